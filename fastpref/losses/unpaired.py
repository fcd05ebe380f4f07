"""Losses of single answers labelled desirable or undesirable: KTO and unpaired APO-zero."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastpref.validation import check_number

UNPAIRED_LOSS_TYPES = ("kto", "apo_zero_unpaired")


class UnpairedLoss(NamedTuple):
    """A loss of single answers and their rewards.

    Attributes:
        loss: [], the mean over the answers.
        rewards: [B], beta (logp - ref_logp), detached.
        kl: [] or [B], the KL estimate that KTO used, detached; 0 for apo_zero_unpaired.
        logps: [B] log-probabilities of the answers, detached; None from `kto_loss`.
        stats: the per-token outputs if extras were requested; None from `kto_loss`.
    """

    loss: Tensor
    rewards: Tensor
    kl: Tensor
    logps: Tensor | None = None
    stats: Any = None


def kto_kl(kl_logps: Tensor, ref_kl_logps: Tensor) -> Tensor:
    """KTO's estimate of KL(pi || pi_ref), without a gradient.

    max(0, mean(log pi(y'|x) - log pi_ref(y'|x))) over mismatched pairs (x, y'): Ethayarajh et al.
    2024 (arXiv:2402.01306), Section 4.1. y' is the answer to another prompt of the batch; TRL and
    the authors shift the answers by one. With several processes TRL averages over all of them
    before the maximum: compute that average and pass it to `kto_loss` as kl.

    Args:
        kl_logps, ref_kl_logps: [K] log-probabilities of mismatched answers; K = 0 gives 0.

    Returns:
        [], in kl_logps' dtype.

    Raises:
        ValueError: shapes that differ.
    """
    if not isinstance(kl_logps, Tensor) or kl_logps.dim() != 1:
        raise ValueError(f"kl_logps: got {shape_or_type(kl_logps)}, expected a tensor [K]")
    if not isinstance(ref_kl_logps, Tensor) or ref_kl_logps.shape != kl_logps.shape:
        raise ValueError(
            f"ref_kl_logps: got {shape_or_type(ref_kl_logps)}, expected a tensor "
            f"{tuple(kl_logps.shape)}"
        )
    ratios = (kl_logps - ref_kl_logps).detach()
    return (ratios.sum() / max(ratios.shape[0], 1)).clamp(min=0)


def kto_loss(
    logps: Tensor,
    ref_logps: Tensor | None,
    desirable: Tensor,
    kl: Tensor | float | None = None,
    *,
    loss_type: str = "kto",
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
    kl_logps: Tensor | None = None,
    ref_kl_logps: Tensor | None = None,
    reference_free: bool = False,
    weight: Tensor | None = None,
) -> UnpairedLoss:
    """The loss of B answers, each labelled desirable or undesirable.

    With r = logp - ref_logp, sig the logistic function and w the weight of the answer's class:

        kto                w (1 - sig(beta (r - kl)))   desirable
                           w (1 - sig(beta (kl - r)))   undesirable
        apo_zero_unpaired  the same with kl = 0

    and the mean over all answers. KTO: Ethayarajh et al. 2024 (arXiv:2402.01306), Eq. 7 and 8;
    APO-zero: D'Oosterlinck et al. 2024 (arXiv:2408.06266), Eq. 7, without pairs, as in TRL.
    Gradient in r, with z = beta (r - kl): -w beta sig(z) sig(-z) / B for a desirable answer, the
    opposite for an undesirable one; none goes through kl.

    Args:
        logps: [B] log-probabilities of the policy in nats, summed over the answer's tokens.
        ref_logps: [B] of the reference; None with reference_free=True.
        desirable: [B] bool.
        kl: an estimate of KL(pi || pi_ref), as a number or a tensor [] or [B]; no gradient goes
            through it. Not for apo_zero_unpaired.
        loss_type: "kto" or "apo_zero_unpaired".
        beta: strength of the pull towards the reference.
        desirable_weight, undesirable_weight: weights of the two classes, lambda_D and lambda_U in
            the paper, which recommends values that compensate for classes of different sizes.
        kl_logps, ref_kl_logps: [K] in place of kl, which is then their `kto_kl`.
        reference_free: ref_logps count as 0.
        weight: [B] factor on each answer's loss.

    Returns:
        UnpairedLoss; the loss is in logps' dtype. A NaN log-probability makes the loss NaN, while
        TRL drops such answers. Zero answers give a zero loss that is connected to the graph.

    Raises:
        ValueError: an unknown loss, shapes or dtypes that do not fit together, a missing KL
            estimate or one for apo_zero_unpaired, a missing reference or one with reference_free.
    """
    check_unpaired_options(loss_type, beta, desirable_weight, undesirable_weight)
    size = logps.shape[0] if isinstance(logps, Tensor) and logps.dim() == 1 else None
    if size is None:
        raise ValueError(f"logps: got {shape_or_type(logps)}, expected a tensor [B]")
    check_answers(size, ref_logps, desirable, reference_free, weight=weight)
    estimate = kl_estimate(loss_type, kl, kl_logps, ref_kl_logps, logps, size)
    ratio = logps if ref_logps is None else logps - ref_logps
    gain = beta * (ratio - estimate)
    losses = torch.sigmoid(torch.where(desirable, -gain, gain))
    if (desirable_weight, undesirable_weight) != (1.0, 1.0):
        losses = torch.where(desirable, desirable_weight * losses, undesirable_weight * losses)
    if weight is not None:
        losses = losses * weight
    return UnpairedLoss(losses.sum() / max(size, 1), beta * ratio.detach(), estimate)


def check_unpaired_options(loss_type: str, beta: float, *class_weights: float) -> None:
    """Raise ValueError for an unknown loss or a value out of range.

    class_weights: desirable_weight and undesirable_weight.
    """
    if loss_type not in UNPAIRED_LOSS_TYPES:
        raise ValueError(
            f"loss_type: got {loss_type!r}, expected one of {', '.join(UNPAIRED_LOSS_TYPES)}"
        )
    check_number("beta", beta)
    if not 0 < beta < float("inf"):
        raise ValueError(f"beta: got {beta}, expected a positive number")
    names = ("desirable_weight", "undesirable_weight")
    for name, value in zip(names, class_weights, strict=True):
        check_number(name, value)
        if not 0 <= value < float("inf"):
            raise ValueError(f"{name}: got {value}, expected a number from 0 on")


def check_answers(
    size: int,
    ref_logps: Tensor | None,
    desirable: Tensor,
    reference_free: bool,
    **weight: Tensor | None,
) -> None:
    """Raise ValueError unless the tensors of each answer are [size] and the reference fits.

    weight: the factor on each answer, under the name that errors give it.
    """
    if reference_free and ref_logps is not None:
        raise ValueError(
            "reference_free: got True with reference log-probs, expected one of the two"
        )
    if not reference_free and ref_logps is None:
        raise ValueError(
            "ref_logps: got None, expected the reference's log-probs; without a reference model "
            "pass reference_free=True"
        )
    for name, t in {"ref_logps": ref_logps, "desirable": desirable, **weight}.items():
        if t is not None and (not isinstance(t, Tensor) or t.shape != (size,)):
            raise ValueError(f"{name}: got {shape_or_type(t)}, expected a tensor [{size}]")
    if desirable.dtype != torch.bool:
        raise ValueError(f"desirable: got {str(desirable.dtype)[6:]}, expected bool")


def kl_estimate(
    loss_type: str,
    kl: Tensor | float | None,
    kl_logps: Tensor | None,
    ref_kl_logps: Tensor | None,
    like: Tensor,
    size: int,
) -> Tensor:
    """KTO's KL estimate, [] or [size], on the device of `like`; 0 for another loss_type.

    Raises ValueError unless either kl, or kl_logps and ref_kl_logps, are passed.
    """
    arguments = {"kl": kl, "kl_logps": kl_logps, "ref_kl_logps": ref_kl_logps}
    names = [name for name, value in arguments.items() if value is not None]
    if loss_type != "kto":
        if names:
            raise ValueError(f"{names[0]}: loss_type {loss_type!r} does not support it; kto does")
        return like.new_zeros(())
    if len(names) == 2 and kl is None:
        assert kl_logps is not None and ref_kl_logps is not None
        return kto_kl(kl_logps, ref_kl_logps).to(like.device)
    if names != ["kl"]:
        raise ValueError(
            f"kl: got {' and '.join(names) or 'None'}, expected kl, or both kl_logps and "
            "ref_kl_logps"
        )
    if isinstance(kl, Tensor):
        if kl.numel() != 1 and kl.shape != (size,):
            raise ValueError(
                f"kl: got {shape_or_type(kl)}, expected a number or a tensor [] or [{size}]"
            )
        kl = kl.detach().to(like.device)
        return kl.reshape(()) if kl.numel() == 1 else kl.to(like.dtype)
    check_number("kl", kl)
    return like.new_full((), kl)  # type: ignore[arg-type]


def shape_or_type(value: Any) -> str:
    """The shape of a tensor, or the type of anything else, for an error message."""
    return f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
