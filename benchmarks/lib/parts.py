"""Two parts of a step on their own: the passes over a tile of logits, and what a call costs the
host when there is next to nothing to compute."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from .device import Gpu, PretendGpu, Rounds, failure
from .gpu_peers import Entry, step
from .problem import HeadProblem

COPY = "copy"
_SMALL_ROUNDS = 40


@dataclass(frozen=True)
class Pass:
    """A kernel over a tile: the bytes that it reads and writes, each once."""

    about: dict[str, Any]
    bytes: int
    call: Callable[[], object]


def row_passes(
    gpu: Gpu | PretendGpu,
    problem: HeadProblem,
    backends: list[str],
    precisions: list[str],
    excluded: dict[str, str],
) -> tuple[dict[str, Pass], list[dict[str, Any]]]:
    """fold and grad, and both in one where there is that, of every backend over tiles as large as a
    step has them, and a copy; and those that cannot run, with the reason. D gets memory of its own,
    as where all of it is kept."""
    from fastpref import backends as modules

    passes: dict[str, Pass] = {}
    missing = []
    for backend in backends:
        for precision in precisions:
            for kernel in ("fold", "grad", "fold_grad"):
                if not hasattr(modules._MODULES[backend], kernel):
                    continue
                name = f"{backend} {precision} {kernel}"
                about = {"backend": backend, "precision": precision, "kernel": kernel}
                if name in excluded:
                    missing.append({**about, "missing": excluded[name]})
                    continue
                try:
                    passes[name] = _row_pass(problem, about)
                except Exception as error:
                    missing.append({**about, "missing": failure(error)})
                    gpu.check(failure(error))
    # As large as a tile, or what a copy of twice the cache is.
    columns = max(p.bytes for p in passes.values()) // 4 if passes else 2**27
    passes[COPY] = copy_pass(gpu, columns)
    return passes, missing


def copy_pass(gpu: Gpu | PretendGpu, numbers: int) -> Pass:
    """A copy of so many bf16 numbers, which is what the memory can do."""
    source = torch.ones(numbers, dtype=torch.bfloat16, device=gpu.device)
    target = torch.empty_like(source)
    moved = 2 * source.numel() * source.element_size()
    return Pass({}, moved, lambda: target.copy_(source))


def _row_pass(problem: HeadProblem, about: dict[str, Any]) -> Pass:
    from fastpref import backends
    from fastpref.backends.tile import Stats, Transform
    from fastpref.logps.plan import plan_head, tile_dtype

    x, w = problem.hidden.detach().flatten(0, 1), problem.weight.detach()
    options = {"device": x.device, "precision": about["precision"]}
    module = backends.choose(x.device, x.dtype, about["backend"])
    n = plan_head(x.shape[0], *reversed(w.shape), x.dtype, **options).block_tokens
    labels = problem.labels.flatten()[:n].contiguous()
    transform = Transform(softcap=problem.softcap)

    def rows(dtype: torch.dtype) -> torch.Tensor:
        step = 16 // dtype.itemsize  # rows start at multiples of 16 bytes
        width = -(-w.shape[0] // step) * step
        return torch.empty(n, width, dtype=dtype, device=x.device)[:, : w.shape[0]]

    tile = rows(tile_dtype(x.dtype, about["precision"]))
    module.linear(x[:n], w, tile)
    stats = Stats.empty(n, x.device, torch.float32)
    module.fold(tile, labels, 0, stats, transform)
    read = tile.numel() * tile.element_size()
    if about["kernel"] == "fold":
        return Pass(about, read, lambda: module.fold(tile, labels, 0, stats, transform))
    d = rows(x.dtype)
    lse, logps = stats.lse, stats.logps
    calls = {
        "grad": lambda: module.grad(tile, labels, 0, lse, logps, d, transform),
        "fold_grad": lambda: module.fold_grad(tile, labels, stats, transform, d),
    }
    call = calls[about["kernel"]]
    call()
    return Pass(about, read + d.numel() * d.element_size(), call)


def time_passes(
    gpu: Gpu | PretendGpu,
    rounds: Rounds,
    passes: dict[str, Pass],
    doing: Callable[[str], None],
) -> dict[str, Any]:
    """Rates, and fractions of the rate of the copy."""
    calls = {name: p.call for name, p in passes.items()}
    cost = {}
    for name, call in calls.items():
        doing(name)
        gpu.time(call)
        cost[name] = gpu.time(call).device
    rounds.run(calls, cost, doing=doing)
    rates = {
        name: passes[name].bytes / timing.median / 1e9
        for name, timing in rounds.device.items()
        if name not in rounds.failed
    }
    kernels = []
    for name, p in passes.items():
        if name == COPY:
            continue
        if name in rounds.failed:
            kernels.append({**p.about, "missing": rounds.failed[name]})
            continue
        row = {**p.about, "bytes": p.bytes, "time": rounds.device[name].to_json()}
        row["gb_per_s"] = round(rates[name], 1)
        if COPY in rates:
            row["of_copy"] = round(rates[name] / rates[COPY], 4)
        kernels.append(row)
    copy = {"bytes": passes[COPY].bytes, "gb_per_s": round(rates.get(COPY, 0.0), 1)}
    return {"copy": copy, "kernels": kernels}


# ---- what a call costs the host ----------------------------------------------------------------


def small_call(
    gpu: Gpu | PretendGpu, entry: Entry, problem: HeadProblem, mode: str
) -> Callable[[], tuple[float, ...]]:
    """A warm call of a small batch on an idle GPU. Seconds of the host in the forward pass and, but
    for a pass without gradients, in the backward pass; and until the GPU is done as well."""
    side = entry.make()
    run = step(side, mode)
    for _ in range(3):
        problem.clear()
        run(problem)
    clock = time.perf_counter

    def evaluate() -> tuple[float, ...]:
        gpu.synchronize()
        a = clock()
        run(problem)
        b = clock()
        gpu.synchronize()
        return b - a, clock() - a

    def train() -> tuple[float, ...]:
        problem.clear()
        gpu.synchronize()
        a = clock()
        out = side.loss(problem)
        b = clock()
        out.loss.backward()
        c = clock()
        gpu.synchronize()
        return b - a, c - b, clock() - a

    return evaluate if mode == "forward-only" else train


def small_rows(calls: dict[str, Callable[[], tuple[float, ...]]]) -> dict[str, dict[str, float]]:
    """Medians in microseconds of interleaved calls."""
    samples: dict[str, list[tuple[float, ...]]] = {name: [] for name in calls}
    for _ in range(_SMALL_ROUNDS):
        for name, call in calls.items():
            samples[name].append(call())
    out = {}
    for name, taken in samples.items():
        *host, wall = (round(1e6 * statistics.median(s), 1) for s in zip(*taken, strict=True))
        out[name] = dict(zip(("forward_us", "backward_us"), host, strict=False)) | {"wall_us": wall}
    return out
