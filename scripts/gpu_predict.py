"""Predicted times of the head on a GPU: what each way has to multiply and to move.

A prediction is the time of the products, plus the time of the bytes that the passes beside them
read and write. It is made from two sets of rates: `ASSUMED`, before anything was measured, and
those that the same run measured of bare products and of a copy. The first tests what is believed of
the GPU, the second what is believed of the kernels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

# Least products of a mode, of 2NHV FLOPs each.
LEAST = {"trainable": 3, "frozen": 2, "forward-only": 1}

# Bytes per logit beside those of the bare products, which write the logits in 2 bytes, with
# gradients and without. Tiles in fp32 write 2 bytes more. fold reads 4; grad reads 4 and writes 2.
_PASSES = {
    ("triton", "tiles"): (2 + 4 + 6, 2 + 4),
    ("cuda", "tiles"): (2 + 6, 2 + 4),  # fold and grad in one kernel
    ("triton", "logit-free"): (0, 0),  # D is what the product writes, in place of logits
    ("cuda", "logit-free"): (0, 0),
    # Eager torch widens all logits to float32 for log_softmax: 18 bytes forward, 22 backward.
    ("eager", "eager"): (40, 18),
    # Compiled torch reads the logits in forward, and reads them and writes D in backward.
    ("compiled", "compiled"): (6, 2),
}
# Added to eager's with a softcap: each of its three operations reads and writes the logits.
_SOFTCAP = (26, 12)
# Added for a recomputed tile: it is written in fp32 and read, and D is written.
_RECOMPUTED = 2 + 6


@dataclass(frozen=True)
class Rates:
    """product: FLOP/s of a large bf16 product; copy: bytes read and written per second."""

    product: float
    copy: float


# An H200: 0.8 of the 989 TFLOP/s and 0.9 of the 4.8 TB/s of its data sheet.
ASSUMED = Rates(790e12, 4.3e12)
# A pass over rows next to a copy.
_PASS_SPEED = 0.88
# Of the library's rate: a logit-free product that is CUDA C++, and one in Triton, whose epilogue is
# not hidden: it weighs the more the smaller the hidden size.
_OWN_PRODUCT = 0.93
_TRITON_EPILOGUE = 96


def logits_efficiency(h: int) -> float:
    """Of a large product's rate, for a product of inner size H: filling and draining a tile costs
    as much as 64 more."""
    return h / (h + 64)


def _gradient_efficiency(h: int) -> float:
    return 1.0 if h >= 2048 else 0.92


def _own(backend: str | None, h: int) -> float:
    return _OWN_PRODUCT * (h / (h + _TRITON_EPILOGUE) if backend == "triton" else 1.0)


def way(row: dict[str, Any]) -> tuple[str, str] | None:
    """A variant's backend and the way it takes; None for a peer or a precision without one."""
    name = row["variant"]
    if not row["ours"]:
        return {"eager": ("eager", "eager"), "torch.compile": ("compiled", "compiled")}.get(name)
    if row["precision"] != "exact":
        return None
    if row["products"] == 4:
        return row["backend"], "recompute"
    return row["backend"], "tiles" if "tiles" in name else "logit-free"


def _moved(backend: str, kind: str, mode: str, softcap: bool) -> float | None:
    """Bytes per logit; None where nothing is known of this backend."""
    # The first pass of a recomputing variant is as of tiles; the second one makes D once more.
    known = _PASSES.get((backend, "tiles" if kind == "recompute" else kind))
    if known is None:
        return None
    forward = mode == "forward-only"
    more = _SOFTCAP[forward] if softcap and kind == "eager" else 0
    return known[forward] + more + (_RECOMPUTED if kind == "recompute" else 0)


def assumed_ms(row: dict[str, Any], mode: str, size: dict[str, Any]) -> float | None:
    """From `ASSUMED` alone."""
    chosen = way(row)
    if chosen is None:
        return None
    n, h, v = size["n"], size["h"], size["v"]
    one = 2 * n * h * v / ASSUMED.product
    first = one / logits_efficiency(h)
    rest = (LEAST[mode] - 1) * one / _gradient_efficiency(h)
    return _sum(chosen, mode, size, first, rest, ASSUMED.copy)


def measured_ms(
    row: dict[str, Any],
    mode: str,
    size: dict[str, Any],
    roofline_ms: float | None,
    logits_ms: float | None,
    copy: float | None,
) -> float | None:
    """From this run: the bare products of the mode together, the first of them, and the copy's rate
    in bytes per second; without a copy, the assumed one."""
    chosen = way(row)
    if chosen is None or roofline_ms is None:
        return None
    first = (logits_ms or roofline_ms / LEAST[mode]) / 1e3
    rest = max(roofline_ms / 1e3 - first, 0.0)
    return _sum(chosen, mode, size, first, rest, copy or ASSUMED.copy)


def _sum(
    chosen: tuple[str, str],
    mode: str,
    size: dict[str, Any],
    first: float,  # seconds of the product X W^T
    rest: float,  # seconds of the products after it
    copy: float,
) -> float | None:
    """Milliseconds."""
    backend, kind = chosen
    moved = _moved(backend, kind, mode, size.get("softcap") is not None)
    if moved is None:
        return None
    seconds = rest + first / (_own(backend, size["h"]) if kind == "logit-free" else 1.0)
    seconds += first * (kind == "recompute")
    seconds += size["n"] * size["v"] * moved / (_PASS_SPEED * copy)
    return 1e3 * seconds
