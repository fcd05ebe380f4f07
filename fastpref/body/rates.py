"""How much faster the native product is than torch's for a linear layer's shape, on this machine.

A shape is measured once. The result is kept in the process, and in a file for later processes: they
then choose alike, and their results have the same bits.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from fastpref.backends import native
from fastpref.backends.processor import read_processor

Shape = tuple[int, int]  # out_features, in_features

# Tokens of a measurement: those of a batch, and fewer where a layer is large.
_TOKENS, _FEWEST_TOKENS, _OPERATIONS = 1024, 128, 2e9
# Both sides take turns for so long, and at least three times.
_SECONDS = 0.25
# A side this much slower in its first run is not measured further.
_CLEARLY = 4.0


def cache_file() -> Path:
    """Where measured ratios are kept."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "fastpref" / "cpu_linear.json"


def speedup(shape: Shape, dtype: torch.dtype) -> float:
    """torch's time over the native product's, for the three products of a layer together.

    It is measured at torch's present number of threads, unless the file has it.
    """
    return _speedup(shape, dtype, torch.get_num_threads())


@functools.cache
def _speedup(shape: Shape, dtype: torch.dtype, threads: int) -> float:
    machine, case = _machine(threads), f"{shape[0]}x{shape[1]} {str(dtype)[6:]}"
    stored = _read().get(machine, {}).get(case)
    if isinstance(stored, (int, float)) and stored > 0:
        return float(stored)
    ratio = round(_measure(shape, dtype), 3)
    _write(machine, case, ratio)
    return ratio


@functools.cache
def _machine(threads: int) -> str:
    """What a ratio depends on besides the layer: the processor, the threads and both libraries."""
    from fastpref import __version__

    module = native._cpu.__file__
    built = os.stat(module).st_mtime_ns if module else 0
    return (
        f"{read_processor()[0]}, {threads} threads, torch {torch.__version__}, "
        f"fastpref {__version__} built {built}"
    )


def _measure(shape: Shape, dtype: torch.dtype) -> float:
    n, k = shape
    m = int(min(max(_OPERATIONS / (2 * n * k), _FEWEST_TOKENS), _TOKENS))
    generator = torch.Generator().manual_seed(0)
    x, weight, dy = (
        torch.randn(size, generator=generator).to(dtype) for size in ((m, k), (n, k), (m, n))
    )

    def with_torch() -> None:
        torch.mm(x, weight.t()), torch.mm(dy, weight), torch.mm(dy.t(), x)

    def with_native() -> None:
        for a, b in ((x, weight), (dy, weight.t()), (dy.t(), x.t())):
            out = torch.empty(a.shape[0], b.shape[0], dtype=dtype)
            native.own_product(a, b, out)

    sides = with_native, with_torch
    with torch.no_grad():
        first = [_seconds(side) for side in sides]  # includes what happens once
        if max(first) > 1 and max(first) > _CLEARLY * min(first):
            return first[1] / first[0]
        best, runs, end = [math.inf, math.inf], 0, time.perf_counter() + _SECONDS
        while runs < 3 or time.perf_counter() < end:
            # The best of each side: on a busy machine most runs are slower.
            best = [min(b, _seconds(side)) for b, side in zip(best, sides, strict=True)]
            runs += 1
    return best[1] / max(best[0], 1e-9)


def _seconds(function: Callable[[], None]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def _read() -> dict[str, dict[str, float]]:
    """The file's contents; nothing if it is missing or damaged."""
    try:
        contents = json.loads(cache_file().read_text("utf-8"))
    except (OSError, ValueError, RuntimeError):  # RuntimeError: there is no home directory
        return {}
    if not isinstance(contents, dict):
        return {}
    return {key: value for key, value in contents.items() if isinstance(value, dict)}


def _write(machine: str, case: str, ratio: float) -> None:
    """Add a ratio to the file. A file that cannot be written is left: the next process measures."""
    with contextlib.suppress(OSError, RuntimeError):
        path = cache_file()
        path.parent.mkdir(parents=True, exist_ok=True)
        contents = _read()
        contents.setdefault(machine, {})[case] = ratio
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.name)
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                json.dump(contents, file, indent=1)
            os.replace(name, path)
        except OSError:
            os.unlink(name)
            raise
