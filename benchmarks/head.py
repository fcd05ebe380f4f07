"""The head: DPO loss, forward and backward, from hidden states to gradients, against the peers.

    python benchmarks/head.py
    python benchmarks/head.py --shapes 1024,1024,32768 --modes frozen --precision fast --repeats 9

On a machine with a GPU, or with --device cuda, lib/gpu_run.py measures that instead; this one is
for CPUs.

Prints a table, and writes a JSON and a PNG to benchmarks/results/. Times come from one process and
interleaved calls; memory from a second one, in which freed blocks go back to the system at once.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from lib import peers, runner
from lib import report as head_report
from lib.peers import Variant
from lib.problem import HeadProblem, Truth, errors, float64_truth, make_problem

SHAPES = "1024,1024,32768 2048,576,49152 1024,896,151936"
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
# A result further off than this is wrong, not imprecise, and gets no speed-up. Eager is at 3e-3.
WRONG = {"bf16": 0.05, "fp32": 1e-3}


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "--device",
        default="cpu",
        choices=["cpu"],
        metavar="{cpu,cuda}",
        help="default: cuda where there is one; --device cuda --help lists its options",
    )
    parser.add_argument("--shapes", default=SHAPES, help="N,H,V triples, separated by spaces")
    parser.add_argument("--modes", default="trainable,frozen", help="trainable, frozen or both")
    parser.add_argument("--precision", default="exact,fast", help="exact, fast or both")
    parser.add_argument("--dtype", default="bf16", help="bf16, fp32 or both")
    parser.add_argument("--peers", default=None, help="peers to run beside eager; default: all")
    parser.add_argument("--repeats", type=int, default=7, help="calls of each variant")
    parser.add_argument(
        "--seconds", type=float, default=4.0, help="what one variant may spend on its calls"
    )
    parser.add_argument("--output", default="head", help="name of the files in results/, or a path")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    args.shapes = [tuple(int(i) for i in s.split(",")) for s in args.shapes.split()]
    for name, known in (
        ("modes", ["trainable", "frozen"]),
        ("precision", ["exact", "fast"]),
        ("dtype", list(DTYPES)),
    ):
        given = getattr(args, name).split(",")
        if not set(given) <= set(known):
            parser.error(f"--{name}: got {','.join(given)}, expected some of {','.join(known)}")
        setattr(args, name, [k for k in known if k in given])
    if any(len(s) != 3 for s in args.shapes):
        parser.error("--shapes: expected triples N,H,V separated by spaces")
    known = [v.name for v in peers.PEERS]
    args.peers = None if args.peers is None else args.peers.split(",")
    if args.peers and not set(args.peers) <= set(known):
        parser.error(f"--peers: got {','.join(args.peers)}, expected some of {','.join(known)}")
    return args


def gpu_mode(argv: list[str] | None) -> bool:
    """Whether lib/gpu_run.py takes over: with --device cuda, or where there is a GPU."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--device")
    parser.add_argument("--worker", action="store_true")
    known, _ = parser.parse_known_args(argv)
    if known.worker or known.device == "cpu":
        return False
    return known.device is not None or torch.cuda.is_available()


def quiet() -> None:
    """Peers warn about GPUs that are not there; that is not what this measures."""
    warnings.filterwarnings("ignore")


# ---- memory, in a process of its own -----------------------------------------------------------


def memory_worker(request: dict[str, Any]) -> dict[str, Any]:
    dtype = DTYPES[request["dtype"]]
    problem = make_problem(*request["shape"], dtype)
    problem.set_trainable(request["mode"] == "trainable")
    small = make_problem(64, request["shape"][1], 1024, dtype)
    small.set_trainable(problem.trainable)
    answer: dict[str, Any] = {}
    for variant in _variants(request):
        try:
            step = variant.make()
            step(problem if variant.compiled else small)
            usage = runner.peak_beyond(lambda step=step: step(problem), problem.clear)
        except Exception as error:
            answer[variant.name] = {"failed": runner.one_line(error)}
            continue
        usage["extra"] = usage["peak_beyond"] - problem.gradient_bytes()
        answer[variant.name] = usage
    return answer


def _variants(request: dict[str, Any]) -> list[Variant]:
    return peers.variants(
        request["mode"] == "trainable",
        DTYPES[request["dtype"]],
        request["precision"],
        request["peers"],
    )


# ---- time and errors ---------------------------------------------------------------------------


def warm_up(
    variant: Variant, problem: HeadProblem, truth: Truth
) -> tuple[Any, list[float], dict[str, float | None]]:
    """The step, seconds of its calls so far, and the errors of the last of them."""
    step, seconds, outputs = variant.make(), [], []

    def call() -> None:
        outputs[:] = [step(problem)]

    for _ in range(2 if variant.compiled else 1):
        seconds.append(runner.timed(call, problem.clear))
    out = outputs.pop()
    tokens = out.token_logps if variant.logps is None else variant.logps(problem)
    wrong = errors(problem, truth, float(out.loss), tokens, out.sums, variant.with_reference)
    return step, seconds, wrong


def measure(
    problem: HeadProblem, truth: Truth, request: dict[str, Any], args: argparse.Namespace
) -> dict[str, Any]:
    """One shape, dtype and mode."""
    shape, trainable = request["shape"], request["mode"] == "trainable"
    problem.set_trainable(trainable)
    torch._dynamo.reset()  # otherwise a second shape compiles for shapes of any size
    steps: dict[str, Any] = {}
    rows: dict[str, dict[str, Any]] = {}
    cost: dict[str, float] = {}
    once: dict[str, runner.Timing] = {}
    for variant in _variants(request):
        row = rows[variant.name] = {
            "variant": variant.name,
            "ours": variant.ours,
            "strategy": variant.strategy,
            "precision": variant.precision,
            "note": variant.note,
        }
        _say(f"  {variant.name}: warming up")
        try:
            step, seconds, row["errors"] = warm_up(variant, problem, truth)
        except Exception as error:
            row["missing"] = runner.one_line(error)
            continue
        row["first_call_s"] = round(seconds[0], 3)
        gradients = (row["errors"]["dhidden"], row["errors"]["dweight"] or 0.0)
        row["wrong"] = not max(gradients) < WRONG[request["dtype"]]
        if seconds[-1] > args.seconds:  # so slow that this call has to do
            once[variant.name] = runner.Timing(seconds[-1:], limited=True)
        else:
            steps[variant.name], cost[variant.name] = step, seconds[-1]
    calls = {name: (lambda step=step: step(problem)) for name, step in steps.items()}
    dtype = DTYPES[request["dtype"]]
    products = runner.head_products(*shape, dtype)
    if not trainable:
        del products["D^T X"]
    extra = {**products, "canary": runner.canary(dtype)}
    for name, call in extra.items():
        call()
        cost[name] = runner.timed(call)
    _say(f"  {args.repeats} rounds")
    timings = runner.interleave(
        calls | extra, cost, repeats=args.repeats, seconds=args.seconds, reset=problem.clear
    )
    problem.clear()
    del products, extra
    roofline = sum(timings[name].median for name in timings if name in ("X W^T", "D W", "D^T X"))
    timings |= once
    for name in [*steps, *once]:
        rows[name]["time"] = timings[name].to_json()
        rows[name]["roofline_fraction"] = round(roofline / timings[name].median, 4)
    product_flops = 2 * shape[0] * shape[1] * shape[2]
    gemm = {
        name: {
            **timings[name].to_json(),
            "gflop_per_s": round(product_flops / timings[name].median / 1e9, 1),
        }
        for name in ("X W^T", "D W", "D^T X")
        if name in timings
    }
    return {
        "shape": dict(zip("NHV", shape, strict=True)),
        "sequences": problem.labels.shape[0],
        "dtype": request["dtype"],
        "mode": request["mode"],
        "median_label_probability": round(truth.median_probability, 4),
        "head_products": gemm,
        "roofline_ms": round(1e3 * roofline, 3),
        "canary": timings["canary"].to_json(),
        "variants": list(rows.values()),
    }


def add_memory(cell: dict[str, Any], memory: dict[str, Any]) -> None:
    """Put memory and the ratios to eager into a cell's rows, and its targets beside them."""
    rows = {row["variant"]: row for row in cell["variants"]}
    for name, row in rows.items():
        row["memory"] = memory.get(name, {"failed": memory.get("failed", "not measured")})
    eager = rows[peers.EAGER]
    for row in rows.values():
        if "time" in row and "time" in eager:
            row["speed_over_eager"] = None if row["wrong"] else _ratio(eager, row)
        if "extra" in row["memory"] and "extra" in eager["memory"]:
            ratio = row["memory"]["extra"] / eager["memory"]["extra"]
            row["memory_over_eager"] = round(ratio, 4)
    cell["targets"] = targets(cell, rows)


def _ratio(slow: dict[str, Any], fast: dict[str, Any]) -> float:
    return round(slow["time"]["median_ms"] / fast["time"]["median_ms"], 3)


def targets(cell: dict[str, Any], rows: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """The aims of this cell, measured: fastpref's fastest strategy in each precision."""
    trainable, narrow = cell["mode"] == "trainable", cell["dtype"] == "bf16"
    ours = [r for r in rows.values() if r["ours"]]
    out = []

    def best(precision: str, peer: str) -> float | None:
        usable = [r for r in ours if r["precision"] == precision and "time" in r and not r["wrong"]]
        if "time" not in rows.get(peer, {}) or not usable:
            return None
        return max(_ratio(rows[peer], r) for r in usable)

    if narrow and any(r["precision"] == "fast" for r in ours):
        wanted = {peers.EAGER: 1.8 if trainable else 2.2, peers.TRL: 9.0, peers.LIGER: 2.0}
        for peer, times in wanted.items():
            out.append(runner.target(f"fast: speed over {peer}", times, best("fast", peer)))
    if not narrow:
        out.append(runner.target("fp32: speed over eager", 1.2, best("exact", peers.EAGER)))
    for row in ours:
        part = 1 / 6 if row["strategy"] == "stash" else 1 / 16
        what = f"{row['variant']}: extra memory over eager's"
        out.append(runner.target(what, part, row.get("memory_over_eager"), most=True))
    for row in ours:
        if row["precision"] == "exact" and narrow and "errors" in row:
            what = f"{row['variant']}: error of a 512-token sum, nat"
            out.append(runner.target(what, 1e-3, row["errors"]["sum_max"], most=True))
    return out


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main(argv: list[str] | None = None) -> None:
    if gpu_mode(argv):
        from lib import gpu_run as head_gpu_run

        head_gpu_run.main(argv)
        return
    args = arguments(argv)
    quiet()
    if args.worker:
        request = json.load(sys.stdin)
        if "tasks" in request:
            from lib import gpu_worker

            gpu_worker.main(request)
        else:
            print(json.dumps(memory_worker(request)))
        return
    begun = time.perf_counter()
    cells = []
    for shape in args.shapes:
        for dtype in args.dtype:
            _say(f"{dtype} {shape}: inputs and float64 truth")
            problem = make_problem(*shape, DTYPES[dtype])
            truth = float64_truth(problem)
            for mode in args.modes:
                request = {"shape": shape, "dtype": dtype, "mode": mode}
                request |= {"precision": args.precision, "peers": args.peers}
                cell = measure(problem, truth, request, args)
                _say("  memory")
                try:
                    memory = runner.run_worker(
                        os.fspath(Path(__file__)), request, runner.TIGHT_MALLOC
                    )
                except RuntimeError as error:
                    memory = {"failed": str(error)}
                add_memory(cell, memory)
                cells.append(cell)
                print(head_report.report(cell), flush=True)
            del problem, truth
    results = {
        "benchmark": "head: linear DPO loss, forward and backward",
        "machine": runner.machine(),
        "settings": {
            "repeats": args.repeats,
            "seconds_per_variant": args.seconds,
            "slow_variants": "one whose calls would take longer than seconds_per_variant gets "
            "fewer repeats, at least 3; one whose single call does is timed in its first call only",
            "memory": "peak_beyond is the peak resident memory of one warm call beyond what was "
            "resident before it; extra is that less the bytes of the gradients it returns, also "
            "where these did not exist yet at the peak, as in eager, which flatters eager",
            "errors": "against float64 on the same inputs; dhidden and dweight are relative",
            "roofline": "time of the bare products with the least FLOPs (6NHV trainable, 4NHV "
            "frozen), measured in the same rounds, over the variant's time",
        },
        "wall_s": round(time.perf_counter() - begun, 1),
        "cells": cells,
    }
    path = Path(args.output)
    path = path if path.parent != Path(".") else runner.RESULTS / path.name
    runner.write_json(path.with_suffix(".json"), results)
    head_report.plot(cells, path.with_suffix(".png"))
    print(f"\n{results['wall_s']:.0f} s in all; wrote {path.stem}.json and {path.stem}.png")


if __name__ == "__main__":
    main()
