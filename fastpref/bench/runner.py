"""Running: interleaved calls, workers in processes of their own, and who watches over them.

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
    """Seconds of each call of one variant. limited: slow, so it sat out some of the rounds."""

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
    """Of so many rounds, how many each call takes part in when it may spend so many seconds."""
    fits = {name: int(seconds / max(c, 1e-9)) for name, c in cost.items()}
    return {name: min(repeats, max(3, n)) for name, n in fits.items()}


def due(shares: dict[str, int], i: int, repeats: int, order: random.Random) -> list[str]:
    """Whose turn it is in round i, shuffled; a call that sits out rounds does so evenly."""
    names = [n for n, k in shares.items() if (i + 1) * k // repeats > i * k // repeats]
    order.shuffle(names)
    return names


class Rounds:
    """Interleaved calls: each round all of them, in an order of its own, so that a slow spell of
    the machine hits every side."""

    def __init__(
        self,
        device: Device,
        repeats: int,
        seconds: float,
        seed: int = 0,
        deadline: float = float("inf"),
    ):
        """repeats: rounds. seconds: what one call may spend in all its rounds. deadline: in
        time.time()'s terms; no round begins after it but the first."""
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
        """cost: seconds of a warm call; one that is slow sits out rounds, but takes part in three.

        doing: told whose turn it is. whole: with the wall clock, until the device is done. A call
        that fails is out, and `failed` says why. Raises Lost.
        """
        clock = self._device.wall if whole else self._device.time
        wanted = {name: cost[name] for name in calls}
        shares = share_rounds(wanted, self._repeats, self._seconds)
        for name, k in shares.items():
            self.device[name] = Timing(limited=k < self._repeats)
            self.host[name] = Timing(limited=k < self._repeats)
        gc.collect()
        gc.freeze()  # what lives now stays; it need not be looked at again every round
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
    """The one message of a worker. Raises RuntimeError if it ends without."""
    child = Child(script, request, env, loud=False)
    try:
        message = child.hear()
        if message is None or "failed" in message:
            raise RuntimeError(message["failed"] if message else child.ending())
        return message
    finally:
        child.stop()


_STRIKES = 2  # tasks that a part may take down before it is left out of all


class Supervisor:
    """Runs a worker over a list of tasks, and goes on without whatever takes the worker down.

    Messages of the worker:

        {"doing": id, "entry": name}   what it is at; entry: which part of the task, if any
        {"result": {"id": id, ...}}    a task is done
        {"dropped": id}                no time for that task
        {"lost": why}                  it cannot go on, and ends
        {"done": true}                 all tasks are done

    It is stopped when it is silent for too long or past its time. Then, or when it died, another
    one gets the tasks that are left, without the part that the first one was at. Tasks with an
    environment of their own, `env`, get a worker of their own.

    results: in the order in which they came. dropped: ids of tasks. stops: what went wrong.
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
        """command: starts a worker. hear: gets every message but `doing`, which goes to `doing`.
        patience: seconds of silence that are too many. grace: seconds past request["deadline"], in
        time.time()'s terms, until the end. env: of all workers. loud: whether their stderr is
        passed on."""
        self._command, self._request, self._hear, self._doing = command, request, hear, doing
        self._patience, self._end = patience, request["deadline"] + grace
        self._env, self._loud = env or {}, loud
        self._tasks = {task["id"]: {**task, "excluded": {}} for task in request["tasks"]}
        self._strikes: dict[str, int] = {}
        self._first = True
        self.results: list[dict[str, Any]] = []
        self.dropped: list[str] = []
        self.stops: list[str] = []

    def run(self) -> None:
        while self._tasks and time.time() < self._end:
            before = len(self._tasks)
            at, why = self._one_worker()
            if why is not None:
                self._learn(at, why, len(self._tasks) < before)
            elif len(self._tasks) == before:  # it says that it is done, and did nothing
                break
        self.dropped += self._tasks

    def _one_worker(self) -> tuple[dict[str, Any], str | None]:
        """Run one worker. What it was at last, and why it stopped early; None: it did not."""
        env, tasks = next(itertools.groupby(self._tasks.values(), lambda task: task.get("env")))
        request = {**self._request, "tasks": list(tasks), "first": self._first}
        child = processes.Child(self._command, request, {**self._env, **(env or {})}, self._loud)
        at: dict[str, Any] = {}
        why: str | None = None
        try:
            while True:
                wait = min(self._patience, self._end - time.time())
                try:
                    message = child.hear(timeout=max(wait, 0.0))
                except queue.Empty:
                    silent = f"nothing heard for {wait:.0f} s"
                    return at, silent if wait == self._patience else "the time was up"
                if message is None:
                    return at, (why or child.ending())[:300]
                if "doing" in message:
                    at = message
                    self._doing(message)
                    continue
                if "result" in message:
                    self.results.append(message["result"])
                    self._tasks.pop(message["result"]["id"])
                    at = {}
                elif "dropped" in message:
                    self.dropped.append(message["dropped"])
                    self._tasks.pop(message["dropped"])
                elif "lost" in message or "failed" in message:
                    why = message.get("lost") or message["failed"]
                elif "machine" in message:
                    self._first = False
                elif "done" in message:
                    return {}, None
                self._hear(message)
        finally:
            child.stop()

    def _learn(self, at: dict[str, Any], why: str, moved: bool) -> None:
        """Leave out the part that did it, or the task where it was no part. moved: it did some."""
        name, entry = at.get("doing", ""), at.get("entry")
        self.stops.append(": ".join(part for part in (name, entry, why) if part))
        if self._loud:
            print(f"stopped at {self.stops[-1]}", file=sys.stderr, flush=True)
        if name not in self._tasks:
            if not moved:  # it cannot even start: no task would go better
                self.dropped += self._tasks
                self._tasks.clear()
            return
        if entry is None or entry in self._tasks[name]["excluded"]:
            self._fail(name, why)
            return
        self._strikes[entry] = self._strikes.get(entry, 0) + 1
        tasks = self._tasks.values() if self._strikes[entry] >= _STRIKES else [self._tasks[name]]
        for task in tasks:
            task["excluded"][entry] = f"it stopped the process: {why}"

    def _fail(self, name: str, why: str) -> None:
        result = {**self._tasks.pop(name), "failed": f"the process stopped: {why}"}
        self.results.append(result)
        self._hear({"result": result})
