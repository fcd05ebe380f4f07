"""`run_tasks`: runs the tasks of a benchmark in supervised workers, and collects the results.

options -> tasks (cases.py) -> `Supervisor` with a worker (runner.py, worker.py)
     -> each result with its speeds (targets.py) -> `BenchResult`, in the form of the JSON file
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from fastpref.bench import runner
from fastpref.bench.cases import BenchOptions, tasks
from fastpref.bench.targets import compared, targets, usable

_WORKER = [sys.executable, "-m", "fastpref.bench.worker"]
# Keeps a module in the user's directory, such as random.py, from replacing one of the library.
_ENV = {"PYTHONSAFEPATH": "1"}
Hear = Callable[[dict[str, Any]], None]


@dataclass
class BenchResult:
    """The results of a run.

    Attributes:
        machine: processor or GPU, versions, threads and commit.
        settings: how it was measured.
        results: the results of all tasks, including those that failed, in the order of their ends.
        dropped: names of tasks for which no time was left.
        stops: sentences on sides that ended their process.
        missing_peers: why a peer was not measured at all, by the peer's name.
        wall_s: seconds of the run.
    """

    machine: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    results: list[dict[str, Any]] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)
    stops: list[str] = field(default_factory=list)
    missing_peers: dict[str, str] = field(default_factory=dict)
    wall_s: float = 0.0

    @property
    def cells(self) -> list[dict[str, Any]]:
        """The result of each case and mode: its sides with time, error, memory and speed."""
        return self._of_kind("cell")

    @property
    def rates(self) -> list[dict[str, Any]]:
        """The rates of a GEMM and of a copy, for each dtype."""
        return self._of_kind("roofline")

    def _of_kind(self, kind: str) -> list[dict[str, Any]]:
        return [r for r in self.results if r["kind"] == kind and "failed" not in r]

    def wrong(self) -> list[tuple[str, str, str]]:
        """The case, the side and the fault of every wrong result of fastpref."""
        return [
            (cell["id"], row["variant"], row.get("wrong_because", "wrong"))
            for cell in self.cells
            for row in cell["variants"]
            if row["ours"] and row.get("wrong")
        ]

    def measured(self) -> bool:
        """Whether any side of any case has a time, and a result that is not wrong."""
        return any(usable(row) for cell in self.cells for row in cell["variants"])

    def why_nothing(self) -> str | None:
        """Why nothing was `measured`; None if something was."""
        if self.measured():
            return None
        reasons = [r["failed"] for r in self.results if "failed" in r] + self.stops
        for cell in self.cells:
            for row in cell["variants"]:
                reason = row.get("wrong_because") or row.get("missing")
                reasons += [f"{row['variant']}: {reason}"] if reason else []
        return "; ".join(dict.fromkeys(reasons)) or "no time was left"

    def as_dict(self) -> dict[str, Any]:
        """The attributes as JSON values, in the format of the files in benchmarks/results."""
        on, also = "" if self.settings["device"] == "cpu" else " on a GPU", ""
        if "forward-only" in self.settings["modes"]:
            also = ", and forward alone"
        out: dict[str, Any] = {
            "benchmark": f"head{on}: linear DPO loss, forward and backward{also}",
            "machine": self.machine,
            "settings": self.settings,
            "wall_s": self.wall_s,
            "dropped": self.dropped,
            "stops": self.stops,
            "missing_peers": self.missing_peers,
            "targets": [target for r in self.results for target in r["targets"]],
        }
        if on:
            return out | {"results": self.results}
        cells = self.cells
        others = [r for r in self.results if not any(r is cell for cell in cells)]
        return out | {"cells": [_by_letters(cell) for cell in cells], "results": others}


def _by_letters(cell: dict[str, Any]) -> dict[str, Any]:
    """A cell in the format of a file: sizes by capital letter, rates in GFLOP/s."""
    rates = {k: g | {"gflop_per_s": 1e3 * g["tflop_per_s"]} for k, g in cell["products"].items()}
    shape = {k.upper(): cell["size"][k] for k in "nhv"}
    return {k: v for k, v in cell.items() if k not in ("products", "excluded")} | {
        "shape": shape,
        "head_products": rates,
    }


def run_tasks(
    options: BenchOptions,
    *,
    hear: Hear | None = None,
    doing: Hear | None = None,
    changed: Callable[[BenchResult], None] | None = None,
    loud: bool = False,
) -> BenchResult:
    """Run all tasks of the options.

    Args:
        hear: gets each message of a worker: `machine`, `result`, `dropped`.
        doing: gets `{"doing": task, "entry": side}` for each side that begins.
        changed: gets the results so far, after each task and at the end.
        loud: whether the stderr of workers is passed on.
    """
    begun = time.perf_counter()
    budget = 1e9 if options.budget is None else options.budget
    request = options.request() | {
        "tasks": tasks(options),
        "deadline": time.time() + budget,
        "least_seconds": min(6.0, budget / 20),
    }
    result = BenchResult(settings=describe(options), missing_peers=options.missing_peers)

    def update() -> None:
        measured = [r for r in supervisor.results if r["kind"] != "memory"]
        result.results = [_with_speeds(r) for r in measured]
        result.wall_s = round(time.perf_counter() - begun, 1)
        result.dropped, result.stops = list(supervisor.dropped), list(supervisor.stops)
        if changed is not None:
            changed(result)

    def listen(message: dict[str, Any]) -> None:
        if "machine" in message:
            result.machine = message["machine"]
        if "result" in message:
            if message["result"]["kind"] == "memory":
                _add_memory(message["result"], supervisor.results)
            update()
        if hear is not None:
            hear(message)

    supervisor = runner.Supervisor(
        _WORKER,
        request,
        hear=listen,
        doing=doing or (lambda message: None),
        patience=options.patience,
        env=_ENV,
        loud=loud,
    )
    try:
        supervisor.run()
    finally:  # also when it is interrupted
        update()
    return result


def cell_of(memory: dict[str, Any], cells: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The cell to which the figures of a memory task belong; None if it was not measured."""
    keys = ("shape", "dtype", "mode", "threads")
    for cell in cells:
        matches = all(cell.get(key) == memory.get(key) for key in keys)
        if cell["kind"] == "cell" and "variants" in cell and matches:
            return cell
    return None


def _add_memory(result: dict[str, Any], cells: list[dict[str, Any]]) -> None:
    """Put a memory task's figures into the rows of its cell."""
    failed = {"failed": result.get("failed", "not measured")}
    for row in (cell_of(result, cells) or {}).get("variants", ()):
        row["memory"] = result.get("memory", {}).get(row["variant"], failed)


def _with_speeds(result: dict[str, Any]) -> dict[str, Any]:
    result = compared(result)
    result["targets"] = targets(result)
    return result


def describe(options: BenchOptions) -> dict[str, Any]:
    """The settings of a results file: how the figures are measured. See benchmarks/README.md."""
    cpu = options.device == "cpu"
    return {
        "device": options.device,
        "modes": options.modes,
        "dtype": ",".join(dict.fromkeys(d for case in options.cases for d in case.dtypes)),
        "shapes": list(dict.fromkeys(case.shape for case in options.cases)),
        "repeats": options.repeats,
        "seconds_per_variant": options.seconds,
        "freed_memory": "kept from call to call" if options.keep_memory else "returned",
        "budget_s": options.budget,
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
