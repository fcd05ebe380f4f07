"""What some losses need from the tokens, beyond the sums of their log-probabilities.

Everywhere: token log-probs [2P, T] with labels [2P, T], or flat [N] with sequence_ids [N] in
[0, 2P); the chosen sequences first, then the rejected ones in the same order.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastpref.logps.sequences import sequence_logps


def ld_weights(
    labels: Tensor,
    ld_alpha: float,
    *,
    sequence_ids: Tensor | None = None,
    num_sequences: int | None = None,
    ignore_index: int = -100,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """LD-DPO's weight of each token, Liu et al. 2024 (arXiv:2409.06411), shaped like labels.

    The labelled tokens of an answer up to the length of the pair's shorter answer weigh 1, those
    past it ld_alpha. So log-probabilities become a^alpha a'^(1-alpha) with a the whole answer's and
    a' that of its first tokens, for the policy and for the reference.

    Args:
        labels: [2P, T], or [N] with sequence_ids.
        ld_alpha: in [0, 1].
        num_sequences: 2P, for the flat form.

    Returns:
        In dtype; 1 where there is no label.
    """
    counted = labels != ignore_index
    if sequence_ids is None:
        position = counted.cumsum(1)  # from 1 on
        lengths = counted.sum(1)
        shared = torch.minimum(*lengths.chunk(2)).repeat(2)[:, None]
    else:
        assert num_sequences is not None
        # Unlabelled tokens go to a sequence of their own, so that they take no position.
        # So do those whose id is out of range, which on a GPU nobody has looked at.
        outside = ~counted | (sequence_ids < 0) | (sequence_ids >= num_sequences)
        ids = sequence_ids.masked_fill(outside, num_sequences)
        lengths = ids.new_zeros(num_sequences + 1).index_add(0, ids, torch.ones_like(ids))
        order = ids.argsort(stable=True)
        starts = (lengths.cumsum(0) - lengths).index_select(0, ids.index_select(0, order))
        rank = torch.arange(1, ids.shape[0] + 1, device=ids.device) - starts
        position = torch.empty_like(rank).index_copy(0, order, rank)
        shorter = torch.minimum(*lengths[:num_sequences].chunk(2)).repeat(2)
        shared = torch.cat([shorter, lengths[num_sequences:]]).index_select(0, ids)
    past = counted & (position > shared)
    return torch.ones(labels.shape, dtype=dtype, device=labels.device).masked_fill(past, ld_alpha)


def ld_sequence_logps(token_logps: Tensor, labels: Tensor, ld_alpha: float, **form: Any) -> Tensor:
    """`sequence_logps` with LD-DPO's weights, [2P]; reference log-probs for ld_alpha are such sums.

    Arguments as in `ld_weights`.
    """
    weights = ld_weights(labels, ld_alpha, **form, dtype=token_logps.dtype)
    return sequence_logps(token_logps * weights, labels, **form)


@torch.no_grad()
def wpo_weights(
    token_logps: Tensor, log_sum_sq_probs: Tensor, labels: Tensor, **form: Any
) -> Tensor:
    """WPO's weight of each pair, Zhou et al. 2024 (arXiv:2406.11827), Eq. 2, without a gradient.

    w(y_w) w(y_l) with w(y) = exp(mean over y's tokens of (log p_t - log sum_v p(v)^2)): how likely
    the policy is to write y, against what it would write by itself.

    Args:
        token_logps, log_sum_sq_probs: outputs of `linear_token_logps` with that extra.
        form: sequence_ids, num_sequences, ignore_index of the flat form, as in `sequence_logps`.

    Returns:
        [P], in token_logps' dtype. An answer without tokens weighs 1.
    """
    aligned = sequence_logps(token_logps - log_sum_sq_probs, labels, average=True, **form)
    chosen, rejected = aligned.chunk(2)
    return (chosen + rejected).exp()


def nll_tokens(
    labels: Tensor,
    nll_labels: Tensor | None,
    *,
    sequence_ids: Tensor | None = None,
    num_sequences: int | None = None,
    ignore_index: int = -100,
) -> Tensor:
    """The labels of the tokens that the NLL counts, shaped like labels: the chosen sequences'."""
    chosen = labels if nll_labels is None else nll_labels
    if sequence_ids is None:
        pairs = labels.shape[0] // 2
        is_chosen = (torch.arange(labels.shape[0], device=labels.device) < pairs)[:, None]
    else:
        assert num_sequences is not None
        is_chosen = sequence_ids < num_sequences // 2
    return chosen.masked_fill(~is_chosen, ignore_index)
