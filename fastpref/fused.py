"""Losses from hidden states or logits to a scalar: the functions that a training step calls."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastpref import backends
from fastpref.autograd import TokenStats
from fastpref.checks import check_ids
from fastpref.logps import prepare, sequence_logps, token_logps
from fastpref.losses import NEEDS_LENGTHS, check_options, check_reference, preference_loss
from fastpref.options import HeadOptions


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


@dataclass(frozen=True)
class _PairProblem:
    """What is left to do once the token log-probs are there; checked before any of them is."""

    labels: Tensor
    segments: dict[str, Any]  # sequence_ids, num_sequences, ignore_index of sequence_logps
    options: dict[str, Any]  # loss_type, beta, label_smoothing, ipo_normalization, reference_free
    ref_logps: Tensor | None
    lengths: Tensor | None
    pair_weight: Tensor | None
    margin: Tensor | None
    backend: str | None

    def solve(self, logps: Tensor, stats: TokenStats | None = None) -> PreferenceOutput:
        """From token log-probs [2P, T] or [N] to the output; by closed form if there is one."""
        size = self.segments["num_sequences"]
        counted = self.labels != self.segments["ignore_index"]
        ref_logps, pair_weight, margin = (
            None if t is None else t.to(device=logps.device, dtype=logps.dtype).contiguous()
            for t in (self.ref_logps, self.pair_weight, self.margin)
        )
        lengths = None
        by_token = self.options["ipo_normalization"] == "token_mean"
        if self.options["loss_type"] in NEEDS_LENGTHS and by_token:
            lengths = self.lengths
            if lengths is None:
                lengths = sequence_logps(counted.to(logps.dtype), self.labels, **self.segments)
            lengths = lengths.to(device=logps.device, dtype=logps.dtype).contiguous()
        inputs = (ref_logps, lengths, pair_weight, margin)
        module = self._closed_form_backend(logps, inputs)
        if module is not None:
            out = self._closed_form(logps, size // 2, module, *inputs)
        else:
            out = self._autograd(logps, size // 2, *inputs)
        # Without a labelled token there is nothing to learn; the graph stays connected.
        return out._replace(loss=out.loss * counted.any().to(out.loss.dtype), stats=stats)

    def _closed_form_backend(self, logps, inputs):
        """The backend whose `pair_loss` has this loss in closed form, or None."""
        if torch.compiler.is_compiling():  # which fuses the few operations on [2P] itself
            return None
        module = backends.choose(logps.device, logps.dtype, self.backend)
        learned = any(t is not None and t.requires_grad for t in inputs)
        return None if learned or self.options["loss_type"] not in module.CLOSED_FORMS else module

    def _closed_form(self, logps, pairs, module, ref_logps, lengths, pair_weight, margin):
        ids = self.segments["sequence_ids"]
        if ids is None:
            ids = torch.arange(2 * pairs, device=logps.device)
            ids = ids.repeat_interleave(self.labels.shape[1])
        options = dict(
            loss_type=self.options["loss_type"],
            beta=self.options["beta"],
            label_smoothing=self.options["label_smoothing"],
            lengths=lengths,
            weight=pair_weight,
            margin=margin,
        )
        loss, sequences, rewards = _PairLoss.apply(
            logps.reshape(-1).contiguous(), ids.contiguous(), pairs, ref_logps, options, module
        )
        return PreferenceOutput(
            loss, sequences[:pairs], sequences[pairs:], rewards[:pairs], rewards[pairs:]
        )

    def _autograd(self, logps, pairs, ref_logps, lengths, pair_weight, margin):
        sums = sequence_logps(logps, self.labels, **self.segments)
        chosen, rejected = sums[:pairs], sums[pairs:]
        chosen_lengths, rejected_lengths = _halves(lengths, pairs)
        result = preference_loss(
            chosen,
            rejected,
            *_halves(ref_logps, pairs),
            chosen_lengths=chosen_lengths,
            rejected_lengths=rejected_lengths,
            weight=pair_weight,
            margin=margin,
            **self.options,
        )
        rewards = result.chosen_rewards, result.rejected_rewards
        return PreferenceOutput(result.loss, chosen.detach(), rejected.detach(), *rewards)


def _pair_problem(
    labels: Tensor,
    ref_logps: Tensor | None,
    *,
    has_reference: bool,
    sequence_ids: Tensor | None = None,
    num_sequences: int | None = None,
    ignore_index: int = -100,
    backend: str | None = None,
    loss_type: str = "sigmoid",
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    ipo_normalization: str = "token_mean",
    lengths: Tensor | None = None,
    reference_free: bool = False,
    pair_weight: Tensor | None = None,
    margin: Tensor | None = None,
) -> _PairProblem:
    """Check everything that does not need a log-prob. Raises ValueError."""
    size = _count_sequences(labels, sequence_ids, num_sequences, ref_logps, lengths)
    check_options(loss_type, beta, label_smoothing, ipo_normalization, margin)
    check_reference(reference_free, has_reference)
    for name, t, expected in (
        ("ref_logps", ref_logps, size),
        ("lengths", lengths, size),
        ("pair_weight", pair_weight, size // 2),
        ("margin", margin, size // 2),
    ):
        if t is None:
            continue
        if not isinstance(t, Tensor) or t.shape != (expected,):
            given = tuple(t.shape) if isinstance(t, Tensor) else type(t).__name__
            raise ValueError(f"{name}: got {given}, expected a tensor [{expected}]")
    return _PairProblem(
        labels=labels,
        segments=dict(sequence_ids=sequence_ids, num_sequences=size, ignore_index=ignore_index),
        options=dict(
            loss_type=loss_type,
            beta=beta,
            label_smoothing=label_smoothing,
            ipo_normalization=ipo_normalization,
            reference_free=reference_free,
        ),
        ref_logps=ref_logps,
        lengths=lengths,
        pair_weight=pair_weight,
        margin=margin,
        backend=backend,
    )


def _halves(t: Tensor | None, pairs: int) -> tuple[Tensor | None, Tensor | None]:
    return (None, None) if t is None else (t[:pairs], t[pairs:])


def _count_sequences(
    labels: Tensor,
    sequence_ids: Tensor | None,
    num_sequences: int | None,
    *vectors: Tensor | None,
) -> int:
    """2P: the rows of labels [2P, T]; in the flat form as told, or the length of a vector [2P]."""
    if not isinstance(labels, Tensor):
        raise ValueError(f"labels: got {type(labels).__name__}, expected a tensor")
    if sequence_ids is None:
        if labels.dim() != 2:
            raise ValueError(
                f"labels: got shape {tuple(labels.shape)}, expected [2P, T], or [N] with "
                "sequence_ids"
            )
        size = labels.shape[0]
        if num_sequences not in (None, size):
            raise ValueError(
                f"num_sequences: got {num_sequences}, expected {size}, the rows of labels"
            )
    else:
        if not isinstance(sequence_ids, Tensor):
            raise ValueError(f"sequence_ids: got {type(sequence_ids).__name__}, expected a tensor")
        if labels.dim() != 1 or sequence_ids.shape != labels.shape:
            raise ValueError(
                f"sequence_ids: got shape {tuple(sequence_ids.shape)} for labels "
                f"{tuple(labels.shape)}, expected [N] for both"
            )
        known = [len(t) for t in vectors if isinstance(t, Tensor)]
        if num_sequences is None and not known:
            raise ValueError("num_sequences: got None, expected 2P with sequence_ids")
        size = known[0] if num_sequences is None else num_sequences
        check_ids("sequence_ids", sequence_ids, size)
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
    token_indices: Tensor | None = None,
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
        token_indices: as in `linear_token_logps`.
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
    problem = _pair_problem(
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
    policy = prepare(hidden, weight, labels, bias, options, extras, token_indices)
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
            head_ref = ref_hidden, ref_weight, labels, ref_bias, options
            ref_tokens = prepare(*head_ref, (), token_indices, "ref_").run()
        assert isinstance(ref_tokens, Tensor)
        problem = replace(problem, ref_logps=sequence_logps(ref_tokens, labels, **problem.segments))
    out = policy.run()
    if isinstance(out, TokenStats):
        return problem.solve(out.logps, out)
    return problem.solve(out)


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
    problem = _pair_problem(
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
