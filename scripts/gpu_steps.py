"""Steps of a run on a GPU: a command each, in a process of its own, with a time limit.

A GPU's errors and hangs end the process that meets them, so a step can fail, crash or hang without
stopping the steps after it.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).resolve().parents[1]
_POLL_S = 0.1
_TICK_S = 1.0
_KILL_S = 10.0  # how long a killed process may take to disappear: the driver can hold it
_CUT_GRACE_S = 3.0  # whoever cut the run kills it soon
_TAIL_LINES, _TAIL_BYTES = 12, 1 << 16
_SIGNALS = tuple(
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
)
_received: list[int] = []  # signals to this process


@dataclass(frozen=True)
class Step:
    """seconds: the most it gets. least: with less left, it is left out; steps before it leave it so
    much. grace: between the interrupt at its limit and the kill. needs: steps without which it is
    pointless. In the command "{seconds}" becomes the limit that it runs under, "{seconds-10}" ten
    seconds less."""

    name: str
    command: Sequence[str]
    seconds: float
    least: float = 5.0
    grace: float = 8.0
    needs: tuple[str, ...] = ()
    env: Mapping[str, str] = field(default_factory=dict)


@dataclass
class Outcome:
    """state: passed, failed, timed out, cut, left out. status: of the process; negative: a signal.
    tail: its last lines."""

    name: str
    state: str
    status: int | None = None
    seconds: float = 0.0
    limit: float = 0.0
    why: str = ""
    tail: list[str] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        return self.state == "passed"

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def heed_signals() -> None:
    """From now on SIGINT, SIGTERM and SIGHUP end the current step, and `cut_by` names the first."""

    def note(number: int, frame: object) -> None:
        _received.append(number)

    for each in _SIGNALS:
        signal.signal(each, note)


def cut_by() -> int | None:
    """The signal that told this run to stop, or None."""
    return _received[0] if _received else None


def run_step(
    step: Step,
    limit: float | None = None,
    *,
    log: Path | None = None,
    tick: Callable[[], object] = lambda: None,
) -> Outcome:
    """Run a step for `limit` seconds at most, by default its own.

    log: the file that its output is appended to; None: this process's output. tick: called about
    once a second while it runs.
    """
    limit = step.seconds if limit is None else limit
    command = [_filled(part, limit) for part in step.command]
    outcome = Outcome(step.name, "failed", limit=round(limit, 1))
    start = log.stat().st_size if log is not None and log.exists() else 0
    begun = time.monotonic()
    with contextlib.ExitStack() as stack:
        output: IO[bytes] | None = None
        if log is not None:
            output = stack.enter_context(open(log, "ab"))
        sys.stdout.flush()
        try:
            process = subprocess.Popen(
                command,
                cwd=ROOT,
                env={**os.environ, "PYTHONUNBUFFERED": "1", **step.env},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=None if output is None else subprocess.STDOUT,
                start_new_session=True,
            )
        except OSError as error:
            outcome.why = f"it did not start: {error}"
            return outcome
        try:
            if not _watch(process, begun + limit, tick):
                number = cut_by()
                if number is None:
                    outcome.state, outcome.why = "timed out", f"longer than {limit:.0f} s"
                else:
                    outcome.state = "cut"
                    outcome.why = f"the run was cut by {signal.Signals(number).name}"
                _signal(process, signal.SIGINT)  # pytest and the benchmark then sum up
                grace = step.grace if number is None else min(step.grace, _CUT_GRACE_S)
                _watch(process, time.monotonic() + grace, tick, heed=False)
        finally:
            _end(process, outcome)
    outcome.seconds = round(time.monotonic() - begun, 1)
    outcome.tail = text_since(log, start).splitlines()[-_TAIL_LINES:]
    if outcome.state == "failed" and outcome.status == 0:
        outcome.state = "passed"
    elif outcome.state == "failed":
        outcome.why = outcome.why or said(outcome.status)
    return outcome


def _filled(part: str, limit: float) -> str:
    for field_name, value in (("{seconds}", limit), ("{seconds-10}", max(limit - 10, 1.0))):
        part = part.replace(field_name, f"{value:.0f}")
    return part


def _watch(
    process: subprocess.Popen[bytes],
    end: float,
    tick: Callable[[], object],
    heed: bool = True,
) -> bool:
    """Whether the process ended in time. heed: a signal to this process ends the time."""
    last = time.monotonic()
    while process.poll() is None:
        now = time.monotonic()
        if now >= end or (heed and cut_by() is not None):
            return False
        if now - last >= _TICK_S:
            last = now
            tick()
        time.sleep(min(_POLL_S, max(end - now, 0.0)))
    return True


def _signal(process: subprocess.Popen[bytes], number: int) -> None:
    """To the process and whatever it started: the compilers and workers of a step are its group."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, number)


def _end(process: subprocess.Popen[bytes], outcome: Outcome) -> None:
    _signal(process, signal.SIGKILL)
    try:
        outcome.status = process.wait(_KILL_S)
    except subprocess.TimeoutExpired:
        outcome.why = f"{outcome.why}; it could not be killed".removeprefix("; ")


def said(status: int | None) -> str:
    if status is not None and status < 0:
        with contextlib.suppress(ValueError):
            return f"ended by {signal.Signals(-status).name}"
    return f"ended with status {status}"


def text_since(log: Path | None, start: int, most: int = _TAIL_BYTES) -> str:
    """What was written to the log since it had `start` bytes: the last `most` of it."""
    if log is None or not log.exists():
        return ""
    with open(log, "rb") as file:
        file.seek(max(start, log.stat().st_size - most))
        return file.read().decode("utf-8", "replace")


def read_json(path: Path) -> Any:
    """None where there is no such file, or half of one."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def write_json(path: Path, value: object) -> None:
    write_text(path, json.dumps(value, indent=1))


def write_text(path: Path, text: str) -> None:
    """Whole or not at all: whoever stops this process leaves the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.part")
    scratch.write_text(text, encoding="utf-8")
    os.replace(scratch, path)
