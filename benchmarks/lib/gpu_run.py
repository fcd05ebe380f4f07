"""The GPU mode of head.py: its options, the tasks in order of importance, and the results.

    python benchmarks/head.py --device cuda
    python benchmarks/head.py --device cuda --shapes 'a d a/1024' --modes trainable --budget 120

Prints a table per task, and writes a JSON and a PNG to benchmarks/results/ as it goes.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path
from typing import Any

from . import gpu_peers, gpu_report, runner
from .gpu_peers import MODES
from .shapes import parse_shape
from .supervise import Supervisor

# The most important first: where time is short, the last ones are left out.
SHAPES = "a e c b d a/1024 e/1024 c/1024 b/1024 d/1024"
SMALL = "d/256 a/256"
HEAD = Path(__file__).resolve().parents[1] / "head.py"


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    # pretend: on a CPU, for tests.
    parser.add_argument("--device", default="cuda", choices=["cuda", "pretend"], metavar="cuda")
    parser.add_argument(
        "--shapes",
        default=SHAPES,
        help="the most important first: a letter of benchmarks/README.md, one with another number\n"
        "of tokens, a/1024, or N,H,V or N,H,V,softcap; separated by spaces",
    )
    parser.add_argument("--small", default=SMALL, help="shapes whose calls are timed on the host")
    parser.add_argument("--modes", default=",".join(MODES), help=f"some of {', '.join(MODES)}")
    parser.add_argument("--precision", default="exact,fast", help="exact, fast or both")
    parser.add_argument(
        "--backends", default=None, help="of fastpref's, such as triton,cuda; default: all for GPUs"
    )
    parser.add_argument("--peers", default=None, help="peers to run beside eager; default: all")
    parser.add_argument("--repeats", type=int, default=10, help="calls of each variant")
    parser.add_argument(
        "--seconds", type=float, default=1.5, help="what one variant may spend on its calls"
    )
    parser.add_argument("--budget", type=float, default=400, help="seconds for everything")
    parser.add_argument(
        "--patience", type=float, default=120, help="seconds after which a silent peer is stopped"
    )
    parser.add_argument(
        "--output", default="head_gpu", help="name of the files in results/, or a path"
    )
    args = parser.parse_args(argv)
    for name, known in (("modes", list(MODES)), ("precision", ["exact", "fast"])):
        given = getattr(args, name).split(",")
        if not set(given) <= set(known):
            parser.error(f"--{name}: got {','.join(given)}, expected some of {','.join(known)}")
        setattr(args, name, [k for k in known if k in given])
    known = ["cuda", "triton", "native", "eager"]
    args.backends = None if args.backends is None else args.backends.split(",")
    if args.backends and not set(args.backends) <= set(known):
        parser.error(
            f"--backends: got {','.join(args.backends)}, expected some of {','.join(known)}"
        )
    known = [e.name for e in gpu_peers.PEERS]
    args.peers = None if args.peers is None else [n for n in args.peers.split(",") if n]
    if args.peers and not set(args.peers) <= set(known):
        parser.error(f"--peers: got {','.join(args.peers)}, expected some of {','.join(known)}")
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
    small = [
        {"id": f"overhead of {name}", "kind": "overhead", "shape": name} for name in args.small
    ]
    for name in args.shapes:
        if "/" in name:  # fewer tokens: after what every call costs
            out += small
            small = []
        for mode in args.modes:
            out.append({"id": f"{name} {mode}", "kind": "cell", "shape": name, "mode": mode})
        if "/" not in name:
            out.append({"id": f"row kernels of {name}", "kind": "rows", "shape": name})
            out.append({"id": f"ready logits of {name}", "kind": "logits", "shape": name})
    return out + small


def settings(args: argparse.Namespace) -> dict[str, Any]:
    return {
        "dtype": "bf16",
        "shapes": args.shapes,
        "repeats": args.repeats,
        "seconds_per_variant": args.seconds,
        "budget_s": args.budget,
        "inputs": "random, with a label probability of about a half and the rest spread by Zipf's "
        "law over the vocabulary; sequences of 512 tokens, all of them labelled",
        "time": "between events on the GPU, call by call in an order that changes every round, "
        "with a cold cache; it spins for 2 ms first, in which the host gets ahead as in training. "
        "host_ms is what the call took on the host, which counts where it is the longer one",
        "memory": "peak_beyond is what torch's allocator held at the peak of a warm call beyond "
        "what it held before; extra is that less the gradients it returns",
        "errors": "against float64 on the same inputs; dhidden and dweight are relative",
        "roofline": "time of the bare products with the least FLOPs (6NHV trainable, 4NHV frozen, "
        "2NHV forward-only), measured one after the other in the same rounds on the same data, "
        "over the variant's time",
        "other_function": "computes something else than this loss: in no target",
    }


def main(argv: list[str] | None = None) -> None:
    args = arguments(argv)
    begun = time.perf_counter()
    path = Path(args.output)
    path = path if path.parent != Path(".") else runner.RESULTS / path.name
    results: dict[str, Any] = {
        "benchmark": "head on a GPU: linear DPO loss, forward and backward, and forward alone",
        "machine": {},
        "settings": settings(args),
    }
    request = {
        "tasks": tasks(args),
        "device": args.device,
        "deadline": time.time() + args.budget,
        "least_seconds": min(6.0, args.budget / 20),
        "modes": args.modes,
        "precision": args.precision,
        "backends": args.backends,
        "peers": args.peers,
        "repeats": args.repeats,
        "seconds": args.seconds,
    }

    def write() -> None:
        done = [gpu_report.compared(r) for r in supervisor.results]
        results["wall_s"] = round(time.perf_counter() - begun, 1)
        results["dropped"] = list(supervisor.dropped)
        results["stops"] = list(supervisor.stops)
        results["targets"] = gpu_report.targets(done)
        results["results"] = done
        runner.write_json(path.with_suffix(".json"), results)

    def hear(message: dict[str, Any]) -> None:
        if "machine" in message:
            results["machine"] = message["machine"]
        if "dropped" in message:
            print(f"{message['dropped']}: left out, no time left", flush=True)
        if "result" in message:
            print(gpu_report.report(gpu_report.compared(message["result"])), flush=True)
            write()

    script = os.fspath(HEAD)
    supervisor = Supervisor(script, request, hear=hear, patience=args.patience)
    try:
        supervisor.run()
    finally:  # also when it is interrupted
        write()
        gpu_report.plot(results["results"], path.with_suffix(".png"))
    print(gpu_report.closing(results))
    print(f"{results['wall_s']:.0f} s in all; wrote {path.stem}.json and {path.stem}.png")
    if all("failed" in r for r in supervisor.results):
        raise SystemExit("nothing was measured")
