"""Losses of single answers that are labelled desirable or not: KTO and APO-zero without pairs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastpref.backends.tile import check_number
from fastpref.checks import check_ids
from fastpref.logps import prepare
from fastpref.options import take_head_options
from fastpref.passes import HeadTensors, TokenStats
from fastpref.sequences import sequence_logps

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
    stats: TokenStats | None = None


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
        raise ValueError(f"kl_logps: got {_given(kl_logps)}, expected a tensor [K]")
    if not isinstance(ref_kl_logps, Tensor) or ref_kl_logps.shape != kl_logps.shape:
        raise ValueError(
            f"ref_kl_logps: got {_given(ref_kl_logps)}, expected a tensor {tuple(kl_logps.shape)}"
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
        raise ValueError(f"logps: got {_given(logps)}, expected a tensor [B]")
    _check_answers(size, ref_logps, desirable, reference_free, weight=weight)
    estimate = _kl(loss_type, kl, kl_logps, ref_kl_logps, logps, size)
    ratio = logps if ref_logps is None else logps - ref_logps
    gain = beta * (ratio - estimate)
    each = torch.sigmoid(torch.where(desirable, -gain, gain))
    if (desirable_weight, undesirable_weight) != (1.0, 1.0):
        each = torch.where(desirable, desirable_weight * each, undesirable_weight * each)
    if weight is not None:
        each = each * weight
    return UnpairedLoss(each.sum() / max(size, 1), beta * ratio.detach(), estimate)


def linear_kto_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    desirable: Tensor,
    ref_logps: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    sequence_ids: Tensor | None = None,
    kl: Tensor | float | None = None,
    kl_logps: Tensor | None = None,
    ref_kl_logps: Tensor | None = None,
    loss_type: str = "kto",
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
    reference_free: bool = False,
    answer_weight: Tensor | None = None,
    extras: Sequence[str] = (),
    token_indices: Tensor | None = None,
    low_rank: tuple[Tensor, Tensor] | None = None,
    weight_scale: Tensor | None = None,
    **head: Any,
) -> UnpairedLoss:
    """`kto_loss` from hidden states and the head, without the logits.

    Args:
        hidden: [B, T, H], or flat [N, H] with sequence_ids [N] int64 in [0, B).
        weight, bias: the head, [V, H] and [V] or None.
        labels: [B, T] or [N] int64, aligned with hidden; ignore_index where a token does not count.
        desirable: [B] bool.
        ref_logps: [B] the reference's log-probabilities, summed per answer.
        kl, kl_logps, ref_kl_logps, loss_type, beta, desirable_weight, undesirable_weight,
            reference_free: as in `kto_loss`; answer_weight is its weight. kl_logps come from a
            forward pass of the policy over mismatched answers, without gradients.
        extras, token_indices, low_rank, weight_scale, head: as in `linear_token_logps`.

    Returns:
        UnpairedLoss; loss is float32 (float64 for float64 inputs), 0 without a labelled token.

    Raises:
        ValueError: as the two functions named above, before any product.
    """
    options = take_head_options("linear_kto_loss", head)
    check_unpaired_options(loss_type, beta, desirable_weight, undesirable_weight)
    if not isinstance(desirable, Tensor) or desirable.dim() != 1:
        raise ValueError(f"desirable: got {_given(desirable)}, expected a tensor [B]")
    size = desirable.shape[0]
    _check_answers(size, ref_logps, desirable, reference_free, answer_weight=answer_weight)
    form: dict[str, Any] = {"ignore_index": options.ignore_index}
    if sequence_ids is None:
        if not isinstance(labels, Tensor) or labels.dim() != 2 or labels.shape[0] != size:
            raise ValueError(f"labels: got {_given(labels)}, expected [{size}, T], as desirable")
    else:
        check_ids("sequence_ids", sequence_ids, size)
        if not isinstance(labels, Tensor) or sequence_ids.shape != labels.shape:
            raise ValueError(
                f"sequence_ids: got {tuple(sequence_ids.shape)} for labels {_given(labels)}, "
                "expected [N] for both"
            )
        form |= {"sequence_ids": sequence_ids, "num_sequences": size}
    low, up = (None, None) if low_rank is None else low_rank
    own = HeadTensors(weight, bias, up, weight_scale)
    call = prepare(hidden, own, labels, options, extras, token_indices, low)
    _kl(loss_type, kl, kl_logps, ref_kl_logps, hidden, size)  # raises, before any product
    result = call.run()
    stats = result if isinstance(result, TokenStats) else None
    tokens = result.logps if isinstance(result, TokenStats) else result
    sums = sequence_logps(tokens, labels, **form)
    out = kto_loss(
        sums,
        None if ref_logps is None else ref_logps.to(sums.device, sums.dtype),
        desirable.to(sums.device),
        kl,
        loss_type=loss_type,
        beta=beta,
        desirable_weight=desirable_weight,
        undesirable_weight=undesirable_weight,
        kl_logps=kl_logps,
        ref_kl_logps=ref_kl_logps,
        reference_free=reference_free,
        weight=None if answer_weight is None else answer_weight.to(sums.device, sums.dtype),
    )
    counted = (labels != options.ignore_index).any().to(sums.dtype)
    return out._replace(loss=out.loss * counted, logps=sums.detach(), stats=stats)


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


def _check_answers(
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
            raise ValueError(f"{name}: got {_given(t)}, expected a tensor [{size}]")
    if desirable.dtype != torch.bool:
        raise ValueError(f"desirable: got {str(desirable.dtype)[6:]}, expected bool")


def _kl(
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
            raise ValueError(f"kl: got {_given(kl)}, expected a number or a tensor [] or [{size}]")
        kl = kl.detach().to(like.device)
        return kl.reshape(()) if kl.numel() == 1 else kl.to(like.dtype)
    check_number("kl", kl)
    return like.new_full((), kl)  # type: ignore[arg-type]


def _given(value: Any) -> str:
    return f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
