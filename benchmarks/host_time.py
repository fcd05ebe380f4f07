"""What a call costs the host: a DPO loss of a few tokens and a tiny head, where Python takes longer
than arithmetic. On a GPU this is what small batches wait for.

    python benchmarks/host_time.py

One process, one thread, the steps of all variants by turns, medians. Then "without kernels":
fastpref with row kernels, products and pair loss that do nothing; what is left is checks, plan,
allocations and autograd. Writes a JSON to benchmarks/results/.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from lib.results import machine, results_path, table, write_json

import fastpref
from fastpref import validation
from fastpref.backends import native
from fastpref.bench import peers
from fastpref.bench.device import Device
from fastpref.bench.ours import entries
from fastpref.bench.parts import by_turns
from fastpref.bench.peers import TRL
from fastpref.bench.problem import HeadProblem, make_problem
from fastpref.bench.runner import failure

KERNELS = ("fold", "fold_grad", "grad", "linear", "project", "outer", "scale_rows")
OURS = "fastpref exact, stash"


@contextlib.contextmanager
def without_kernels() -> Iterator[None]:
    """The native backend with nothing behind it, and the checks that a GPU is spared left out."""

    def pair_loss(logps, ids, pairs, *_):
        two = logps.new_empty(2 * pairs), logps.new_empty(2 * pairs)
        return logps.new_empty(()), *two, torch.empty_like(logps)

    replaced: list[tuple[Any, str, Any]] = [(native, "pair_loss", pair_loss)]
    replaced += [(native, name, lambda *a, **k: None) for name in KERNELS]
    replaced.append((validation, "may_synchronise", lambda t: False))
    before = [(module, name, getattr(module, name)) for module, name, _ in replaced]
    for module, name, function in replaced:
        setattr(module, name, function)
    try:
        yield
    finally:
        for module, name, function in before:
            setattr(module, name, function)


def parts(p: HeadProblem) -> dict[str, Callable[[], float]]:
    """Seconds of each part of a call without kernels."""
    index = torch.arange(p.labels.numel())

    def loss() -> torch.Tensor:
        given = p.hidden, p.weight, p.labels, p.ref_logps
        return fastpref.linear_dpo_loss(*given, token_indices=index).loss

    def forward() -> float:
        start = time.perf_counter()
        loss()
        return time.perf_counter() - start

    def backward() -> float:
        out = loss()
        start = time.perf_counter()
        out.backward()
        return time.perf_counter() - start

    def reference() -> float:
        with torch.no_grad():
            start = time.perf_counter()
            fastpref.linear_token_logps(p.hidden, p.weight, p.labels, token_indices=index)
            return time.perf_counter() - start

    return {"forward": forward, "backward": backward, "log-probs without gradients": reference}


def medians(
    calls: dict[str, Callable[[], float]], clear: Callable[[], None], args: argparse.Namespace
) -> dict[str, dict[str, Any]]:
    """Median and quartiles of each, in microseconds."""
    told = {name: lambda call=call: (1e6 * call(),) for name, call in calls.items()}
    out = {}
    for name, taken in by_turns(told, args.repeats, args.warm_up, clear).items():
        us = [took for (took,) in taken]
        low, _, high = statistics.quantiles(us, n=4)
        out[name] = {
            "median": round(statistics.median(us), 1),
            "quartiles": [round(low, 1), round(high, 1)],
        }
    return out


def measure(args: argparse.Namespace) -> dict[str, Any]:
    torch.set_num_threads(1)
    p = make_problem(args.tokens, args.hidden, args.vocab, torch.float32)
    calls: dict[str, Callable[[], float]] = {}
    missing = {}
    listed = entries(
        Device(), "trainable", torch.float32, backends=[None], precisions=["exact"], names=[TRL]
    )
    for entry in listed:
        if entry.ours and entry.name != OURS:
            continue
        try:
            step = peers.step(entry.make(), "trainable")
            step(p)
        except ImportError as error:
            missing[entry.name] = failure(error)
            continue

        def call(step=step) -> float:
            start = time.perf_counter()
            step(p)
            return time.perf_counter() - start

        calls[f"step, {entry.name}"] = call
    us = medians(calls, p.clear, args)
    with without_kernels():  # apart: replacing functions makes Python forget what it knew of them
        empty = {f"without kernels, {name}": part for name, part in parts(p).items()}
        us.update(medians(empty, p.clear, args))
    return {"missing": missing, "us": us}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add = parser.add_argument
    add("--tokens", type=int, default=96)
    add("--hidden", type=int, default=8)
    add("--vocab", type=int, default=16)
    add("--repeats", type=int, default=2000)
    add("--warm-up", type=int, default=200)
    add("--output", default="host_time", help="name of the file in results/, or a path")
    args = parser.parse_args(argv)
    options = {k: v for k, v in vars(args).items() if k != "output"}
    results = {"machine": machine(), "options": options, **measure(args)}
    write_json(results_path(args.output), results)
    rows = [
        [name, f"{found['median']:.0f} us", "{:.0f} to {:.0f}".format(*found["quartiles"])]
        for name, found in results["us"].items()
    ]
    print(table(["", "median", "quartiles"], rows))


if __name__ == "__main__":
    main()
