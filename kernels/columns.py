"""The sums of the columns and of the rows of a block of D, in one pass: a program for COLS columns.

The rows are taken in order, so that the sums are the same bits on every run. A row's sum over the
columns of one program goes to `parts`; the caller adds these up.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def column_sums(
    d,  # [rows, columns]
    row_scale,  # [rows], or None
    squares,  # [columns]
    totals,  # [columns]
    parts,  # [rows, programs]
    rows,
    columns,
    stride,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    program = tl.program_id(0)
    column = program * COLS + tl.arange(0, COLS)
    total = tl.zeros([COLS], tl.float32)
    square = tl.zeros([COLS], tl.float32)
    for start in range(0, rows, ROWS):
        row = start + tl.arange(0, ROWS)
        inside = row < rows
        at = row.to(tl.int64)[:, None] * stride + column[None, :]
        mask = inside[:, None] & (column < columns)[None, :]
        value = tl.load(d + at, mask=mask, other=0.0).to(tl.float32)
        part = parts + row.to(tl.int64) * tl.num_programs(0) + program
        tl.store(part, tl.sum(value, 1), mask=inside)
        if row_scale is not None:
            value *= tl.load(row_scale + row, mask=inside, other=0.0)[:, None]
        total += tl.sum(value, 0)
        square += tl.sum(value * value, 0)
    tl.store(totals + column, total, mask=column < columns)
    tl.store(squares + column, square, mask=column < columns)
