"""`run_bench`: a benchmark from Python. Its options are checked before anything is measured."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from fastpref.backends import NAMES, choose
from fastpref.backends.host_memory import free_memory
from fastpref.bench import device as devices
from fastpref.bench.cases import BenchOptions, Case, check_names, make_cases, scaled
from fastpref.bench.ours import STRATEGIES, entries
from fastpref.bench.peers import EAGER, MODES, PEERS, Entry
from fastpref.bench.problem import DTYPES, parse_shape
from fastpref.bench.run import BenchResult, Hear, run_tasks
from fastpref.logps.plan import check_tolerance

# Small enough for a laptop with two cores; on a GPU the heads of SmolLM2 135M and Llama 3 8B.
DEFAULT_SHAPES = {"cpu": ("512,512,32000",), "cuda": ("d", "a")}
DEFAULT_BUDGET = 120.0
_PATIENCE = 120.0


def run_bench(
    shapes: Sequence[str] | None = None,
    *,
    hear: Hear | None = None,
    doing: Hear | None = None,
    changed: Callable[[BenchResult], None] | None = None,
    **options: Any,
) -> BenchResult:
    """Measure the DPO loss of a head, forward and backward: time, memory, and error.

    fastpref's variants, eager torch and other libraries compute it in turn on the same random data,
    in a separate process. The error is against float64.

    Args:
        shapes: each "N,H,V" or "N,H,V,softcap", or the name or the folder of a model, whose
            config gives H, V and the dtype. N is the number of labelled tokens, an even number. By
            default one small head, and on a GPU those of two models.
        hear: gets each message of the workers, such as `{"result": ...}`.
        doing: gets `{"doing": task, "entry": side}` whenever a side begins.
        changed: gets the `BenchResult` so far, after each task.
        options: those of `bench_options`.

    Raises:
        ValueError: an unknown name, tokens that cannot be divided into pairs of sequences, or a
            head that does not fit into memory.
        RuntimeError: nothing could be measured.
    """
    chosen = bench_options(shapes, **options)
    result = run_tasks(chosen, hear=hear, doing=doing, changed=changed)
    if (why := result.why_nothing()) is not None:
        raise RuntimeError(f"nothing was measured: {why}")
    return result


def bench_options(
    shapes: Sequence[str] | None = None,
    *,
    tokens: int | None = None,
    modes: Sequence[str] | None = None,
    dtypes: Sequence[str] | None = None,
    precision: Sequence[str] = ("exact", "fast"),
    backends: Sequence[str] | None = None,
    strategies: Sequence[str] | None = None,
    gradient_tolerance: float | None = None,
    peers: Sequence[str] | None = None,
    scale: str | None = None,
    device: str | None = None,
    repeats: int = 5,
    seconds: float = 1.5,
    budget: float | None = DEFAULT_BUDGET,
    memory: bool = True,
    trust_remote_code: bool = False,
) -> BenchOptions:
    """The options of a run, checked.

    Args:
        tokens: N of every head; by default 1024 for models, and a shape's own N.
        modes: "trainable", "frozen", "forward-only"; by default the first two, or with `scale` the
            first one.
        dtypes: "bf16", "fp32"; by default a model's own dtype, and for shapes the one that the
            device is fast at.
        precision: fastpref's option, "exact" and "fast".
        backends: fastpref's backends; by default the one that it picks, and on a GPU all.
        strategies: of a trainable head, "stash" and "recompute"; by default both.
        gradient_tolerance: an error of approximate gradients, which are measured as well.
        peers: names of other libraries or their beginnings, such as "trl"; None: all that are
            installed.
        scale: "tokens", "vocab" or "threads": measures each head at several values of it.
        device: "cpu" or "cuda"; by default a GPU where there is one.
        repeats: calls of each side.
        seconds: seconds that one side may spend on its calls.
        budget: seconds of the whole run. Tasks beyond them are left out and named. None: no limit.
        memory: whether the memory is measured on a CPU, in a second process.

    Raises:
        ValueError: as `run_bench`.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device != "pretend":  # a GPU of the tests
        check_names("device", [device], ["cpu", "cuda"])
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device: got 'cuda', but torch finds no GPU")
    for name, value in {"repeats": repeats, "seconds": seconds, "budget": budget}.items():
        if value is not None and not value > 0:
            raise ValueError(f"{name}: got {value}, expected a number above 0")
    check_tolerance("gradient_tolerance", gradient_tolerance)
    kind = "cpu" if device == "cpu" else "cuda"
    cases = make_cases(
        shapes or DEFAULT_SHAPES[kind],
        tokens=tokens,
        dtypes=None if dtypes is None else check_names("dtypes", dtypes, list(DTYPES)),
        device=device,
        trust_remote_code=trust_remote_code,
    )
    if scale is not None:
        cases = scaled(cases, scale, torch.get_num_threads())
    for case in cases:
        _check_memory(case.shape, device)
    fastpref_backends = None if backends is None else check_names("backends", backends, list(NAMES))
    if fastpref_backends is not None:
        _check_backends(fastpref_backends, cases, device)
    chosen = ["trainable"] if scale else ["trainable", "frozen"]
    names, missing = select_peers(peers, kind)
    return BenchOptions(
        cases,
        device=device,
        modes=check_names("modes", modes or chosen, list(MODES)),
        parts=["roofline", "head"],
        precision=check_names("precision", precision, ["exact", "fast"]),
        backends=fastpref_backends,
        strategies=None
        if strategies is None
        else check_names("strategies", strategies, list(STRATEGIES)),
        gradient_tolerance=gradient_tolerance,
        peers=names,
        repeats=repeats,
        seconds=seconds,
        budget=budget,
        patience=_patience(cases, device),
        memory=memory and Path("/proc/self/clear_refs").exists(),
        memory_last=True,
        missing_peers=missing,
    )


def select_peers(names: Sequence[str] | None, kind: str) -> tuple[list[str], dict[str, str]]:
    """The names of the peers to measure besides eager, and why other peers are not measured.

    Args:
        names: names of peers or their beginnings; None: the peers that are measured by default.
        kind: the kind of device, "cpu" or "cuda".

    Raises:
        ValueError: a name that no peer has.
    """
    device = devices.PretendGpu() if kind == "cuda" else devices.Device()
    peers = [e for e in PEERS if e.runs_on(device) and e.name != EAGER]
    selected: list[Entry] = [e for e in peers if e.by_default]
    if names is not None:
        selected = []
        for name in names:
            exact = [e for e in peers if e.name.lower() == name.lower()]
            matches = exact or [e for e in peers if e.name.lower().startswith(name.lower())]
            if not matches:
                allowed = ", ".join(e.name for e in peers)
                raise ValueError(f"peers: got {name!r}, expected none, all, or some of {allowed}")
            selected += [e for e in matches if e not in selected]
    missing = {e.name: f"{e.package} is not installed" for e in selected if not e.installed()}
    return [e.name for e in selected if e.name not in missing], missing


def side_names(options: BenchOptions) -> list[str]:
    """The names of the sides that are measured, over all cases and modes."""
    device = devices.Device() if options.device == "cpu" else devices.PretendGpu()
    by_default = [None] if options.device == "cpu" else ["cuda", "triton"]
    sides = [
        entry.name
        for case in options.cases
        for dtype in case.dtypes
        for mode in options.modes
        for entry in entries(
            device,
            mode,
            DTYPES[dtype],
            backends=options.backends or by_default,
            precisions=options.precision,
            names=options.peers,
            strategies=options.strategies,
            tolerance=options.gradient_tolerance,
        )
    ]
    return list(dict.fromkeys(sides))


def _check_backends(names: Sequence[str], cases: Sequence[Case], device: str) -> None:
    """Raise ValueError if none of the backends can run any of the cases."""
    kind = torch.device("cuda" if device == "cuda" else "cpu")
    reasons: dict[str, str] = {}
    for name in names:
        for dtype in dict.fromkeys(dtype for case in cases for dtype in case.dtypes):
            try:
                choose(kind, DTYPES[dtype], name)
            except RuntimeError as error:
                reasons[name] = str(error)
            else:
                return
    raise ValueError(f"backends: none of them can run here: {'; '.join(reasons.values())}")


def _patience(cases: Sequence[Case], device: str) -> float:
    """Seconds of silence after which a worker is taken to hang.

    A call on a CPU sends no message until it ends. Every side reaches more than the 5 GFLOP/s per
    thread that are assumed here.
    """
    if device != "cpu":
        return _PATIENCE
    sizes = [(parse_shape(case.shape), case.threads or torch.get_num_threads()) for case in cases]
    slowest = max(8 * s.n * s.h * s.v / (5e9 * threads) for s, threads in sizes)
    return max(_PATIENCE, slowest)


def _check_memory(text: str, device: str) -> None:
    """Raise ValueError if a head's inputs, float64 truth and eager logits exceed free memory."""
    shape = parse_shape(text)
    weights, logits = shape.h * shape.v, shape.n * shape.v
    free: int | None
    if device == "cuda":
        free = torch.cuda.mem_get_info()[0]
    else:
        free = free_memory()
    needed = 12 * weights + 12 * logits
    if free is not None and needed > free:
        raise ValueError(
            f"shape: got {text}, which takes about {needed / 1e9:,.1f} GB with eager logits; "
            f"{free / 1e9:,.1f} GB are free"
        )
