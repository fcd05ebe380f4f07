"""What is left of a preference loss once the token log-probs are there, checked before they are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastpref import backends, validation
from fastpref.backends.tile import Backend, PairLossInputs
from fastpref.logps.checks import check_extras
from fastpref.logps.compile import CompiledLogps
from fastpref.logps.forward import TokenStats
from fastpref.logps.prepared import PreparedLogps
from fastpref.logps.sequences import sequence_logps
from fastpref.losses.options import LossOptions
from fastpref.losses.preference import check_inputs, evaluate, make_pairs
from fastpref.losses.tokens import ld_sequence_logps, nll_tokens, wpo_weights
from fastpref.validation import check_ids


class PreferenceOutput(NamedTuple):
    """loss []. chosen_logps, rejected_logps [P]: sums over the answer's tokens, detached.

    chosen_rewards, rejected_rewards [P]: beta (logp - ref), detached; of losses without a reference
    see `PreferenceLoss`. stats: the per-token outputs where extras were asked for, else None.
    nll_loss []: the mean NLL of the chosen answers' tokens where it is part of the loss, detached,
    without the pairs' weights; else None.
    """

    loss: Tensor
    chosen_logps: Tensor
    rejected_logps: Tensor
    chosen_rewards: Tensor
    rejected_rewards: Tensor
    stats: TokenStats | None = None
    nll_loss: Tensor | None = None


class PairInputs(NamedTuple):
    """What comes with each sequence [2P] and with each pair [P]; None where nothing does."""

    ref_logps: Tensor | None = None
    lengths: Tensor | None = None
    pair_weight: Tensor | None = None
    margin: Tensor | None = None
    soft_labels: Tensor | None = None

    def to(self, device: torch.device, dtype: torch.dtype) -> PairInputs:
        """On this device, in this dtype, contiguous."""
        return PairInputs(*(None if t is None else t.to(device, dtype).contiguous() for t in self))


class _PairLoss(torch.autograd.Function):
    """Token log-probs [N] to `Backend.pair_loss` without its derivative, which is kept."""

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
    @once_differentiable
    def backward(ctx: Any, dloss: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        return None if dloss is None else ctx.saved_tensors[0] * dloss, None, None


class PairProblem(NamedTuple):
    """What is left to do once the token log-probs are there; checked before any of them is."""

    labels: Tensor
    segments: dict[str, Any]  # sequence_ids, num_sequences, ignore_index of sequence_logps
    options: LossOptions
    inputs: PairInputs
    nll_labels: Tensor | None = None
    backend: str | None = None
    wants_stats: bool = False

    @property
    def pairs(self) -> int:
        return self.segments["num_sequences"] // 2

    @property
    def head_labels(self) -> Tensor:
        """The labels of all tokens whose log-probs are needed."""
        if self.nll_labels is None:
            return self.labels
        ignored = self.labels == self.segments["ignore_index"]
        return torch.where(
            ignored, nll_tokens(self.labels, self.nll_labels, **self.segments), self.labels
        )

    def head_extras(self, extras: Sequence[str]) -> tuple[str, ...]:
        """The per-token outputs that are needed of the head: those asked for and the loss's own."""
        names = check_extras(extras)
        if not self.options.use_weighting or "log_sum_sq_probs" in names:
            return names
        return *names, "log_sum_sq_probs"

    def sums(self, logps: Tensor) -> Tensor:
        """Token log-probs to those of the sequences, as the loss compares them."""
        if self.options.ld_alpha is None:
            return sequence_logps(logps, self.labels, **self.segments)
        return ld_sequence_logps(logps, self.labels, self.options.ld_alpha, **self.segments)

    def pair_loss_inputs(self, policy: PreparedLogps | CompiledLogps) -> PairLossInputs | None:
        """The inputs of the closed form of the policy's backend; None: there is no closed form."""
        if isinstance(policy, CompiledLogps):  # compiled code fuses the few operations on [2P]
            return None
        if self._closed_form_backend(policy.hidden, policy.call.backend) is None:
            return None
        # The ignored tokens are not put back for a sum that drops them again.
        labels = policy.labels
        return self._pair_loss_inputs(policy.positions, labels.shape[0], None, labels.device)

    def output(
        self,
        policy: PreparedLogps | CompiledLogps,
        inputs: PairLossInputs | None,
        out: Sequence[Tensor | None],
    ) -> PreferenceOutput:
        """The output, from what the policy's `compute` gave: token statistics with wants_stats or
        without inputs, else the closed form's loss, sequences and rewards."""
        if inputs is not None:
            assert isinstance(policy, PreparedLogps)
            tokens = policy.labels.shape[0]
            if not self.wants_stats:
                return self._output(out, tokens)
            loss = self._output(_PairLoss.apply(out[0], policy.call.backend, inputs), tokens)
            return loss._replace(stats=policy.spread(out))
        stats = policy.spread(out)
        shown = stats
        if self.nll_labels is not None:  # only the tokens that are compared
            counted = self.labels != self.segments["ignore_index"]
            masked = [None if t is None else t * counted for t in stats]
            shown = TokenStats(*masked)  # type: ignore[arg-type]
        return self.loss_from_logps(stats)._replace(stats=shown if self.wants_stats else None)

    def loss_from_logps(self, stats: TokenStats) -> PreferenceOutput:
        """From token log-probs [2P, T] or [N] to the output; by closed form if there is one."""
        logps = stats.logps
        counted = self.labels != self.segments["ignore_index"]
        backend = self._closed_form_backend(logps)
        if backend is not None:
            inputs = self._pair_loss_inputs(None, logps.numel(), counted.reshape(-1), logps.device)
            flat = logps.reshape(-1).contiguous()
            out = self._output(_PairLoss.apply(flat, backend, inputs), logps.numel())
        else:
            out = self._autograd(stats)
        # Without a labelled token there is nothing to learn; the graph stays connected.
        return out._replace(loss=out.loss * counted.any().to(out.loss.dtype))

    def _closed_form_backend(self, t: Tensor, backend: Backend | None = None) -> Backend | None:
        """The backend, if its `pair_loss` has this loss in closed form; backend: t's, if known."""
        if torch.compiler.is_compiling():  # compiled code fuses the few operations on [2P]
            return None
        inputs = self.inputs
        name = None if inputs.soft_labels is not None else self.options.closed_form
        learned = (inputs.ref_logps, inputs.lengths, inputs.pair_weight, inputs.margin)
        if name is None or any(t is not None and t.requires_grad for t in learned):
            return None
        backend = backend or backends.choose(t.device, t.dtype, self.backend)
        return backend if name in backend.CLOSED_FORMS else None

    @property
    def _wants_lengths(self) -> bool:
        return self.options.needs_lengths or any(x.options is None for x in self.options.losses)

    def _ids(self, index: Tensor | None, tokens: int) -> Tensor:
        """The sequences [N] of the tokens at these positions; None: of all of them."""
        ids = self.segments["sequence_ids"]
        if ids is not None:
            return (ids if index is None else ids.index_select(0, index)).contiguous()
        if index is None:
            index = torch.arange(tokens, device=self.labels.device)
        return index.div(max(self.labels.shape[1], 1), rounding_mode="floor")

    def _pair_loss_inputs(
        self,
        index: Tensor | None,  # [N], the positions of the tokens; None: all
        tokens: int,
        counted: Tensor | None,  # [N], which of them count; None: every one
        device: torch.device,
    ) -> PairLossInputs:
        """The inputs of the closed form for the log-probs [N] of these tokens."""
        options, size = self.options, 2 * self.pairs
        ids, inputs = self._ids(index, tokens), self.inputs.to(device, torch.float32)
        lengths = inputs.lengths if options.needs_lengths else None
        if options.needs_lengths and lengths is None:
            ones = torch.ones(tokens, device=device) if counted is None else counted.float()
            # An id out of range, which is not looked for on a GPU, makes the loss NaN later.
            known = torch.where((ids >= 0) & (ids < size), ids, size)
            lengths = torch.zeros(size + 1, device=device).index_add_(0, known, ones)[:-1]
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
        """From a closed form's loss, sequences [2P] and rewards [2P] of so many tokens."""
        loss, sequences, rewards = closed_form
        # Without a token there is nothing to learn; the graph stays connected.
        loss = loss if tokens else loss * 0.0
        chosen, rejected = sequences.chunk(2)
        return PreferenceOutput(loss, chosen, rejected, *rewards.chunk(2))  # type: ignore[arg-type]

    def _nll(self, logps: Tensor) -> tuple[Tensor, Tensor]:
        """The NLL of each chosen answer, and how many tokens it counts, [P]."""
        labels = nll_tokens(self.labels, self.nll_labels, **self.segments)
        ones = (labels != self.segments["ignore_index"]).to(logps.dtype)
        nll, lengths = (sequence_logps(t, labels, **self.segments) for t in (-logps, ones))
        return nll[: self.pairs], lengths[: self.pairs]

    def per_pair(self, stats: TokenStats) -> tuple[dict[str, Tensor | None], Tensor | None]:
        """What the loss compares, as `make_pairs` takes it, [P] each; and WPO's weights [P]."""
        logps = stats.logps
        inputs = self.inputs.to(logps.device, logps.dtype)
        lengths = inputs.lengths
        if lengths is None and self._wants_lengths:
            counted = (self.labels != self.segments["ignore_index"]).to(logps.dtype)
            lengths = sequence_logps(counted, self.labels, **self.segments)
        nll, nll_lengths = self._nll(logps) if self.options.needs_nll else (None, None)
        weight = None
        if self.options.use_weighting:
            assert stats.log_sum_sq_probs is not None
            weight = wpo_weights(logps, stats.log_sum_sq_probs, self.labels, **self.segments)
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
        nll, nll_lengths, mean = values["chosen_nll"], values["nll_lengths"], None
        if nll is not None and nll_lengths is not None:
            mean = (nll.sum() / nll_lengths.sum().clamp(min=1)).detach()
        data = make_pairs(self.options, **values)  # type: ignore[arg-type]
        pair_weight = self.inputs.to(stats.logps.device, stats.logps.dtype).pair_weight
        out = evaluate(data, pair_weight, weight)
        both = data.chosen_logps.detach(), data.rejected_logps.detach()
        rewards = out.chosen_rewards, out.rejected_rewards
        return PreferenceOutput(out.loss, *both, *rewards, nll_loss=mean)

    def _halves(self, t: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        return (None, None) if t is None else (t[: self.pairs], t[self.pairs :])


def pair_problem(
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
) -> PairProblem:
    """Check everything that does not need a log-prob. Raises ValueError."""
    size = _count_sequences(labels, sequence_ids, num_sequences, inputs.ref_logps, inputs.lengths)
    options.check_reference(has_reference)
    for name, t in (("ref_logps", inputs.ref_logps), ("lengths", inputs.lengths)):
        if t is not None and (not isinstance(t, Tensor) or t.shape != (size,)):
            given = tuple(t.shape) if isinstance(t, Tensor) else type(t).__name__
            raise ValueError(f"{name}: got {given}, expected a tensor [{size}]")
    check_inputs(options, size // 2, inputs.pair_weight, inputs.margin, inputs.soft_labels)
    if nll_labels is not None:
        if not options.needs_nll:
            raise ValueError(
                "nll_labels: the loss has no NLL, so it does not support them; pass nll_weight"
            )
        _check_nll_labels(nll_labels, labels, ignore_index)
    segments = dict(sequence_ids=sequence_ids, num_sequences=size, ignore_index=ignore_index)
    return PairProblem(labels, segments, options, inputs, nll_labels, backend, wants_stats)


def _check_nll_labels(nll_labels: Tensor, labels: Tensor, ignore_index: int) -> None:
    if not isinstance(nll_labels, Tensor) or nll_labels.shape != labels.shape:
        given = tuple(nll_labels.shape) if isinstance(nll_labels, Tensor) else type(nll_labels)
        raise ValueError(f"nll_labels: got {given}, expected a tensor {tuple(labels.shape)}")
    if nll_labels.dtype != torch.int64 or nll_labels.device != labels.device:
        raise ValueError(
            f"nll_labels: got {str(nll_labels.dtype)[6:]} on {nll_labels.device}, expected int64 "
            f"on {labels.device}"
        )
    if validation.may_synchronise(labels.device):
        both = (labels != ignore_index) & (nll_labels != ignore_index)
        if bool((both & (labels != nll_labels)).any()):
            raise ValueError(
                "nll_labels: got another token than labels for a position, expected the same one "
                "or ignore_index"
            )


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
