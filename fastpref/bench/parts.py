"""Parts of a step, measured by themselves.

They are the passes over a tile of logits, the log-probs of ready logits with their gradient, and
the time that a call takes on the host when there is next to nothing to compute.
"""

from __future__ import annotations

import functools
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastpref.bench.device import Device
from fastpref.bench.peers import EAGER, Entry, step
from fastpref.bench.problem import HeadProblem
from fastpref.bench.runner import Rounds, failure

COPY = "copy"
_SMALL_ROUNDS = 40


@dataclass(frozen=True)
class Pass:
    """A kernel over a tile, and the bytes that it has to read and write."""

    about: dict[str, Any]
    bytes: int
    call: Callable[[], object]


# The facts about a pass, and a function that makes the pass or raises if it cannot run here.
Maker = tuple[dict[str, Any], Callable[[], Pass]]


def copy_pass(device: Device, numbers: int) -> Pass:
    """A copy of so many bf16 numbers, which runs at the rate of the memory."""
    source = torch.ones(numbers, dtype=torch.bfloat16, device=device.device)
    target = torch.empty_like(source)
    moved = 2 * source.numel() * source.element_size()
    return Pass({}, moved, lambda: target.copy_(source))


def measure(
    device: Device,
    rounds: Rounds,
    makers: dict[str, Maker],
    excluded: dict[str, str],
    doing: Callable[[str], None],
) -> dict[str, Any]:
    """The rates of the passes, also as fractions of the rate of a copy.

    A pass that is excluded or cannot run is listed with the reason.
    """
    passes: dict[str, Pass] = {}
    cost: dict[str, float] = {}
    missing = []

    def warm(name: str, measured: Pass) -> None:
        passes[name] = measured
        device.time(measured.call)
        cost[name] = device.time(measured.call).device

    for name, (about, make) in makers.items():
        if name in excluded:
            missing.append({**about, "missing": excluded[name]})
            continue
        doing(name)
        try:
            warm(name, make())
        except Exception as error:
            passes.pop(name, None)
            missing.append({**about, "missing": failure(error)})
            device.check(failure(error))
    # It moves as many bytes as the largest pass.
    doing(COPY)
    warm(COPY, copy_pass(device, max((p.bytes for p in passes.values()), default=2**29) // 4))
    calls = {name: p.call for name, p in passes.items()}
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
    return {"copy": copy, "kernels": kernels + missing}


def row_passes(
    problem: HeadProblem, backends: list[str], precisions: list[str]
) -> dict[str, Maker]:
    """The row passes of every backend, over tiles of the size that a step has.

    D is written to separate memory, as where it is stashed.
    """
    makers: dict[str, Maker] = {}
    for backend in backends:
        for precision in precisions:
            # Elsewhere fold_grad is fold followed by grad.
            for kernel in ("fold", "grad", *["fold_grad"] * (backend == "cuda")):
                about = {"backend": backend, "precision": precision, "kernel": kernel}
                name = f"{backend} {precision} {kernel}"
                makers[name] = about, functools.partial(_row_pass, problem, about)
    return makers


def _row_pass(problem: HeadProblem, about: dict[str, Any]) -> Pass:
    from fastpref import backends
    from fastpref.backends.stats import Stats
    from fastpref.backends.tile import Transform
    from fastpref.logps.plan import plan_head, tile_dtype

    x, w = problem.hidden.detach().flatten(0, 1), problem.weight.detach()
    module = backends.choose(x.device, x.dtype, about["backend"])
    vocab, hidden = w.shape
    n = plan_head(
        x.shape[0], hidden, vocab, x.dtype, device=x.device, precision=about["precision"]
    ).block_tokens
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


# Maps logits [N, V] and labels [N] to the negative log-probs [N].
Side = Callable[[Tensor, Tensor], Tensor]
_MOST_BYTES = 2**31  # of the logits; N is as many rows as fit


def _ours(backend: str) -> Side:
    import fastpref

    return lambda x, y: -fastpref.token_logps(x, y, backend=backend, inplace_backward=True)


def _plain(logits: Tensor, labels: Tensor) -> Tensor:
    return torch.nn.functional.cross_entropy(logits.float(), labels, reduction="none")


def _liger() -> Side:
    from liger_kernel.ops.cross_entropy import LigerCrossEntropyFunction

    return lambda x, y: LigerCrossEntropyFunction.apply(x, y, None, -100, 0.0, 0.0, "none")[0]


def _flash_attention() -> Side:
    from flash_attn.ops.triton.cross_entropy import cross_entropy_loss

    return lambda x, y: cross_entropy_loss(x, y, inplace_backward=True)[0]


LOGITS_PEERS: dict[str, Callable[[], Side]] = {
    EAGER: lambda: _plain,
    "torch.compile": lambda: torch.compile(_plain, dynamic=False),
    "Liger cross-entropy": _liger,
    "flash-attention cross-entropy": _flash_attention,
}


def logits_passes(
    device: Device, problem: HeadProblem, backends: list[str], names: list[str] | None
) -> dict[str, Maker]:
    """From ready bf16 logits [N, V] to token log-probs, forward and backward together.

    The sides are fastpref's token_logps and the peers' cross-entropies. The rate counts the least
    bytes that have to move, not those that a side moves: the forward pass reads the logits, the
    backward pass reads them and writes their gradient, 6 bytes a logit.

    names: the peers besides eager; None: all.
    """
    vocab, labels = problem.weight.shape[0], problem.labels.flatten()
    n = max(1, min(labels.shape[0], _MOST_BYTES // (2 * vocab)))
    labels = labels[:n].contiguous()
    source = (2 * torch.randn(n, vocab, device=device.device)).bfloat16()
    dlogp = torch.rand(n, device=device.device)

    def make(about: dict[str, Any], side: Callable[[], Side]) -> Pass:
        return Pass(about, 6 * n * vocab, _call(side(), source, labels, dlogp))

    sides: dict[str, tuple[Callable[[], Side], bool]] = {
        f"fastpref {name}": (functools.partial(_ours, name), False) for name in backends
    }
    peer_names = LOGITS_PEERS if names is None else [EAGER, *names]
    sides |= {name: (side, True) for name, side in LOGITS_PEERS.items() if name in peer_names}
    makers: dict[str, Maker] = {}
    for name, (side, peer) in sides.items():
        about = {"backend": name, "precision": "bf16", "kernel": "token_logps", "peer": peer}
        makers[name] = about, functools.partial(make, about, side)
    return makers


def _call(side: Side, source: Tensor, labels: Tensor, dlogp: Tensor) -> Callable[[], object]:
    """Forward and backward on a copy of the logits, because several sides overwrite the logits.

    The later calls of such a side read the previous gradient as logits, which takes the same time.
    """
    leaf = source.clone().requires_grad_()

    def run() -> None:
        losses = side(leaf, labels)
        torch.autograd.grad(losses, leaf, dlogp.to(losses.dtype))

    return run


def small_call(
    device: Device, entry: Entry, problem: HeadProblem, mode: str
) -> Callable[[], tuple[float, ...]]:
    """A warm call of a small batch on an idle GPU, which returns its seconds.

    They are the host's seconds in the forward pass, those in the backward pass if the mode has one,
    and the seconds until the GPU is done.
    """
    side = entry.make()
    run = step(side, mode)
    for _ in range(3):
        problem.clear()
        run(problem)
    clock = time.perf_counter

    def evaluate() -> tuple[float, ...]:
        device.synchronize()
        a = clock()
        run(problem)
        b = clock()
        device.synchronize()
        return b - a, clock() - a

    def train() -> tuple[float, ...]:
        problem.clear()
        device.synchronize()
        a = clock()
        out = side.loss(problem)
        b = clock()
        out.loss.backward()
        c = clock()
        device.synchronize()
        return b - a, c - b, clock() - a

    return evaluate if mode == "forward-only" else train


def by_turns(
    calls: dict[str, Callable[[], tuple[float, ...]]],
    rounds: int,
    warm_up: int = 0,
    reset: Callable[[], object] = lambda: None,
) -> dict[str, list[tuple[float, ...]]]:
    """The times that each call returned. The calls take turns, in a random order."""
    samples: dict[str, list[tuple[float, ...]]] = {name: [] for name in calls}
    order, names = random.Random(0), list(calls)
    for i in range(rounds + warm_up):
        order.shuffle(names)
        for name in names:
            reset()
            took = calls[name]()
            if i >= warm_up:
                samples[name].append(took)
    return samples


def small_rows(calls: dict[str, Callable[[], tuple[float, ...]]]) -> dict[str, dict[str, float]]:
    """Medians of the times of each `small_call`, in microseconds."""
    out = {}
    for name, times in by_turns(calls, _SMALL_ROUNDS).items():
        *host, wall = (round(1e6 * statistics.median(s), 1) for s in zip(*times, strict=True))
        out[name] = dict(zip(("forward_us", "backward_us"), host, strict=False)) | {"wall_us": wall}
    return out
