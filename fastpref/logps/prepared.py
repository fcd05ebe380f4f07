"""A call of `linear_token_logps` that is checked and planned, and has not run yet."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastpref import backends, validation
from fastpref.backends.tile import Transform
from fastpref.logps.autograd import LinearTokenLogps, Solve, without_autocast
from fastpref.logps.checks import (
    check_indices,
    check_range,
)
from fastpref.logps.forward import HeadTensors, LinearCall, TokenStats
from fastpref.logps.options import HeadOptions
from fastpref.logps.plan import plan_head

_WIDEST_CAP = 100.0  # where the error of a logit is 1e-5; models have 30 to 50


class PreparedLogps(NamedTuple):
    """A checked and planned call of `linear_token_logps`; no kernel has run yet."""

    rows: Tensor  # [M, H]
    low: Tensor | None  # [M, r]
    head: HeadTensors
    labels: Tensor  # [N]
    positions: Tensor | None  # [N] which rows the labels belong to
    shape: torch.Size
    call: LinearCall

    @property
    def has_grads(self) -> bool:
        return self.call.hidden_grad or self.call.weight_grad

    @property
    def fused(self) -> bool:
        return self.call.plan.fused

    def compute(self) -> TokenStats:
        """The outputs of the labelled tokens, [N]."""
        return TokenStats(*self._apply(None))

    def compute_loss(self, solve: Solve) -> tuple[Tensor, ...]:
        """What solve makes of their log-probs, without its last; see `LinearTokenLogps`."""
        return self._apply(solve)

    def _apply(self, solve: Solve | None) -> tuple:
        args = self.rows, self.low, *self.head, self.labels, self.positions, self.call
        with without_autocast(self.rows.device.type):
            return LinearTokenLogps.apply(*args, solve)

    def spread(self, out: TokenStats) -> TokenStats:
        """The outputs at their places among the ignored tokens, shaped like the labels."""
        logps, *others = (
            None if t is None else scatter(t, self.positions, self.shape) for t in out
        )
        assert logps is not None
        return TokenStats(logps, *others)

    def run(self) -> Tensor | TokenStats:
        out = self.spread(self.compute())
        return out if self.call.extras else out.logps


def _is_plain(transform: Transform) -> bool:
    """Whether a product that keeps its logits has them as exactly as a tile. Their tanh is one less
    a number near 1, which under a wide cap is most of them."""
    cap = transform.softcap
    return transform.scale != 0 and (cap is None or cap / transform.temperature <= _WIDEST_CAP)


def plan_call(
    hidden: Tensor,
    head: HeadTensors,
    tokens: int,
    options: HeadOptions,
    extras: tuple[str, ...],
    grads: tuple[bool, bool],
) -> LinearCall:
    """The backend and the plan for so many labelled tokens."""
    module = backends.choose(hidden.device, hidden.dtype, options.backend)
    plain = head.up is None and head.scale is None and _is_plain(options.transform)
    weight = head.weight
    if weight.dtype != hidden.dtype:
        # Under autocast a copy is multiplied, whose rows lie like this.
        weight = weight.new_empty((0, weight.shape[1]), dtype=hidden.dtype)
    # Where the product keeps its logits in a pass with gradients, so it does in one without.
    keeps = plain and hasattr(module, "linear_grad")
    keeps = keeps and module.keeps_logits(weight, options.transform, extras)
    fused: bool | None = None
    if any(grads) or options.fused == "match":
        asked = options.fused if isinstance(options.fused, bool) else None
        fused = keeps and (module.KEEPS_LOGITS if asked is None else asked)
    elif not (keeps or (plain and not extras and hasattr(module, "linear_logps"))):
        fused = False
    elif options.fused is not None:
        fused = bool(options.fused)
    elif not module.fused_is_fast(weight):
        fused = False
    plan = plan_head(
        tokens,
        head.weight.shape[1],
        head.weight.shape[0],
        hidden.dtype,
        device=hidden.device,
        hidden_grad=grads[0],
        weight_grad=grads[1],
        memory_budget=options.memory_budget,
        strategy=options.strategy,
        precision=options.precision,
        fused=fused,
    )
    return LinearCall(plan, options.transform, extras, module, *grads)


def compact(
    rows: Tensor,
    low: Tensor | None,
    head: HeadTensors,
    labels: Tensor,
    options: HeadOptions,
    extras: tuple[str, ...],
    token_indices: Tensor | None,
    grads: tuple[bool, bool],
) -> PreparedLogps:
    """Drop the ignored tokens and plan the rest. grads: whether states and the head need them."""
    flat, index = labels.reshape(-1), token_indices
    if index is None:
        kept = flat != options.ignore_index
        index = None if rows.device.type == "cpu" and bool(kept.all()) else kept.nonzero()[:, 0]
    else:
        check_indices(index, flat, options.ignore_index)
        if index.shape == flat.shape:  # increasing positions: all of them
            index = None
    y = flat if index is None else flat.index_select(0, index)
    check_range(y, head.weight.shape[0])
    if not validation.may_synchronise(y.device):
        # A negative label that got here is a mistake, not an ignored token: NaN, as any other.
        y = y.masked_fill(y < 0, head.weight.shape[0])
    call = plan_call(rows, head, y.shape[0], options, extras, grads)
    return PreparedLogps(rows, low, adjacent_head(head), y.contiguous(), index, labels.shape, call)


def adjacent(rows: Tensor) -> Tensor:
    """A matrix whose columns lie next to each other, as every kernel expects: a copy if need be."""
    return rows if rows.stride(1) == 1 or rows.shape[1] <= 1 else rows.contiguous()


def adjacent_head(head: HeadTensors) -> HeadTensors:
    """The head with its matrices as in `adjacent`."""
    up = None if head.up is None else adjacent(head.up)
    return head._replace(weight=adjacent(head.weight), up=up)


def scatter(values: Tensor, index: Tensor | None, shape: torch.Size) -> Tensor:
    if index is None:
        return values.view(shape)
    return values.new_zeros(shape.numel()).index_copy(0, index, values).view(shape)
