"""Runs a worker over a list of tasks, and goes on without whatever takes the worker down.

The worker reads a request from stdin, JSON with `tasks`, and writes lines of JSON:

    {"doing": id, "entry": name}   what it is at; entry: which part of the task, if any
    {"result": {"id": id, ...}}    a task is done
    {"dropped": id}                no time for that task
    {"lost": why}                  it cannot go on, and ends
    {"done": true}                 all tasks are done

It is stopped when it is silent for too long or past its time. Then, or when it died, another one
gets the tasks that are left, without the part that the first one was at.
"""

from __future__ import annotations

import collections
import contextlib
import json
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

_STRIKES = 2  # tasks that a part may take down before it is left out of all


class Supervisor:
    """results: in the order in which they came. dropped: ids of tasks. stops: what went wrong."""

    def __init__(
        self,
        script: str,
        request: dict[str, Any],
        *,
        hear: Callable[[dict[str, Any]], None] = lambda message: None,
        patience: float = 120.0,
        grace: float = 30.0,
    ):
        """hear: gets every message but `doing`. patience: seconds of silence that are too many.
        grace: seconds past request["deadline"], in time.time()'s terms, until the end."""
        self._script, self._request, self._hear = script, request, hear
        self._patience, self._end = patience, request["deadline"] + grace
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
            if why is None:
                break
            self._learn(at, why, len(self._tasks) < before)
        self.dropped += self._tasks

    def _one_worker(self) -> tuple[dict[str, Any], str | None]:
        """What the worker was at, and why it stopped before its end; None: it did not."""
        request = {**self._request, "tasks": list(self._tasks.values()), "first": self._first}
        worker = subprocess.Popen(
            [sys.executable, self._script, "--worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
        )
        assert worker.stdin is not None and worker.stdout is not None
        lines: queue.Queue[str | None] = queue.Queue()
        last: collections.deque[str] = collections.deque(maxlen=1)
        readers = [
            threading.Thread(target=_read, args=(worker.stdout, lines.put), daemon=True),
            threading.Thread(target=_read, args=(worker.stderr, _teller(last)), daemon=True),
        ]
        for reader in readers:
            reader.start()
        at: dict[str, Any] = {}
        why: str | None = None
        try:
            with contextlib.suppress(OSError):  # it died at once; the end of its output says so
                worker.stdin.write(json.dumps(request))
                worker.stdin.close()
            while True:
                wait = min(self._patience, self._end - time.time())
                try:
                    line = lines.get(timeout=max(wait, 0.0))
                except queue.Empty:
                    silent = f"nothing heard for {wait:.0f} s"
                    return at, silent if wait == self._patience else "the time was up"
                if line is None:
                    status = worker.wait()
                    readers[1].join(timeout=5)
                    why = why or f"the process ended with status {status}: {''.join(last)}"
                    return at, why[:300]
                try:
                    message = json.loads(line)
                except ValueError:
                    continue
                if "doing" in message:
                    at = message
                    continue
                if "result" in message:
                    self.results.append(message["result"])
                    self._tasks.pop(message["result"]["id"])
                    at = {}
                elif "dropped" in message:
                    self.dropped.append(message["dropped"])
                    self._tasks.pop(message["dropped"])
                elif "lost" in message:
                    why = message["lost"]
                elif "machine" in message:
                    self._first = False
                elif "done" in message:
                    return {}, None
                self._hear(message)
        finally:
            worker.kill()
            worker.wait()
            with contextlib.suppress(OSError):
                worker.stdin.close()
            for reader in readers:
                reader.join(timeout=5)

    def _learn(self, at: dict[str, Any], why: str, moved: bool) -> None:
        """Leave out the part that did it, or the task where it was no part. moved: it did some."""
        name, entry = at.get("doing"), at.get("entry")
        self.stops.append(": ".join(part for part in (name, entry, why) if part))
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


def _read(stream: Any, put: Callable[[str | None], object]) -> None:
    with stream:
        for line in stream:
            put(line)
    put(None)


def _teller(last: collections.deque[str]) -> Callable[[str | None], None]:
    """Passes on what the worker says to people, and keeps the last line."""

    def tell(line: str | None) -> None:
        if line is not None:
            sys.stderr.write(line)
            if line.strip():
                last.append(" ".join(line.split()))

    return tell
