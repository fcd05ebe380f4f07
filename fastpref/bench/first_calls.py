"""The first calls of a side: they warm it up, and their results are checked against float64."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastpref.bench.device import Device
from fastpref.bench.peers import Entry, Output, Side, step
from fastpref.bench.problem import HeadProblem, Truth, errors, logp_errors
from fastpref.bench.verdict import fault


def warm_up(
    device: Device,
    entry: Entry,
    row: dict[str, Any],
    problem: HeadProblem,
    truth: Truth,
    mode: str,
) -> tuple[Callable[[], object], float]:
    """Run a side until it is warm. Returns the call, and the seconds of its last run.

    The row gets the errors. On a GPU it also gets the memory, and whether two runs give the same
    bits.
    """
    begun = time.perf_counter()
    side = entry.make()
    run = step(side, mode)
    outputs: list[Any] = []

    def call() -> None:
        outputs[:] = [run(problem)]

    seconds = device.wall(call).device
    row["first_call_s"] = round(time.perf_counter() - begun, 3)
    if entry.compiled:
        seconds = device.wall(call, problem.clear).device
    out = outputs.pop()
    measured, loss = _errors(entry, side, problem, truth, mode, out)
    row["errors"], row["wrong"] = measured, False
    if measured is not None:
        dtype = "bf16" if problem.weight.dtype == torch.bfloat16 else "fp32"
        tolerance = dict(entry.options).get("gradient_tolerance")
        tokens = problem.labels.shape[1]
        reason = fault(measured, dtype, tokens=tokens, loss=loss, tolerance=tolerance)
        row["wrong"] = reason is not None
        if reason is not None:
            row["wrong_because"] = reason
    if device.like_gpu:
        first_results = _results(problem, out)
        problem.clear()
        row["memory"] = peak_memory(device, call, problem, mode)
        second_results = _results(problem, outputs.pop())
        row["same_bits_twice"] = all(map(torch.equal, first_results, second_results))
    return lambda: run(problem), seconds


def peak_memory(
    device: Device, call: Callable[[], object], problem: HeadProblem, mode: str
) -> dict[str, int]:
    """`Device.peak` of a call, and as "extra" its bytes less those of the gradients it returns."""
    memory = device.peak(call)
    returned = 0 if mode == "forward-only" else problem.gradient_bytes()
    return memory | {"extra": memory["peak_beyond"] - returned}


def _errors(
    entry: Entry, side: Side, problem: HeadProblem, truth: Truth, mode: str, out: Any
) -> tuple[dict[str, float | None] | None, float | None]:
    """The errors, and the true loss of a call that has one."""
    if entry.other:
        return None, None
    if mode == "forward-only":
        return logp_errors(problem, truth, out, out.double().sum(1)), None
    assert isinstance(out, Output)
    tokens = out.token_logps
    if tokens is None and side.logps is not None:
        tokens = side.logps(problem).detach()
    sums = torch.cat(out.sums) if isinstance(out.sums, tuple) else out.sums
    assert sums is not None
    loss = float(out.loss.detach())
    measured = errors(problem, truth, loss, tokens, sums, entry.with_reference)
    return measured, truth.loss[entry.with_reference]


def _results(problem: HeadProblem, out: Any) -> list[Tensor]:
    """The tensors that every run must give bit for bit: the loss and gradients, or log-probs."""
    if isinstance(out, Tensor):
        return [out]
    results = out.loss.detach(), problem.hidden.grad, problem.weight.grad
    return [t for t in results if t is not None]
