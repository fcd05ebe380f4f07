"""Every preference loss in float64, typed from its paper; shares nothing with fastpref.

One function a loss, from the log-probabilities of one batch to the loss of each pair [P]. `p` has:
w, l: log pi of the chosen and the rejected answers; rw, rl: log pi_ref; nw, nl: their tokens; beta;
and the options of the losses. Written out as the papers do, with no thought of overflow except
where they say sigmoid or log.
"""

from __future__ import annotations

import math
from types import SimpleNamespace

import torch
from torch import Tensor


def data(**given) -> SimpleNamespace:
    """float64 copies of the tensors, and the options' defaults."""
    options = dict(
        beta=0.1,
        label_smoothing=0.0,
        margin=0.0,
        soft_labels=None,
        ipo_normalization="token_mean",
        f_divergence_type="reverse_kl",
        f_alpha_divergence_coef=0.5,
        discopop_tau=0.05,
        simpo_gamma=0.5,
        alpha=0.0,
    )
    values = {k: v.double() if isinstance(v, Tensor) else v for k, v in given.items()}
    return SimpleNamespace(**{**options, **values})


def sig(x: Tensor) -> Tensor:
    return 1 / (1 + torch.exp(-x.clamp(-700, 700)))


def log_sig(x: Tensor) -> Tensor:
    return -torch.logaddexp(torch.zeros_like(x), -x)


def sided(p, loss, x: Tensor) -> Tensor:
    """E over the true label: the given one with the probability 1 - e."""
    e = p.label_smoothing if p.soft_labels is None else 1 - p.soft_labels
    return (1 - e) * loss(x) + e * loss(-x)


def f_prime(p, policy: Tensor, reference: Tensor) -> Tensor:
    """f'(u) at u = pi / pi_ref: Wang et al. 2023, Table 1; the constants are those of TRL."""
    log_u = policy - reference
    u = torch.exp(log_u)
    if p.f_divergence_type == "forward_kl":  # f = -log u + u
        return 1 - 1 / u
    if p.f_divergence_type == "js_divergence":
        return torch.log(2 * u / (1 + u))
    if p.f_divergence_type == "alpha_divergence" and p.f_alpha_divergence_coef != 1:
        power = p.f_alpha_divergence_coef - 1
        return (u**power - 1) / power
    return log_u  # f = u log u


def difference(p) -> Tensor:
    return f_prime(p, p.w, p.rw) - f_prime(p, p.l, p.rl)


def bradley_terry(p, x: Tensor) -> Tensor:
    return sided(p, lambda t: -log_sig(t), x - p.margin)


def sigmoid(p):  # Rafailov et al. 2023, Eq. 7
    return bradley_terry(p, p.beta * difference(p))


def ipo(p):  # Azar et al. 2023, Eq. 17
    chosen, rejected = f_prime(p, p.w, p.rw), f_prime(p, p.l, p.rl)
    if p.ipo_normalization == "token_mean":
        chosen, rejected = chosen / p.nw, rejected / p.nl
    return sided(p, lambda h: (h - 1 / (2 * p.beta)) ** 2, chosen - rejected)


def hinge(p):  # Liu et al. 2023 (RSO): hinge of the normalised likelihoods
    return sided(p, lambda t: torch.maximum(1 - t, 0 * t), p.beta * difference(p) - p.margin)


def exo_pair(p):  # Ji et al. 2024, Eq. 16: KL between two distributions over the pair
    x, e = p.beta * difference(p) - p.margin, p.label_smoothing
    policy = torch.log_softmax(torch.stack([x, 0 * x]), 0)
    target = torch.tensor([math.log(1 - e), math.log(e)], dtype=torch.float64)[:, None]
    return (policy.exp() * (policy - target)).sum(0)


def robust(p):  # Chowdhury et al. 2024
    x, e = p.beta * difference(p) - p.margin, p.label_smoothing
    return ((1 - e) * -log_sig(x) - e * -log_sig(-x)) / (1 - 2 * e)


def nca_pair(p):  # Chen et al. 2024, K = 2, rewards 1 and 0
    chosen, rejected = p.beta * (p.w - p.rw), p.beta * (p.l - p.rl)
    return -log_sig(chosen) - sum(0.5 * log_sig(-r) for r in (chosen, rejected))


def bco_pair(p):  # Jung et al. 2024, delta = 0
    return -log_sig(p.beta * (p.w - p.rw)) - log_sig(-p.beta * (p.l - p.rl))


def sppo_hard(p):  # Wu et al. 2024, Eq. 4.7 with eta = 1 / beta
    eta, won = 1 / p.beta, 1.0 if p.soft_labels is None else p.soft_labels
    chosen, rejected = p.w - p.rw, p.l - p.rl
    first = won * (chosen - eta / 2) ** 2 + (1 - won) * (chosen + eta / 2) ** 2
    return first + won * (rejected + eta / 2) ** 2 + (1 - won) * (rejected - eta / 2) ** 2


def aot(p):  # Melnyk et al. 2024, paired: sort the margins of the policy and of the reference
    policy, reference = torch.sort(p.w - p.l)[0], torch.sort(p.rw - p.rl)[0]
    return sided(p, lambda t: -log_sig(t), p.beta * (policy - reference))


def aot_unpaired(p):
    quantiles = torch.sort(p.w - p.rw)[0] - torch.sort(p.l - p.rl)[0]
    return sided(p, lambda t: -log_sig(t), p.beta * quantiles)


def apo_zero(p):  # D'Oosterlinck et al. 2024, Eq. 7, plus 1
    return 1 - sig(p.beta * (p.w - p.rw)) + sig(p.beta * (p.l - p.rl))


def apo_down(p):  # Eq. 8, plus 1
    chosen, rejected = p.w - p.rw, p.l - p.rl
    return sig(p.beta * chosen) + 1 - sig(p.beta * (chosen - rejected))


def discopop(p):  # Lu et al. 2024, Eq. 5
    x = p.beta * difference(p) - p.margin
    mixed = sig(x / p.discopop_tau)
    exponential = torch.where(x < -600 * p.discopop_tau, 0.0, mixed * torch.exp(-x.clamp(min=-600)))
    return (1 - mixed) * -log_sig(x) + exponential


def sigmoid_norm(p):
    chosen, rejected = f_prime(p, p.w, p.rw) / p.nw, f_prime(p, p.l, p.rl) / p.nl
    return bradley_terry(p, p.beta * (chosen - rejected))


def sft(p):  # one number for the batch, in equal shares
    return (-p.w.sum() / p.nw.sum()).expand(len(p.w))


def cpo_preference(p):  # Xu et al. 2024, Eq. 3
    return bradley_terry(p, p.beta * p.w - p.beta * p.l)


def cpo(p):
    return cpo_preference(p) + sft(p)


def simpo(p):  # Meng et al. 2024, Eq. 6
    return bradley_terry(p, p.beta / p.nw * p.w - p.beta / p.nl * p.l - p.simpo_gamma)


def alphapo(p):  # Gupta et al. 2025
    chosen, rejected = (torch.exp(a / n) for a, n in ((p.w, p.nw), (p.l, p.nl)))
    rewards = ((1 - q ** (-p.alpha)) / p.alpha for q in (chosen, rejected))
    return bradley_terry(p, p.beta * (next(rewards) - next(rewards)) - p.simpo_gamma)


def orpo_preference(p):  # Hong et al. 2024, Eq. 4 and 7
    chosen, rejected = (torch.exp(a / n) for a, n in ((p.w, p.nw), (p.l, p.nl)))
    ratio = (chosen / (1 - chosen)) / (rejected / (1 - rejected))
    return p.beta * sided(p, lambda t: -log_sig(t), torch.log(ratio))


def orpo(p):  # Eq. 6
    return orpo_preference(p) + sft(p)


LOSSES = {
    f.__name__: f
    for f in (
        sigmoid, ipo, hinge, exo_pair, nca_pair, robust, bco_pair, sppo_hard, aot, aot_unpaired,
        apo_zero, apo_down, discopop, sft, sigmoid_norm, cpo, simpo, alphapo, orpo,
    )
}  # fmt: skip


def kto(logps, reference, desirable, kl, beta, weights) -> Tensor:
    """Ethayarajh et al. 2024, Eq. 7 and 8: lambda_y - v(x, y), one loss per answer."""
    ratio = logps.double() - reference.double()
    good, bad = weights
    value = torch.where(desirable, good * sig(beta * (ratio - kl)), bad * sig(beta * (kl - ratio)))
    return torch.where(desirable, float(good), float(bad)) - value


def ld_sums(token_logps: Tensor, labels: Tensor, alpha: float) -> Tensor:
    """Liu et al. 2024: log-probs [2P] whose tokens past the shorter answer's length count alpha."""
    rows = [row[kept] for row, kept in zip(token_logps, labels != -100, strict=True)]
    pairs = len(rows) // 2
    shared = [min(len(rows[i]), len(rows[i + pairs])) for i in range(pairs)] * 2
    return torch.stack(
        [r[:n].sum() + alpha * r[n:].sum() for r, n in zip(rows, shared, strict=True)]
    )


def wpo(token_logps: Tensor, probs: Tensor, labels: Tensor) -> Tensor:
    """Zhou et al. 2024, Eq. 2: [P] from log-probs and whole distributions [2P, T, V]."""
    aligned = token_logps - probs.square().sum(-1).log()
    rows = [row[kept] for row, kept in zip(aligned, labels != -100, strict=True)]
    each = [row.mean().exp() if len(row) else torch.ones((), dtype=row.dtype) for row in rows]
    pairs = len(rows) // 2
    return torch.stack([each[i] * each[i + pairs] for i in range(pairs)]).detach()
