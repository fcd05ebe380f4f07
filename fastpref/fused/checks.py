"""Checks of the labels and of the sequence ids of a preference loss."""

from __future__ import annotations

import torch
from torch import Tensor

from fastpref import validation
from fastpref.validation import check_device, check_ids


def check_nll_labels(nll_labels: Tensor, labels: Tensor, ignore_index: int) -> None:
    """Check the labels that the NLL counts.

    Raises:
        ValueError: not int64 of the labels' shape and device, or other tokens than theirs.
    """
    if not isinstance(nll_labels, Tensor) or nll_labels.shape != labels.shape:
        shape = tuple(nll_labels.shape) if isinstance(nll_labels, Tensor) else type(nll_labels)
        raise ValueError(f"nll_labels: got {shape}, expected a tensor {tuple(labels.shape)}")
    if nll_labels.dtype != torch.int64 or nll_labels.device != labels.device:
        raise ValueError(
            f"nll_labels: got {str(nll_labels.dtype)[6:]} on {nll_labels.device}, expected int64 "
            f"on {labels.device}"
        )
    if validation.may_synchronise(labels):
        in_both = (labels != ignore_index) & (nll_labels != ignore_index)
        if bool((in_both & (labels != nll_labels)).any()):
            raise ValueError(
                "nll_labels: got another token than labels for a position, expected the same one "
                "or ignore_index"
            )


def count_sequences(
    labels: Tensor,
    sequence_ids: Tensor | None,
    num_sequences: int | None,
    *vectors: Tensor | None,
) -> int:
    """The number of sequences, 2P.

    labels [2P, T] have it as their number of rows. With sequence_ids it is num_sequences or else
    the length of one of the vectors [2P].

    Raises:
        ValueError: labels and sequence_ids that do not fit together, or an odd number.
    """
    if not isinstance(labels, Tensor):
        raise ValueError(f"labels: got {type(labels).__name__}, expected a tensor")
    if sequence_ids is None:
        if labels.dim() != 2:
            raise ValueError(
                f"labels: got shape {tuple(labels.shape)}, expected [2P, T], or [N] with "
                "sequence_ids"
            )
        size = labels.shape[0]
        if num_sequences not in (None, size):
            raise ValueError(
                f"num_sequences: got {num_sequences}, expected {size}, the rows of labels"
            )
    else:
        if not isinstance(sequence_ids, Tensor):
            raise ValueError(f"sequence_ids: got {type(sequence_ids).__name__}, expected a tensor")
        if labels.dim() != 1 or sequence_ids.shape != labels.shape:
            raise ValueError(
                f"sequence_ids: got shape {tuple(sequence_ids.shape)} for labels "
                f"{tuple(labels.shape)}, expected [N] for both"
            )
        check_device("sequence_ids", sequence_ids, labels.device)
        sizes = [len(t) for t in vectors if isinstance(t, Tensor)]
        if num_sequences is None and not sizes:
            raise ValueError("num_sequences: got None, expected 2P with sequence_ids")
        size = sizes[0] if num_sequences is None else num_sequences
        check_ids("sequence_ids", sequence_ids, size)
    if size % 2:
        raise ValueError(
            f"labels: got {size} sequences, expected an even number, [chosen; rejected]"
        )
    return size
