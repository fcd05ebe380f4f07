"""From a public call to a kernel: the functions on the stack are those of docs/algorithm.md."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import machine
import pytest
import torch

import fastpref
from fastpref import backends

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = Path(fastpref.__file__).resolve().parent
NAME = r"`((?:fastpref|kernels)/[\w/]+\.py:\w+)`"


def documented():
    """The shared steps, and for each kernel the two that follow."""
    text = (ROOT / "docs" / "algorithm.md").read_text("utf-8")
    section = text.split("## From the call to the kernel")[1].split("\n## ")[0]
    shared = re.findall(rf"^\d\. {NAME}", section, re.MULTILINE)
    rows = re.findall(rf"^\| `([\w.]+)` \| {NAME} \| {NAME} \|", section, re.MULTILINE)
    return shared, {kernel: list(last) for kernel, *last in rows}


SHARED, LAST = documented()


def stack():
    """file:function of fastpref on the stack, from the outermost one."""
    from fastpref import kernels

    folders = {PACKAGE: "fastpref", Path(kernels.__file__).resolve().parent: "kernels"}
    found, frame = [], sys._getframe(1)
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        for folder, name in folders.items():
            if folder in path.parents:
                file = (Path(name) / path.relative_to(folder)).as_posix()
                found.append(f"{file}:{frame.f_code.co_name}")
        frame = frame.f_back
    return found[::-1]


class Recorder:
    """A module, or a kernel of Triton, that notes the stack of the calls of one function."""

    def __init__(self, real, name, seen):
        self._real, self._name, self._seen = real, name, seen

    def __getattr__(self, name):
        value = getattr(self._real, name)
        return self._noting(value) if name == self._name else value

    def __getitem__(self, grid):
        return self._noting(self._real[grid])

    def _noting(self, function):
        def call(*args, **kwargs):
            self._seen.append(stack())
            return function(*args, **kwargs)

        return call


def record(monkeypatch, kernel, seen):
    backend, name = kernel.split(".")
    if backend == "_cpu":
        monkeypatch.setattr(backends.native, "_cpu", Recorder(backends.native._cpu, name, seen))
    elif backend == "_cuda":
        from fastpref.backends import cuda_module

        monkeypatch.setattr(cuda_module, "MODULE", Recorder(cuda_module.MODULE, name, seen))
    else:
        from fastpref.kernels import forward, rows

        module = rows if name == "fold" else forward
        monkeypatch.setattr(module, name, Recorder(getattr(module, name), name, seen))


@pytest.mark.parametrize("public", ["linear_dpo_loss", "linear_token_logps"])
@pytest.mark.parametrize("kernel", LAST)
def test_the_call_path_is_the_documented_one(monkeypatch, kernel, public):
    backend = {"_cpu": "native", "_cuda": "cuda", "triton": "triton"}[kernel.split(".")[0]]
    reason = machine.why_not(backend, [torch.bfloat16])
    if reason is not None:
        pytest.skip(reason)
    device = machine.device_of(backend)
    hidden = torch.randn(2, 3, 16, device=device).bfloat16()
    hidden.requires_grad_(kernel != "_cpu.product")  # u is another product
    weight = torch.randn(20, 16, device=device).bfloat16()
    labels = torch.randint(20, (2, 3), device=device)
    inputs = (hidden, weight, labels)
    if public == "linear_dpo_loss":
        inputs = (*inputs, torch.zeros(2, device=device))
    seen = []
    record(monkeypatch, kernel, seen)
    logit_free = kernel in ("_cpu.logit_free_forward", "_cuda.forward", "triton.combine")
    getattr(fastpref, public)(*inputs, backend=backend, fused=logit_free)
    expected = [*SHARED, *LAST[kernel]]
    if public == "linear_token_logps":
        expected[:2] = ["fastpref/logps/linear.py:linear_token_logps"]
    assert seen and seen == [expected] * len(seen)
    assert len(expected) <= 7


def test_every_device_has_a_path():
    assert len(SHARED) == 5 and {k.split(".")[0] for k in LAST} == {"_cpu", "_cuda", "triton"}
