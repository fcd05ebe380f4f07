"""Losses from hidden states or logits to a scalar: the functions that a training step calls."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fastpref.logps import prepare, sequence_logps, token_logps
from fastpref.options import HeadOptions
from fastpref.pairs import PreferenceOutput, pair_problem
from fastpref.passes import Head


def linear_preference_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    ref_logps: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    ref_hidden: Tensor | None = None,
    ref_weight: Tensor | None = None,
    ref_bias: Tensor | None = None,
    sequence_ids: Tensor | None = None,
    num_sequences: int | None = None,
    loss_type: str = "sigmoid",
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    ipo_normalization: str = "token_mean",
    lengths: Tensor | None = None,
    reference_free: bool = False,
    pair_weight: Tensor | None = None,
    margin: Tensor | None = None,
    extras: Sequence[str] = (),
    ignore_index: int = -100,
    backend: str | None = None,
    token_indices: Tensor | None = None,
    low_rank: tuple[Tensor, Tensor] | None = None,
    weight_scale: Tensor | None = None,
    **head: Any,
) -> PreferenceOutput:
    """A preference loss from hidden states and the head, without the logits.

    Args:
        hidden: [2P, T, H], the chosen sequences first, then the rejected ones in the same order; or
            flat [N, H] with sequence_ids.
        weight, bias: the head, [V, H] and [V] or None.
        labels: [2P, T] or [N] int64, aligned with hidden; ignore_index where a token does not
            count.
        ref_logps: [2P] the reference's log-probabilities, summed per sequence. Or give ref_hidden
            (shaped like hidden) and they are computed here without gradients, under ref_weight and
            ref_bias, or under the policy's own head where neither is given. Or pass
            reference_free=True.
        sequence_ids, num_sequences: the flat form: [N] int64 in [0, 2P), chosen ones in [0, P).
        loss_type, beta, label_smoothing, ipo_normalization, reference_free, margin: as in
            `preference_loss`; pair_weight is its weight.
        lengths: [2P] IPO's denominators; default: the labelled tokens of each sequence.
        extras: per-token outputs to return in stats, as in `linear_token_logps`.
        token_indices, low_rank, weight_scale: as in `linear_token_logps`. The reference inside has
            no adapter.
        head: scale, softcap, temperature, strategy, memory_budget, precision, fused of
            `linear_token_logps`.

    Returns:
        PreferenceOutput; loss is float32 (float64 for float64 inputs).

    Raises:
        ValueError: as the two functions named above, an odd number of sequences, and a reference
            that is missing or given twice.
    """
    given = ref_hidden is not None
    if given and ref_logps is not None:
        raise ValueError("ref_hidden: got it with ref_logps, expected one of the two")
    for name, t in (("ref_weight", ref_weight), ("ref_bias", ref_bias)):
        if t is not None and not given:
            raise ValueError(f"ref_hidden: got None with {name}, expected the reference's states")
    problem = pair_problem(
        labels,
        ref_logps,
        has_reference=given or ref_logps is not None,
        sequence_ids=sequence_ids,
        num_sequences=num_sequences,
        ignore_index=ignore_index,
        backend=backend,
        loss_type=loss_type,
        beta=beta,
        label_smoothing=label_smoothing,
        ipo_normalization=ipo_normalization,
        lengths=lengths,
        reference_free=reference_free,
        pair_weight=pair_weight,
        margin=margin,
    )
    options = HeadOptions(ignore_index=ignore_index, backend=backend, **head)
    low, up = (None, None) if low_rank is None else low_rank
    own = Head(weight, bias, up, weight_scale)
    policy = prepare(hidden, own, labels, options, extras, token_indices, low)
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
            # The same kernels on both sides: where the two models agree, so do all bits.
            if policy.has_grads:
                options = replace(options, fused=False)
            ref_head = Head(ref_weight, ref_bias)
            reference = prepare(
                ref_hidden, ref_head, labels, options, (), token_indices, prefix="ref_"
            )
            ref_tokens = reference.run()
        assert isinstance(ref_tokens, Tensor)
        problem = replace(problem, ref_logps=sequence_logps(ref_tokens, labels, **problem.segments))
    return problem.run(policy)


def linear_dpo_loss(
    hidden: Tensor, weight: Tensor, labels: Tensor, ref_logps: Tensor | None = None, **options: Any
) -> PreferenceOutput:
    """`linear_preference_loss` with the DPO loss (Rafailov et al. 2023, arXiv:2305.18290)."""
    return linear_preference_loss(hidden, weight, labels, ref_logps, loss_type="sigmoid", **options)


def linear_ipo_loss(
    hidden: Tensor, weight: Tensor, labels: Tensor, ref_logps: Tensor | None = None, **options: Any
) -> PreferenceOutput:
    """`linear_preference_loss` with the IPO loss (Azar et al. 2023, arXiv:2310.12036)."""
    return linear_preference_loss(hidden, weight, labels, ref_logps, loss_type="ipo", **options)


def _logits_loss(
    logits: Tensor,
    labels: Tensor,
    ref_logps: Tensor | None,
    ignore_index: int = -100,
    backend: str | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    inplace_backward: bool = False,
    **options: Any,
) -> PreferenceOutput:
    problem = pair_problem(
        labels,
        ref_logps,
        has_reference=ref_logps is not None,
        ignore_index=ignore_index,
        backend=backend,
        **options,
    )
    logps = token_logps(
        logits,
        labels,
        scale=scale,
        softcap=softcap,
        temperature=temperature,
        ignore_index=ignore_index,
        inplace_backward=inplace_backward,
        backend=backend,
    )
    return problem.solve(logps)


def dpo_loss(
    logits: Tensor, labels: Tensor, ref_logps: Tensor | None = None, **options: Any
) -> PreferenceOutput:
    """The DPO loss (Rafailov et al. 2023, arXiv:2305.18290) from ready logits.

    logits [2P, T, V] = [chosen; rejected], labels [2P, T] aligned with them, ref_logps [2P].

    Forward reads the logits once; backward writes their gradient once, over the logits themselves
    with inplace_backward=True. Options, returns and errors: those of `token_logps` and of
    `linear_preference_loss`.
    """
    return _logits_loss(logits, labels, ref_logps, loss_type="sigmoid", **options)


def ipo_loss(
    logits: Tensor, labels: Tensor, ref_logps: Tensor | None = None, **options: Any
) -> PreferenceOutput:
    """The IPO loss (Azar et al. 2023, arXiv:2310.12036) from ready logits; else as `dpo_loss`."""
    return _logits_loss(logits, labels, ref_logps, loss_type="ipo", **options)
