"""Progress of long work, as lines in a log file where there is no terminal for a bar."""

from __future__ import annotations

import contextlib
import multiprocessing
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar
from typing import IO, Any, TypeVar

T = TypeVar("T")
INTERVAL = 30.0  # seconds between two lines

# Each thread has values of its own: two trainers may work at the same time.
_chosen_stream: ContextVar[IO[str] | None] = ContextVar("chosen_stream", default=None)
_silent: ContextVar[bool] = ContextVar("silent", default=False)
_current: ContextVar[ProgressLines | None] = ContextVar("current", default=None)


class ProgressLines:
    """Prints a line about some work at most every `interval` seconds: count, rate and time left.

    A last line follows when the work is done, unless it took less than one interval.

    Args:
        what: the name of the work.
        unit: what is counted, in the plural, such as "rows".
        total: the expected count, or None.
        stream: where the lines are printed.
        start: the count at the beginning, of a run that was resumed.
        interval: seconds between two lines; by default `INTERVAL`.
        clock: returns the time in seconds.
        shared: whether forked processes count as well.
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
        # The count, and the time of the last line.
        self._now: Any = [float(start), self.began]
        self._lock: Any = contextlib.nullcontext()
        if shared:
            self._now = multiprocessing.Array("d", self._now)
            self._lock = self._now.get_lock()

    def add(self, count: int = 1) -> None:
        """Increase the count."""
        with self._lock:
            self._now[0] += count
            now = self.clock()
            if now - self._now[1] < self.interval:
                return
            self._now[1] = now
            done = int(self._now[0])
        self._print(done, now - self.began)

    def update(self, done: int) -> None:
        """Set the count."""
        self.add(done - int(self._now[0]))

    def close(self) -> None:
        """Print the last line."""
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
    """Seconds as text: 45 s, 12 min, 3 h 20 min."""
    minutes = round(seconds / 60)
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def stream_for_lines(disabled: bool = False) -> IO[str] | None:
    """The stream for lines; None if a bar can be shown instead, or if progress is disabled."""
    chosen = _chosen_stream.get()
    if chosen is not None:
        return chosen
    notebook = "ipykernel" in sys.modules  # notebooks show bars
    return None if disabled or _silent.get() or notebook or sys.stderr.isatty() else sys.stderr


@contextlib.contextmanager
def lines_to(stream: IO[str] | None) -> Iterator[None]:
    """Print all progress as lines to this stream; None has no effect."""
    token = _chosen_stream.set(stream or _chosen_stream.get())
    try:
        yield
    finally:
        _chosen_stream.reset(token)


@contextlib.contextmanager
def silenced(yes: bool) -> Iterator[None]:
    """Print no lines if `yes`, except to the stream of `lines_to`."""
    token = _silent.set(yes or _silent.get())
    try:
        yield
    finally:
        _silent.reset(token)


def watched(
    work: Iterable[T], what: str, unit: str, total: int, units_per_item: int, disabled: bool
) -> Iterator[T]:
    """The items of `work`, with a bar or with lines.

    Args:
        what, unit, total: as in `ProgressLines`.
        units_per_item: how much an item adds to the count.
        disabled: whether to show no progress.
    """
    done = 0
    with advancing(what, unit, total, disabled) as advance:
        for item in work:
            yield item
            units = min(units_per_item, total - done)
            done += units
            advance(units)


@contextlib.contextmanager
def advancing(
    what: str, unit: str, total: int, disabled: bool
) -> Iterator[Callable[[int], object]]:
    """Show a bar or lines. Yields the function that increases the count.

    Arguments as in `watched`.
    """
    stream = stream_for_lines(disabled)
    if stream is None:
        from tqdm.auto import tqdm

        with tqdm(total=total, desc=what, unit=f" {unit}", disable=disabled) as bar:
            yield bar.update
        return
    lines = ProgressLines(what, unit, total, stream)
    yield lines.add
    lines.close()


@contextlib.contextmanager
def counting(
    what: str, unit: str, total: int, *, disabled: bool, shared: bool
) -> Iterator[ProgressLines | None]:
    """Direct `count` to lines, which are yielded; None if `stream_for_lines` says so.

    Arguments as in `ProgressLines`.
    """
    stream = stream_for_lines(disabled)
    lines = None
    if stream is not None:
        lines = ProgressLines(what, unit, total, stream, shared=shared)
    token = _current.set(lines)
    try:
        yield lines
        if lines is not None:
            lines.close()
    finally:
        _current.reset(token)


def count(number: int = 1) -> None:
    """Increase the count of `counting`, from this process or from a forked one."""
    lines = _current.get()
    if lines is not None:
        lines.add(number)


def size_text(count: float | None) -> str:
    """Bytes for people: 12.3 MB, 4.56 GB; "not measured" for None."""
    if count is None:
        return "not measured"
    for unit, scale in (("GB", 1e9), ("MB", 1e6)):
        if count >= scale:
            return f"{count / scale:.3g} {unit}"
    return f"{count / 1e3:.3g} kB"
