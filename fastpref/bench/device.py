"""The devices that are measured, with one interface: time, peak memory, errors that end a process.

`Device` is the CPU and defines the interface. `Gpu` takes times between events, with a cold cache.
`PretendGpu` is a CPU that gets the tasks of a GPU, for tests: its figures mean nothing.
"""

from __future__ import annotations

import contextlib
import gc
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fastpref.backends.host_memory import release_memory
from fastpref.profiling.resident import status_bytes

# Before each timed call the GPU spins for so long. The host prepares the call's launches meanwhile,
# as in training, where the host is ahead of the GPU. The host's time is reported separately.
_AHEAD_S = 2e-3
_FLUSH_BYTES = 256 * 2**20
# With these variables glibc returns every large block to the system when it is freed, so that
# resident memory is live memory.
TIGHT_MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}


class Lost(Exception):
    """An error after which this process cannot use the GPU any more."""


class Times(NamedTuple):
    """Seconds of one call.

    device: between events on a GPU. host: until the call returned.
    """

    device: float
    host: float


class Device:
    """The CPU. Peak memory is that of the process, which should run with TIGHT_MALLOC."""

    kind = "cpu"
    device = torch.device("cpu")
    # The backends that are measured, each by itself; none: only the one that fastpref picks.
    backends: tuple[str, ...] = ()

    @property
    def like_gpu(self) -> bool:
        """Whether this device gets the tasks of a GPU."""
        return self.kind != "cpu"

    def synchronize(self) -> None:
        """Wait until all calls are done."""

    def check(self, reason: str) -> None:
        """Raise Lost, with the reason, after an error that makes every later call fail."""

    def free(self) -> None:
        """Free unused memory, including graphs that were compiled for another shape."""
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
        release_memory()
        before = _status("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")
        call()
        peak = peak_resident_bytes()
        return {"resident_before": before, "peak_resident": peak, "peak_beyond": peak - before}

    def describe(self) -> dict[str, Any]:
        """Facts about this device, to be added to those about the machine."""
        return {}


def _status(key: str) -> int:
    """A field of /proc/self/status in bytes."""
    size = status_bytes(key)
    if size is None:
        raise RuntimeError(f"/proc/self/status has no {key}; peak memory is measured on Linux only")
    return size


def peak_resident_bytes() -> int:
    """The most resident memory of this process since its start or the last `Device.peak`."""
    return _status("VmHWM")


def resident_bytes() -> int:
    """The present resident memory of this process."""
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

    def check(self, reason: str) -> None:
        try:
            self._sink.add_(0).item()
        except Exception:
            raise Lost(reason) from None

    def free(self) -> None:
        super().free()
        torch.cuda.empty_cache()

    def time(self, call: Callable[[], object], reset: Callable[[], object] | None = None) -> Times:
        """One call with a cold cache, after `reset`.

        The cache is filled by reading another tensor: lines that were read, unlike written ones,
        need not be written back while the call runs.
        """
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
        """Bytes of tensors at the peak of a call beyond those before it.

        The allocator counts them. Neither its reserve nor memory that libraries allocate past it
        is included.
        """
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
    """The driver, and the GPU's power and clock limits, as nvidia-smi reports them."""
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
    """Drop compiled graphs, if the compiler was imported.

    Otherwise torch compiles the second shape with dynamic sizes, and the ninth not at all.
    """
    compiler = sys.modules.get("torch._dynamo")
    if compiler is not None:
        compiler.reset()


def open_device(kind: str | None = None) -> Device:
    """The device of a kind: "cpu", "cuda" or "pretend"; None: "cuda" if there is a GPU."""
    kind = kind or ("cuda" if torch.cuda.is_available() else "cpu")
    return {"cpu": Device, "cuda": Gpu, "pretend": PretendGpu}[kind]()
