"""Which backend a call gets, and doing without the native module."""

from __future__ import annotations

import subprocess
import sys

import machine
import pytest
import torch

import fastpref
from fastpref import backends
from fastpref.backends import native


def test_forcing_a_backend(backend, monkeypatch):
    hidden, weight, labels = torch.randn(3, 4), torch.randn(5, 4), torch.tensor([0, 4, 2])
    seen = []

    def spy(module, real):
        def call(*args, **options):
            seen.append(module.NAME)
            real(*args, **options)

        return call

    for module in backends._MODULES.values():
        for name in ("fold_grad", "logit_free_forward"):
            monkeypatch.setattr(module, name, spy(module, getattr(module, name)))
    fastpref.linear_token_logps(hidden, weight, labels, backend=backend)
    monkeypatch.setenv("FASTPREF_BACKEND", backend)
    fastpref.linear_token_logps(hidden, weight, labels)
    assert backends.active(hidden.device) == backend
    monkeypatch.setenv("FASTPREF_BACKEND", "eager")
    fastpref.linear_token_logps(hidden, weight, labels, backend=backend)
    assert seen == [backend] * 3  # the argument wins
    monkeypatch.setenv("FASTPREF_BACKEND", "fast")
    with pytest.raises(ValueError, match="^FASTPREF_BACKEND: got 'fast', expected .*native"):
        fastpref.linear_token_logps(hidden, weight, labels)


@pytest.mark.parametrize("value", ["auto", ""])
def test_the_fastest_backend_that_works_is_chosen(monkeypatch, value):
    monkeypatch.setenv("FASTPREF_BACKEND", value)
    fastest = {"cpu": "native", "cuda": "triton"} if machine.HAS_GPU else {"cpu": "native"}
    for device, name in fastest.items():
        works = machine.why_not(name) is None
        assert backends.active(device) == (name if works else "eager")
        assert backends.active(device, torch.float64) == "eager"


def test_a_forced_backend_that_cannot_run_says_why(monkeypatch):
    wide = torch.randn(3, 4, dtype=torch.float64)
    labels = torch.zeros(3).long()
    with pytest.raises(RuntimeError, match="backend='native' cannot run here: "):
        fastpref.linear_token_logps(wide, wide, labels, backend="native")
    monkeypatch.setenv("FASTPREF_BACKEND", "native")
    with pytest.raises(RuntimeError, match="FASTPREF_BACKEND='native' cannot run here: "):
        fastpref.token_logps(wide, labels)
    with pytest.raises(RuntimeError, match="not built" if native.problem() else "meta"):
        backends.choose(torch.device("meta"), torch.float32)


def test_report():
    statuses = {s.name: s for s in backends.report()}
    assert list(statuses) == list(backends.NAMES)
    assert statuses["eager"].works and statuses["native"].works == (native.problem() is None)
    assert all(s.reason and s.devices for s in statuses.values())


MISSING = """
import sys, warnings
warnings.simplefilter("error")
sys.modules["fastpref._cpu"] = None  # what an import finds where it was not built
import torch, fastpref
from fastpref import backends
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    assert backends.active() == backends.active() == "eager"
assert len(said) == 1 and "plain torch" in str(said[0].message), said
x = torch.randn(4, 3, 8, requires_grad=True)
loss = fastpref.linear_dpo_loss(x, torch.randn(9, 8), torch.ones(4, 3).long(), torch.zeros(4)).loss
loss.backward()
try:
    backends.choose(torch.device("cpu"), torch.float32, "native")
except RuntimeError as error:
    assert "_cpu is not built" in str(error), error
else:
    raise AssertionError("native was forced and is missing")
assert not {"transformers", "triton", "datasets", "accelerate", "peft"} & set(sys.modules)
status = {s.name: s for s in backends.report()}["native"]
assert not status.works and "_cpu is not built" in status.reason and "compiler" in status.reason
print("ok")
"""


def test_without_the_module_eager_works_and_says_so():
    run = subprocess.run([sys.executable, "-c", MISSING], capture_output=True, text=True)
    assert run.stdout.strip() == "ok", run.stderr
