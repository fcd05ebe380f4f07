"""What is left of a preference loss once the token log-probs are there, checked before they are."""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastpref import backends
from fastpref.checks import check_ids
from fastpref.logps import PreparedLogps, sequence_logps
from fastpref.losses import NEEDS_LENGTHS, check_options, check_reference, preference_loss
from fastpref.passes import TokenStats


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
class PairProblem:
    """What is left to do once the token log-probs are there; checked before any of them is."""

    labels: Tensor
    segments: dict[str, Any]  # sequence_ids, num_sequences, ignore_index of sequence_logps
    options: dict[str, Any]  # loss_type, beta, label_smoothing, ipo_normalization, reference_free
    ref_logps: Tensor | None
    lengths: Tensor | None
    pair_weight: Tensor | None
    margin: Tensor | None
    backend: str | None

    def run(self, call: PreparedLogps | Any) -> PreferenceOutput:
        """From the prepared head to the output."""
        if isinstance(call, PreparedLogps):
            module = self._closed_form_backend(call.rows)
            if module is not None:
                # The ignored tokens are not put back for a sum that drops them again.
                stats = call.compute()
                ids = self._ids(call.index, call.labels.shape[0])
                out = self._closed_form(stats.logps, ids, None, module)
                return out._replace(stats=call.spread(stats) if call.call.extras else None)
        result = call.run()
        if isinstance(result, TokenStats):
            return self.solve(result.logps)._replace(stats=result)
        return self.solve(result)

    def solve(self, logps: Tensor) -> PreferenceOutput:
        """From token log-probs [2P, T] or [N] to the output; by closed form if there is one."""
        counted = self.labels != self.segments["ignore_index"]
        module = self._closed_form_backend(logps)
        if module is not None:
            ids = self._ids(None, logps.numel())
            out = self._closed_form(logps.reshape(-1), ids, counted.reshape(-1), module)
        else:
            out = self._autograd(logps, counted)
        # Without a labelled token there is nothing to learn; the graph stays connected.
        return out._replace(loss=out.loss * counted.any().to(out.loss.dtype))

    def _closed_form_backend(self, t: Tensor) -> ModuleType | None:
        """The backend whose `pair_loss` has this loss in closed form, or None."""
        if torch.compiler.is_compiling():  # which fuses the few operations on [2P] itself
            return None
        module = backends.choose(t.device, t.dtype, self.backend)
        given = (self.ref_logps, self.lengths, self.pair_weight, self.margin)
        learned = any(t is not None and t.requires_grad for t in given)
        return None if learned or self.options["loss_type"] not in module.CLOSED_FORMS else module

    @property
    def _by_token(self) -> bool:
        """Whether the loss divides by the numbers of labelled tokens."""
        by_token = self.options["ipo_normalization"] == "token_mean"
        return self.options["loss_type"] in NEEDS_LENGTHS and by_token

    def _ids(self, index: Tensor | None, tokens: int) -> Tensor:
        """The sequences [N] of the tokens at these positions; None: of all of them."""
        ids = self.segments["sequence_ids"]
        if ids is not None:
            return (ids if index is None else ids.index_select(0, index)).contiguous()
        if index is None:
            index = torch.arange(tokens, device=self.labels.device)
        return index.div(max(self.labels.shape[1], 1), rounding_mode="floor")

    def _closed_form(
        self, logps: Tensor, ids: Tensor, counted: Tensor | None, module: ModuleType
    ) -> PreferenceOutput:
        """Of logps [N] with their sequences ids [N]; counted [N], None if every one of them is."""
        size = self.segments["num_sequences"]
        pairs = size // 2
        lengths = self.lengths if self._by_token else None
        if self._by_token and lengths is None:
            ones = torch.ones_like(logps) if counted is None else counted.to(logps.dtype)
            lengths = logps.new_zeros(size).index_add_(0, ids, ones.detach())
        vectors = (self.ref_logps, lengths, self.pair_weight, self.margin)
        ref_logps, lengths, pair_weight, margin = (
            None if t is None else t.to(device=logps.device, dtype=logps.dtype).contiguous()
            for t in vectors
        )
        options = dict(
            loss_type=self.options["loss_type"],
            beta=self.options["beta"],
            label_smoothing=self.options["label_smoothing"],
            lengths=lengths,
            weight=pair_weight,
            margin=margin,
        )
        loss, sequences, rewards = _PairLoss.apply(
            logps.contiguous(), ids, pairs, ref_logps, options, module
        )
        if logps.shape[0] == 0:
            loss = loss * 0.0 + logps.sum()
        return PreferenceOutput(
            loss, sequences[:pairs], sequences[pairs:], rewards[:pairs], rewards[pairs:]
        )

    def _autograd(self, logps: Tensor, counted: Tensor) -> PreferenceOutput:
        sums = sequence_logps(logps, self.labels, **self.segments)
        pairs = self.segments["num_sequences"] // 2
        lengths = self.lengths if self._by_token else None
        if self._by_token and lengths is None:
            lengths = sequence_logps(counted.to(logps.dtype), self.labels, **self.segments)
        ref_logps, lengths, pair_weight, margin = (
            None if t is None else t.to(device=logps.device, dtype=logps.dtype)
            for t in (self.ref_logps, lengths, self.pair_weight, self.margin)
        )
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


def pair_problem(
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
) -> PairProblem:
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
    return PairProblem(
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
