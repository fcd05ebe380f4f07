"""Losses of single answers that are labelled desirable or not: KTO and APO-zero without pairs."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastpref.validation import check_number

UNPAIRED_LOSS_TYPES = ("kto", "apo_zero_unpaired")


class UnpairedLoss(NamedTuple):
    """loss []: mean over the answers. rewards [B]: beta (logp - ref), detached.

    kl [] or [B]: the estimate that KTO used, detached; 0 for apo_zero_unpaired. logps [B]: of the
    answers, detached, and stats: the per-token outputs where extras were asked for; None from
    `kto_loss`.
    """

    loss: Tensor
    rewards: Tensor
    kl: Tensor
    logps: Tensor | None = None
    stats: Any = None


def kto_kl(kl_logps: Tensor, ref_kl_logps: Tensor) -> Tensor:
    """KTO's estimate of KL(pi || pi_ref), Ethayarajh et al. 2024 (arXiv:2402.01306), Section 4.1:
    max(0, mean(log pi(y'|x) - log pi_ref(y'|x))) over mismatched pairs, without a gradient.

    y' is the answer to another prompt of the batch: TRL and the authors shift the answers by one.
    With several processes TRL averages over all of them before the maximum: pass that as kl.

    Args:
        kl_logps, ref_kl_logps: [K] log-probabilities of mismatched answers; K = 0 gives 0.

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
    """The loss of B answers, each labelled desirable or not.

    With r = logp - ref_logp, sig the logistic function and w the weight of the answer's class:

        kto                w (1 - sig(beta (r - kl)))   desirable
                           w (1 - sig(beta (kl - r)))   undesirable
        apo_zero_unpaired  the same with kl = 0

    and the mean over all answers. KTO: Ethayarajh et al. 2024 (arXiv:2402.01306), Eq. 7 and 8;
    APO-zero: D'Oosterlinck et al. 2024 (arXiv:2408.06266), Eq. 7, without pairs, as in TRL.
    Gradient in r, with z = beta (r - kl): -w beta sig(z) sig(-z) / B for a desirable answer, the
    opposite for an undesirable one; none goes through kl.

    Args:
        logps, ref_logps: [B] of the policy and of the reference, summed over the answer's tokens;
            ref_logps None with reference_free=True, where they count as 0.
        desirable: [B] bool.
        kl: the estimate of KL(pi || pi_ref), a number, a tensor of one or one for each answer [B],
            used as it is, without a gradient; or give kl_logps and ref_kl_logps [K], from which
            `kto_kl` makes it. Not for apo_zero_unpaired.
        beta: strength of the pull towards the reference.
        desirable_weight, undesirable_weight: factors on the two classes, lambda_D and lambda_U in
            the paper; they should even out the classes' sizes.
        weight: [B] a factor on each answer.

    Returns:
        UnpairedLoss; the loss is in logps' dtype. An answer whose log-prob is NaN makes it NaN (TRL
        drops such answers). Zero answers give a zero loss that is connected to the graph.

    Raises:
        ValueError: an unknown loss, shapes or dtypes that do not fit, a KL that is missing or has
            no use, a reference that is missing or given with reference_free.
    """
    check_unpaired_options(loss_type, beta, desirable_weight, undesirable_weight)
    size = logps.shape[0] if isinstance(logps, Tensor) and logps.dim() == 1 else None
    if size is None:
        raise ValueError(f"logps: got {shape_or_type(logps)}, expected a tensor [B]")
    check_answers(size, ref_logps, desirable, reference_free, weight=weight)
    estimate = kl_estimate(loss_type, kl, kl_logps, ref_kl_logps, logps, size)
    ratio = logps if ref_logps is None else logps - ref_logps
    gain = beta * (ratio - estimate)
    each = torch.sigmoid(torch.where(desirable, -gain, gain))
    if (desirable_weight, undesirable_weight) != (1.0, 1.0):
        each = torch.where(desirable, desirable_weight * each, undesirable_weight * each)
    if weight is not None:
        each = each * weight
    return UnpairedLoss(each.sum() / max(size, 1), beta * ratio.detach(), estimate)


def check_unpaired_options(loss_type: str, beta: float, *class_weights: float) -> None:
    """Raise ValueError unless they are a loss and its numbers; class_weights: the two in order."""
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
    """The estimate [] or [size], on like's device."""
    given = {"kl": kl, "kl_logps": kl_logps, "ref_kl_logps": ref_kl_logps}
    names = [name for name, value in given.items() if value is not None]
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
    """What was given in place of a tensor of another shape, for an error message."""
    return f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
