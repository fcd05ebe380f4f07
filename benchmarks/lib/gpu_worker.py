"""The GPU mode of head.py: what it measures, task by task, in a process of its own.

gpu_run.py starts head.py as its worker, hands it the tasks and writes the results: a peer
that takes its process down, or hangs, costs its own figure and no other.
"""

from __future__ import annotations

import json
import os
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from . import gpu_peers, logits, parts, runner
from .device import Gpu, Lost, PretendGpu, Rounds, failure, open_device
from .gpu_peers import PRODUCTS, Entry, Output, Side, step
from .problem import HeadProblem, Truth, errors, float64_truth, logp_errors, zipf_problem
from .shapes import DTYPE, Products, Shape, parse_shape

# Gradients further off than this are wrong, not imprecise; so are log-probs, in nats.
WRONG_GRADIENT, WRONG_LOGP = 0.05, 0.2
# What each task still to come is left, before a peer may be warmed up that is known to be slow.
_RESERVE_S = 3.0
_ALWAYS = (gpu_peers.EAGER, gpu_peers.TRL)  # what the ratios are to
ROOFLINE = "products"


class Worker:
    """Measures one task after another. say: tells the supervisor, who stops a worker that is silent
    for long."""

    def __init__(
        self,
        gpu: Gpu | PretendGpu,
        request: dict[str, Any],
        say: Callable[[dict[str, Any]], None],
    ):
        import fastpref.backends

        self._gpu, self._request, self._say = gpu, request, say
        wanted = request.get("backends") or gpu.backends
        self._backends = [b for b in wanted if b in fastpref.backends.NAMES]
        self._warm: dict[str, float] = {}  # seconds that the warm-up of a side took at most
        self._shape: Shape | None = None
        self._after = 0  # tasks still to come

    def machine(self) -> dict[str, Any]:
        import fastpref.backends

        active = fastpref.backends.active(self._gpu.device, DTYPE)
        return runner.machine() | self._gpu.describe() | {"backend": active}

    def left(self) -> float:
        return self._request["deadline"] - time.time()

    def run(self) -> None:
        tasks = self._request["tasks"]
        for i, task in enumerate(tasks):
            self._after = len(tasks) - i - 1
            if self.left() < self._request["least_seconds"]:
                self._say({"dropped": task["id"]})
                continue
            self._say({"doing": task["id"]})
            kinds = {
                "cell": self._cell,
                "rows": self._rows,
                "logits": self._logits,
                "overhead": self._overhead,
            }
            kind = kinds[task["kind"]]
            begun = time.perf_counter()
            try:
                result = kind(parse_shape(task["shape"]), task)
            except Lost:
                raise
            except Exception as error:  # most likely too little memory for the inputs themselves
                result = {"failed": failure(error)}
                self._gpu.check(result["failed"])
            seconds = round(time.perf_counter() - begun, 1)
            self._say({"result": {**task, **result, "seconds": seconds}})

    def _teller(self, task: dict[str, Any]) -> Callable[[str], None]:
        return lambda name: self._say({"doing": task["id"], "entry": name})

    def _prepare(self, shape: Shape) -> tuple[HeadProblem, Truth, Products | None]:
        if shape != self._shape:
            self._shape = self._kept = None
            self._gpu.free()
            size = shape.n, shape.h, shape.v, DTYPE, self._gpu.device, shape.softcap
            problem = zipf_problem(*size)
            truth = float64_truth(problem)
            self._gpu.free()
            try:
                products = Products(problem)
            except torch.OutOfMemoryError:
                products = None
            self._shape, self._kept = shape, (problem, truth, products)
        assert self._kept is not None
        return self._kept

    # ---- one shape in one mode -----------------------------------------------------------------

    def _cell(self, shape: Shape, task: dict[str, Any]) -> dict[str, Any]:
        mode = task["mode"]
        problem, truth, products = self._prepare(shape)
        problem.set_trainable(mode == "trainable")
        self._gpu.free()
        rows: dict[str, dict[str, Any]] = {}
        calls: dict[str, Callable[[], object]] = {}
        cost: dict[str, float] = {}
        for entry, row in self._entries(shape, mode, task):
            rows[entry.name] = row
            if "missing" in row:
                continue
            self._say({"doing": task["id"], "entry": entry.name})
            begun = time.perf_counter()
            try:
                call = self._warm_up(entry, row, problem, truth, mode)
                cost[entry.name] = self._gpu.time(call, problem.clear).device
                calls[entry.name] = call
            except Exception as error:
                row["missing"] = failure(error)
                self._gpu.check(row["missing"])
            finally:
                problem.clear()
            took = time.perf_counter() - begun
            self._warm[entry.name] = max(took, self._warm.get(entry.name, 0.0))
        bare = self._bare(products, mode)
        for name, (_, call) in bare.items():
            self._gpu.time(call)
            cost[name] = self._gpu.time(call).device
            calls[name] = call
        rounds = Rounds(self._gpu, self._request["repeats"], self._request["seconds"])
        rounds.run(calls, cost, problem.clear, self._teller(task))
        problem.clear()
        roofline = rounds.device.get(ROOFLINE) if ROOFLINE not in rounds.failed else None
        for name, row in rows.items():
            if name in rounds.failed:
                row["missing"] = rounds.failed[name]
            elif name in rounds.device:
                row["time"] = rounds.device[name].to_json()
                row["host_ms"] = round(1e3 * rounds.host[name].median, 3)
                if roofline is not None:
                    fraction = roofline.median / rounds.device[name].median
                    row["roofline_fraction"] = round(fraction, 4)
        result = {
            "size": asdict(shape),
            "median_label_probability": round(truth.median_probability, 4),
            "products": {},
            "roofline_ms": None if roofline is None else round(1e3 * roofline.median, 4),
            "plan_fuses": self._fuses(shape),
            "variants": list(rows.values()),
        }
        for name, (n, _) in bare.items():
            if name != ROOFLINE and name not in rounds.failed:
                timing = rounds.device[name]
                rate = 2 * n * shape.h * shape.v / timing.median / 1e12
                more = {"rows": n, "tflop_per_s": round(rate, 1)}
                result["products"][name] = timing.to_json() | more
        return result

    def _entries(self, shape: Shape, mode: str, task: dict[str, Any]):
        """Each side with its row, which says where it is missing and why."""
        excluded = task.get("excluded", {})
        listed = gpu_peers.entries(
            mode, self._backends, self._request["precision"], self._request["peers"]
        )
        for entry in listed:
            row: dict[str, Any] = {
                "variant": entry.name,
                "ours": entry.ours,
                "backend": entry.backend,
                "precision": entry.precision,
                "products": entry.products,
                "other_function": entry.other,
                "note": entry.note,
            }
            slow = self._warm.get(entry.name, 0.0)
            if entry.name in excluded:
                row["missing"] = excluded[entry.name]
            elif shape.softcap is not None and not entry.softcap:
                row["missing"] = "it has no softcap"
            elif entry.name not in _ALWAYS and not entry.ours and self._short(slow):
                row["missing"] = "left out: no time left"
                row["dropped"] = True
            elif entry.ours:
                row["plan"] = self._plan(shape, mode, entry)
            yield entry, row

    def _short(self, seconds: float) -> bool:
        """Whether so many would be missing for the tasks to come."""
        return self.left() - seconds < _RESERVE_S * self._after

    def _plan(self, shape: Shape, mode: str, entry: Entry) -> dict[str, Any]:
        from fastpref.logps.plan import plan_head

        plan = plan_head(
            shape.n,
            shape.h,
            shape.v,
            DTYPE,
            device=self._gpu.device,
            hidden_grad=mode != "forward-only",
            weight_grad=mode == "trainable",
            **dict(entry.options),
        )
        return asdict(plan)

    def _fuses(self, shape: Shape) -> bool:
        """Whether a pass without gradients runs in one kernel if it is left to the plan."""
        return self._plan(shape, "forward-only", Entry("", Side))["fused"]

    def _warm_up(
        self, entry: Entry, row: dict[str, Any], problem: HeadProblem, truth: Truth, mode: str
    ) -> Callable[[], object]:
        """The call, warm; its errors, its memory and whether it gives the same bits twice."""
        begun = time.perf_counter()
        side = entry.make()
        run = step(side, mode)
        out = run(problem)
        self._gpu.synchronize()
        row["first_call_s"] = round(time.perf_counter() - begun, 3)
        if entry.compiled:
            problem.clear()
            out = run(problem)
        row["errors"], row["wrong"] = self._errors(entry, side, problem, truth, mode, out)
        before = _results(problem, out)
        problem.clear()
        again: list[Any] = []
        row["memory"] = self._gpu.peak(lambda: again.append(run(problem)))
        gradients = 0 if mode == "forward-only" else problem.gradient_bytes()
        row["memory"]["extra"] = row["memory"]["peak_beyond"] - gradients
        after = _results(problem, again.pop())
        row["same_bits_twice"] = all(map(torch.equal, before, after))
        return lambda: run(problem)

    def _errors(
        self, entry: Entry, side: Side, problem: HeadProblem, truth: Truth, mode: str, out: Any
    ) -> tuple[dict[str, float | None] | None, bool]:
        if entry.other:
            return None, False
        if mode == "forward-only":
            found = logp_errors(problem, truth, out, out.double().sum(1))
            return found, not (found["logp_rms"] or 0.0) < WRONG_LOGP
        assert isinstance(out, Output)
        tokens = out.token_logps
        if tokens is None and side.logps is not None:
            tokens = side.logps(problem).detach()
        sums = torch.cat(out.sums) if isinstance(out.sums, tuple) else out.sums
        loss = float(out.loss.detach())
        found = errors(problem, truth, loss, tokens, sums, entry.with_reference)
        return found, not max(found["dhidden"], found["dweight"] or 0.0) < WRONG_GRADIENT

    def _bare(
        self, products: Products | None, mode: str
    ) -> dict[str, tuple[int, Callable[[], object]]]:
        """Bare products, each with its number of rows; 0 for those of the roofline together."""
        if products is None:
            return {}
        together = {ROOFLINE: (0, products.together(PRODUCTS[mode]))}
        return together | (products.single() if mode == "trainable" else {})

    # ---- the parts ------------------------------------------------------------------------------

    def _rows(self, shape: Shape, task: dict[str, Any]) -> dict[str, Any]:
        problem, _, _ = self._prepare(shape)
        self._gpu.free()
        passes, missing = parts.row_passes(
            self._gpu,
            problem,
            self._backends,
            self._request["precision"],
            task.get("excluded", {}),
        )
        rounds = Rounds(self._gpu, self._request["repeats"], self._request["seconds"])
        result = parts.time_passes(self._gpu, rounds, passes, self._teller(task))
        result["kernels"] += missing
        return {"size": asdict(shape), **result}

    def _logits(self, shape: Shape, task: dict[str, Any]) -> dict[str, Any]:
        problem, _, _ = self._prepare(shape)
        self._gpu.free()
        passes, missing = logits.passes(
            self._gpu, problem, self._backends, task.get("excluded", {})
        )
        rounds = Rounds(self._gpu, self._request["repeats"], self._request["seconds"])
        result = parts.time_passes(self._gpu, rounds, passes, self._teller(task))
        result["kernels"] += missing
        return {"size": asdict(shape), **result}

    def _overhead(self, shape: Shape, task: dict[str, Any]) -> dict[str, Any]:
        """All modes of a small batch. Its inputs need no float64 truth."""
        self._shape = self._kept = None
        self._gpu.free()
        size = shape.n, shape.h, shape.v, DTYPE, self._gpu.device, shape.softcap
        problem = zipf_problem(*size)
        modes = {}
        for mode in self._request["modes"]:
            problem.set_trainable(mode == "trainable")
            self._gpu.free()
            rows, calls = {}, {}
            for entry, row in self._entries(shape, mode, task):
                rows[entry.name] = row
                if "missing" in row:
                    continue
                self._teller(task)(entry.name)
                try:
                    calls[entry.name] = parts.small_call(self._gpu, entry, problem, mode)
                    calls[entry.name]()
                except Exception as error:
                    row["missing"] = failure(error)
                    self._gpu.check(row["missing"])
                    calls.pop(entry.name, None)
            for name, times in parts.small_rows(calls).items():
                rows[name] |= times
            problem.clear()
            modes[mode] = list(rows.values())
        return {"size": asdict(shape), "modes": modes}


def _results(problem: HeadProblem, out: Any) -> list[Tensor]:
    """What has to be the same in every run."""
    if isinstance(out, Tensor):
        return [out]
    given = out.loss.detach(), problem.hidden.grad, problem.weight.grad
    return [t for t in given if t is not None]


def main(request: dict[str, Any]) -> None:
    """The worker: what it says goes out on stdout, a line each."""
    # Whatever else prints to stdout, a peer or its compiler, goes to stderr.
    channel = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    warnings.filterwarnings("ignore")

    def say(message: dict[str, Any]) -> None:
        channel.write(json.dumps(message) + "\n")

    try:
        worker = Worker(open_device(request["device"]), request, say)
        if request["first"]:
            say({"machine": worker.machine()})
        worker.run()
    except Lost as error:
        say({"lost": str(error)})
        sys.exit(1)
    say({"done": True})
