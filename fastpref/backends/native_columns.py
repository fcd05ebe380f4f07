"""Columns of a block of D in C++ (csrc/columns.h, csrc/column_choice.h)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastpref.backends import column_choice
from fastpref.backends.column_choice import HEAD_MARGIN, Chosen
from fastpref.backends.native_module import DTYPES, MODULE, rows_of, threads, vector


def choose_columns(
    squares: Tensor,
    labels: Tensor,
    distance: Tensor,
    norm: Tensor,
    tolerances: tuple[float | None, float | None],
    state: Tensor,
    count: int | None = None,
) -> Chosen | None:
    """As `Backend.choose_columns`; with a count, which no CPU is given, in torch."""
    if count is not None:
        arguments = squares, labels, distance, norm, tolerances, state
        return column_choice.choose_columns(*arguments, count)
    vocab, labels = squares.shape[0], labels.contiguous()
    index, factor = torch.empty(vocab, dtype=torch.int64), torch.empty(vocab)
    squared_norms = float(norm), float(squares.double().sum() / HEAD_MARGIN**2)
    number, first, variance, head_variance = MODULE.choose_columns(
        vector(squares),
        vector(distance),
        vocab,
        vector(labels, torch.int64),
        labels.shape[0],
        *squared_norms,
        *(math.nan if t is None else t for t in tolerances),
        int(state) % 2**64,
        vector(index, torch.int64),
        vector(factor),
    )
    if not number:
        return None
    kept = torch.arange(number) < first
    sums = torch.tensor([variance, head_variance], dtype=torch.float64)
    return Chosen(index[:number], kept, factor[:number], *sums.unbind())


def column_sums(d: Tensor, row_scale: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """As `Backend.column_sums`."""
    rows, cols = d.shape
    squares, totals, row_sums = (torch.empty(size) for size in (cols, cols, rows))
    address, stride = rows_of(d)
    sums = map(vector, (row_scale, squares, totals, row_sums))
    MODULE.column_sums(address, DTYPES[d.dtype], rows, cols, stride, *sums, threads())
    return squares, totals, row_sums


def gather_columns(
    d: Tensor,
    index: Tensor,
    kept: Tensor,
    factor: Tensor,
    mean: Tensor,
    row_sums: Tensor,
    out: Tensor,
) -> Tensor:
    """As `Backend.gather_columns`; the kept columns come first."""
    assert out.dtype == d.dtype and out.shape == (d.shape[0], index.shape[0] + 1)
    remainders = torch.empty_like(row_sums)
    address, stride = rows_of(d)
    MODULE.gather_columns(
        address,
        DTYPES[d.dtype],
        d.shape[0],
        stride,
        vector(index, torch.int64),
        index.shape[0],
        int(kept.sum()),
        *map(vector, (factor, mean, row_sums)),
        *rows_of(out),
        vector(remainders),
        threads(),
    )
    return remainders


def weighted_rows(q: Tensor, weight: Tensor) -> Tensor:
    """As `Backend.weighted_rows`."""
    assert q.shape[1] == weight.shape[0]
    out = torch.empty((q.shape[0], weight.shape[1]))
    address, stride = rows_of(weight)
    kind = DTYPES[weight.dtype]
    sums = vector(q), q.shape[0], vector(out)
    MODULE.weighted_rows(address, kind, *weight.shape, stride, *sums, threads())
    return out
