"""The worker of a benchmark, which measures one task after another in a process of its own.

A peer that crashes or hangs then costs its own figure and no other.

A task is a dictionary of cases.py. Its kind is the name of a method: cell, memory, rows, logits,
overhead or roofline.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor

from fastpref.backends import native
from fastpref.bench import parts, rates, results
from fastpref.bench.device import Device, Lost, open_device
from fastpref.bench.peers import Entry, Output, Side, step
from fastpref.bench.problem import (
    DTYPES,
    HeadProblem,
    Shape,
    Truth,
    errors,
    float64_truth,
    logp_errors,
    make_problem,
    parse_shape,
)
from fastpref.bench.runner import Rounds, Timing, failure, serve
from fastpref.bench.sides import Sides
from fastpref.bench.verdict import fault
from fastpref.body import keep_cpu_memory

# Seconds that are kept for each remaining task. A peer whose warm-up would use them is left out.
_RESERVE_S = 3.0
ROOFLINE, PEAK, CANARY = "products", "peak", "canary"
Say = Callable[[dict[str, Any]], None]


class Worker:
    """Measures one task after another. say: tells the supervisor, who stops a worker that is silent
    for long."""

    def __init__(self, device: Device, request: dict[str, Any], say: Say):
        import fastpref.backends

        self._device, self._request, self._say = device, request, say
        backends = request.get("backends") or device.backends
        self._backends: list[Any] = [b for b in backends if b in fastpref.backends.NAMES]
        self._sides = Sides(device, request, self._backends)
        self._inputs: tuple[HeadProblem, Truth, rates.Products | None] | None = None
        self._warm: dict[str, float] = {}  # seconds that the warm-up of a side took at most
        self._inputs_of: tuple[Shape, str] | None = None
        self._tasks_left = 0  # tasks still to come
        self._doing = ""
        self._threads = torch.get_num_threads()

    def machine(self) -> dict[str, Any]:
        import fastpref.backends

        about = results.machine() | self._device.describe()
        active = fastpref.backends.active(self._device.device, torch.bfloat16)
        return about | ({"backend": active} if self._device.like_gpu else {})

    def left(self) -> float:
        return self._request["deadline"] - time.time()

    def run(self) -> None:
        tasks = self._request["tasks"]
        for i, task in enumerate(tasks):
            task = {"dtype": "bf16", **task}
            self._tasks_left = len(tasks) - i - 1
            if self.left() < self._request["least_seconds"]:
                self._say({"dropped": task["id"]})
                continue
            self._doing = task["id"]
            self._alive()
            begun = time.perf_counter()
            torch.set_num_threads(task.get("threads") or self._threads)
            try:
                shape = parse_shape(task["shape"])
                shape = replace(shape, model=task.get("model", shape.model))
                result = getattr(self, "_" + task["kind"])(shape, task)
            except Lost:
                raise
            except Exception as error:  # most likely too little memory for the inputs themselves
                result = {"failed": failure(error)}
                self._device.check(result["failed"])
            seconds = round(time.perf_counter() - begun, 1)
            self._say({"result": {**task, **result, "seconds": seconds}})

    def _alive(self) -> None:
        """Say that the present task goes on."""
        self._say({"doing": self._doing})

    def _teller(self, task: dict[str, Any]) -> Callable[[str], None]:
        return lambda name: self._say({"doing": task["id"], "entry": name})

    def _rounds(self) -> Rounds:
        limits = self._request["repeats"], self._request["seconds"]
        return Rounds(self._device, *limits, deadline=self._request["deadline"])

    def _problem(self, shape: Shape, dtype: str) -> HeadProblem:
        """New inputs. The previous ones are freed first, as both may not fit the memory."""
        self._inputs_of = self._inputs = None
        self._device.free()
        size = shape.n, shape.h, shape.v, DTYPES[dtype], self._device.device, shape.softcap
        return make_problem(*size, zipf=self._device.like_gpu)

    def _prepare(
        self, shape: Shape, dtype: str
    ) -> tuple[HeadProblem, Truth, rates.Products | None]:
        """Inputs, their float64 truth and bare GEMMs. Consecutive tasks of a shape share them."""
        if (shape, dtype) != self._inputs_of:
            problem = self._problem(shape, dtype)
            truth = float64_truth(problem, self._alive)
            self._device.free()
            try:
                products = rates.Products(problem)
            except torch.OutOfMemoryError:
                products = None
            self._inputs_of, self._inputs = (shape, dtype), (problem, truth, products)
        self._device.free()
        assert self._inputs is not None
        return self._inputs

    def _cell(self, shape: Shape, task: dict[str, Any]) -> dict[str, Any]:
        mode, dtype = task["mode"], task["dtype"]
        problem, truth, products = self._prepare(shape, dtype)
        problem.set_trainable(mode == "trainable")
        calls: dict[str, Callable[[], object]] = {}
        cost: dict[str, float] = {}
        once: dict[str, Timing] = {}

        def warm_up(entry: Entry, row: dict[str, Any]) -> None:
            call, seconds = self._warm_up(entry, row, problem, truth, mode)
            if self._device.like_gpu:
                seconds = self._device.time(call, problem.clear).device
            elif seconds > self._request["seconds"]:  # of a side so slow, one run is enough
                once[entry.name] = Timing([seconds], limited=True)
                return
            calls[entry.name], cost[entry.name] = call, seconds

        rows = self._each(shape, task, problem, warm_up)
        peak = self._peak(problem.weight.dtype)
        bare = self._bare(products, peak, mode, problem.weight.dtype)
        for name, (_, call) in bare.items():
            self._teller(task)(name)
            self._device.time(call)
            cost[name] = self._device.time(call).device
            calls[name] = call
        rounds = self._rounds()
        with keep_cpu_memory(self._request.get("keep_memory", False)):
            for call in calls.values() if self._request.get("keep_memory") else ():
                call()  # its memory is there from now on
                problem.clear()
            rounds.run(calls, cost, problem.clear, self._teller(task))
            problem.clear()
        timings = {n: t for n, t in (rounds.device | once).items() if n not in rounds.failed}
        roofline = timings[ROOFLINE].median if ROOFLINE in timings else None
        if peak is not None and PEAK in timings:
            flops = 2 * rates.PRODUCTS[mode] * shape.n * shape.h * shape.v
            roofline = flops / peak.median()
        for name, row in rows.items():
            if name in rounds.failed:
                row["missing"] = rounds.failed[name]
            elif name in timings:
                row["time"] = timings[name].to_json()
                row["host_ms"] = round(1e3 * rounds.host.get(name, timings[name]).median, 3)
                if roofline is not None:
                    row["roofline_fraction"] = round(roofline / timings[name].median, 4)
        products_row = {}
        for name, (n, _) in bare.items():
            if n and name in timings:
                rate = 2 * n * shape.h * shape.v / timings[name].median / 1e12
                more = {"rows": n, "tflop_per_s": round(rate, 4)}
                products_row[name] = timings[name].to_json() | more
        return {
            "size": asdict(shape),
            "sequences": problem.labels.shape[0],
            "median_label_probability": round(truth.median_probability, 4),
            "products": products_row,
            "peak_tflop_per_s": None if peak is None else round(peak.median() / 1e12, 4),
            "roofline_ms": None if roofline is None else round(1e3 * roofline, 4),
            "plan_fuses": self._sides.fuses(shape, dtype),
            "canary": timings[CANARY].to_json() if CANARY in timings else None,
            "variants": list(rows.values()),
        }

    def _each(
        self,
        shape: Shape,
        task: dict[str, Any],
        problem: HeadProblem,
        measure: Callable[[Entry, dict[str, Any]], None],
    ) -> dict[str, dict[str, Any]]:
        """A row for each side; one that fails, or is not there, has the reason in its row."""
        rows = {}
        for entry, row in self._sides.rows(shape, task, self._short):
            rows[entry.name] = row
            if "missing" in row:
                continue
            self._teller(task)(entry.name)
            if not self._device.like_gpu:
                print(f"  {task['id']}: {entry.name}", file=sys.stderr, flush=True)
            begun = time.perf_counter()
            try:
                measure(entry, row)
            except Exception as error:
                row["missing"] = failure(error)
                self._device.check(row["missing"])
            finally:
                problem.clear()
                took = time.perf_counter() - begun
                self._warm[entry.name] = max(took, self._warm.get(entry.name, 0.0))
        return rows

    def _short(self, name: str) -> bool:
        """Whether warming up a side again would take the time of the tasks to come."""
        seconds = self._warm.get(name, 0.0)
        return self.left() - seconds < _RESERVE_S * self._tasks_left

    def _warm_up(
        self, entry: Entry, row: dict[str, Any], problem: HeadProblem, truth: Truth, mode: str
    ) -> tuple[Callable[[], object], float]:
        """Run a side until it is warm. Returns the call, and the seconds of its last run.

        The row gets the errors and, on a GPU, the memory and whether two runs give the same bits.
        """
        begun = time.perf_counter()
        side = entry.make()
        run = step(side, mode)
        outputs: list[Any] = []

        def call() -> None:
            outputs[:] = [run(problem)]

        seconds = self._device.wall(call).device
        row["first_call_s"] = round(time.perf_counter() - begun, 3)
        if entry.compiled:
            seconds = self._device.wall(call, problem.clear).device
        out = outputs.pop()
        measured, loss = self._errors(entry, side, problem, truth, mode, out)
        row["errors"], row["wrong"] = measured, False
        if measured is not None:
            dtype = "bf16" if problem.weight.dtype == torch.bfloat16 else "fp32"
            tolerance = dict(entry.options).get("gradient_tolerance")
            tokens = problem.labels.shape[1]
            why = fault(measured, dtype, tokens=tokens, loss=loss, tolerance=tolerance)
            row["wrong"] = why is not None
            if why is not None:
                row["wrong_because"] = why
        if self._device.like_gpu:
            before = _results(problem, out)
            problem.clear()
            row["memory"] = self._device.peak(call)
            row["memory"]["extra"] = row["memory"]["peak_beyond"] - _returned(problem, mode)
            after = _results(problem, outputs.pop())
            row["same_bits_twice"] = all(map(torch.equal, before, after))
        return lambda: run(problem), seconds

    def _errors(
        self, entry: Entry, side: Side, problem: HeadProblem, truth: Truth, mode: str, out: Any
    ) -> tuple[dict[str, float | None] | None, float | None]:
        """The errors, and the true loss of a call that has one."""
        if entry.other:
            return None, None
        if mode == "forward-only":
            return logp_errors(problem, truth, out, out.double().sum(1)), None
        assert isinstance(out, Output)
        tokens = out.token_logps
        if tokens is None and side.logps is not None:
            tokens = side.logps(problem).detach()
        sums = torch.cat(out.sums) if isinstance(out.sums, tuple) else out.sums
        assert sums is not None
        loss = float(out.loss.detach())
        measured = errors(problem, truth, loss, tokens, sums, entry.with_reference)
        return measured, truth.loss[entry.with_reference]

    def _peak(self, dtype: torch.dtype) -> rates.Peak | None:
        """The CPU's own best rate, if the native module, which measures it, is there."""
        measures = not self._device.like_gpu and native.problem() is None
        return rates.Peak(dtype) if measures else None

    def _bare(
        self,
        products: rates.Products | None,
        peak: rates.Peak | None,
        mode: str,
        dtype: torch.dtype,
    ) -> dict[str, tuple[int, Callable[[], object]]]:
        """Calls that others are compared with, each with the number of its rows: single GEMMs.

        All GEMMs together, the CPU's best rate and the canary have 0 rows.
        """
        out: dict[str, tuple[int, Callable[[], object]]] = {}
        if peak is not None:
            out[PEAK] = 0, peak
        if products is not None:
            out[ROOFLINE] = 0, products.together(mode)
        if products is not None and (mode == "trainable" or not self._device.like_gpu):
            out |= products.single(mode)
        if not self._device.like_gpu:
            out[CANARY] = 0, rates.canary(dtype)
        return out

    def _memory(self, shape: Shape, task: dict[str, Any]) -> dict[str, Any]:
        """Peak resident memory of each side, in a process that has the allocator for that."""
        mode, dtype = task["mode"], task["dtype"]
        problem = self._problem(shape, dtype)
        problem.set_trainable(mode == "trainable")
        small = make_problem(64, shape.h, 1024, DTYPES[dtype], softcap=shape.softcap)
        small.set_trainable(problem.trainable)

        def peak(entry: Entry, row: dict[str, Any]) -> None:
            run = step(entry.make(), mode)
            run(problem if entry.compiled else small)
            problem.clear()
            row["memory"] = self._device.peak(lambda: run(problem))
            row["memory"]["extra"] = row["memory"]["peak_beyond"] - _returned(problem, mode)

        rows = self._each(shape, task, problem, peak)
        memory = {n: row.get("memory", {"failed": row.get("missing")}) for n, row in rows.items()}
        return {"memory": memory}

    def _rows(self, shape: Shape, task: dict[str, Any]) -> dict[str, Any]:
        problem, _, _ = self._prepare(shape, task["dtype"])
        makers = parts.row_passes(problem, self._named(), self._request["precision"])
        return self._passes(shape, task, makers)

    def _logits(self, shape: Shape, task: dict[str, Any]) -> dict[str, Any]:
        problem, _, _ = self._prepare(shape, task["dtype"])
        makers = parts.logits_passes(self._device, problem, self._named(), self._request["peers"])
        return self._passes(shape, task, makers)

    def _named(self) -> list[str]:
        import fastpref.backends

        return self._backends or [fastpref.backends.active(self._device.device, torch.bfloat16)]

    def _passes(self, shape: Shape, task: dict[str, Any], makers: Any) -> dict[str, Any]:
        excluded, tell = task.get("excluded", {}), self._teller(task)
        rows = parts.measure(self._device, self._rounds(), makers, excluded, tell)
        return {"size": asdict(shape), **rows}

    def _roofline(self, shape: Shape, task: dict[str, Any]) -> dict[str, Any]:
        """What the machine can do, before anything else is measured."""
        dtype = DTYPES[task["dtype"]]
        measured = rates.machine_rates(self._device, self._rounds(), dtype, self._peak(dtype))
        return {"size": asdict(shape), **measured}

    def _overhead(self, shape: Shape, task: dict[str, Any]) -> dict[str, Any]:
        """All modes of a small batch. Its inputs need no float64 truth."""
        problem = self._problem(shape, task["dtype"])
        calls: dict[str, Callable[[], tuple[float, ...]]] = {}
        modes = {}
        for mode in self._request["modes"]:
            problem.set_trainable(mode == "trainable")
            self._device.free()
            calls.clear()

            def warm_up(entry: Entry, row: dict[str, Any], mode: str = mode) -> None:
                call = parts.small_call(self._device, entry, problem, mode)
                call()
                calls[entry.name] = call

            rows = self._each(shape, {**task, "mode": mode}, problem, warm_up)
            for name, times in parts.small_rows(calls).items():
                rows[name] |= times
            problem.clear()
            modes[mode] = list(rows.values())
        return {"size": asdict(shape), "modes": modes}


def _results(problem: HeadProblem, out: Any) -> list[Tensor]:
    """What has to be the same in every run."""
    if isinstance(out, Tensor):
        return [out]
    results = out.loss.detach(), problem.hidden.grad, problem.weight.grad
    return [t for t in results if t is not None]


def _returned(problem: HeadProblem, mode: str) -> int:
    """Bytes of the gradients that a call returns."""
    return 0 if mode == "forward-only" else problem.gradient_bytes()


def answer(request: dict[str, Any], say: Say) -> None:
    """The whole worker."""
    worker = Worker(open_device(request["device"]), request, say)
    if request["first"]:
        say({"machine": worker.machine()})
    try:
        worker.run()
    except Lost as error:
        say({"lost": str(error)})
        raise SystemExit(1) from None
    say({"done": True})


if __name__ == "__main__":
    serve(answer)
