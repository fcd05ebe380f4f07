"""The devices that are measured, behind one face: time, peak memory, errors that end a process.

`Device` is the CPU and the face; `Gpu` times with events, with a cold cache. `PretendGpu` is a CPU
that gets a GPU's list of work, for tests: its figures mean nothing.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fastpref.profiling.resident import status_bytes

# Before each timed call the GPU spins for so long, in which the host prepares the call's launches:
# in training it is ahead as well. What the host takes is reported beside.
_AHEAD_S = 2e-3
_FLUSH_BYTES = 256 * 2**20
# With these glibc gives every large block back at once, so that resident memory is live memory.
TIGHT_MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}


class Lost(Exception):
    """The GPU is beyond use for this process."""


class Times(NamedTuple):
    """Seconds of one call: between events on a GPU, and until the call returned on the host."""

    device: float
    host: float


class Device:
    """The CPU. Peak memory is the process's, which should run with TIGHT_MALLOC."""

    kind = "cpu"
    device = torch.device("cpu")
    # fastpref's that are measured one by one; none: the one that fastpref picks.
    backends: tuple[str, ...] = ()

    @property
    def like_gpu(self) -> bool:
        """Whether it gets the GPU's list of work."""
        return self.kind != "cpu"

    def synchronize(self) -> None:
        """Wait until all calls are done."""

    def check(self, why: str) -> None:
        """Raise Lost, with why, after an error that no later call of this process can survive."""

    def free(self) -> None:
        """Give memory back that nothing uses, graphs compiled for another shape included."""
        forget_compiled()
        gc.collect()

    def time(self, call: Callable[[], object], reset: Callable[[], object] | None = None) -> Times:
        """One call, after `reset`, which is not timed."""
        return self.wall(call, reset)

    def wall(self, call: Callable[[], object], reset: Callable[[], object] | None = None) -> Times:
        """One call until the device is done, with whatever the cache holds."""
        if reset is not None:
            reset()
        gc.collect()
        self.synchronize()
        collecting = gc.isenabled()
        gc.disable()
        try:
            start = time.perf_counter()
            call()
            host = time.perf_counter() - start
            self.synchronize()
            return Times(time.perf_counter() - start, host)
        finally:
            if collecting:
                gc.enable()

    def peak(self, call: Callable[[], object]) -> dict[str, int]:
        """Peak resident memory of a call beyond what was resident before it, in bytes."""
        gc.collect()
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL("libc.so.6").malloc_trim(0)
        before = _status("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")
        call()
        peak = peak_resident_bytes()
        return {"resident_before": before, "peak_resident": peak, "peak_beyond": peak - before}

    def describe(self) -> dict[str, Any]:
        """What to say of it beside the machine."""
        return {}


def _status(key: str) -> int:
    """A line of /proc/self/status that is in kB, as bytes."""
    size = status_bytes(key)
    if size is None:
        raise RuntimeError(f"/proc/self/status has no {key}; peak memory is measured on Linux only")
    return size


def peak_resident_bytes() -> int:
    """The most memory that this process has held, or since the last `Device.peak`."""
    return _status("VmHWM")


def resident_bytes() -> int:
    """The memory that this process holds now."""
    return _status("VmRSS")


class PretendGpu(Device):
    """`Gpu` on a CPU."""

    kind = "pretend"
    backends = ("native", "eager")

    def peak(self, call: Callable[[], object]) -> dict[str, int]:
        call()
        return {"allocated_before": 0, "peak_allocated": 0, "peak_beyond": 0}

    def describe(self) -> dict[str, Any]:
        return {"gpu": "none: a CPU that pretends; no figure here means anything"}


class Gpu(Device):
    """One NVIDIA or AMD GPU, on its default stream."""

    kind = "cuda"
    backends = ("cuda", "triton")

    def __init__(self, index: int = 0):
        if not torch.cuda.is_available():
            raise RuntimeError("torch finds no GPU")
        self.device = torch.device("cuda", index)
        torch.cuda.set_device(self.device)
        self._properties = torch.cuda.get_device_properties(self.device)
        cache = getattr(self._properties, "L2_cache_size", 0)
        self._other = torch.zeros(max(_FLUSH_BYTES, 4 * cache) // 4, device=self.device)
        self._sink = torch.zeros((), device=self.device)
        self._spin_cycles = self._calibrate()

    def _events(self) -> tuple[torch.cuda.Event, torch.cuda.Event]:
        return torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)

    def _calibrate(self) -> int:
        """How many cycles of torch's spinning kernel make `_AHEAD_S`; 0 where there is none."""
        spin = getattr(torch.cuda, "_sleep", None)
        if spin is None:
            return 0
        rates = []
        for _ in range(3):
            start, end = self._events()
            start.record()
            spin(1_000_000)
            end.record()
            end.synchronize()
            rates.append(1_000_000 / max(start.elapsed_time(end), 1e-3) * 1e3)
        return int(_AHEAD_S * sorted(rates)[1])

    def synchronize(self) -> None:
        torch.cuda.synchronize(self.device)

    def check(self, why: str) -> None:
        try:
            self._sink.add_(0).item()
        except Exception:
            raise Lost(why) from None

    def free(self) -> None:
        super().free()
        torch.cuda.empty_cache()

    def time(self, call: Callable[[], object], reset: Callable[[], object] | None = None) -> Times:
        """One call with a cold cache, after `reset`. Reading fills the cache with other lines that,
        unlike written ones, need not be written back while the call runs."""
        if reset is not None:
            reset()
        torch.sum(self._other, 0, out=self._sink)
        self.synchronize()
        start, end = self._events()
        if self._spin_cycles:
            torch.cuda._sleep(self._spin_cycles)
        start.record()
        begun = time.perf_counter()
        call()
        host = time.perf_counter() - begun
        end.record()
        end.synchronize()
        return Times(start.elapsed_time(end) / 1e3, host)

    def peak(self, call: Callable[[], object]) -> dict[str, int]:
        """Bytes of tensors at the peak of a call beyond those before it, as the allocator counts
        them: neither what it keeps in reserve nor what libraries take past it."""
        self.synchronize()
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        call()
        self.synchronize()
        peak = torch.cuda.max_memory_allocated(self.device)
        return {"allocated_before": before, "peak_allocated": peak, "peak_beyond": peak - before}

    def describe(self) -> dict[str, Any]:
        p = self._properties
        about: dict[str, Any] = {
            "gpu": p.name,
            "capability": f"{p.major}.{p.minor}",
            "multiprocessors": p.multi_processor_count,
            "l2_mib": round(getattr(p, "L2_cache_size", 0) / 2**20, 1),
            "gpu_memory_gib": round(p.total_memory / 2**30, 1),
            "cuda": torch.version.cuda,
            "hip": torch.version.hip,
            "gpus": torch.cuda.device_count(),
        }
        return about | _driver(self.device.index)


def _driver(index: int) -> dict[str, str]:
    """The driver and the limits that the GPU runs under, as nvidia-smi tells them."""
    names = "driver_version", "power.limit", "clocks.max.sm", "clocks.max.mem"
    if shutil.which("nvidia-smi") is None:
        return {}
    query = [f"--query-gpu={','.join(names)}", "--format=csv,noheader", f"--id={index}"]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(["nvidia-smi", *query], capture_output=True, text=True, timeout=20)
        values = [v.strip() for v in done.stdout.strip().split(",")]
        if done.returncode == 0 and len(values) == len(names):
            return dict(zip(names, values, strict=True))
    return {}


def forget_compiled() -> None:
    """Otherwise torch compiles the second shape for shapes of any size, and the ninth not at all.
    Where nothing has been compiled, the compiler is not even imported."""
    compiler = sys.modules.get("torch._dynamo")
    if compiler is not None:
        compiler.reset()


def open_device(kind: str | None = None) -> Device:
    """cpu, cuda or pretend; None: cuda where there is one."""
    kind = kind or ("cuda" if torch.cuda.is_available() else "cpu")
    return {"cpu": Device, "cuda": Gpu, "pretend": PretendGpu}[kind]()
