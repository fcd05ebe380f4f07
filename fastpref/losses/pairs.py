"""`Pairs`, the argument of a loss function; and the scores of f-divergences."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

F_DIVERGENCES = ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence")
LARGEST_EXPONENT = 80.0  # beta * exp(80) is finite in float32


@dataclass(frozen=True)
class Pairs:
    """P preference pairs. Tensors are [P], float32 or float64.

    A loss function maps a `Pairs` to the loss of each pair, [P]; see docs/losses.md.

    Attributes:
        options: the `LossOptions` of this call.
        beta: options.beta.
        chosen_logps, rejected_logps: log pi(y|x), summed over the answer's tokens, in nats.
        ref_chosen_logps, ref_rejected_logps: the same under the reference; zeros without one.
        chosen, rejected: log-ratios, logp - ref_logp.
        chosen_scores, rejected_scores: f'(pi / pi_ref) of options.f_divergence_type; the log-ratios
            for reverse_kl.
        chosen_lengths, rejected_lengths: labelled tokens per answer, at least 1; None if no loss
            reads them.
        margin: target difference between the chosen and the rejected reward; 0.0 for none.
        soft_labels: probability that the chosen answer is the preferred one; None means 1.
        chosen_nll: the NLL of each chosen answer, summed over its tokens; None if no loss reads it.
        nll_lengths: the number of tokens that chosen_nll sums; None if no loss reads it.
    """

    options: Any  # LossOptions; importing the class here would be circular
    beta: float
    chosen_logps: Tensor
    rejected_logps: Tensor
    ref_chosen_logps: Tensor
    ref_rejected_logps: Tensor
    chosen: Tensor
    rejected: Tensor
    chosen_scores: Tensor
    rejected_scores: Tensor
    chosen_lengths: Tensor | None = None
    rejected_lengths: Tensor | None = None
    margin: Tensor | float = 0.0
    soft_labels: Tensor | None = None
    chosen_nll: Tensor | None = None
    nll_lengths: Tensor | None = None

    def advantage(self) -> Tensor:
        """beta (s_w - s_l) - margin, [P]: the argument of most losses."""
        return self.beta * (self.chosen_scores - self.rejected_scores) - self.margin

    def mean_scores(self) -> tuple[Tensor, Tensor]:
        """The scores per token of the chosen and of the rejected answers, [P] each."""
        assert self.chosen_lengths is not None and self.rejected_lengths is not None
        return (
            self.chosen_scores / self.chosen_lengths,
            self.rejected_scores / self.rejected_lengths,
        )

    def mean_logps(self) -> tuple[Tensor, Tensor]:
        """The policy's log-probabilities per token of both answers, [P] each."""
        assert self.chosen_lengths is not None and self.rejected_lengths is not None
        return self.chosen_logps / self.chosen_lengths, self.rejected_logps / self.rejected_lengths

    def expected(
        self, loss: Callable[[Tensor], Tensor], x: Tensor, smoothing: float = 0.0
    ) -> Tensor:
        """The expected loss (1 - e) loss(x) + e loss(-x), where e is the probability of a flip.

        e is 1 minus the pair's soft label if there are soft labels, and `smoothing` otherwise.
        """
        if self.soft_labels is not None:
            return self.soft_labels * loss(x) + (1 - self.soft_labels) * loss(-x)
        return loss(x) if smoothing == 0 else (1 - smoothing) * loss(x) + smoothing * loss(-x)


def divergence_scores(log_ratio: Tensor, kind: str, coef: float) -> Tensor:
    """f'(pi / pi_ref) of an f-divergence, which replaces log(pi / pi_ref) in DPO.

    Source: f-DPO, Wang et al. 2023 (arXiv:2309.16240). With r = log(pi / pi_ref), and up to
    constants that cancel between the two answers:

        reverse_kl        r
        forward_kl        1 - exp(-r)
        js_divergence     log 2 + log sigmoid(r)
        alpha_divergence  (exp((a - 1) r) - 1) / (a - 1),  r itself at a = 1

    Exponents are clamped at 80 to stay finite in float32; the gradient beyond is 0. IPO squares the
    score, which overflows float32 for scores above 1e19. Gradients in r: 1, exp(-r), sigmoid(-r),
    exp((a - 1) r).

    Args:
        log_ratio: r, [P].
        kind: one of F_DIVERGENCES.
        coef: a of alpha_divergence.

    Returns:
        [P], in log_ratio's dtype.
    """
    if kind == "forward_kl":
        return -torch.expm1((-log_ratio).clamp(max=LARGEST_EXPONENT))
    if kind == "js_divergence":
        return math.log(2) + F.logsigmoid(log_ratio)
    power = coef - 1
    if kind == "reverse_kl" or abs(power) < 1e-6:
        return log_ratio
    return torch.expm1((power * log_ratio).clamp(max=LARGEST_EXPONENT)) / power
