"""Losses of single answers from hidden states: `linear_kto_loss`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from fastpref.logps.checks import adapter_tensors
from fastpref.logps.first_order import check_transforms
from fastpref.logps.forward import HeadTensors
from fastpref.logps.linear import prepare
from fastpref.logps.options import take_head_options
from fastpref.logps.sequences import sequence_logps
from fastpref.logps.vocab_parallel import VocabParallelWeight
from fastpref.losses.unpaired import (
    UnpairedLoss,
    check_answers,
    check_unpaired_options,
    kl_estimate,
    kto_loss,
    shape_or_type,
)
from fastpref.validation import check_device, check_ids


def linear_kto_loss(
    hidden: Tensor,
    weight: Tensor | VocabParallelWeight,
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
    lora_hidden: Tensor | None = None,
    lora_B: Tensor | None = None,
    dora_scale: Tensor | None = None,
    low_rank: tuple[Tensor, Tensor] | None = None,
    weight_scale: Tensor | None = None,
    **head: Any,
) -> UnpairedLoss:
    """`kto_loss` from hidden states and the head, without the logits.

    Args:
        hidden: [B, T, H], or flat [N, H] with sequence_ids [N] int64 in [0, B). Dtypes as in
            `linear_token_logps`.
        weight, bias: the head, [V, H] and [V] or None; or a `VocabParallelWeight` and its rows of
            the bias.
        labels: [B, T] or [N] int64, aligned with hidden; ignore_index where a token does not count.
        desirable: [B] bool.
        ref_logps: [B] the reference's log-probabilities in nats, summed per answer.
        kl, kl_logps, ref_kl_logps, loss_type, beta, desirable_weight, undesirable_weight,
            reference_free: as in `kto_loss`. kl_logps come from a forward pass of the policy over
            mismatched answers, without gradients.
        answer_weight: [B] factor on each answer's loss.
        extras, token_indices, lora_hidden, lora_B, dora_scale, low_rank, weight_scale, head: as in
            `linear_token_logps`.

    Returns:
        UnpairedLoss; loss is float32 (float64 for float64 inputs), 0 without a labelled token.

    Raises:
        ValueError: as `kto_loss` and `linear_token_logps`, before any product.
        TypeError: an unknown keyword.
    """
    check_transforms()
    options = take_head_options("linear_kto_loss", head)
    check_unpaired_options(loss_type, beta, desirable_weight, undesirable_weight)
    if not isinstance(desirable, Tensor) or desirable.dim() != 1:
        raise ValueError(f"desirable: got {shape_or_type(desirable)}, expected a tensor [B]")
    size = desirable.shape[0]
    check_answers(size, ref_logps, desirable, reference_free, answer_weight=answer_weight)
    layout: dict[str, Any] = {"ignore_index": options.ignore_index}
    if sequence_ids is None:
        if not isinstance(labels, Tensor) or labels.dim() != 2 or labels.shape[0] != size:
            raise ValueError(
                f"labels: got {shape_or_type(labels)}, expected [{size}, T], as desirable"
            )
    else:
        check_ids("sequence_ids", sequence_ids, size)
        if not isinstance(labels, Tensor) or sequence_ids.shape != labels.shape:
            raise ValueError(
                f"sequence_ids: got {tuple(sequence_ids.shape)} for labels "
                f"{shape_or_type(labels)}, expected [N] for both"
            )
        check_device("sequence_ids", sequence_ids, labels.device)
        layout |= {"sequence_ids": sequence_ids, "num_sequences": size}
    lora_hidden, lora_B, dora_scale = adapter_tensors(
        low_rank, weight_scale, lora_hidden, lora_B, dora_scale
    )
    tensors = HeadTensors(weight, bias, lora_B, dora_scale)  # type: ignore[arg-type]
    call = prepare(hidden, tensors, labels, options, extras, token_indices, lora_hidden)
    # For its errors, which must come before any product; `kto_loss` computes the estimate again.
    kl_estimate(loss_type, kl, kl_logps, ref_kl_logps, hidden, size)
    stats = call.spread(call.compute())
    sums = sequence_logps(stats.logps, labels, **layout)
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
    return out._replace(
        loss=out.loss * counted, logps=sums.detach(), stats=stats if extras else None
    )
