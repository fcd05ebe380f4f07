"""Per-token parts of preference losses: LD-DPO's and WPO's weights, and the tokens of the NLL.

Token log-probs are [2P, T] with labels [2P, T], or flat [N] with sequence_ids [N] in [0, 2P). The
chosen sequences come first, then the rejected ones in the same order. `**sequence_layout` stands
for sequence_ids, num_sequences and ignore_index, as in `sequence_logps`.
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
    """LD-DPO's weight of each token, Liu et al. 2024 (arXiv:2409.06411).

    Let L be the length of the pair's shorter answer. An answer's first L labelled tokens have
    weight 1, the later ones ld_alpha. With a the probability of the whole answer and a' that of its
    first L tokens, the weighted sum is the logarithm of a^ld_alpha a'^(1 - ld_alpha).

    Args:
        labels: [2P, T], or [N] with sequence_ids, int64.
        ld_alpha: in [0, 1].
        sequence_ids: [N] int64 in [0, 2P), for flat labels.
        num_sequences: 2P, for flat labels.
        dtype: of the result.

    Returns:
        Shaped like labels; 1 where there is no label.
    """
    counted = labels != ignore_index
    if sequence_ids is None:
        position = counted.cumsum(1)  # the first labelled token has 1
        lengths = counted.sum(1)
        shared = torch.minimum(*lengths.chunk(2)).repeat(2)[:, None]
    else:
        assert num_sequences is not None
        # Unlabelled tokens form an extra sequence, so that they do not advance the positions.
        # So do tokens whose id is out of range, which is not checked on a GPU.
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


def ld_sequence_logps(
    token_logps: Tensor, labels: Tensor, ld_alpha: float, **sequence_layout: Any
) -> Tensor:
    """`sequence_logps` with LD-DPO's weights, [2P].

    With ld_alpha, policy and reference log-probs are both such weighted sums. Arguments: those of
    `ld_weights`.
    """
    weights = ld_weights(labels, ld_alpha, **sequence_layout, dtype=token_logps.dtype)
    return sequence_logps(token_logps * weights, labels, **sequence_layout)


@torch.no_grad()
def wpo_weights(
    token_logps: Tensor, log_sum_sq_probs: Tensor, labels: Tensor, **sequence_layout: Any
) -> Tensor:
    """WPO's weight of each pair, Zhou et al. 2024 (arXiv:2406.11827), Eq. 2, without a gradient.

    The weight is w(y_w) w(y_l), where w(y) = exp(mean over y's tokens of
    (log p_t - log sum_v p(v)^2)) compares the probability of y's tokens with that of tokens sampled
    from the policy.

    Args:
        token_logps, log_sum_sq_probs: `linear_token_logps` with the extra "log_sum_sq_probs".
        labels: shaped like token_logps, int64.

    Returns:
        [P], in token_logps' dtype. An answer without tokens has w = 1.
    """
    log_weights = sequence_logps(
        token_logps - log_sum_sq_probs, labels, average=True, **sequence_layout
    )
    chosen, rejected = log_weights.chunk(2)
    return (chosen + rejected).exp()


def nll_tokens(
    labels: Tensor,
    nll_labels: Tensor | None,
    *,
    sequence_ids: Tensor | None = None,
    num_sequences: int | None = None,
    ignore_index: int = -100,
) -> Tensor:
    """The labels of the tokens that the NLL counts, shaped like labels; elsewhere ignore_index.

    Only tokens of chosen sequences count. nll_labels None means that the NLL counts the labelled
    ones.
    """
    counted_labels = labels if nll_labels is None else nll_labels
    if sequence_ids is None:
        pairs = labels.shape[0] // 2
        is_chosen = (torch.arange(labels.shape[0], device=labels.device) < pairs)[:, None]
    else:
        assert num_sequences is not None
        is_chosen = sequence_ids < num_sequences // 2
    return counted_labels.masked_fill(~is_chosen, ignore_index)
