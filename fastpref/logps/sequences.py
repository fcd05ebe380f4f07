"""Sequence log-probabilities: sums of token log-probabilities over each sequence."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastpref.validation import check_device, check_ids, check_integer


def sequence_logps(
    token_logps: Tensor,
    labels: Tensor | None = None,
    *,
    sequence_ids: Tensor | None = None,
    num_sequences: int | None = None,
    average: bool = False,
    ignore_index: int = -100,
) -> Tensor:
    """Sum, or mean, of token log-probabilities over the labelled tokens of each sequence.

    Args:
        token_logps: [S, T] with labels [S, T], or flat [N] with sequence_ids [N] in [0, S).
        num_sequences: S for the flat form; default: the largest id plus one.
        average: divide by the number of labelled tokens. A sequence without any has 0.
        labels: the positions with ignore_index do not count; optional in the flat form.

    Returns:
        [S], in token_logps' dtype.

    Raises:
        ValueError: shapes that differ, ids outside [0, S), neither labels nor sequence_ids.
    """
    check_integer("ignore_index", ignore_index)
    if (sequence_ids is None) == (token_logps.dim() == 1):
        raise ValueError(
            f"token_logps: got shape {tuple(token_logps.shape)} "
            f"{'without' if sequence_ids is None else 'with'} sequence_ids, expected [S, T] with "
            "labels or [N] with sequence_ids"
        )
    if labels is None and sequence_ids is None:
        raise ValueError("labels: got None, expected the labels [S, T] of token_logps [S, T]")
    for name, other in (("labels", labels), ("sequence_ids", sequence_ids)):
        if other is not None and other.shape != token_logps.shape:
            raise ValueError(
                f"{name}: got shape {tuple(other.shape)}, expected {tuple(token_logps.shape)}, "
                "the shape of token_logps"
            )
        if other is not None:
            check_device(name, other, token_logps.device)
    # In float64: a policy and its reference then have the same sums wherever they were formed.
    counted = torch.ones_like(token_logps) if labels is None else (labels != ignore_index)
    values = token_logps if labels is None else token_logps.masked_fill(~counted, 0.0)
    values, counted = values.double(), counted.double()
    if sequence_ids is None:
        sums, counts = values.sum(1), counted.sum(1)
    else:
        size = num_sequences
        if size is None:
            size = int(sequence_ids.max()) + 1 if sequence_ids.numel() else 0
        check_ids("sequence_ids", sequence_ids, size)
        sums, counts = segment_sums((values, counted), sequence_ids, size)
    return (sums / counts.clamp(min=1) if average else sums).to(token_logps.dtype)


def segment_sums(vectors: Sequence[Tensor], ids: Tensor, size: int) -> list[Tensor]:
    """For each vector [N] the sums [size] over equal ids [N], the same bits from run to run."""
    if ids.device.type == "cpu":
        return [v.new_zeros(size).index_add(0, ids, v) for v in vectors]
    return sorted_sums(vectors, ids, size)


def sorted_sums(vectors: Sequence[Tensor], ids: Tensor, size: int) -> list[Tensor]:
    """`segment_sums` where index_add is atomic, and so adds in any order: ids are brought together
    first. An id outside [0, size), which is found without waiting for the GPU, makes all NaN."""
    ids, order = ids.sort(stable=True)
    bounds = torch.searchsorted(ids, torch.arange(size + 1, device=ids.device))
    outside = (bounds[0] != 0) | (bounds[-1] != ids.shape[0])
    out = []
    for v in vectors:
        v = v.index_select(0, order)
        sums = torch.segment_reduce(v, "sum", offsets=bounds, initial=0, unsafe=True)
        out.append(sums.masked_fill(outside, torch.nan))
    return out
