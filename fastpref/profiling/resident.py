"""The memory of this process as the system counts it, and what the C library keeps of it."""

from __future__ import annotations

import ctypes
import sys
import threading
import time
from pathlib import Path
from typing import Any, NamedTuple


def status_bytes(name: str) -> int | None:
    """A field of /proc/self/status in bytes; None if there is no such file or field."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(x.split()[1]) * 1024 for x in lines if x.startswith(name + ":")), None)


def reset_peak() -> bool:
    """Begin a new high-water mark of resident memory; False where the system has no such thing."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def life_peak() -> int | None:
    """The most resident memory that this process has had, in bytes."""
    peak = status_bytes("VmHWM")
    if peak is not None:
        return peak
    try:
        import resource
    except ImportError:  # Windows
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


class _Mallinfo(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks",
            "fordblks", "keepcost",
        )
    ]  # fmt: skip


def _mallinfo() -> Any:
    """glibc's mallinfo2; None with another C library."""
    try:
        function = ctypes.CDLL(None).mallinfo2
    except (AttributeError, OSError, TypeError):
        return None
    function.restype = _Mallinfo
    return function


class Sample(NamedTuple):
    """The memory of this process at one time.

    seconds: of `time.perf_counter`.
    resident: bytes in RAM.
    freed: those of them that the program has freed and malloc has not returned to the system.
    """

    seconds: float
    resident: int
    freed: int


class Resident:
    """Samples of this process's memory while a `with` block runs.

    Attributes:
        samples: in order; empty where the system does not tell.
        peak: the most resident bytes, from the system's own mark where it can be reset; None where
            the system does not tell.
    """

    def __init__(self, interval: float = 0.005) -> None:
        self.interval = interval
        self.samples: list[Sample] = []
        self.peak: int | None = None
        self._malloc = _mallinfo()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def sample(self) -> Sample | None:
        """The present values."""
        resident = status_bytes("VmRSS")
        if resident is None:
            return None
        freed = 0 if self._malloc is None else self._malloc().fordblks
        return Sample(time.perf_counter(), resident, freed)

    def __enter__(self) -> Resident:
        self._exact = reset_peak()
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._stopped.set()
        self._thread.join()
        self._add()
        if self.samples:
            self.peak = max(sample.resident for sample in self.samples)
            if self._exact:
                self.peak = max(self.peak, status_bytes("VmHWM") or 0)

    def _run(self) -> None:
        while not self._stopped.is_set():
            self._add()
            self._stopped.wait(self.interval)

    def _add(self) -> None:
        if (sample := self.sample()) is not None:
            self.samples.append(sample)

    @property
    def at_peak(self) -> Sample | None:
        """The sample of the peak: of those with nearly the most resident memory the one with the
        least freed, because memory stays resident when its blocks are freed."""
        peak = max((sample.resident for sample in self.samples), default=0)
        highest = [sample for sample in self.samples if sample.resident >= 0.99 * peak]
        return min(highest, key=lambda sample: sample.freed, default=None)
