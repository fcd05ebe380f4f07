"""Running: interleaved calls, workers in separate processes, and the supervisor of a worker.

fastpref.profiling.processes has the two ends of a worker's pipe. The worker of `fastpref bench` is
the module fastpref.bench.worker. That of other benchmarks is their script, started with --worker.
"""

from __future__ import annotations

import functools
import gc
import itertools
import queue
import random
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from fastpref.bench.device import Device, Times
from fastpref.profiling import processes
from fastpref.profiling.processes import failure, serve

__all__ = ["Child", "Rounds", "Supervisor", "Timing", "failure", "run_worker", "serve"]


@dataclass
class Timing:
    """The seconds of each call of one variant.

    limited: whether the variant is so slow that it took part in fewer rounds.
    """

    seconds: list[float] = field(default_factory=list)
    limited: bool = False

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    def to_json(self) -> dict[str, Any]:
        ms = sorted(1e3 * s for s in self.seconds)
        low, _, high = (
            statistics.quantiles(ms, n=4, method="inclusive") if len(ms) > 1 else (ms[0],) * 3
        )
        return {
            "median_ms": round(1e3 * self.median, 3),
            "quartiles_ms": [round(low, 3), round(high, 3)],
            "min_ms": round(ms[0], 3),
            "repeats": len(ms),
            "fewer_repeats_because_slow": self.limited,
        }


def share_rounds(cost: dict[str, float], repeats: int, seconds: float) -> dict[str, int]:
    """The number of rounds, of `repeats`, that each call may take part in.

    cost: seconds of each call. seconds: what a call may spend in all its rounds; it takes part in
    three rounds at least.
    """
    fits = {name: int(seconds / max(c, 1e-9)) for name, c in cost.items()}
    return {name: min(repeats, max(3, n)) for name, n in fits.items()}


def due(shares: dict[str, int], i: int, repeats: int, order: random.Random) -> list[str]:
    """The calls of round i, in a random order.

    shares: the number of rounds of each call, which are spread evenly over all rounds.
    """
    names = [n for n, k in shares.items() if (i + 1) * k // repeats > i * k // repeats]
    order.shuffle(names)
    return names


class Rounds:
    """Interleaved calls: every round makes all of them, in a new random order.

    A time in which the machine is slow thus affects every side.
    """

    def __init__(
        self,
        device: Device,
        repeats: int,
        seconds: float,
        seed: int = 0,
        deadline: float = float("inf"),
    ):
        """repeats: the number of rounds. seconds: what one call may spend in all its rounds.
        deadline: a value of time.time(), after which no round but the first begins."""
        self._deadline = deadline
        self._device, self._repeats, self._seconds = device, repeats, seconds
        self._order = random.Random(seed)
        self.device: dict[str, Timing] = {}
        self.host: dict[str, Timing] = {}
        self.failed: dict[str, str] = {}

    def run(
        self,
        calls: dict[str, Callable[[], object]],
        cost: dict[str, float],
        reset: Callable[[], object] | None = None,
        doing: Callable[[str], object] = lambda name: None,
        whole: bool = False,
    ) -> None:
        """Time the calls; `device` and `host` get the times, `failed` the reasons of failures.

        cost: the seconds of a warm call, by which a slow call takes part in fewer rounds. doing:
        called with the name of each call before it is made. whole: whether the times are those of
        `Device.wall` instead of `Device.time`. A call that fails is not made again. Raises Lost.
        """
        clock = self._device.wall if whole else self._device.time
        costs = {name: cost[name] for name in calls}
        shares = share_rounds(costs, self._repeats, self._seconds)
        for name, k in shares.items():
            self.device[name] = Timing(limited=k < self._repeats)
            self.host[name] = Timing(limited=k < self._repeats)
        gc.collect()
        gc.freeze()  # a collection between rounds then skips all objects that exist now
        gc.disable()
        try:
            for i in range(self._repeats):
                if i and time.time() > self._deadline:
                    break
                for name in due(shares, i, self._repeats, self._order):
                    if name not in self.failed:
                        doing(name)
                        self._once(name, functools.partial(clock, calls[name], reset))
                gc.collect()
        finally:
            gc.enable()
            gc.unfreeze()
        for name in calls:
            if not self.device[name].seconds:
                self.failed.setdefault(name, "no time left")

    def _once(self, name: str, timed: Callable[[], Times]) -> None:
        try:
            times = timed()
        except Exception as error:
            self.failed[name] = failure(error)
            self._device.check(self.failed[name])
            return
        self.device[name].seconds.append(times.device)
        self.host[name].seconds.append(times.host)


class Child(processes.Child):
    """A benchmark's script as a worker."""

    def __init__(
        self,
        script: str,
        request: dict[str, Any],
        env: dict[str, str] | None = None,
        loud: bool = True,
    ):
        super().__init__([sys.executable, script, "--worker"], request, env, loud)


def run_worker(script: str, request: dict[str, Any], env: dict[str, str]) -> dict[str, Any]:
    """The only message of a worker. Raises RuntimeError if the worker ends without one."""
    child = Child(script, request, env, loud=False)
    try:
        message = child.hear()
        if message is None or "failed" in message:
            raise RuntimeError(message["failed"] if message else child.ending())
        return message
    finally:
        child.stop()


_STRIKES = 2  # tasks in which an entry may end the worker before it is left out of all tasks


class Supervisor:
    """Runs a worker over a list of tasks, and goes on without an entry that ends the worker.

    Messages of the worker:

        {"doing": id, "entry": name}   the present task, and the entry (side) that it measures
        {"result": {"id": id, ...}}    a task is done
        {"dropped": id}                no time is left for that task
        {"lost": reason}               the worker cannot go on, and ends
        {"done": true}                 all tasks are done

    A worker is stopped if it is silent for too long or past its deadline. After that, or after its
    death, a new worker gets the remaining tasks. The entry that the old worker was measuring is
    left out of its task. Tasks with the same environment variables, `env`, share a worker.

    results: in the order of their ends. dropped: ids of tasks. stops: why workers ended early.
    """

    def __init__(
        self,
        command: list[str],
        request: dict[str, Any],
        *,
        hear: Callable[[dict[str, Any]], None] = lambda message: None,
        doing: Callable[[dict[str, Any]], None] = lambda message: None,
        patience: float = 120.0,
        grace: float = 30.0,
        env: dict[str, str] | None = None,
        loud: bool = True,
    ):
        """command: starts a worker. hear: gets every message but `doing`. doing: gets those.
        patience: seconds of silence after which a worker is stopped. grace: seconds after
        request["deadline"], a value of time.time(), at which every worker is stopped. env:
        environment variables of all workers. loud: whether their stderr is passed on."""
        self._command, self._request, self._hear, self._doing = command, request, hear, doing
        self._patience, self._end_time = patience, request["deadline"] + grace
        self._env, self._loud = env or {}, loud
        self._tasks = {task["id"]: {**task, "excluded": {}} for task in request["tasks"]}
        self._strikes: dict[str, int] = {}
        self._first = True
        self.results: list[dict[str, Any]] = []
        self.dropped: list[str] = []
        self.stops: list[str] = []

    def run(self) -> None:
        while self._tasks and time.time() < self._end_time:
            tasks_before = len(self._tasks)
            last, reason = self._one_worker()
            if reason is not None:
                self._exclude(last, reason, len(self._tasks) < tasks_before)
            elif len(self._tasks) == tasks_before:  # a worker that did nothing would do so again
                break
        self.dropped += self._tasks

    def _one_worker(self) -> tuple[dict[str, Any], str | None]:
        """Run one worker.

        Returns:
            The last `doing` of an unfinished task, and why the worker ended early; None if it did
            not end early.
        """
        env, tasks = next(itertools.groupby(self._tasks.values(), lambda task: task.get("env")))
        request = {**self._request, "tasks": list(tasks), "first": self._first}
        child = processes.Child(self._command, request, {**self._env, **(env or {})}, self._loud)
        last: dict[str, Any] = {}
        reason: str | None = None
        try:
            while True:
                wait = min(self._patience, self._end_time - time.time())
                try:
                    message = child.hear(timeout=max(wait, 0.0))
                except queue.Empty:
                    silent = f"nothing heard for {wait:.0f} s"
                    return last, silent if wait == self._patience else "the time was up"
                if message is None:
                    return last, (reason or child.ending())[:300]
                if "doing" in message:
                    last = message
                    self._doing(message)
                    continue
                if "result" in message:
                    self.results.append(message["result"])
                    self._tasks.pop(message["result"]["id"])
                    last = {}
                elif "dropped" in message:
                    self.dropped.append(message["dropped"])
                    self._tasks.pop(message["dropped"])
                elif "lost" in message or "failed" in message:
                    reason = message.get("lost") or message["failed"]
                elif "machine" in message:
                    self._first = False
                elif "done" in message:
                    return {}, None
                self._hear(message)
        finally:
            child.stop()

    def _exclude(self, last: dict[str, Any], reason: str, progressed: bool) -> None:
        """Leave out the entry that ended a worker, or the whole task if it was not at an entry.

        last: as `_one_worker` returns it. progressed: whether the worker finished any task.
        """
        name, entry = last.get("doing", ""), last.get("entry")
        self.stops.append(": ".join(text for text in (name, entry, reason) if text))
        if self._loud:
            print(f"stopped at {self.stops[-1]}", file=sys.stderr, flush=True)
        if name not in self._tasks:
            if not progressed:  # the worker cannot even start, whatever the task
                self.dropped += self._tasks
                self._tasks.clear()
            return
        if entry is None or entry in self._tasks[name]["excluded"]:
            self._fail(name, reason)
            return
        self._strikes[entry] = self._strikes.get(entry, 0) + 1
        tasks = self._tasks.values() if self._strikes[entry] >= _STRIKES else [self._tasks[name]]
        for task in tasks:
            task["excluded"][entry] = f"it stopped the process: {reason}"

    def _fail(self, name: str, reason: str) -> None:
        result = {**self._tasks.pop(name), "failed": f"the process stopped: {reason}"}
        self.results.append(result)
        self._hear({"result": result})
