"""Sums of D's columns and a gather of some, in plain torch on any device.

Both read the block [n, V] of D a few rows at a time, so that no temporary is of its size.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fastpref.backends import gemm

# Rows of D that are widened at a time: few stay in a CPU's cache, many keep a GPU busy.
_ROWS = {"cpu": 64, "cuda": 256}

_WEIGHT_ROWS = 2048  # rows of the weight that are widened at a time


def _wide(d: Tensor) -> torch.dtype:
    return torch.promote_types(d.dtype, torch.float32)


def _parts(d: Tensor) -> Iterator[slice]:
    step = _ROWS.get(d.device.type, 64)
    return (slice(a, a + step) for a in range(0, d.shape[0], step))


def column_sums(d: Tensor, row_scale: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """As `Backend.column_sums`."""
    dtype = _wide(d)
    squares, totals = (torch.zeros(d.shape[1], dtype=dtype, device=d.device) for _ in range(2))
    row_sums = torch.empty(d.shape[0], dtype=dtype, device=d.device)
    for part in _parts(d):
        rows = d[part].to(dtype)
        row_sums[part] = rows.sum(1)
        # Scaled before it is squared: entries of a logit-free D may be as large as 2^64.
        scaled = rows if row_scale is None else rows * row_scale[part, None]
        totals += scaled.sum(0)
        squares += scaled.square().sum(0)
    return squares, totals, row_sums


def weighted_rows(q: Tensor, weight: Tensor) -> Tensor:
    """As `Backend.weighted_rows`."""
    if weight.dtype == q.dtype:
        return torch.mm(q, weight)
    total = q.new_zeros((q.shape[0], weight.shape[1]))
    for a in range(0, weight.shape[0], _WEIGHT_ROWS):
        total.addmm_(q[:, a : a + _WEIGHT_ROWS], weight[a : a + _WEIGHT_ROWS].to(q.dtype))
    return total


def project_rows(
    d: Tensor, weight: Tensor, index: Tensor, last: Tensor | None, memory: Tensor, out: Tensor
) -> None:
    """As `Backend.project_rows`."""
    count = index.shape[0]
    torch.index_select(weight, 0, index, out=memory[:count])
    if last is not None:
        memory[count] = last
    gemm.project(d, memory[: d.shape[1]], out)


def gather_columns(
    d: Tensor,
    index: Tensor,
    kept: Tensor,
    factor: Tensor,
    mean: Tensor,
    row_sums: Tensor,
    out: Tensor,
) -> Tensor:
    """As `Backend.gather_columns`."""
    dtype, count = _wide(d), index.shape[0]
    is_kept = kept.to(dtype)
    remainders = torch.empty_like(row_sums)
    for part in _parts(d):
        rows = d[part].index_select(1, index).to(dtype)
        remainder = row_sums[part] - (rows * is_kept).sum(1)
        rows = (rows - remainder[:, None] * mean) * factor
        out[part, :count] = rows
        out[part, count] = remainder - (rows * (1 - is_kept)).sum(1)
        remainders[part] = remainder
    return remainders
