"""The rates of the machine: of multiply-adds, of the head's GEMMs alone, and of a canary."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch

import fastpref
from fastpref.backends import native
from fastpref.bench.device import Device
from fastpref.bench.problem import HeadProblem, capped
from fastpref.bench.runner import Rounds

# The least number of GEMMs that an exact method needs: 6NHV, 4NHV and 2NHV FLOPs.
PRODUCTS = {"trainable": 3, "frozen": 2, "forward-only": 1}


class Products:
    """The head's GEMMs alone, on the data of a problem.

    D is computed from the data, not random. Nearly all of its entries are tiny, and a GPU
    multiplies such numbers faster than random ones.
    """

    def __init__(self, problem: HeadProblem):
        self._x = x = problem.hidden.detach().flatten(0, 1)
        self._w = w = problem.weight.detach()
        labels, cap = problem.labels.flatten(), problem.softcap
        self._z, self._d = (x.new_empty(x.shape[0], w.shape[0]) for _ in range(2))
        self._u, self._dw = torch.empty_like(x), torch.empty_like(w)
        for a in range(0, x.shape[0], 512):
            block = slice(a, a + 512)
            z = capped(x[block] @ w.t(), cap).float()
            d = z.softmax(1).neg_()
            d.scatter_add_(1, labels[block, None], torch.ones_like(d[:, :1]))
            self._d[block] = d if cap is None else d * (1 - (z / cap).square())

    def _calls(self) -> dict[str, Callable[[], object]]:
        x, w, d = self._x, self._w, self._d
        return {
            "X W^T": lambda: torch.mm(x, w.t(), out=self._z),
            "D W": lambda: torch.mm(d, w, out=self._u),
            "D^T X": lambda: torch.mm(d.t(), x, out=self._dw),
        }

    def together(self, mode: str) -> Callable[[], object]:
        """The GEMMs that a mode needs, one after the other. No exact method takes less time."""
        calls = list(self._calls().values())[: PRODUCTS[mode]]
        return lambda: [call() for call in calls]

    def single(self, mode: str) -> dict[str, tuple[int, Callable[[], object]]]:
        """Each GEMM of a mode with its number of rows.

        An NVIDIA GPU also has the first one with a float32 result, over the rows of a tile, as
        precision="exact" computes it.
        """
        x, w = self._x, self._w
        calls = list(self._calls().items())[: PRODUCTS[mode]]
        out = {name: (len(x), call) for name, call in calls}
        if x.is_cuda and torch.version.hip is None:
            n, h = x.shape
            plan = fastpref.plan_head(n, h, len(w), x.dtype, device=x.device)
            tile = x[: plan.block_tokens]
            wide = torch.empty(len(tile), len(w), device=x.device)

            def product() -> object:
                return torch.mm(tile, w.t(), out_dtype=torch.float32, out=wide)

            out["X W^T in float32"] = len(tile), product
        return out


class Peak:
    """The rate of this CPU's multiply-adds on operands in its L1 cache.

    A call measures it once, with torch's threads, for a fiftieth of a second.
    """

    def __init__(self, dtype: torch.dtype):
        self._dtype = dtype
        self._rates: list[float] = []

    def __call__(self) -> None:
        self._rates.append(native.peak_rate(self._dtype, 0.02))

    def median(self) -> float:
        """The median of the measured rates, in FLOP/s."""
        return statistics.median(self._rates)


# Rows, columns and depth of the square GEMM, and bytes of the copy, which no cache holds.
_PRODUCT = {"cpu": 1024, "cuda": 8192, "pretend": 64}
_COPIED = {"cpu": 2**28, "cuda": 2**32, "pretend": 2**16}


def machine_rates(
    device: Device, rounds: Rounds, dtype: torch.dtype, peak: Peak | None
) -> dict[str, Any]:
    """The rates of a square GEMM and of a copy, which take turns.

    peak: the rate of a CPU's multiply-adds, measured in the same rounds.
    """
    size, moved = _PRODUCT[device.kind], _COPIED[device.kind]
    a, b = (torch.randn(size, size, device=device.device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    source = torch.ones(moved // 2, dtype=torch.uint8, device=device.device)
    target = torch.empty_like(source)
    calls: dict[str, Callable[[], object]] = {
        "product": lambda: torch.mm(a, b, out=out),
        "copy": lambda: target.copy_(source),
    }
    if peak is not None:
        calls["peak"] = peak
    for call in calls.values():
        device.time(call)
    cost = {name: device.time(call).device for name, call in calls.items()}
    rounds.run(calls, cost)
    seconds = {name: timing.median for name, timing in rounds.device.items()}
    return {
        "product": {
            "size": [size, size, size],
            "tflop_per_s": round(2 * size**3 / seconds["product"] / 1e12, 4),
            "time": rounds.device["product"].to_json(),
        },
        "copy": {
            "bytes": moved,  # read and written
            "gb_per_s": round(moved / seconds["copy"] / 1e9, 2),
            "time": rounds.device["copy"].to_json(),
        },
        "peak_tflop_per_s": None if peak is None else round(peak.median() / 1e12, 4),
    }


def canary(dtype: torch.dtype) -> Callable[[], object]:
    """A fixed GEMM on the CPU, 8.6 GFLOP. Its spread shows how quiet the machine is."""
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(512, 1024, generator=generator).to(dtype)
    b = torch.randn(1024, 8192, generator=generator).to(dtype)
    out = torch.empty(512, 8192, dtype=dtype)
    return lambda: torch.mm(a, b, out=out)
