"""Losses from hidden states or logits to a scalar: the functions that a training step calls."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastpref import backends
from fastpref.autograd import TokenStats
from fastpref.logps import _check_ids, linear_token_logps, sequence_logps, token_logps
from fastpref.losses import check_options, check_reference, preference_loss


class PreferenceOutput(NamedTuple):
    """loss []. chosen_logps, rejected_logps [P]: sums over the answer's tokens, detached.

    chosen_rewards, rejected_rewards [P]: beta (logp - ref), detached. stats: the per-token outputs
    where extras were asked for, else None.
    """

    loss: Tensor
    chosen_logps: Tensor
    rejected_logps: Tensor
    chosen_rewards: Tensor
    rejected_rewards: Tensor
    stats: TokenStats | None = None


class _PairLoss(torch.autograd.Function):
    """Token log-probs [N] -> loss [], through a backend's closed form; backward is one scaling."""

    @staticmethod
    def forward(ctx, logps, ids, pairs, ref_logps, options, backend):
        loss, sequences, rewards, coef = backend.pair_loss(logps, ids, pairs, ref_logps, **options)
        ctx.save_for_backward(coef)
        ctx.mark_non_differentiable(sequences, rewards)
        ctx.set_materialize_grads(False)
        return loss, sequences, rewards

    @staticmethod
    @once_differentiable
    def backward(ctx, dloss, *_):
        if dloss is None:
            return (None,) * 6
        return ctx.saved_tensors[0] * dloss, None, None, None, None, None


def _preference(
    logps: Tensor,
    labels: Tensor,
    ref_logps: Tensor | None,
    *,
    sequence_ids: Tensor | None,
    num_sequences: int,
    ignore_index: int,
    backend: str | None,
    stats: TokenStats | None = None,
    loss_type: str = "sigmoid",
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    ipo_normalization: str = "token_mean",
    lengths: Tensor | None = None,
    reference_free: bool = False,
    pair_weight: Tensor | None = None,
    margin: Tensor | None = None,
) -> PreferenceOutput:
    """From token log-probs [2P, T] or [N] to the output; by closed form if the backend has it."""
    loss = check_options(loss_type, beta, label_smoothing, ipo_normalization, margin)
    check_reference(reference_free, ref_logps)
    segments: dict[str, Any] = dict(
        sequence_ids=sequence_ids, num_sequences=num_sequences, ignore_index=ignore_index
    )
    if not (loss.needs_lengths and ipo_normalization == "token_mean"):
        lengths = None
    elif lengths is None:
        lengths = sequence_logps((labels != ignore_index).to(logps.dtype), labels, **segments)
    pairs = num_sequences // 2
    ref_logps = _vector("ref_logps", ref_logps, num_sequences, logps)
    lengths = _vector("lengths", lengths, num_sequences, logps)
    pair_weight = _vector("pair_weight", pair_weight, pairs, logps)
    margin = _vector("margin", margin, pairs, logps)

    module = backends.choose(logps.device, logps.dtype, backend)
    inputs = (ref_logps, lengths, pair_weight, margin)
    learned = any(t is not None and t.requires_grad for t in inputs)  # closed forms know only logps
    if loss_type in module.CLOSED_FORMS and not learned:
        ids = sequence_ids
        if ids is None:
            ids = torch.arange(num_sequences, device=logps.device)
            ids = ids.repeat_interleave(labels.shape[1])
        options = dict(
            loss_type=loss_type,
            beta=beta,
            label_smoothing=label_smoothing,
            lengths=lengths,
            weight=pair_weight,
            margin=margin,
        )
        value, sequences, rewards = _PairLoss.apply(
            logps.reshape(-1).contiguous(), ids.contiguous(), pairs, ref_logps, options, module
        )
        return PreferenceOutput(
            value,
            sequences[:pairs],
            sequences[pairs:],
            rewards[:pairs],
            rewards[pairs:],
            stats,
        )
    sums = sequence_logps(logps, labels, **segments)
    chosen, rejected = sums[:pairs], sums[pairs:]
    result = preference_loss(
        chosen,
        rejected,
        *(_halves(ref_logps, pairs)),
        loss_type=loss_type,
        beta=beta,
        label_smoothing=label_smoothing,
        ipo_normalization=ipo_normalization,
        chosen_lengths=_halves(lengths, pairs)[0],
        rejected_lengths=_halves(lengths, pairs)[1],
        reference_free=reference_free,
        weight=pair_weight,
        margin=margin,
    )
    return PreferenceOutput(
        result.loss,
        chosen.detach(),
        rejected.detach(),
        result.chosen_rewards,
        result.rejected_rewards,
        stats,
    )


def _logps(out: Tensor | TokenStats) -> Tensor:
    return out.logps if isinstance(out, TokenStats) else out


def _halves(t: Tensor | None, pairs: int) -> tuple[Tensor | None, Tensor | None]:
    return (None, None) if t is None else (t[:pairs], t[pairs:])


def _vector(name: str, t: Tensor | None, size: int, like: Tensor) -> Tensor | None:
    if t is None:
        return None
    if t.shape != (size,):
        raise ValueError(f"{name}: got shape {tuple(t.shape)}, expected [{size}]")
    return t.to(device=like.device, dtype=like.dtype).contiguous()


def _count_sequences(
    labels: Tensor, sequence_ids: Tensor | None, num_sequences: int | None, **vectors: Tensor | None
) -> int:
    """2P: the rows of labels [2P, T]; in the flat form as told, or as long as ref_logps."""
    if sequence_ids is None:
        if labels.dim() != 2:
            raise ValueError(
                f"labels: got shape {tuple(labels.shape)}, expected [2P, T], or [N] with "
                "sequence_ids"
            )
        size = labels.shape[0]
    else:
        if labels.dim() != 1 or sequence_ids.shape != labels.shape:
            raise ValueError(
                f"sequence_ids: got shape {tuple(sequence_ids.shape)} for labels "
                f"{tuple(labels.shape)}, expected [N] for both"
            )
        known = [len(t) for t in vectors.values() if t is not None]
        if num_sequences is None and not known:
            raise ValueError("num_sequences: got None, expected 2P with sequence_ids")
        size = known[0] if num_sequences is None else num_sequences
        _check_ids("sequence_ids", sequence_ids, size)
    if size % 2:
        raise ValueError(
            f"labels: got {size} sequences, expected an even number, [chosen; rejected]"
        )
    return size


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
            (shaped like hidden) with ref_weight and ref_bias (default: weight and bias), and they
            are computed here without gradients. Or pass reference_free=True.
        sequence_ids, num_sequences: the flat form: [N] int64 in [0, 2P), chosen ones in [0, P).
        loss_type, beta, label_smoothing, ipo_normalization, reference_free, margin: as in
            `preference_loss`; pair_weight is its weight.
        lengths: [2P] IPO's denominators; default: the labelled tokens of each sequence.
        extras: per-token outputs to return in stats, as in `linear_token_logps`.
        head: scale, softcap, temperature, strategy, memory_budget, precision, token_indices of
            `linear_token_logps`.

    Returns:
        PreferenceOutput; loss is float32 (float64 for float64 inputs).

    Raises:
        ValueError: as the two functions named above, an odd number of sequences, and a reference
            that is missing or given twice.
    """
    size = _count_sequences(
        labels, sequence_ids, num_sequences, ref_logps=ref_logps, lengths=lengths
    )
    options = dict(head, ignore_index=ignore_index, backend=backend)
    if ref_hidden is not None:
        if ref_logps is not None:
            raise ValueError("ref_hidden: got it with ref_logps, expected one of the two")
        with torch.no_grad():
            ref_tokens = _logps(
                linear_token_logps(
                    ref_hidden,
                    weight if ref_weight is None else ref_weight,
                    labels,
                    bias if ref_weight is None else ref_bias,
                    **options,
                )
            )
        ref_logps = sequence_logps(
            ref_tokens,
            labels,
            sequence_ids=sequence_ids,
            num_sequences=size,
            ignore_index=ignore_index,
        )
    elif ref_weight is not None or ref_bias is not None:
        raise ValueError("ref_hidden: got None with ref_weight or ref_bias, expected all of them")
    out = linear_token_logps(hidden, weight, labels, bias, extras=extras, **options)
    return _preference(
        _logps(out),
        labels,
        ref_logps,
        sequence_ids=sequence_ids,
        num_sequences=size,
        ignore_index=ignore_index,
        backend=backend,
        stats=out if isinstance(out, TokenStats) else None,
        loss_type=loss_type,
        beta=beta,
        label_smoothing=label_smoothing,
        ipo_normalization=ipo_normalization,
        lengths=lengths,
        reference_free=reference_free,
        pair_weight=pair_weight,
        margin=margin,
    )


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
    sequence_ids: Tensor | None = None,
    num_sequences: int | None = None,
    ignore_index: int = -100,
    backend: str | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    inplace_backward: bool = False,
    **options: Any,
) -> PreferenceOutput:
    size = _count_sequences(labels, sequence_ids, num_sequences, ref_logps=ref_logps)
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
    return _preference(
        logps,
        labels,
        ref_logps,
        sequence_ids=sequence_ids,
        num_sequences=size,
        ignore_index=ignore_index,
        backend=backend,
        **options,
    )


def dpo_loss(
    logits: Tensor, labels: Tensor, ref_logps: Tensor | None = None, **options: Any
) -> PreferenceOutput:
    """The DPO loss from ready logits [2P, T, V] = [chosen; rejected] and aligned labels [2P, T].

    Forward reads the logits once; backward writes their gradient once, over the logits themselves
    with inplace_backward=True. Options: those of `token_logps` and of `linear_preference_loss`.
    """
    return _logits_loss(logits, labels, ref_logps, loss_type="sigmoid", **options)


def ipo_loss(
    logits: Tensor, labels: Tensor, ref_logps: Tensor | None = None, **options: Any
) -> PreferenceOutput:
    """The IPO loss from ready logits; as `dpo_loss` otherwise."""
    return _logits_loss(logits, labels, ref_logps, loss_type="ipo", **options)
