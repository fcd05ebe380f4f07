"""The host memory that this process may use, the machine's or its container's, and its return."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
from pathlib import Path

# The folders of control groups of both versions, with their files of the limit and of the use.
_GROUPS = (
    ("/sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"),
    (
        "/sys/fs/cgroup/memory",
        "memory.limit_in_bytes",
        "memory.usage_in_bytes",
        "total_inactive_file",
    ),
)


def memory_limit() -> int | None:
    """Bytes of the machine, or of its container if those are fewer; None if they are not known."""
    try:
        sizes = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    except (AttributeError, ValueError, OSError):
        return None
    sizes += [limit for limit, _ in _limits()]
    return min((size for size in sizes if size > 0), default=None)


def free_memory() -> int | None:
    """Bytes that are free on the machine and in its container; None if they are not known."""
    sizes = [limit - used for limit, used in _limits()]
    with contextlib.suppress(OSError, KeyError, ValueError):
        with open("/proc/meminfo", encoding="ascii") as file:
            lines = dict(line.split(":") for line in file)
        sizes.append(int(lines["MemAvailable"].split()[0]) * 1024)
    return max(min(sizes), 0) if sizes else None


def _limits() -> list[tuple[int, int]]:
    """The limit of each control group that has one, and its use, in bytes."""
    limits = []
    for folder, limit, current, cached in _GROUPS:
        # "max" is no number: there is no limit.
        with contextlib.suppress(OSError, ValueError):
            size = int(Path(folder, limit).read_text())
            limits.append((size, _bytes_used(folder, current, cached)))
    return limits


def _bytes_used(folder: str, current: str, cached: str) -> int:
    """The bytes that a group uses, without caches that Linux can drop; 0 if it is not known."""
    used = dropped = 0
    with contextlib.suppress(OSError, ValueError):
        used = int(Path(folder, current).read_text())
    with contextlib.suppress(OSError, KeyError, ValueError):
        lines = Path(folder, "memory.stat").read_text().splitlines()
        dropped = int(dict(line.split() for line in lines)[cached])
    return max(used - dropped, 0)


def release_memory() -> None:
    """Return freed memory to the system, so that the next peak includes all allocations."""
    gc.collect()
    with contextlib.suppress(AttributeError, OSError, TypeError):  # another C library than GNU's
        ctypes.CDLL(None).malloc_trim(0)
