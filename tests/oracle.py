"""The truth in float64, typed from the formulas; shares nothing with fastpref.

Tensors in, tensors out, everything differentiable by autograd.
"""

from __future__ import annotations

import math
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor


def logits(hidden, weight, bias=None, scale=1.0, softcap=None, temperature=1.0) -> Tensor:
    """softcap tanh(scale (h W^T + b) / softcap) / temperature, [..., V]."""
    raw = torch.einsum("...h,vh->...v", hidden.double(), weight.double())
    if bias is not None:
        raw = raw + bias.double()
    return transform(raw, scale, softcap, temperature)


def transform(raw: Tensor, scale=1.0, softcap=None, temperature=1.0) -> Tensor:
    z = raw.double() * scale
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    return z / temperature


def token_stats(z: Tensor, labels: Tensor, ignore_index: int = -100) -> SimpleNamespace:
    """Per-token statistics of logits z [..., V], 0 (False) where the label is ignored."""
    z = z.double()
    kept = labels != ignore_index
    m = z.detach().max(-1, keepdim=True).values
    lse = m[..., 0] + (z - m).exp().sum(-1).log()
    logp = z - lse[..., None]
    p = logp.exp()
    label = labels.masked_fill(~kept, 0)
    first = (z == m).to(torch.uint8).argmax(-1)  # the first of equal maxima
    plogp = torch.where(p > 0, p * logp.masked_fill(p == 0, 0.0), 0.0)  # 0 log 0 = 0

    def only(t: Tensor) -> Tensor:
        return torch.where(kept, t, torch.zeros_like(t))

    return SimpleNamespace(
        logps=only(logp.gather(-1, label[..., None])[..., 0]),
        entropy=only(-plogp.sum(-1)),
        mean_logit=only(z.mean(-1)),
        is_top1=(first == label) & kept,
        log_sum_sq_probs=only(p.square().sum(-1).log()),
    )


def linear_logps(hidden, weight, labels, bias=None, ignore_index=-100, **transforms) -> Tensor:
    z = logits(hidden, weight, bias, **transforms)
    return token_stats(z, labels, ignore_index).logps


def sequence_sums(logps: Tensor, labels: Tensor, ignore_index: int = -100) -> Tensor:
    return (logps * (labels != ignore_index)).sum(-1)


def log_sigmoid(x: Tensor) -> Tensor:
    return -torch.logaddexp(torch.zeros_like(x), -x)


def dpo(chosen, rejected, beta=0.1, label_smoothing=0.0, margin=0.0) -> Tensor:
    """Rafailov et al. 2023, Eq. 7, one loss per pair; chosen, rejected: log(pi / pi_ref) [P].

    label_smoothing: cDPO (Mitchell 2023). margin: the offset of Amini et al. 2024.
    """
    x = beta * (chosen.double() - rejected.double()) - margin
    return -(1 - label_smoothing) * log_sigmoid(x) - label_smoothing * log_sigmoid(-x)


def ipo(chosen, rejected, beta=0.1, chosen_lengths=1, rejected_lengths=1) -> Tensor:
    """Azar et al. 2023, Eq. 17, one loss per pair; beta is the paper's tau.

    TRL 1.16 divides each log-ratio by its answer's tokens; lengths of 1 are the paper's sums.
    """
    h = chosen.double() / chosen_lengths - rejected.double() / rejected_lengths
    return (h - 1 / (2 * beta)) ** 2


def ipo_bandit(preferences: Tensor, reference: Tensor, tau: float) -> Tensor:
    """The optimum of Azar et al. 2023, Eq. 7 with Psi = identity and mu uniform.

    pi*(y) ~ reference(y) exp(p*(y > mu) / tau); preferences[i, j] = p*(i > j), 1/2 on the diagonal.
    """
    return torch.softmax(reference.double().log() + preferences.double().mean(1) / tau, 0)


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def eager_logps(hidden, weight, labels, bias=None, scale=1.0, softcap=None, temperature=1.0):
    """The yardstick, not the truth: eager torch in the inputs' dtype, with the softmax in fp32."""
    z = F.linear(hidden, weight, bias)
    z = (z if z.dtype == torch.float64 else z.float()) * scale
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    label = labels.clamp(min=0)[..., None]
    logps = torch.log_softmax(z / temperature, -1).gather(-1, label)[..., 0]
    return torch.where(labels < 0, 0.0, logps)


def assert_no_worse(got: Tensor, eager: Tensor, truth: Tensor, dtype: torch.dtype) -> None:
    """The error of got is no more than eager's, in the Euclidean norm, up to the luck of rounding.

    Luck is a tenth, and in quadrature one rounding of each value to dtype: D is rounded before it
    is scaled by the loss's coefficient and eager's is rounded after; either may be the finer.
    """
    assert got.shape == truth.shape and got.isfinite().all()
    one = {torch.float64: 512, torch.float32: 4}.get(dtype, 1 / 3) * torch.finfo(dtype).eps
    ours, theirs = (float((t.double() - truth).norm()) for t in (got, eager))
    bound = math.hypot(1.1 * theirs, one * float(truth.norm())) + 1e-30
    assert ours <= bound, f"error {ours:.3g}, eager's {theirs:.3g}, {ours / theirs:.2f} times it"


def assert_within(got: Tensor, truth: Tensor, bound: Tensor | float) -> None:
    """Every |got - truth| <= bound, no NaN; the message shows the worst element only."""
    assert got.shape == truth.shape
    got, truth = got.detach().double(), truth.detach().double()
    excess = torch.where(got == truth, 0.0, (got - truth).abs() / bound)
    excess = excess.nan_to_num(nan=math.inf)
    if excess.numel() and excess.max() > 1:
        at = tuple(int(i) for i in torch.unravel_index(excess.argmax(), got.shape))
        raise AssertionError(
            f"{int((excess > 1).sum())} of {got.numel()} out of bounds, the worst at {at}: "
            f"got {float(got[at])!r}, truth {float(truth[at])!r}, {float(excess[at]):.3g} bounds"
        )
