"""Sums over the pairs of a micro-step that the alarms read: margins against lengths, rankings.

They are further elements of the micro-step's vector, so they leave the device with the metrics.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fastpref.fused.pair_loss import PreferenceOutput
from fastpref.logps.sequences import sequence_logps

# With m the margin of a pair's rewards and d the chosen answer's tokens minus the rejected one's:
# the sums of m, m^2, d, d^2 and m d; and the number of pairs whose chosen answer has the higher
# log-prob per token.
MOMENTS = ("m", "m2", "d", "d2", "md", "ranked")


def pair_moments(
    out: PreferenceOutput, labels: Tensor, sequence_ids: Tensor | None, per_token: bool
) -> dict[str, Tensor]:
    """The sums `MOMENTS` of P pairs, [] each, without a synchronisation.

    Args:
        labels: [2P, T], or [N] with sequence_ids [N] in [0, 2P).
        per_token: whether a reward is divided by its answer's tokens, as in IPO's token means.
    """
    pairs = len(out.chosen_rewards)
    if sequence_ids is None:
        counts = (labels != -100).sum(1).to(out.chosen_rewards.dtype)
    else:
        ones = torch.ones_like(labels, dtype=out.chosen_rewards.dtype)
        counts = sequence_logps(ones, labels, sequence_ids=sequence_ids, num_sequences=2 * pairs)
    lengths, whole = counts.clamp(min=1).chunk(2), counts.chunk(2)
    rewards = out.chosen_rewards, out.rejected_rewards
    if per_token:
        rewards = rewards[0] / lengths[0], rewards[1] / lengths[1]
    m, d = rewards[0] - rewards[1], whole[0] - whole[1]
    ranked = out.chosen_logps / lengths[0] > out.rejected_logps / lengths[1]
    products = torch.stack([m, m * m, d, d * d, m * d, ranked.to(m.dtype)]).sum(1)
    return dict(zip(MOMENTS, products.unbind(), strict=True))


def explained_by_length(sums: Mapping[str, float]) -> float:
    """R^2 of the margin on the length difference, from the sums `MOMENTS` and "pairs"."""
    n = sums["pairs"]
    if n < 3:
        return 0.0
    variances = [sums[f"{x}2"] / n - (sums[x] / n) ** 2 for x in ("m", "d")]
    if min(variances) <= 0:
        return 0.0
    covariance = sums["md"] / n - sums["m"] * sums["d"] / n**2
    return min(1.0, covariance**2 / (variances[0] * variances[1]))


def margin_size(sums: Mapping[str, float]) -> float:
    """The root mean square of the margin, from the sums `MOMENTS` and "pairs"."""
    return float((sums["m2"] / max(sums["pairs"], 1.0)) ** 0.5)


def is_per_token(options: Any) -> bool:
    """Whether a loss compares log-ratios per token: IPO with token means.

    options: the `LossOptions`.
    """
    return options.names == ("ipo",) and options.ipo_normalization == "token_mean"
