"""Losses of preference pairs, from hidden states and the head or from logits to a scalar."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fastpref.fused.pair_loss import PairInputs, PreferenceOutput, prepare_loss
from fastpref.logps.checks import adapter_tensors
from fastpref.logps.forward import HeadTensors, TokenStats
from fastpref.logps.linear import prepare
from fastpref.logps.logits import token_logps
from fastpref.logps.options import take_head_options
from fastpref.logps.prepared import PreparedLogps
from fastpref.logps.vocab_parallel import VocabParallelWeight
from fastpref.losses.options import pop_loss_options


def linear_preference_loss(
    hidden: Tensor,
    weight: Tensor | VocabParallelWeight,
    labels: Tensor,
    ref_logps: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    ref_hidden: Tensor | None = None,
    ref_weight: Tensor | VocabParallelWeight | None = None,
    ref_bias: Tensor | None = None,
    sequence_ids: Tensor | None = None,
    num_sequences: int | None = None,
    lengths: Tensor | None = None,
    pair_weight: Tensor | None = None,
    margin: Tensor | None = None,
    soft_labels: Tensor | None = None,
    nll_labels: Tensor | None = None,
    extras: Sequence[str] = (),
    token_indices: Tensor | None = None,
    lora_hidden: Tensor | None = None,
    lora_B: Tensor | None = None,
    dora_scale: Tensor | None = None,
    low_rank: tuple[Tensor, Tensor] | None = None,
    weight_scale: Tensor | None = None,
    **options: Any,
) -> PreferenceOutput:
    """A preference loss from hidden states and the head, without the logits.

    Args:
        hidden: [2P, T, H], the chosen sequences first, then the rejected ones in the same order; or
            flat [N, H] with sequence_ids. Dtypes as in `linear_token_logps`.
        weight, bias: the head, [V, H] and [V] or None; or a `VocabParallelWeight` and its rows of
            the bias.
        labels: [2P, T] or [N] int64, aligned with hidden; ignore_index where a token does not
            count.
        ref_logps: [2P] the reference's log-probabilities in nats, summed per sequence. They may be
            replaced by ref_hidden, or by reference_free=True. A loss without a reference (simpo,
            alphapo, orpo, cpo) accepts none of them.
        ref_hidden: the reference's hidden states, shaped like hidden but for H. ref_logps are then
            computed here, without gradients and without an adapter.
        ref_weight, ref_bias: the head for ref_hidden; by default weight and bias.
        sequence_ids: [N] int64 in [0, 2P), for flat hidden; chosen sequences are in [0, P).
        num_sequences: 2P, for flat hidden; by default the length of ref_logps or of lengths.
        lengths: [2P] the divisors of losses per token; by default the number of labelled tokens of
            each sequence.
        pair_weight, margin, soft_labels: [P], as weight, margin and soft_labels of
            `preference_loss`.
        nll_labels: shaped like labels, int64: the labels of the chosen sequences' tokens that an
            NLL counts; by default labels. (The authors' code for ORPO counts the prompt as well.)
            Rejected sequences are not read. With it, token_indices are the positions that either
            labels or nll_labels labels.
        extras: per-token outputs to return in stats, as in `linear_token_logps`.
        token_indices, lora_hidden, lora_B, dora_scale, low_rank, weight_scale: as in
            `linear_token_logps`.
        options: of the loss, as in `fastpref.LossOptions`: loss_type="sigmoid" (or a list, or a
            function of your own), beta=0.1, loss_weights, label_smoothing, ipo_normalization,
            reference_free, f_divergence_type, f_alpha_divergence_coef, discopop_tau, simpo_gamma,
            alpha, nll_weight, ld_alpha, use_weighting; or a LossOptions as loss_options. Of the
            head, as in `linear_token_logps`: scale, softcap, temperature, ignore_index=-100,
            strategy, memory_budget, precision, fused, backend, gradient_tolerance,
            head_gradient_tolerance, gradient_seed.

    Returns:
        PreferenceOutput; loss is float32 (float64 for float64 inputs).

    Raises:
        ValueError: the errors of `preference_loss` and of `linear_token_logps`, an odd number of
            sequences, both ref_logps and ref_hidden.
        TypeError: an unknown keyword.
    """
    has_ref_hidden = ref_hidden is not None
    if has_ref_hidden and ref_logps is not None:
        raise ValueError("ref_hidden: got it with ref_logps, expected one of the two")
    for name, t in (("ref_weight", ref_weight), ("ref_bias", ref_bias)):
        if t is not None and not has_ref_hidden:
            raise ValueError(f"ref_hidden: got None with {name}, expected the reference's states")
    loss, head = pop_loss_options(options), take_head_options("linear_preference_loss", options)
    prepared = prepare_loss(
        labels,
        loss,
        PairInputs(ref_logps, lengths, pair_weight, margin, soft_labels),
        has_reference=has_ref_hidden or ref_logps is not None,
        sequence_ids=sequence_ids,
        num_sequences=num_sequences,
        nll_labels=nll_labels,
        ignore_index=head.ignore_index,
        backend=head.backend,
        wants_stats=len(extras) > 0,
    )
    lora_hidden, lora_B, dora_scale = adapter_tensors(
        low_rank, weight_scale, lora_hidden, lora_B, dora_scale
    )
    policy_head = HeadTensors(weight, bias, lora_B, dora_scale)  # type: ignore[arg-type]
    head_labels = prepared.head_labels
    head_extras = prepared.head_extras(extras)
    policy = prepare(
        hidden, policy_head, head_labels, head, head_extras, token_indices, lora_hidden
    )
    if ref_hidden is not None:
        if isinstance(ref_hidden, Tensor) and ref_hidden.shape[:-1] != hidden.shape[:-1]:
            raise ValueError(
                f"ref_hidden: got shape {tuple(ref_hidden.shape)}, expected that of hidden, "
                f"{tuple(hidden.shape)}, but for the last dimension"
            )
        if ref_bias is None and ref_weight is None:
            ref_bias = bias
        ref_weight = weight if ref_weight is None else ref_weight
        with torch.no_grad():
            # Policy and reference run the same kernels, so that equal models have equal log-probs.
            if not policy.logit_free:
                head = replace(head, fused=False)
            if policy.has_grads and head.strategy == "forward-only":
                head = replace(head, strategy="auto")
            ref_head = HeadTensors(ref_weight, ref_bias)  # type: ignore[arg-type]
            reference = prepare(
                ref_hidden, ref_head, head_labels, head, (), token_indices, prefix="ref_"
            )
            ref_tokens = reference.spread(reference.compute()).logps
        inputs = prepared.inputs._replace(ref_logps=prepared.sums(ref_tokens))
        prepared = prepared._replace(inputs=inputs)
    pair_loss = prepared.pair_loss_inputs(policy)
    if isinstance(policy, PreparedLogps):
        out = policy.compute(None if prepared.wants_stats else pair_loss)
    else:
        out = policy.compute()
    return prepared.output(policy, pair_loss, out)


def linear_dpo_loss(
    hidden: Tensor,
    weight: Tensor | VocabParallelWeight,
    labels: Tensor,
    ref_logps: Tensor | None = None,
    **options: Any,
) -> PreferenceOutput:
    """`linear_preference_loss` with loss_type "sigmoid": DPO, Rafailov et al. 2023
    (arXiv:2305.18290).
    """
    return linear_preference_loss(hidden, weight, labels, ref_logps, loss_type="sigmoid", **options)


def linear_ipo_loss(
    hidden: Tensor,
    weight: Tensor | VocabParallelWeight,
    labels: Tensor,
    ref_logps: Tensor | None = None,
    **options: Any,
) -> PreferenceOutput:
    """`linear_preference_loss` with loss_type "ipo": Azar et al. 2023 (arXiv:2310.12036)."""
    return linear_preference_loss(hidden, weight, labels, ref_logps, loss_type="ipo", **options)


def _logits_loss(
    logits: Tensor,
    labels: Tensor,
    ref_logps: Tensor | None,
    *,
    sequence_ids: Tensor | None = None,
    num_sequences: int | None = None,
    lengths: Tensor | None = None,
    pair_weight: Tensor | None = None,
    margin: Tensor | None = None,
    soft_labels: Tensor | None = None,
    nll_labels: Tensor | None = None,
    ignore_index: int = -100,
    backend: str | None = None,
    **options: Any,
) -> PreferenceOutput:
    loss = pop_loss_options(options)
    if loss.use_weighting:
        raise ValueError(
            "use_weighting: ready logits do not support it, expected hidden states; use "
            "linear_preference_loss"
        )
    prepared = prepare_loss(
        labels,
        loss,
        PairInputs(ref_logps, lengths, pair_weight, margin, soft_labels),
        has_reference=ref_logps is not None,
        sequence_ids=sequence_ids,
        num_sequences=num_sequences,
        nll_labels=nll_labels,
        ignore_index=ignore_index,
        backend=backend,
    )
    options |= {"ignore_index": ignore_index, "backend": backend}
    return prepared.loss_from_logps(
        TokenStats(token_logps(logits, prepared.head_labels, **options))
    )


def dpo_loss(
    logits: Tensor, labels: Tensor, ref_logps: Tensor | None = None, **options: Any
) -> PreferenceOutput:
    """The DPO loss (Rafailov et al. 2023, arXiv:2305.18290) from logits that exist already.

    The forward pass reads the logits once. The backward pass writes their gradient once; with
    inplace_backward=True it overwrites the logits.

    Args:
        logits: [2P, T, V], [chosen; rejected], float64, float32, bfloat16 or float16.
        labels: [2P, T] int64, aligned with logits.
        ref_logps: [2P], as in `linear_preference_loss`.
        options: those of `token_logps` and of `linear_preference_loss`.

    Returns:
        PreferenceOutput.

    Raises:
        ValueError: as `token_logps` and `linear_preference_loss`.
    """
    return _logits_loss(logits, labels, ref_logps, loss_type="sigmoid", **options)


def ipo_loss(
    logits: Tensor, labels: Tensor, ref_logps: Tensor | None = None, **options: Any
) -> PreferenceOutput:
    """The IPO loss (Azar et al. 2023, arXiv:2310.12036) from logits; arguments as `dpo_loss`."""
    return _logits_loss(logits, labels, ref_logps, loss_type="ipo", **options)
