"""The losses that need no reference, and the NLL: one function each, from `Pairs` to [P].

Notation: l_w, l_l are the policy's log-probabilities of the chosen and the rejected answer, a_w and
a_l their means over the answer's tokens, sig the logistic function. Gradients are those of one
pair's loss, without the NLL that CPO and ORPO add.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastpref.loss_data import LARGEST_EXPONENT, Pairs
from fastpref.loss_functions import logistic


def sft(pairs: Pairs) -> Tensor:
    """The NLL of the chosen answers: minus the mean of their tokens' log-probabilities.

    The mean is over all tokens of the batch, as in TRL and Liger, so longer answers count for more.
    [i] is the share of answer i: P nll_i / (all tokens). Gradient in a token's log-probability:
    -1 / (all tokens).
    """
    assert pairs.chosen_nll is not None and pairs.nll_lengths is not None
    tokens = pairs.nll_lengths.sum().clamp(min=1)
    return pairs.chosen_nll * (pairs.chosen_nll.shape[0] / tokens)


def cpo(pairs: Pairs) -> Tensor:
    """CPO, Xu et al. 2024 (arXiv:2401.08417), Eq. 3: -log sig(beta (l_w - l_l) - margin), and the
    NLL of the chosen answer with nll_weight, 1 by default.

    label_smoothing and soft labels as in `sigmoid`. Gradient in l_w: -beta sig(-x).
    """
    x = pairs.beta * (pairs.chosen_logps - pairs.rejected_logps) - pairs.margin
    return pairs.expected(logistic, x, pairs.options.label_smoothing)


def simpo(pairs: Pairs) -> Tensor:
    """SimPO, Meng et al. 2024 (arXiv:2405.14734), Eq. 6:
    -log sig(beta (a_w - a_l) - simpo_gamma - margin).

    simpo_gamma is the target reward margin, in units of reward (the paper tunes gamma / beta).
    Without an NLL unless nll_weight asks for it. label_smoothing and soft labels as in `sigmoid`.
    Gradient in l_w: -beta sig(-x) / |y_w|.
    """
    chosen, rejected = pairs.mean_logps()
    x = pairs.beta * (chosen - rejected) - (pairs.options.simpo_gamma + pairs.margin)
    return pairs.expected(logistic, x, pairs.options.label_smoothing)


def alphapo_rewards(pairs: Pairs) -> tuple[Tensor, Tensor]:
    """(1 - exp(-alpha a)) / alpha of both answers; the exponent stops at 80, where float32 ends."""
    alpha = pairs.options.alpha
    chosen, rejected = (
        -torch.expm1((-alpha * mean).clamp(max=LARGEST_EXPONENT)) / alpha
        for mean in pairs.mean_logps()
    )
    return chosen, rejected


def alphapo(pairs: Pairs) -> Tensor:
    """AlphaPO, Gupta et al. 2025 (arXiv:2501.03884): SimPO with the rewards
    (1 - exp(-alpha a)) / alpha in place of a.

    alpha must not be 0, where it is SimPO. Gradient in l_w: -beta sig(-x) exp(-alpha a_w) / |y_w|.
    """
    chosen, rejected = alphapo_rewards(pairs)
    x = pairs.beta * (chosen - rejected) - (pairs.options.simpo_gamma + pairs.margin)
    return pairs.expected(logistic, x, pairs.options.label_smoothing)


def orpo(pairs: Pairs) -> Tensor:
    """ORPO, Hong et al. 2024 (arXiv:2403.07691), Eq. 6 and 7: -beta log sig(o_w - o_l), and the NLL
    of the chosen answer with nll_weight, 1 by default; beta is the paper's lambda.

    o = a - log(1 - exp(a)) are the log-odds of the mean log-probability. An answer of probability 1
    (an empty one, too) counts as 1 minus the dtype's epsilon, without a gradient. Gradient in l_w:
    -beta sig(o_l - o_w) / (|y_w| (1 - exp(a_w))).
    """
    chosen, rejected = (log_odds(mean) for mean in pairs.mean_logps())
    return pairs.beta * pairs.expected(logistic, chosen - rejected)


def log_odds(logp: Tensor) -> Tensor:
    """logp - log(1 - exp(logp)), finite at 0, where an answer without a token is."""
    logp = logp.clamp(max=-torch.finfo(logp.dtype).eps)
    return logp - torch.log(-torch.expm1(logp))
