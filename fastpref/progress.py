"""How far long work has come, as lines in a log file where there is no terminal for a bar."""

from __future__ import annotations

import contextlib
import multiprocessing
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import IO, Any, TypeVar

T = TypeVar("T")
INTERVAL = 30.0  # seconds between two lines

_chosen: IO[str] | None = None  # by `lines_to`
_silent = False  # by `silenced`
_current: ProgressLines | None = None  # of `counting`, which `count` adds to


class ProgressLines:
    """Prints a line about some work at most every `interval` seconds: done, rate and time left.

    Work that is over before the first line prints nothing, other work one more line at its end.

    Args:
        what: names the work.
        unit: of what is counted, in the plural.
        total: how many there are, or None.
        stream: where the lines go.
        start: how many were done before.
        interval: seconds; by default `INTERVAL`.
        clock: the time in seconds.
        shared: whether forked processes count, too.
    """

    def __init__(
        self,
        what: str,
        unit: str,
        total: int | None,
        stream: IO[str],
        *,
        start: int = 0,
        interval: float | None = None,
        clock: Callable[[], float] = time.monotonic,
        shared: bool = False,
    ) -> None:
        self.what, self.unit, self.total, self.stream = what, unit, total, stream
        self.start, self.clock, self.began = start, clock, clock()
        self.interval = INTERVAL if interval is None else interval
        # What is done, and when the last line was printed.
        self._now: Any = [float(start), self.began]
        self._lock: Any = contextlib.nullcontext()
        if shared:
            self._now = multiprocessing.Array("d", self._now)
            self._lock = self._now.get_lock()

    def add(self, count: int = 1) -> None:
        """Count some more as done."""
        with self._lock:
            self._now[0] += count
            now = self.clock()
            if now - self._now[1] < self.interval:
                return
            self._now[1] = now
            done = int(self._now[0])
        self._print(done, now - self.began)

    def update(self, done: int) -> None:
        """Say how many are done in all."""
        self.add(done - int(self._now[0]))

    def close(self) -> None:
        """The work has ended."""
        done = int(self._now[0])
        if self._now[1] > self.began and done > self.start:
            spent = duration(self.clock() - self.began)
            self._write(f"{self.what}: {done:,} {self.unit} done, in {spent}")

    def _print(self, done: int, spent: float) -> None:
        rate = (done - self.start) / spent if spent > 0 else 0.0
        text = f"{self.what}: {done:,}"
        if self.total:
            text += f" of {self.total:,} {self.unit} ({100 * done // self.total}%)"
        else:
            text += f" {self.unit}"
        text += f", {_rate(rate)} {self.unit}/s"
        if self.total and rate > 0:
            text += f", {duration(max(self.total - done, 0) / rate)} left"
        self._write(text)

    def _write(self, text: str) -> None:
        print(text, file=self.stream, flush=True)


def _rate(rate: float) -> str:
    return f"{rate:,.0f}" if rate >= 100 else f"{rate:.3g}"


def duration(seconds: float) -> str:
    """Seconds as a person would say them: 45 s, 12 min, 3 h 20 min."""
    minutes = round(seconds / 60)
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def stream_for_lines(disabled: bool = False) -> IO[str] | None:
    """Where lines go; None where a bar can be shown instead, or where no progress is wanted."""
    if _chosen is not None:
        return _chosen
    notebook = "ipykernel" in sys.modules  # which has bars of its own
    return None if disabled or _silent or notebook or sys.stderr.isatty() else sys.stderr


@contextlib.contextmanager
def lines_to(stream: IO[str] | None) -> Iterator[None]:
    """Within it all progress goes to this stream as lines; None changes nothing."""
    global _chosen
    before, _chosen = _chosen, stream or _chosen
    try:
        yield
    finally:
        _chosen = before


@contextlib.contextmanager
def silenced(yes: bool) -> Iterator[None]:
    """Within it there are no lines, unless `lines_to` asks for them."""
    global _silent
    before, _silent = _silent, _silent or yes
    try:
        yield
    finally:
        _silent = before


def watched(
    work: Iterable[T], what: str, unit: str, total: int, each: int, disabled: bool
) -> Iterator[T]:
    """The items of work, each of which counts for so many units, under a bar or with lines."""
    stream = stream_for_lines(disabled)
    if stream is None:
        from tqdm.auto import tqdm

        yield from tqdm(work, desc=what, disable=disabled)
        return
    lines = ProgressLines(what, unit, total, stream)
    done = 0
    for item in work:
        yield item
        done = min(done + each, total)
        lines.update(done)
    lines.close()


@contextlib.contextmanager
def counting(
    what: str, unit: str, total: int, *, disabled: bool, shared: bool
) -> Iterator[ProgressLines | None]:
    """Within it `count` prints lines, where they are wanted; otherwise there are none."""
    global _current
    stream = stream_for_lines(disabled)
    before, lines = _current, None
    if stream is not None:
        lines = ProgressLines(what, unit, total, stream, shared=shared)
    _current = lines
    try:
        yield lines
        if lines is not None:
            lines.close()
    finally:
        _current = before


def count(number: int = 1) -> None:
    """Count what is done within `counting`, in this process or in a forked one."""
    if _current is not None:
        _current.add(number)


def size_text(count: float | None) -> str:
    """Bytes for people: 12.3 MB, 4.56 GB; "not measured" for None."""
    if count is None:
        return "not measured"
    for unit, scale in (("GB", 1e9), ("MB", 1e6)):
        if count >= scale:
            return f"{count / scale:.3g} {unit}"
    return f"{count / 1e3:.3g} kB"
