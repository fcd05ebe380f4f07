"""What a GPU changes about measuring: events, the cache, peak memory, errors that end a process.

`Gpu` is the device; `PretendGpu` has the same face on a CPU, so that all that is built on it can be
tried and tested where there is no GPU. Its times and bytes mean nothing.
"""

from __future__ import annotations

import contextlib
import gc
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from . import runner

# Before each timed call the GPU spins for so long, in which the host prepares the call's launches:
# in training it is ahead as well. What the host takes is reported beside.
_AHEAD_S = 2e-3
_FLUSH_BYTES = 256 * 2**20


class Lost(Exception):
    """The GPU is beyond use for this process."""


class Times(NamedTuple):
    """Seconds of one call: between events on the GPU, and until the call returned on the host."""

    device: float
    host: float


class Gpu:
    """Timing and memory of one NVIDIA or AMD GPU, on its default stream."""

    def __init__(self, index: int = 0):
        if not torch.cuda.is_available():
            raise RuntimeError("torch finds no GPU")
        self.device = torch.device("cuda", index)
        torch.cuda.set_device(self.device)
        properties = torch.cuda.get_device_properties(self.device)
        self._properties = properties
        cache = getattr(properties, "L2_cache_size", 0)
        self._other = torch.zeros(max(_FLUSH_BYTES, 4 * cache) // 4, device=self.device)
        self._sink = torch.zeros((), device=self.device)
        self._spin_cycles = self._calibrate()

    backends = ("cuda", "triton")

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
        """Raise Lost, with why, after an error that no later call of this process can survive."""
        try:
            self._sink.add_(0).item()
        except Exception:
            raise Lost(why) from None

    def free(self) -> None:
        """Give memory back that nothing uses, graphs compiled for another shape included."""
        forget_compiled()
        gc.collect()
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


class PretendGpu:
    """`Gpu` on a CPU."""

    backends = ("native", "eager")
    device = torch.device("cpu")

    def synchronize(self) -> None:
        pass

    def check(self, why: str) -> None:
        pass

    def free(self) -> None:
        forget_compiled()
        gc.collect()

    def time(self, call: Callable[[], object], reset: Callable[[], object] | None = None) -> Times:
        if reset is not None:
            reset()
        begun = time.perf_counter()
        call()
        seconds = time.perf_counter() - begun
        return Times(seconds, seconds)

    def peak(self, call: Callable[[], object]) -> dict[str, int]:
        call()
        return {"allocated_before": 0, "peak_allocated": 0, "peak_beyond": 0}

    def describe(self) -> dict[str, Any]:
        return {"gpu": "none: a CPU that pretends; no figure here means anything"}


def forget_compiled() -> None:
    """Otherwise torch compiles the second shape for shapes of any size, and the ninth not at all.
    Where nothing has been compiled, the compiler is not even imported."""
    compiler = sys.modules.get("torch._dynamo")
    if compiler is not None:
        compiler.reset()


def open_device(kind: str) -> Gpu | PretendGpu:
    return PretendGpu() if kind == "pretend" else Gpu()


class Rounds:
    """Interleaved calls: each round all of them, in an order of its own, so that a hot spell of the
    GPU hits every side."""

    def __init__(self, gpu: Gpu | PretendGpu, repeats: int, seconds: float, seed: int = 0):
        self._gpu, self._repeats, self._seconds = gpu, repeats, seconds
        self._order = random.Random(seed)
        self.device: dict[str, runner.Timing] = {}
        self.host: dict[str, runner.Timing] = {}
        self.failed: dict[str, str] = {}

    def run(
        self,
        calls: dict[str, Callable[[], object]],
        cost: dict[str, float],
        reset: Callable[[], object] | None = None,
        doing: Callable[[str], object] = lambda name: None,
    ) -> None:
        """cost: seconds of a warm call; one that is slow sits out rounds, but takes part in three.

        doing: told whose turn it is. A call that fails is out, and `failed` says why. Raises Lost.
        """
        wanted = {name: cost[name] for name in calls}
        shares = runner.share_rounds(wanted, self._repeats, self._seconds)
        for name, k in shares.items():
            self.device[name] = runner.Timing(limited=k < self._repeats)
            self.host[name] = runner.Timing(limited=k < self._repeats)
        gc.collect()
        gc.freeze()  # what lives now stays; it need not be looked at again every round
        gc.disable()
        try:
            for i in range(self._repeats):
                for name in runner.due(shares, i, self._repeats, self._order):
                    if name not in self.failed:
                        self._once(name, calls[name], reset, doing)
                gc.collect()
        finally:
            gc.enable()
            gc.unfreeze()

    def _once(self, name: str, call: Any, reset: Any, doing: Callable[[str], object]) -> None:
        doing(name)
        try:
            times = self._gpu.time(call, reset)
        except Exception as error:
            self.failed[name] = failure(error)
            self._gpu.check(self.failed[name])
            return
        self.device[name].seconds.append(times.device)
        self.host[name].seconds.append(times.host)


def failure(error: BaseException) -> str:
    """One line on why something cannot run here; running out of memory is a result like others."""
    if isinstance(error, torch.OutOfMemoryError):
        return f"out of memory: {runner.one_line(error)}"
    return runner.one_line(error)
