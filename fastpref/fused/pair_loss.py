"""`PreparedLoss`: the part of a preference loss that follows the token log-probs.

Its inputs are checked before the head runs, so that a bad input costs no product.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastpref import backends, validation
from fastpref.backends.tile import Backend, PairLossInputs
from fastpref.fused.checks import check_nll_labels, count_sequences
from fastpref.logps.checks import check_extras
from fastpref.logps.compile import CompiledLogps
from fastpref.logps.first_order import FirstOrderFunction, check_transforms, first_order
from fastpref.logps.forward import TokenStats
from fastpref.logps.prepared import PreparedLogps
from fastpref.logps.sequences import sequence_logps
from fastpref.losses.options import LossOptions
from fastpref.losses.preference import check_inputs, evaluate, make_pairs
from fastpref.losses.tokens import ld_sequence_logps, nll_tokens, wpo_weights
from fastpref.validation import check_dense


class PreferenceOutput(NamedTuple):
    """A preference loss from tokens.

    Attributes:
        loss: [], the mean over the pairs.
        chosen_logps, rejected_logps: [P] log-probabilities of the answers in nats, detached: sums
            over the answer's tokens.
        chosen_rewards, rejected_rewards: [P], beta (logp - ref_logp), detached; for losses without
            a reference see `PreferenceLoss`.
        stats: the per-token outputs if extras were requested; else None.
        nll_loss: [], the mean NLL of the chosen answers' tokens if it is part of the loss,
            detached and not weighted; else None.
    """

    loss: Tensor
    chosen_logps: Tensor
    rejected_logps: Tensor
    chosen_rewards: Tensor
    rejected_rewards: Tensor
    stats: TokenStats | None = None
    nll_loss: Tensor | None = None


class PairInputs(NamedTuple):
    """The optional inputs of the sequences [2P] and of the pairs [P]."""

    ref_logps: Tensor | None = None  # [2P]
    lengths: Tensor | None = None  # [2P]
    pair_weight: Tensor | None = None  # [P]
    margin: Tensor | None = None  # [P]
    soft_labels: Tensor | None = None  # [P]

    def to(self, device: torch.device, dtype: torch.dtype) -> PairInputs:
        """The same inputs on this device and in this dtype, contiguous."""
        return PairInputs(*(None if t is None else t.to(device, dtype).contiguous() for t in self))


class _PairLoss(FirstOrderFunction):
    """Token log-probs [N] to the results of `Backend.pair_loss`, without its derivative.

    The derivative is saved, so that the backward pass is one scaling.
    """

    @staticmethod
    def forward(
        ctx: Any, logps: Tensor, backend: Backend, inputs: PairLossInputs
    ) -> tuple[Tensor, ...]:
        *out, dlogp = backend.pair_loss(logps, *inputs)
        ctx.save_for_backward(dlogp)
        ctx.mark_non_differentiable(*out[1:])
        ctx.set_materialize_grads(False)
        return tuple(out)

    @staticmethod
    @first_order
    def backward(ctx: Any, dloss: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        return None if dloss is None else ctx.saved_tensors[0] * dloss, None, None


class PreparedLoss(NamedTuple):
    """A preference loss with checked inputs, ready for token log-probs; see `prepare_loss`."""

    labels: Tensor  # [2P, T] or [N]
    sequence_layout: dict[str, Any]  # sequence_ids, num_sequences, ignore_index of sequence_logps
    options: LossOptions
    inputs: PairInputs
    nll_labels: Tensor | None = None
    backend: str | None = None
    wants_stats: bool = False

    @property
    def pairs(self) -> int:
        return self.sequence_layout["num_sequences"] // 2

    @property
    def is_labelled(self) -> Tensor:
        """Whether a token counts for the compared log-probs, shaped like labels."""
        return self.labels != self.sequence_layout["ignore_index"]

    @property
    def head_labels(self) -> Tensor:
        """The labels of all tokens whose log-probs the loss needs, shaped like labels."""
        if self.nll_labels is None:
            return self.labels
        counted_by_nll = nll_tokens(self.labels, self.nll_labels, **self.sequence_layout)
        return torch.where(self.is_labelled, self.labels, counted_by_nll)

    def head_extras(self, extras: Sequence[str]) -> tuple[str, ...]:
        """The per-token outputs that the head must compute: `extras`, and WPO's statistic."""
        names = check_extras(extras)
        if not self.options.use_weighting or "log_sum_sq_probs" in names:
            return names
        return *names, "log_sum_sq_probs"

    def sums(self, logps: Tensor) -> Tensor:
        """Token log-probs -> sequence log-probs [2P], with LD-DPO's weights if ld_alpha is set."""
        if self.options.ld_alpha is None:
            return sequence_logps(logps, self.labels, **self.sequence_layout)
        return ld_sequence_logps(logps, self.labels, self.options.ld_alpha, **self.sequence_layout)

    def pair_loss_inputs(self, policy: PreparedLogps | CompiledLogps) -> PairLossInputs | None:
        """The inputs of the closed form of the policy's backend; None if it has no closed form."""
        if isinstance(policy, CompiledLogps):  # torch.compile fuses the operations on [2P]
            return None
        if self._closed_form_backend(policy.hidden, policy.call.backend) is None:
            return None
        # The log-probs of the labelled tokens suffice: the sums skip the ignored ones.
        labels = policy.labels
        return self._pair_loss_inputs(policy.positions, labels.shape[0], None, labels.device)

    def output(
        self,
        policy: PreparedLogps | CompiledLogps,
        inputs: PairLossInputs | None,
        out: Sequence[Tensor | None],
    ) -> PreferenceOutput:
        """The output, from the results of the policy's `compute`.

        These are token statistics with wants_stats or without inputs; else the closed form's loss,
        sequence log-probs and rewards.
        """
        if inputs is not None:
            assert isinstance(policy, PreparedLogps)
            tokens = policy.labels.shape[0]
            if not self.wants_stats:
                return self._output(out, tokens)
            closed_form = _PairLoss.apply(out[0], policy.call.backend, inputs)
            return self._output(closed_form, tokens)._replace(stats=policy.spread(out))
        stats = policy.spread(out)
        result = self.loss_from_logps(stats)
        if not self.wants_stats:
            return result
        if self.nll_labels is not None:  # tokens that the NLL alone counts are not returned
            labelled = [None if t is None else t * self.is_labelled for t in stats]
            stats = TokenStats(*labelled)  # type: ignore[arg-type]
        return result._replace(stats=stats)

    def loss_from_logps(self, stats: TokenStats) -> PreferenceOutput:
        """The loss of token log-probs [2P, T] or [N], by a closed form if the backend has one."""
        logps, counted = stats.logps, self.is_labelled
        backend = self._closed_form_backend(logps)
        if backend is not None:
            tokens, flat = logps.numel(), logps.reshape(-1).contiguous()
            inputs = self._pair_loss_inputs(None, tokens, counted.reshape(-1), logps.device)
            out = self._output(_PairLoss.apply(flat, backend, inputs), tokens)
        else:
            out = self._autograd(stats)
        # A batch without a labelled token has a zero loss that is connected to the graph.
        return out._replace(loss=out.loss * counted.any().to(out.loss.dtype))

    def _closed_form_backend(self, t: Tensor, backend: Backend | None = None) -> Backend | None:
        """The backend for t if its `pair_loss` has this loss in closed form; else None.

        backend: t's backend, if the caller knows it.
        """
        if validation.is_traced(t):  # torch.compile fuses the operations on [2P]
            return None
        inputs = self.inputs
        name = None if inputs.soft_labels is not None else self.options.closed_form
        constants = (inputs.ref_logps, inputs.lengths, inputs.pair_weight, inputs.margin)
        if name is None or any(t is not None and t.requires_grad for t in constants):
            return None
        backend = backend or backends.choose(t.device, t.dtype, self.backend)
        return backend if name in backend.CLOSED_FORMS else None

    @property
    def _needs_lengths(self) -> bool:
        """Whether a loss may read lengths: one of the user's (options None) always may."""
        return self.options.needs_lengths or any(x.options is None for x in self.options.losses)

    def _ids(self, index: Tensor | None, tokens: int) -> Tensor:
        """The sequence ids [N] of the tokens at the positions `index`; None means all tokens."""
        ids = self.sequence_layout["sequence_ids"]
        if ids is not None:
            return (ids if index is None else ids.index_select(0, index)).contiguous()
        if index is None:
            index = torch.arange(tokens, device=self.labels.device)
        return index.div(max(self.labels.shape[1], 1), rounding_mode="floor")

    def _pair_loss_inputs(
        self,
        index: Tensor | None,  # [N] positions of the tokens; None means all of them
        tokens: int,
        counted: Tensor | None,  # [N] whether a token counts; None means that all do
        device: torch.device,
    ) -> PairLossInputs:
        """The inputs of the closed form for the log-probs [N] of these tokens."""
        options, size = self.options, 2 * self.pairs
        ids, inputs = self._ids(index, tokens), self.inputs.to(device, torch.float32)
        lengths = inputs.lengths if options.needs_lengths else None
        if options.needs_lengths and lengths is None:
            ones = torch.ones(tokens, device=device) if counted is None else counted.float()
            # Ids out of range, which are not checked on a GPU, make the loss NaN below.
            in_range = torch.where((ids >= 0) & (ids < size), ids, size)
            lengths = torch.zeros(size + 1, device=device).index_add_(0, in_range, ones)[:-1]
        assert options.closed_form is not None
        return PairLossInputs(
            ids,
            self.pairs,
            inputs.ref_logps,
            options.closed_form,
            options.beta,
            options.label_smoothing,
            lengths,
            inputs.pair_weight,
            inputs.margin,
            **options.pair_parameters,
        )

    def _output(self, closed_form: Sequence[Any], tokens: int) -> PreferenceOutput:
        """The output from a closed form's loss [], sequence log-probs [2P] and rewards [2P].

        tokens: the number of tokens.
        """
        loss, sequences, rewards = closed_form
        # A batch without a token has a zero loss that is connected to the graph.
        loss = loss if tokens else loss * 0.0
        chosen, rejected = sequences.chunk(2)
        return PreferenceOutput(loss, chosen, rejected, *rewards.chunk(2))  # type: ignore[arg-type]

    def _nll(self, logps: Tensor) -> tuple[Tensor, Tensor]:
        """The NLL of each chosen answer [P], and the number of tokens that it counts [P]."""
        layout = self.sequence_layout
        labels = nll_tokens(self.labels, self.nll_labels, **layout)
        ones = (labels != layout["ignore_index"]).to(logps.dtype)
        nll, lengths = (sequence_logps(t, labels, **layout) for t in (-logps, ones))
        return nll[: self.pairs], lengths[: self.pairs]

    def per_pair(self, stats: TokenStats) -> tuple[dict[str, Tensor | None], Tensor | None]:
        """The arguments of `make_pairs`, [P] each; and WPO's weights [P] or None."""
        logps = stats.logps
        inputs = self.inputs.to(logps.device, logps.dtype)
        lengths = inputs.lengths
        if lengths is None and self._needs_lengths:
            ones = self.is_labelled.to(logps.dtype)
            lengths = sequence_logps(ones, self.labels, **self.sequence_layout)
        nll, nll_lengths = self._nll(logps) if self.options.needs_nll else (None, None)
        weight = None
        if self.options.use_weighting:
            assert stats.log_sum_sq_probs is not None
            weight = wpo_weights(logps, stats.log_sum_sq_probs, self.labels, **self.sequence_layout)
        chosen, rejected = self._halves(self.sums(logps))
        ref_chosen, ref_rejected = self._halves(inputs.ref_logps)
        chosen_lengths, rejected_lengths = self._halves(lengths)
        values = {
            "chosen_logps": chosen,
            "rejected_logps": rejected,
            "ref_chosen_logps": ref_chosen,
            "ref_rejected_logps": ref_rejected,
            "chosen_lengths": chosen_lengths,
            "rejected_lengths": rejected_lengths,
            "margin": inputs.margin,
            "soft_labels": inputs.soft_labels,
            "chosen_nll": nll,
            "nll_lengths": nll_lengths,
        }
        return values, weight

    def _autograd(self, stats: TokenStats) -> PreferenceOutput:
        values, weight = self.per_pair(stats)
        nll, nll_lengths, nll_loss = values["chosen_nll"], values["nll_lengths"], None
        if nll is not None and nll_lengths is not None:
            nll_loss = (nll.sum() / nll_lengths.sum().clamp(min=1)).detach()
        pairs = make_pairs(self.options, **values)  # type: ignore[arg-type]
        inputs = self.inputs.to(stats.logps.device, stats.logps.dtype)
        out = evaluate(pairs, inputs.pair_weight, weight)
        logps = pairs.chosen_logps.detach(), pairs.rejected_logps.detach()
        rewards = out.chosen_rewards, out.rejected_rewards
        return PreferenceOutput(out.loss, *logps, *rewards, nll_loss=nll_loss)

    def _halves(self, t: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        return (None, None) if t is None else (t[: self.pairs], t[self.pairs :])


def prepare_loss(
    labels: Tensor,
    options: LossOptions,
    inputs: PairInputs,
    *,
    has_reference: bool,
    sequence_ids: Tensor | None = None,
    num_sequences: int | None = None,
    nll_labels: Tensor | None = None,
    ignore_index: int = -100,
    backend: str | None = None,
    wants_stats: bool = False,
) -> PreparedLoss:
    """Check the inputs of a preference loss that do not depend on log-probs.

    Args: as `linear_preference_loss`; has_reference tells whether ref_logps are passed, or will be
    computed from ref_hidden. wants_stats: whether to return the per-token outputs.

    Raises:
        ValueError: as `linear_preference_loss`.
    """
    check_transforms()
    size = count_sequences(labels, sequence_ids, num_sequences, inputs.ref_logps, inputs.lengths)
    options.check_reference(has_reference)
    for name, t in (("ref_logps", inputs.ref_logps), ("lengths", inputs.lengths)):
        if isinstance(t, Tensor):
            check_dense(name, t)
        if t is not None and (not isinstance(t, Tensor) or t.shape != (size,)):
            shape = tuple(t.shape) if isinstance(t, Tensor) else type(t).__name__
            raise ValueError(f"{name}: got {shape}, expected a tensor [{size}]")
    check_inputs(options, size // 2, inputs.pair_weight, inputs.margin, inputs.soft_labels)
    if nll_labels is not None:
        if not options.needs_nll:
            raise ValueError(
                "nll_labels: the loss has no NLL, so it does not support them; pass nll_weight"
            )
        check_nll_labels(nll_labels, labels, ignore_index)
    layout = dict(sequence_ids=sequence_ids, num_sequences=size, ignore_index=ignore_index)
    return PreparedLoss(labels, layout, options, inputs, nll_labels, backend, wants_stats)
