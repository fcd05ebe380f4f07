"""How fast this processor multiplies matrices, with torch's product and with the native one."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import torch
from torch import Tensor

from fastpref.backends import native

# m, n, k: 0.15 GFLOP, which torch's slowest product does in a fifth of a second.
_SHAPE = 96, 1024, 768
_DTYPES = torch.float32, torch.bfloat16


def _best_rate(product: Callable[..., object], *operands: Tensor) -> float:
    """GFLOP/s of the fastest run within a tenth of a second: other processes slow some runs."""
    m, n, k = _SHAPE
    product(*operands)
    best, end = math.inf, time.perf_counter() + 0.1
    while best == math.inf or time.perf_counter() < end:
        start = time.perf_counter()
        product(*operands)
        best = min(best, time.perf_counter() - start)
    return 2e-9 * m * n * k / max(best, 1e-9)


def product_rates() -> dict[str, dict[str, float | str | None]]:
    """For float32 and bfloat16: GFLOP/s of "torch", "native" and "peak", and which is "used".

    The product is the head's, X W^T. torch's result is in the operands' dtype, the native one in
    float32. "peak" is the processor's own best, `native.peak_rate`. "native" and "peak" are None
    where the module is not built. It takes about half a second.
    """
    rates: dict[str, dict[str, float | str | None]] = {}
    m, n, k = _SHAPE
    for dtype in _DTYPES:
        x, weight = torch.randn(m, k).to(dtype), torch.randn(n, k).to(dtype)
        native_rate = peak = None
        if native.problem() is None:
            out = torch.empty(m, n)
            native_rate = _best_rate(native.own_product, x, weight, out)
            peak = native.peak_rate(dtype) / 1e9
        used = native.problem() is None and native.product_kernel(dtype, torch.float32) is not None
        rates[str(dtype)[6:]] = {
            "torch": _best_rate(torch.mm, x, weight.t()),
            "native": native_rate,
            "peak": peak,
            "used": "native" if used else "torch",
        }
    return rates


def what_follows(rates: dict[str, dict[str, float | str | None]]) -> list[tuple[str, str]]:
    """The rates for people, and what they mean for training."""
    lines = []
    for dtype, rate in rates.items():
        native_text = "not built" if rate["native"] is None else f"{rate['native']:.0f} GFLOP/s"
        text = f"native {native_text}, torch {rate['torch']:.0f} GFLOP/s"
        if rate["peak"] is not None:
            text += f" of at most {rate['peak']:.0f}"
        text += f": the head takes {rate['used']}'s"
        lines.append((dtype, text))
    wide, half = (rates[name]["torch"] for name in ("float32", "bfloat16"))
    assert isinstance(wide, float) and isinstance(half, float)
    if half < wide / 2:
        text = f"torch multiplies bf16 {wide / half:.0f} times slower than fp32 here: train in fp32"
    elif half > 1.5 * wide:
        text = f"torch multiplies bf16 {half / wide:.1f} times as fast as fp32: train in bf16"
    else:
        text = "torch multiplies bf16 about as fast as fp32"
    return [*lines, ("body of a model", text)]
