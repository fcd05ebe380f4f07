"""The head: DPO loss, forward and backward, from hidden states to gradients, against the peers.

    python benchmarks/head.py
    python benchmarks/head.py --shapes 1024,1024,32768 --modes frozen --precision fast --repeats 9
    python benchmarks/head.py --device cuda --shapes 'a d a/1024' --modes trainable --budget 120
    python benchmarks/head.py --device cuda --shapes c --parts logits --backends cuda

Prints a table per task, and writes a JSON and a PNG to benchmarks/results/ as it goes. Times come
from interleaved calls in one process, which is watched. On a CPU a second one measures the memory,
in which freed blocks go back to the system at once.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import torch
from lib import device, ours, parts, report, results, runner, worker
from lib.peers import MODES
from lib.problem import DTYPES, parse_shape
from lib.targets import compared, targets

PARTS = {
    "head": "the loss of a head",
    "rows": "passes over a tile of logits",
    "logits": "ready logits to log-probs and back",
    "overhead": "what a small call costs the host",
}
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
        "parts": ",".join(PARTS),
        "repeats": 10,
        "seconds": 1.5,
        "patience": 120.0,
        "budget": 400.0,
        "output": "head_gpu",
    },
}


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
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
        help="of fastpref's, such as triton,cuda; default: all for GPUs, or on a\nCPU "
        "the one that fastpref picks",
    )
    add("--peers", help="peers to run beside eager, '' for none; default: all")
    add(
        "--only",
        help="heads: only what has one of these in its name, such as 'exact, stash;TRL',\n"
        "separated by semicolons",
    )
    add("--repeats", type=int, help=f"calls of each variant\n{default('repeats')}")
    add(
        "--seconds",
        type=float,
        help="what one variant may spend on its calls\n" + default("seconds"),
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
    there = device.PretendGpu if args.device != "cpu" else device.Device
    known = {
        "modes": list(MODES),
        "parts": list(PARTS),
        "precision": ["exact", "fast"],
        "dtype": list(DTYPES),
        "backends": ["cuda", "triton", "native", "eager"],
        "peers": [*ours.known(there()), *parts.LOGITS_PEERS],
    }
    for name, names in known.items():
        if (text := getattr(args, name)) is not None:
            given = [part for part in text.split(",") if part]
            if not set(given) <= set(names):
                parser.error(f"--{name}: got {text}, expected some of {','.join(names)}")
            ordered = [n for n in names if n in given]
            setattr(args, name, given if name in ("backends", "peers") else ordered)
    args.only = [part for part in (args.only or "").split(";") if part]
    for name in ("shapes", "small"):
        setattr(args, name, getattr(args, name).split())
        for text in getattr(args, name):
            try:
                parse_shape(text)
            except ValueError:
                parser.error(f"--{name}: got {text}, expected a letter, a/1024 or N,H,V")
    return args


def tasks(args: argparse.Namespace) -> list[dict[str, Any]]:
    """What there is to do, the most important first; the modes of a shape share its inputs."""
    out: list[dict[str, Any]] = []

    def add(what: str, kind: str, shape: str, dtype: str = "bf16", **more: Any) -> None:
        other = "" if args.dtype == ["bf16"] or kind not in ("cell", "memory") else f" {dtype}"
        out.append({"id": what + other, "kind": kind, "shape": shape, "dtype": dtype, **more})

    def small() -> None:
        if "overhead" in args.parts and not any(task["kind"] == "overhead" for task in out):
            for shape in args.small:
                add(f"overhead of {shape}", "overhead", shape)

    for name in args.shapes:
        if "/" in name:  # fewer tokens: after what every call costs
            small()
        for dtype in args.dtype if "head" in args.parts else []:
            for mode in args.modes:
                add(f"{name} {mode}", "cell", name, dtype, mode=mode)
            for mode in args.modes if args.device == "cpu" else []:
                more = {"mode": mode, "env": device.TIGHT_MALLOC}
                add(f"memory of {name} {mode}", "memory", name, dtype, **more)
        if "/" not in name or set(args.parts) <= {"rows", "logits"}:
            if "rows" in args.parts:
                add(f"row kernels of {name}", "rows", name)
            if "logits" in args.parts:
                add(f"ready logits of {name}", "logits", name)
    small()
    return out


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """benchmarks/README.md says more."""
    cpu = args.device == "cpu"
    return {
        "dtype": ",".join(args.dtype),
        "shapes": args.shapes,
        "repeats": args.repeats,
        "seconds_per_variant": args.seconds,
        "budget_s": args.budget,
        "inputs": "random, label probability about a half, sequences of 512 labelled tokens"
        + ("" if cpu else "; the rest is spread by Zipf's law over the vocabulary"),
        "slow_variants": "one whose calls would take longer than seconds_per_variant gets fewer "
        "repeats, at least 3; on a CPU one whose single call does is timed in its first call only",
        "time": "wall time"
        if cpu
        else "between events on the GPU, with a cold cache, after a spin of 2 ms in which the host "
        "gets ahead; host_ms is the call's time on the host, which counts where it is longer",
        "memory": "peak_beyond is what "
        + ("was resident" if cpu else "torch's allocator held")
        + " at the peak of one warm call beyond what was before it; extra is that less the bytes "
        "of the gradients it returns, also where they did not exist yet at the peak, as in eager",
        "errors": "against float64 on the same inputs; dhidden and dweight are relative",
        "roofline": "the least FLOPs (6NHV trainable, 4NHV frozen, 2NHV forward-only) "
        + (
            "at the rate of the processor's own multiply-adds on operands in its first cache"
            if cpu
            else "in bare products"
        )
        + ", in the same rounds, over the variant's time",
        "other_function": "computes something else than this loss: in no target",
    }


class Record:
    """What has been measured so far, in the form of the file."""

    def __init__(self, args: argparse.Namespace):
        self._cpu, self._begun = args.device == "cpu", time.perf_counter()
        self._path = results.results_path(args.output)
        self._plotted = "" if args.no_plot else " and .png"
        on = "" if self._cpu else " on a GPU"
        modes = ", and forward alone" if "forward-only" in args.modes else ""
        self.file: dict[str, Any] = {
            "benchmark": f"head{on}: linear DPO loss, forward and backward{modes}",
            "machine": {},
            "settings": settings(args),
        }

    def add_memory(self, found: dict[str, Any], done: list[dict[str, Any]]) -> Any:
        """Put a memory task's figures into the rows of the cell that it is about, and give that."""
        about = [(r["kind"], r["shape"], r["dtype"], r.get("mode")) for r in done]
        wanted = "cell", found["shape"], found["dtype"], found["mode"]
        cell = done[about.index(wanted)] if wanted in about else {}
        why = {"failed": found.get("failed", "not measured")}
        for row in cell.get("variants", ()):
            row["memory"] = found.get("memory", {}).get(row["variant"], why)
        return cell if "variants" in cell else None

    def write(self, supervisor: runner.Supervisor) -> None:
        done = [_compared(r) for r in supervisor.results if r["kind"] != "memory"]
        self.file["wall_s"] = round(time.perf_counter() - self._begun, 1)
        self.file["dropped"] = list(supervisor.dropped)
        self.file["stops"] = list(supervisor.stops)
        self.file["targets"] = [t for r in done for t in r["targets"]]
        cells = [r for r in done if r["kind"] == "cell" and "failed" not in r]
        if self._cpu:
            self.file["cells"] = [_by_name(cell) for cell in cells]
            done = [r for r in done if r not in cells]
        self.file["results"] = done
        results.write_json(self._path, self.file)
        self.cells = cells

    def plot(self) -> None:
        report.plot(self.cells, self._path.with_suffix(".png"))

    def closing(self) -> str:
        last = f"{self.file['wall_s']:.0f} s in all; wrote {self._path.stem}.json{self._plotted}"
        return f"{report.closing(self.file)}\n{last}"


def _compared(result: dict[str, Any]) -> dict[str, Any]:
    result = compared(result)
    result["targets"] = targets(result)
    return result


def _by_name(cell: dict[str, Any]) -> dict[str, Any]:
    """A cell of a CPU as it stands in the file: sizes by letter, rates in GFLOP/s."""
    rates = {k: g | {"gflop_per_s": 1e3 * g["tflop_per_s"]} for k, g in cell["products"].items()}
    shape = {k.upper(): cell["size"][k] for k in "nhv"}
    return {k: v for k, v in cell.items() if k not in ("products", "excluded")} | {
        "shape": shape,
        "head_products": rates,
    }


def main(argv: list[str] | None = None) -> None:
    if "--worker" in (sys.argv[1:] if argv is None else argv):
        runner.serve(worker.answer)
        return
    args = arguments(argv)
    record = Record(args)
    budget = 1e9 if args.budget is None else args.budget
    names = ("device", "modes", "precision", "backends", "peers", "only", "repeats", "seconds")
    request = {name: getattr(args, name) for name in names} | {
        "tasks": tasks(args),
        "deadline": time.time() + budget,
        "least_seconds": min(6.0, budget / 20),
    }

    def hear(message: dict[str, Any]) -> None:
        if "machine" in message:
            record.file["machine"] = message["machine"]
        if "dropped" in message:
            print(f"{message['dropped']}: left out, no time left", flush=True)
        if "result" in message:
            result = message["result"]
            told = result
            if result["kind"] == "memory":  # the last of a cell
                told = record.add_memory(result, supervisor.results)
            elif args.device == "cpu" and result["kind"] == "cell" and "failed" not in result:
                told = None
            record.write(supervisor)
            if told is not None:
                print(report.report(told), flush=True)

    script = str(Path(__file__).resolve())
    supervisor = runner.Supervisor(script, request, hear=hear, patience=args.patience)
    try:
        supervisor.run()
    finally:  # also when it is interrupted
        record.write(supervisor)
        if not args.no_plot:
            record.plot()
    print(record.closing())
    if all("failed" in r for r in supervisor.results):
        raise SystemExit("nothing was measured")


if __name__ == "__main__":
    main()
