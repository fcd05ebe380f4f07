"""What every benchmark shares: interleaved timing, peak memory, the machine, targets, results.

Variants are timed call by call in one process, in a new order every round, so that a slow spell of
the machine hits all of them; medians and quartiles are reported, and beside them those of a canary
product that shows such spells.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib.metadata
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).resolve().parent.parent / "results"
PACKAGES = (
    "torch",
    "transformers",
    "trl",
    "liger_kernel",
    "cut-cross-entropy",
    "accelerate",
    "datasets",
    "peft",
    "triton",
    "quack-kernels",
    "nvidia-cutlass-dsl",
    "fastpref",
)
# With these glibc gives every large block back at once, so that resident memory is live memory.
TIGHT_MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}


# ---- time --------------------------------------------------------------------------------------


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


def timed(call: Callable[[], object], reset: Callable[[], object] | None = None) -> float:
    """Seconds of one call. reset runs before it, outside of the measurement."""
    if reset is not None:
        reset()
    gc.collect()
    gc.disable()
    try:
        start = time.perf_counter()
        call()
        return time.perf_counter() - start
    finally:
        gc.enable()


def interleave(
    calls: dict[str, Callable[[], object]],
    cost: dict[str, float],
    *,
    repeats: int,
    seconds: float,
    reset: Callable[[], object] | None = None,
    seed: int = 0,
) -> dict[str, Timing]:
    """Time the calls round by round, in an order that is shuffled every round.

    cost: seconds that a call takes once it is warm. seconds: what one variant may spend in all; a
    slower one takes part in fewer rounds, spread evenly, but in three at least.
    """
    shares = share_rounds({name: cost[name] for name in calls}, repeats, seconds)
    timings = {name: Timing(limited=shares[name] < repeats) for name in calls}
    order = random.Random(seed)
    for i in range(repeats):
        for name in due(shares, i, repeats, order):
            timings[name].seconds.append(timed(calls[name], reset))
    return timings


def share_rounds(cost: dict[str, float], repeats: int, seconds: float) -> dict[str, int]:
    """Of so many rounds, how many each call takes part in when it may spend so many seconds."""
    fits = {name: int(seconds / max(c, 1e-9)) for name, c in cost.items()}
    return {name: min(repeats, max(3, n)) for name, n in fits.items()}


def due(shares: dict[str, int], i: int, repeats: int, order: random.Random) -> list[str]:
    """Whose turn it is in round i, shuffled; a call that sits out rounds does so evenly."""
    names = [n for n, k in shares.items() if (i + 1) * k // repeats > i * k // repeats]
    order.shuffle(names)
    return names


def canary(dtype: torch.dtype) -> Callable[[], object]:
    """A fixed product, 8.6 GFLOP: its spread is the machine's, not any variant's."""
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(512, 1024, generator=generator).to(dtype)
    b = torch.randn(1024, 8192, generator=generator).to(dtype)
    out = torch.empty(512, 8192, dtype=dtype)
    return lambda: torch.mm(a, b, out=out)


def head_products(n: int, h: int, v: int, dtype: torch.dtype) -> dict[str, Callable[[], object]]:
    """The three products of a head, bare, at the measured shape: the machine's own GEMM rates."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, h, generator=generator).to(dtype)
    w = torch.randn(v, h, generator=generator).to(dtype)
    d = torch.empty(n, v, dtype=dtype).uniform_(generator=generator)
    u, dw = torch.empty(n, h, dtype=dtype), torch.empty(v, h, dtype=dtype)
    return {
        "X W^T": lambda: torch.mm(x, w.t(), out=d),
        "D W": lambda: torch.mm(d, w, out=u),
        "D^T X": lambda: torch.mm(d.t(), x, out=dw),
    }


# ---- memory ------------------------------------------------------------------------------------


def _status(key: str) -> int:
    """A line of /proc/self/status that is in kB, as bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {key}; peak memory is measured on Linux only")


def peak_resident_bytes() -> int:
    """The most memory that this process has held, or since the last `reset_peak`."""
    return _status("VmHWM")


def reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def peak_beyond(call: Callable[[], object], reset: Callable[[], object]) -> dict[str, int]:
    """Peak resident memory of a call beyond what was resident before it, in bytes."""
    reset()
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    before = _status("VmRSS")
    reset_peak()
    call()
    peak = peak_resident_bytes()
    return {"resident_before": before, "peak_resident": peak, "peak_beyond": peak - before}


def run_worker(script: str, request: dict[str, Any], env: dict[str, str]) -> dict[str, Any]:
    """Run `script --worker` in a process of its own: request in on stdin, the last line of stdout
    back. Raises RuntimeError with the last line of stderr."""
    done = subprocess.run(
        [sys.executable, script, "--worker"],
        input=json.dumps(request),
        env={**os.environ, **env},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        raise RuntimeError(f"the worker failed: {lines[-1]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


# ---- what it ran on ----------------------------------------------------------------------------


def _git(*args: str) -> str | None:
    here = Path(__file__).resolve().parents[2]
    try:
        done = subprocess.run(["git", *args], cwd=here, capture_output=True, text=True, timeout=30)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def machine() -> dict[str, Any]:
    """Device, versions, threads and commit; no host name and no path."""
    import fastpref.backends

    cpu, flags = platform.processor(), ""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                cpu = value.strip()
            elif key.strip() == "flags":
                flags = value
                break
    wanted = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")
    versions = {}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    sources = ("fastpref", "csrc", "kernels")
    dirty = _git("status", "--porcelain", "--untracked-files=no", "--", *sources)
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "cpu": cpu,
        "cpu_features": [f for f in wanted if f in flags.split()],
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        "packages": versions,
        "backend": fastpref.backends.active(),
        # COMMIT: for a copy of the tree that is no checkout.
        "commit": _git("rev-parse", "HEAD") or os.environ.get("COMMIT"),
        "uncommitted_changes": None if dirty is None else bool(dirty),
    }


# ---- results -----------------------------------------------------------------------------------


def target(what: str, wanted: float, measured: float | None, *, most: bool = False) -> dict:
    """One aim beside what was measured. most: the aim is an upper bound."""
    met = None if measured is None else (measured <= wanted if most else measured >= wanted)
    rounded = None if measured is None else round(measured, 4)
    bound = "at most" if most else "at least"
    return {"target": what, "bound": bound, "wanted": wanted, "measured": rounded, "met": met}


def table(header: list[str], rows: list[list[str]]) -> str:
    """Left-aligned first column, right-aligned others."""
    widths = [max(len(r[i]) for r in [header, *rows]) for i in range(len(header))]
    lines = []
    for row in [header, *rows]:
        first, *others = zip(row, widths, strict=True)
        cells = [first[0].ljust(first[1]), *(c.rjust(w) for c, w in others)]
        lines.append("  ".join(cells).rstrip())
    lines.insert(1, "  ".join("-" * w for w in widths))
    return "\n".join(lines)


def target_table(targets: list[dict]) -> str:
    marks = {True: "met", False: "MISSED", None: "not measured"}
    rows = [
        [
            t["target"],
            f"{'<=' if t['bound'] == 'at most' else '>='} {t['wanted']:.3g}",
            "-" if t["measured"] is None else f"{t['measured']:.3g}",
            marks[t["met"]],
        ]
        for t in targets
    ]
    return table(["target", "wanted", "measured", ""], rows)


def results_path(output: str) -> Path:
    """Where --output says: a path that ends in .json, or the name of a file in results/."""
    path = Path(output)
    return path if path.suffix == ".json" else RESULTS / f"{output}.json"


def write_json(path: Path, results: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1) + "\n")


def one_line(error: BaseException) -> str:
    """The first line of an error, for a variant that cannot run."""
    text = " ".join((str(error).strip().splitlines() or [""])[0].split())
    return f"{type(error).__name__}: {text}"[:200]
