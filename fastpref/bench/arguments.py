"""The options of benchmarks/head.py, for machines that have torch and argparse alone.

`fastpref bench` has options of its own and measures with the same `run_tasks`.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from fastpref.bench import device, ours, parts, plots, report, results
from fastpref.bench.cases import PARTS, BenchOptions, Case, split_names
from fastpref.bench.peers import MODES
from fastpref.bench.problem import DTYPES, parse_shape
from fastpref.bench.run import BenchResult, cell_of, run_tasks

_ABOUT = """The head: DPO loss, forward and backward, from hidden states to gradients, against the
peers.

    python benchmarks/head.py
    python benchmarks/head.py --shapes 1024,1024,32768 --modes frozen --precision fast --repeats 9
    python benchmarks/head.py --device cuda --shapes 'a d a/1024' --modes trainable --budget 120
    python benchmarks/head.py --device cuda --shapes c --parts logits --backends cuda

Prints a table per task. Writes a JSON and a PNG to benchmarks/results/ after each task. Times come
from interleaved calls in one process, which is ended if it hangs. On a CPU a second process
measures the memory: its malloc returns freed blocks to the system at once.
"""
# The most important shapes first: where time is short, the last ones are left out.
DEFAULTS: dict[str, dict[str, Any]] = {
    "cpu": {
        "shapes": "1024,1024,32768 2048,576,49152 1024,896,151936",
        "modes": "trainable,frozen",
        "parts": "head",
        "repeats": 7,
        "seconds": 4.0,
        "patience": 3600.0,
        "output": "head",
    },
    "cuda": {
        "shapes": "a e c b d a/1024 e/1024 c/1024 b/1024 d/1024",
        "modes": ",".join(MODES),
        "parts": "head,rows,logits,overhead",
        "repeats": 10,
        "seconds": 1.5,
        "patience": 120.0,
        "budget": 400.0,
        "output": "head_gpu",
    },
}


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=_ABOUT, formatter_class=argparse.RawTextHelpFormatter
    )
    add = parser.add_argument

    def default(name: str) -> str:
        return f"default: {DEFAULTS['cpu'][name]}\non a GPU: {DEFAULTS['cuda'][name]}"

    # pretend: a GPU's work on a CPU, for tests.
    kinds = ["cpu", "cuda", "pretend"]
    add("--device", choices=kinds, metavar="{cpu,cuda}", help="default: cuda where there is one")
    add(
        "--shapes",
        help="the most important first, separated by spaces: a letter of benchmarks/README.md,\n"
        f"one with other tokens, a/1024, or N,H,V or N,H,V,softcap\n{default('shapes')}",
    )
    add("--modes", help=f"some of {', '.join(MODES)}\n{default('modes')}")
    about = "".join(f"\n{name}: {text}" for name, text in PARTS.items())
    add("--parts", help=f"what to measure{about}\n{default('parts')}")
    add("--small", default="d/256 a/256", help="shapes of the part overhead")
    add("--precision", default="exact,fast", help="exact, fast or both")
    add("--dtype", default="bf16", help="bf16, fp32 or both; ready logits are bf16")
    add(
        "--backends",
        help="fastpref's backends, such as triton,cuda; default: all for GPUs, or on a\nCPU "
        "the one that fastpref picks",
    )
    add("--peers", help="peers to run beside eager, '' for none; default: all")
    add(
        "--only",
        help="of the part head: only the sides whose name contains one of these texts,\n"
        "separated by semicolons, such as 'exact, stash;TRL'",
    )
    add("--repeats", type=int, help=f"calls of each variant\n{default('repeats')}")
    add(
        "--seconds",
        type=float,
        help="seconds that one variant may spend on its calls\n" + default("seconds"),
    )
    add(
        "--keep-memory",
        action="store_true",
        help="on a CPU: keep freed memory from call to call, as in a trainer's steps; otherwise\n"
        "each call has the page faults of new memory",
    )
    add("--budget", type=float, help="seconds for everything; on a GPU 400 by default")
    add(
        "--patience",
        type=float,
        help="seconds after which a silent peer is stopped\n" + default("patience"),
    )
    add("--output", help=f"name of the files in results/, or a path\n{default('output')}")
    add("--no-plot", action="store_true", help="write the JSON alone")
    args = parser.parse_args(argv)
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    for name, value in DEFAULTS["cpu" if args.device == "cpu" else "cuda"].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    device_class = device.PretendGpu if args.device != "cpu" else device.Device
    allowed = {
        "modes": list(MODES),
        "parts": list(PARTS),
        "precision": ["exact", "fast"],
        "dtype": list(DTYPES),
        "backends": ["cuda", "triton", "native", "eager"],
        "peers": [*ours.known(device_class()), *parts.LOGITS_PEERS],
    }
    for name, names in allowed.items():
        if (text := getattr(args, name)) is not None:
            chosen = split_names(text, names if name in ("precision", "dtype") else ())
            if not set(chosen) <= set(names):
                parser.error(f"--{name}: got {text}, expected some of {','.join(names)}")
            ordered = [n for n in names if n in chosen]
            setattr(args, name, chosen if name in ("backends", "peers") else ordered)
    args.only = [text for text in (args.only or "").split(";") if text]
    for name in ("shapes", "small"):
        setattr(args, name, getattr(args, name).split())
        for text in getattr(args, name):
            try:
                parse_shape(text)
            except ValueError:
                parser.error(f"--{name}: got {text}, expected a letter, a/1024 or N,H,V")
    return args


def options_of(args: argparse.Namespace) -> BenchOptions:
    names = ["device", "modes", "parts", "small", "precision", "backends", "peers", "only"]
    names += ["repeats", "seconds", "keep_memory", "budget", "patience"]
    return BenchOptions(
        [Case(shape, tuple(args.dtype)) for shape in args.shapes],
        **{name: getattr(args, name) for name in names},
    )


def main(argv: list[str] | None = None, folder: Path | None = None) -> None:
    """Measure, print and write.

    Args:
        folder: where the files go if --output names no folder.
    """
    args = arguments(argv)
    path = Path(args.output)
    if path.parent == Path(".") and folder is not None:
        path = folder / path.name
    path = path.with_suffix(".json")
    measured = BenchResult()

    def keep(result: BenchResult) -> None:
        nonlocal measured
        measured = result
        results.write_json(path, result.as_dict())

    def hear(message: dict[str, Any]) -> None:
        if "dropped" in message:
            print(f"{message['dropped']}: left out, no time left", flush=True)
        if "result" in message and (printed := _complete(message["result"], measured)) is not None:
            print(report.report(printed), flush=True)

    try:
        run_tasks(options_of(args), hear=hear, changed=keep, loud=True)
    finally:  # also when it is interrupted
        if not args.no_plot:
            plots.plot(measured.cells, path.with_suffix(".png"))
    plotted = "" if args.no_plot else " and .png"
    last = f"{measured.wall_s:.0f} s in all; wrote {path.stem}.json{plotted}"
    print(f"{report.closing(measured)}\n{last}")
    if all("failed" in r for r in measured.results):
        raise SystemExit("nothing was measured")


def _complete(result: dict[str, Any], measured: BenchResult) -> dict[str, Any] | None:
    """The result to print; None for a cell on a CPU, whose memory a later task measures."""
    if result["kind"] == "memory":
        return cell_of(result, measured.cells)
    waits = result["kind"] == "cell" and "failed" not in result
    return None if waits and measured.settings["device"] == "cpu" else result
