"""The losses of pairs: one function each, from `Pairs` to the loss of each pair, [P].

The names are TRL's. The losses from `sft` on need no reference. Gradients are those of one pair's
loss, without the NLL that CPO and ORPO add. Notation:

    l_w, l_l   the policy's log-probabilities of the chosen and of the rejected answer
    a_w, a_l   their means over the answer's tokens
    r_w, r_l   the log-ratios log(pi / pi_ref)
    s_w, s_l   the scores of the f-divergence; for reverse_kl, the default, the log-ratios
    d          s_w - s_l
    x          beta d - margin
    sig        the logistic function
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from fastpref.losses.pairs import LARGEST_EXPONENT, Pairs


def logistic(x: Tensor) -> Tensor:
    """-log sig(x), whose gradient is -sig(-x)."""
    return -F.logsigmoid(x)


def sigmoid(pairs: Pairs) -> Tensor:
    """DPO, Rafailov et al. 2023 (arXiv:2305.18290), Eq. 7: -log sig(x).

    label_smoothing e, or soft labels 1 - e, give cDPO (Mitchell 2023, "A note on DPO with noisy
    preferences"): -(1-e) log sig(x) - e log sig(-x). margin gives DPO with an offset (Amini et al.
    2024, arXiv:2402.10571). Gradient in d: beta (e sig(x) - (1-e) sig(-x)).
    """
    return pairs.expected(logistic, pairs.advantage(), pairs.options.label_smoothing)


def sigmoid_norm(pairs: Pairs) -> Tensor:
    """DPO on scores per token: -log sig(beta (s_w/|y_w| - s_l/|y_l|) - margin).

    The length normalisation of SimPO (arXiv:2405.14734) and of Tulu 3 (arXiv:2411.15124) with a
    reference. label_smoothing and soft labels as in `sigmoid`. Gradient in s_w: that of `sigmoid`
    over |y_w|.
    """
    chosen, rejected = pairs.mean_scores()
    x = pairs.beta * (chosen - rejected) - pairs.margin
    return pairs.expected(logistic, x, pairs.options.label_smoothing)


def ipo(pairs: Pairs) -> Tensor:
    """IPO, Azar et al. 2023 (arXiv:2310.12036), Eq. 17: (h - 1/(2 beta))^2, beta their tau.

    h is d for ipo_normalization="sum", as the paper writes it, and s_w/|y_w| - s_l/|y_l| for
    "token_mean", as TRL has it and as the paper's experiments did. A soft label p gives
    p (h - 1/(2 beta))^2 + (1-p) (h + 1/(2 beta))^2. Gradient in h: 2 (h - 1/(2 beta)).
    """
    chosen, rejected = pairs.chosen_scores, pairs.rejected_scores
    if pairs.options.ipo_normalization == "token_mean":
        chosen, rejected = pairs.mean_scores()
    return pairs.expected(lambda h: (h - 1 / (2 * pairs.beta)) ** 2, chosen - rejected)


def hinge(pairs: Pairs) -> Tensor:
    """max(0, 1 - x): SLiC-HF, Zhao et al. 2023 (arXiv:2305.10425), on DPO's rewards as in RSO,
    Liu et al. 2023 (arXiv:2309.06657).

    Gradient in d: -beta where x < 1, else 0.
    """
    return pairs.expected(lambda x: F.relu(1 - x), pairs.advantage())


def exo_pair(pairs: Pairs) -> Tensor:
    """EXO for two answers, Ji et al. 2024 (arXiv:2402.00856), Eq. 16: a reverse KL divergence.

    sig(x) (log sig(x) - log(1-e)) + sig(-x) (log sig(-x) - log e). label_smoothing e must be above
    0; the paper takes 1e-3. Gradient in d: beta sig(x) sig(-x) (x - log((1-e)/e)).
    """
    x, e = pairs.advantage(), pairs.options.label_smoothing
    log_p, log_q = F.logsigmoid(x), F.logsigmoid(-x)
    return x.sigmoid() * (log_p - math.log1p(-e)) + (-x).sigmoid() * (log_q - math.log(e))


def robust(pairs: Pairs) -> Tensor:
    """Robust DPO, Chowdhury et al. 2024 (arXiv:2403.00409): unbiased under flipped labels.

    (-(1-e) log sig(x) + e log sig(-x)) / (1 - 2e), where label_smoothing e is the rate of flipped
    labels. Gradient in d: -beta ((1-e) sig(-x) + e sig(x)) / (1 - 2e).
    """
    x = pairs.advantage()
    e: float = pairs.options.label_smoothing
    return ((1 - e) * logistic(x) - e * logistic(-x)) / (1 - 2 * e)


def nca_pair(pairs: Pairs) -> Tensor:
    """NCA for pairs, Chen et al. 2024 (arXiv:2402.05369):
    -log sig(beta r_w) - (log sig(-beta r_w) + log sig(-beta r_l)) / 2.

    Gradients: beta (sig(beta r_w)/2 - sig(-beta r_w)) in r_w, beta sig(beta r_l)/2 in r_l.
    """
    chosen, rejected = pairs.beta * pairs.chosen, pairs.beta * pairs.rejected
    return logistic(chosen) + (logistic(-chosen) + logistic(-rejected)) / 2


def bco_pair(pairs: Pairs) -> Tensor:
    """BCO, Jung et al. 2024 (arXiv:2404.04656), without the running reward shift, as in TRL:
    -log sig(beta r_w) - log sig(-beta r_l).

    Gradients: -beta sig(-beta r_w) in r_w, beta sig(beta r_l) in r_l.
    """
    return logistic(pairs.beta * pairs.chosen) + logistic(-pairs.beta * pairs.rejected)


def sppo_hard(pairs: Pairs) -> Tensor:
    """SPPO, Wu et al. 2024 (arXiv:2405.00675), Eq. 4.7 with P = 1 for the winner and 0 for the
    loser: (r_w - 1/(2 beta))^2 + (r_l + 1/(2 beta))^2; 1/beta is their eta.

    A soft label p gives the expectation over the winner. Its gradient is that of the paper's form
    with probabilities. Gradients: 2 (r_w - 1/(2 beta)) in r_w, 2 (r_l + 1/(2 beta)) in r_l.
    """
    half = 1 / (2 * pairs.beta)
    return pairs.expected(lambda r: (r - half) ** 2, pairs.chosen) + pairs.expected(
        lambda r: (r + half) ** 2, pairs.rejected
    )


def aot(pairs: Pairs) -> Tensor:
    """AOT for pairs, Melnyk et al. 2024 (arXiv:2406.05882): compares the distribution of the
    policy's log-ratios over the batch with the reference's, quantile by quantile.

    -(1-e) log sig(beta q) - e log sig(-beta q), where e is label_smoothing and q_i is the i-th
    smallest log pi(y_w) - log pi(y_l) minus the i-th smallest of the reference's. Element i of the
    result belongs to a quantile, not to a pair. The quantiles are those of the pairs of one call,
    so the loss depends on the batch size. Gradient in q: as `sigmoid` in d; it goes to the pair at
    the quantile.
    """
    policy = (pairs.chosen_logps - pairs.rejected_logps).sort().values
    reference = (pairs.ref_chosen_logps - pairs.ref_rejected_logps).sort().values
    x = pairs.beta * (policy - reference)
    return pairs.expected(logistic, x, pairs.options.label_smoothing)


def aot_unpaired(pairs: Pairs) -> Tensor:
    """AOT without pairs, Melnyk et al. 2024 (arXiv:2406.05882): as `aot` with q_i the i-th smallest
    r_w minus the i-th smallest r_l.
    """
    quantiles = pairs.chosen.sort().values - pairs.rejected.sort().values
    return pairs.expected(logistic, pairs.beta * quantiles, pairs.options.label_smoothing)


def apo_zero(pairs: Pairs) -> Tensor:
    """APO-zero, D'Oosterlinck et al. 2024 (arXiv:2408.06266), Eq. 7:
    sig(-beta r_w) + sig(beta r_l).

    For chosen answers that are better than the model's: raises their likelihood. Gradients, with
    s' = sig (1 - sig): -beta s'(beta r_w) in r_w, beta s'(beta r_l) in r_l.
    """
    return (-pairs.beta * pairs.chosen).sigmoid() + (pairs.beta * pairs.rejected).sigmoid()


def apo_down(pairs: Pairs) -> Tensor:
    """APO-down, D'Oosterlinck et al. 2024 (arXiv:2408.06266), Eq. 8:
    sig(beta r_w) + sig(-beta (r_w - r_l)).

    For chosen answers that are worse than the model's: lowers both likelihoods, the rejected
    answer's more. Gradients: beta (s'(beta r_w) - s'(beta (r_w - r_l))) in r_w and
    beta s'(beta (r_w - r_l)) in r_l, s' = sig (1 - sig).
    """
    difference = pairs.chosen - pairs.rejected
    return (pairs.beta * pairs.chosen).sigmoid() + (-pairs.beta * difference).sigmoid()


def discopop(pairs: Pairs) -> Tensor:
    """DiscoPOP, Lu et al. 2024 (arXiv:2406.08414), Eq. 5: (m - 1) log sig(x) + m exp(-x), where
    m = sig(x / discopop_tau).

    Gradient in x: -(1-m) sig(-x) - m exp(-x) + m (1-m) (log sig(x) + exp(-x)) / discopop_tau.
    """
    x = pairs.advantage()
    tau: float = pairs.options.discopop_tau
    # m exp(-x) as one exponential: as a product it is 0 times infinity for very negative x.
    exponential = (F.logsigmoid(x / tau) - x).clamp(max=LARGEST_EXPONENT).exp()
    return (-x / tau).sigmoid() * logistic(x) + exponential


def sft(pairs: Pairs) -> Tensor:
    """The NLL of the chosen answers: minus the mean of their tokens' log-probabilities.

    The mean is over all tokens of the batch, as in TRL and Liger, so a longer answer has a larger
    weight. Element i is the share of answer i: P nll_i / (all tokens). Gradient in a token's
    log-probability, after the mean over the pairs: -1 / (all tokens).
    """
    assert pairs.chosen_nll is not None and pairs.nll_lengths is not None
    # The quotient of two integers would be float32, also in the loss of float64 log-probs.
    tokens = pairs.nll_lengths.sum().clamp(min=1).to(pairs.chosen_nll.dtype)
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
    """(1 - exp(-alpha a)) / alpha of both answers, [P] each; exponents are clamped at 80."""
    alpha = pairs.options.alpha
    chosen, rejected = (
        -torch.expm1((-alpha * mean).clamp(max=LARGEST_EXPONENT)) / alpha
        for mean in pairs.mean_logps()
    )
    return chosen, rejected


def alphapo(pairs: Pairs) -> Tensor:
    """AlphaPO, Gupta et al. 2025 (arXiv:2501.03884): SimPO with the rewards
    (1 - exp(-alpha a)) / alpha in place of a.

    alpha must not be 0; the limit at 0 is SimPO. Gradient in l_w:
    -beta sig(-x) exp(-alpha a_w) / |y_w|.
    """
    chosen, rejected = alphapo_rewards(pairs)
    x = pairs.beta * (chosen - rejected) - (pairs.options.simpo_gamma + pairs.margin)
    return pairs.expected(logistic, x, pairs.options.label_smoothing)


def orpo(pairs: Pairs) -> Tensor:
    """ORPO, Hong et al. 2024 (arXiv:2403.07691), Eq. 6 and 7: -beta log sig(o_w - o_l), and the NLL
    of the chosen answer with nll_weight, 1 by default; beta is the paper's lambda.

    o = a - log(1 - exp(a)) are the log-odds of the mean log-probability. An answer of probability
    1, such as an empty one, counts as 1 minus the dtype's epsilon, without a gradient.

    Gradient in l_w: -beta sig(o_l - o_w) / (|y_w| (1 - exp(a_w))).
    """
    chosen, rejected = (log_odds(mean) for mean in pairs.mean_logps())
    return pairs.beta * pairs.expected(logistic, chosen - rejected)


def log_odds(logp: Tensor) -> Tensor:
    """logp - log(1 - exp(logp)); logp is clamped below 0, so that an empty answer's is finite."""
    logp = logp.clamp(max=-torch.finfo(logp.dtype).eps)
    return logp - torch.log(-torch.expm1(logp))
