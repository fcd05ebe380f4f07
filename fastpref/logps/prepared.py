"""A call of `linear_token_logps` that is checked and planned, and has not run yet."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from fastpref import backends, validation
from fastpref.backends.tile import Backend, PairLossInputs
from fastpref.logps.autograd import LinearTokenLogps, without_autocast
from fastpref.logps.checks import check_indices, check_range
from fastpref.logps.columns import ColumnOptions
from fastpref.logps.first_order import raise_for_inference
from fastpref.logps.forward import HeadTensors, LinearCall, TokenStats
from fastpref.logps.options import HeadOptions
from fastpref.logps.plan import plan_head
from fastpref.logps.vocab_parallel import VocabParallelWeight, VocabShard

# Of softcap / temperature: the error of a logit is then 1e-5. Models have 30 to 50.
_WIDEST_CAP = 100.0


class PreparedLogps(NamedTuple):
    """A checked and planned call of `linear_token_logps`; no kernel has run yet."""

    hidden: Tensor  # [M, H]
    lora_hidden: Tensor | None  # [M, r]
    head: HeadTensors
    labels: Tensor  # [N]
    positions: Tensor | None  # [N], the rows that the labels belong to; None: all
    shape: torch.Size  # of the caller's labels
    call: LinearCall

    @property
    def has_grads(self) -> bool:
        return self.call.hidden_grad or self.call.weight_grad

    @property
    def logit_free(self) -> bool:
        return self.call.plan.logit_free

    def compute(self, pair_loss: PairLossInputs | None = None) -> Sequence[Tensor | None]:
        """The fields of a `TokenStats` [N] of the labelled tokens; or, with pair_loss, what
        `Backend.pair_loss` makes of their log-probs, without its derivative."""
        tensors = self.hidden, self.lora_hidden, *self.head, self.labels, self.positions
        arguments = *tensors, self.call, pair_loss
        out: Sequence[Tensor | None]
        with without_autocast(self.hidden.device.type):
            try:
                out = LinearTokenLogps.apply(*arguments)  # type: ignore[no-untyped-call]
            except RuntimeError as error:
                raise_for_inference(
                    error, hidden=self.hidden, labels=self.labels, **self.head._asdict()
                )
                raise
        return out

    def spread(self, out: Sequence[Tensor | None]) -> TokenStats:
        """The result of `compute` at its places among the ignored tokens, shaped as the labels."""
        fields = (None if t is None else scatter(t, self.positions, self.shape) for t in out)
        return TokenStats(*fields)  # type: ignore[arg-type]


def _logit_free_reason(
    backend: Backend,
    head: HeadTensors,
    dtype: torch.dtype,
    options: HeadOptions,
    extras: tuple[str, ...],
    with_d: bool,
) -> str | None:
    """Why the call does not go through the logit-free product; None: it can."""
    if head.lora_B is not None or head.dora_scale is not None:
        return "the head has an adapter"
    transform = options.transform
    if transform.softcap is not None and transform.softcap / transform.temperature > _WIDEST_CAP:
        # Under a wide cap most tanh are near 1 and are computed as 1 less a small number.
        return f"the softcap is more than {_WIDEST_CAP:.0f} times the temperature"
    weight = head.weight
    if weight.dtype != dtype:
        # Under autocast the product reads a contiguous copy in the compute dtype.
        weight = weight.new_empty((0, weight.shape[1]), dtype=dtype)
    required = options.fused is True
    return backend.logit_free_reason(weight, transform, extras, with_d, required)


def plan_call(
    hidden: Tensor,  # [M, H]
    head: HeadTensors,
    tokens: int,
    options: HeadOptions,
    extras: tuple[str, ...],
    grads: tuple[bool, bool],
    shard: VocabShard | None = None,
) -> LinearCall:
    """The backend and the plan for so many labelled tokens."""
    backend = backends.choose(hidden.device, hidden.dtype, options.backend)
    # A pass without gradients takes the product of the same call with gradients: a policy and its
    # reference then agree to the last bit. strategy="forward-only" asks for the fastest instead.
    with_d = any(grads) or options.strategy != "forward-only"
    fused = options.fused if shard is None else False
    if fused is not False:
        reason = _logit_free_reason(backend, head, hidden.dtype, options, extras, with_d)
        if reason is not None and fused:
            raise ValueError(f"fused: got True, expected None or False: {reason}")
        if reason is not None:
            fused = False
        elif fused is None and with_d:
            fused = backend.LOGIT_FREE_BY_DEFAULT
    vocab, hidden_size = head.weight.shape
    plan = plan_head(
        tokens,
        hidden_size,
        vocab if shard is None else shard.planned_rows(),
        hidden.dtype,
        device=hidden.device,
        hidden_grad=grads[0],
        weight_grad=grads[1],
        memory_budget=options.memory_budget,
        strategy=options.strategy,
        precision=options.precision,
        fused=fused,
        at_once=backend.PROJECTS_AT_ONCE,
        gradient_tolerance=options.gradient_tolerance,
        head_gradient_tolerance=options.head_gradient_tolerance,
    )
    if shard is not None:
        plan = replace(plan, vocab_size=vocab)
    columns = None
    if plan.column_tokens:
        columns = ColumnOptions(
            options.gradient_tolerance if grads[0] else None,
            options.head_gradient_tolerance,
            options.gradient_seed,
        )
    if plan.head_columns and head.dora_scale is not None:
        raise ValueError(
            "head_gradient_tolerance: got a number with dora_scale, whose gradient needs all of D; "
            "expected None"
        )
    return LinearCall(plan, options.transform, extras, backend, *grads, columns, shard)


def compact(
    hidden: Tensor,  # [M, H]
    lora_hidden: Tensor | None,  # [M, r]
    head: HeadTensors,
    labels: Tensor,  # [...], M in all
    options: HeadOptions,
    extras: tuple[str, ...],
    token_indices: Tensor | None,  # [N]
    grads: tuple[bool, bool],
    parallel: VocabParallelWeight | None = None,
) -> PreparedLogps:
    """Drop the ignored tokens and plan the rest. grads: whether inputs and head need them.

    parallel: the weight whose rows on this process are head.weight.
    """
    flat, index = labels.reshape(-1), token_indices
    if index is None:
        counted = flat != options.ignore_index
        on_cpu = hidden.device.type == "cpu"
        index = None if on_cpu and bool(counted.all()) else counted.nonzero()[:, 0]
    else:
        check_indices(index, flat, options.ignore_index)
        if index.shape == flat.shape:  # increasing positions: all of them
            index = None
    y = flat if index is None else flat.index_select(0, index)
    vocab = head.weight.shape[0] if parallel is None else parallel.vocab_size
    check_range(y, vocab)
    if not validation.may_synchronise(y):
        # A negative label that is not ignore_index must give NaN, like any other out of range.
        y = y.masked_fill(y < 0, vocab)
    tokens, shard = y.shape[0], None
    if parallel is not None:
        shard = VocabShard.of(parallel).count_tokens(tokens, parallel)
        tokens = tokens if shard.counts is None else sum(shard.counts)
    call = plan_call(hidden, head, tokens, options, extras, grads, shard)
    head, y = adjacent_head(head), y.contiguous()
    return PreparedLogps(hidden, lora_hidden, head, y, index, labels.shape, call)


def adjacent(rows: Tensor) -> Tensor:
    """The matrix as every kernel reads it: adjacent columns, without torch's lazy negation."""
    rows = rows.resolve_neg()
    return rows if rows.stride(1) == 1 or rows.shape[1] <= 1 else rows.contiguous()


def adjacent_head(head: HeadTensors) -> HeadTensors:
    """The head with its matrices as in `adjacent`."""
    lora_B = None if head.lora_B is None else adjacent(head.lora_B)
    return head._replace(weight=adjacent(head.weight), lora_B=lora_B)


def scatter(
    values: Tensor,  # [N]
    index: Tensor | None,  # [N]
    shape: torch.Size,
) -> Tensor:
    """The values at these positions of a tensor of this shape, 0 elsewhere; None: all of it."""
    if index is None:
        return values.view(shape)
    return values.new_zeros(shape.numel()).index_copy(0, index, values).view(shape)
