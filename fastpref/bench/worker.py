"""The worker of a benchmark, which measures one task after another in a process of its own.

A peer that crashes or hangs then costs its own figure and no other.

A task is a dictionary that cases.py made. Its kind is the name of a method here without the
underscore: cell, memory, rows, logits, overhead or roofline.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

import torch

from fastpref.backends import native
from fastpref.bench import first_calls, parts, rates, results
from fastpref.bench.device import Device, Lost, open_device
from fastpref.bench.peers import Entry, step
from fastpref.bench.problem import (
    DTYPES,
    HeadProblem,
    Shape,
    Truth,
    float64_truth,
    make_problem,
    parse_shape,
)
from fastpref.bench.runner import Rounds, Timing, failure, serve
from fastpref.bench.sides import Sides
from fastpref.body import keep_cpu_memory

# Seconds that are reserved for each remaining task. A peer whose warm-up would take them is left
# out.
_RESERVE_S = 3.0
ROOFLINE, PEAK, CANARY = "products", "peak", "canary"
Say = Callable[[dict[str, Any]], None]


class Worker:
    """Measures one task after another.

    say: sends a message to the supervisor, which stops a worker that is silent for too long.
    """

    def __init__(self, device: Device, request: dict[str, Any], say: Say):
        import fastpref.backends

        self._device, self._request, self._say = device, request, say
        backends = request.get("backends") or device.backends
        self._backends: list[Any] = [b for b in backends if b in fastpref.backends.NAMES]
        self._sides = Sides(device, request, self._backends)
        self._inputs: tuple[HeadProblem, Truth, rates.Products | None] | None = None
        self._warm_up_s: dict[str, float] = {}  # the longest warm-up of each side
        self._inputs_key: tuple[Shape, str] | None = None
        self._remaining_tasks = 0  # after the present one
        self._task_id = ""
        self._threads = torch.get_num_threads()

    def machine(self) -> dict[str, Any]:
        import fastpref.backends

        about = results.machine() | self._device.describe()
        active = fastpref.backends.active(self._device.device, torch.bfloat16)
        return about | ({"backend": active} if self._device.like_gpu else {})

    def seconds_left(self) -> float:
        return self._request["deadline"] - time.time()

    def run(self) -> None:
        tasks = self._request["tasks"]
        for i, task in enumerate(tasks):
            task = {"dtype": "bf16", **task}
            self._remaining_tasks = len(tasks) - i - 1
            if self.seconds_left() < self._request["least_seconds"]:
                self._say({"dropped": task["id"]})
                continue
            self._task_id = task["id"]
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
        self._say({"doing": self._task_id})

    def _teller(self, task: dict[str, Any]) -> Callable[[str], None]:
        return lambda name: self._say({"doing": task["id"], "entry": name})

    def _rounds(self) -> Rounds:
        limits = self._request["repeats"], self._request["seconds"]
        return Rounds(self._device, *limits, deadline=self._request["deadline"])

    def _problem(self, shape: Shape, dtype: str) -> HeadProblem:
        """New inputs. The previous ones are freed first, as both may not fit the memory."""
        self._inputs_key = self._inputs = None
        self._device.free()
        size = shape.n, shape.h, shape.v, DTYPES[dtype], self._device.device, shape.softcap
        return make_problem(*size, zipf=self._device.like_gpu)

    def _prepare(
        self, shape: Shape, dtype: str
    ) -> tuple[HeadProblem, Truth, rates.Products | None]:
        """Inputs, their float64 truth and bare GEMMs. Consecutive tasks of a shape share them."""
        if (shape, dtype) != self._inputs_key:
            problem = self._problem(shape, dtype)
            truth = float64_truth(problem, self._alive)
            self._device.free()
            try:
                products = rates.Products(problem)
            except torch.OutOfMemoryError:
                products = None
            self._inputs_key, self._inputs = (shape, dtype), (problem, truth, products)
        self._device.free()
        assert self._inputs is not None
        return self._inputs

    def _cell(self, shape: Shape, task: dict[str, Any]) -> dict[str, Any]:
        mode, dtype = task["mode"], task["dtype"]
        problem, truth, products = self._prepare(shape, dtype)
        problem.set_trainable(mode == "trainable")
        calls: dict[str, Callable[[], object]] = {}
        cost: dict[str, float] = {}
        single_calls: dict[str, Timing] = {}

        def warm_up(entry: Entry, row: dict[str, Any]) -> None:
            call, seconds = first_calls.warm_up(self._device, entry, row, problem, truth, mode)
            if self._device.like_gpu:
                seconds = self._device.time(call, problem.clear).device
            elif seconds > self._request["seconds"]:  # so slow that one call is enough
                single_calls[entry.name] = Timing([seconds], limited=True)
                return
            calls[entry.name], cost[entry.name] = call, seconds

        rows = self._each(shape, task, problem, warm_up)
        peak = self._peak(problem.weight.dtype)
        baselines = self._baselines(products, peak, mode, problem.weight.dtype)
        for name, (_, call) in baselines.items():
            self._teller(task)(name)
            self._device.time(call)
            cost[name] = self._device.time(call).device
            calls[name] = call
        rounds = self._rounds()
        keep_memory = self._request.get("keep_memory", False)
        with keep_cpu_memory(keep_memory):
            for call in calls.values() if keep_memory else ():
                call()  # its memory is there from now on
                problem.clear()
            rounds.run(calls, cost, problem.clear, self._teller(task))
            problem.clear()
        timings = rounds.device | single_calls
        timings = {name: t for name, t in timings.items() if name not in rounds.failed}
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
        for name, (n, _) in baselines.items():
            if n and name in timings:
                rate = 2 * n * shape.h * shape.v / timings[name].median / 1e12
                products_row[name] = timings[name].to_json()
                products_row[name] |= {"rows": n, "tflop_per_s": round(rate, 4)}
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
        """A row for each side. The row of a side that fails or cannot run has the reason."""
        rows = {}
        for entry, row in self._sides.rows(shape, task, self._lacks_time):
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
                self._warm_up_s[entry.name] = max(took, self._warm_up_s.get(entry.name, 0.0))
        return rows

    def _lacks_time(self, name: str) -> bool:
        """Whether warming up a side again would take time that is reserved for later tasks."""
        seconds = self._warm_up_s.get(name, 0.0)
        return self.seconds_left() - seconds < _RESERVE_S * self._remaining_tasks

    def _peak(self, dtype: torch.dtype) -> rates.Peak | None:
        """The CPU's peak rate; None on a GPU, and without the native module, which measures it."""
        measures = not self._device.like_gpu and native.problem() is None
        return rates.Peak(dtype) if measures else None

    def _baselines(
        self,
        products: rates.Products | None,
        peak: rates.Peak | None,
        mode: str,
        dtype: torch.dtype,
    ) -> dict[str, tuple[int, Callable[[], object]]]:
        """The calls that the sides are compared with, each with its number of rows.

        Single GEMMs have rows. All GEMMs together, the CPU's peak rate and the canary have 0.
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
        """Peak resident memory of each side, in a process whose malloc returns freed blocks."""
        mode, dtype = task["mode"], task["dtype"]
        problem = self._problem(shape, dtype)
        problem.set_trainable(mode == "trainable")
        small = make_problem(64, shape.h, 1024, DTYPES[dtype], softcap=shape.softcap)
        small.set_trainable(problem.trainable)

        def peak(entry: Entry, row: dict[str, Any]) -> None:
            run = step(entry.make(), mode)
            run(problem if entry.compiled else small)
            problem.clear()
            row["memory"] = first_calls.peak_memory(
                self._device, lambda: run(problem), problem, mode
            )

        rows = self._each(shape, task, problem, peak)
        memory = {n: row.get("memory", {"failed": row.get("missing")}) for n, row in rows.items()}
        return {"memory": memory}

    def _rows(self, shape: Shape, task: dict[str, Any]) -> dict[str, Any]:
        problem, _, _ = self._prepare(shape, task["dtype"])
        makers = parts.row_passes(problem, self._backend_names(), self._request["precision"])
        return self._passes(shape, task, makers)

    def _logits(self, shape: Shape, task: dict[str, Any]) -> dict[str, Any]:
        problem, _, _ = self._prepare(shape, task["dtype"])
        backends, peers = self._backend_names(), self._request["peers"]
        makers = parts.logits_passes(self._device, problem, backends, peers)
        return self._passes(shape, task, makers)

    def _backend_names(self) -> list[str]:
        import fastpref.backends

        return self._backends or [fastpref.backends.active(self._device.device, torch.bfloat16)]

    def _passes(self, shape: Shape, task: dict[str, Any], makers: Any) -> dict[str, Any]:
        excluded, doing = task.get("excluded", {}), self._teller(task)
        rows = parts.measure(self._device, self._rounds(), makers, excluded, doing)
        return {"size": asdict(shape), **rows}

    def _roofline(self, shape: Shape, task: dict[str, Any]) -> dict[str, Any]:
        """The rates of this machine, measured before anything else."""
        dtype = DTYPES[task["dtype"]]
        measured = rates.machine_rates(self._device, self._rounds(), dtype, self._peak(dtype))
        return {"size": asdict(shape), **measured}

    def _overhead(self, shape: Shape, task: dict[str, Any]) -> dict[str, Any]:
        """Every mode of a small batch, whose results are not compared with float64."""
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


def answer(request: dict[str, Any], say: Say) -> None:
    """Do all tasks of a request, which `serve` has read from the supervisor."""
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
