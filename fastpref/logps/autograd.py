"""The autograd function around the passes over the head."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastpref.logps.backward import both_grads, head_grads, needs_logits_again, scaled
from fastpref.logps.forward import HeadGrads, HeadTensors, LinearCall, Saved, States, forward_pass

# From log-probs [N] to a loss [], outputs without gradients, and last d loss / d log-probs [N].
Solve = Callable[[Tensor], tuple[Tensor, ...]]


class LinearTokenLogps(torch.autograd.Function):
    """hidden [M, H], low [M, r], then a `HeadTensors`, labels [N], index [N] -> TokenStats of [N].

    low and parts of the head may be None. index: which rows of hidden and low the labels belong to;
    None means all, M = N. With `solve`, which has its derivative in closed form, the results are
    its own, without the last: one function where two would take the host longer.
    """

    @staticmethod
    def forward(
        ctx,
        hidden,
        low,
        weight,
        bias,
        up,
        scale,
        labels,
        index,
        call: LinearCall,
        solve: Solve | None,
    ):
        states = pick_states(hidden, low, index)
        rest = (None if t is None else t.detach() for t in (bias, up, scale))
        head = HeadTensors(weight.detach(), *rest)
        out, saved = forward_pass(call, states, head, labels)
        solved = () if solve is None else solve(out.logps)
        again = needs_logits_again(call, states.x.shape[0]) or ctx.needs_input_grad[5]
        ctx.call, ctx.rows, ctx.device_type = call, hidden.shape[0], hidden.device.type
        ctx.like = [None if t is None else (t.shape, t.dtype) for t in head]
        if call.hidden_grad or call.weight_grad:
            ctx.save_for_backward(
                *(states if call.weight_grad or again else (None, None)),
                *((weight, bias, up) if again else (None, None, None)),
                scale,
                labels,
                index,
                *saved,
                out.logps,
                out.entropy,
                solved[-1] if solved else None,
            )
        ctx.set_materialize_grads(False)
        if solved:
            ctx.mark_non_differentiable(*solved[1:-1])
            return solved[:-1]
        ctx.mark_non_differentiable(*(t for t in out[2:] if t is not None))
        return tuple(out)

    @staticmethod
    @once_differentiable
    def backward(ctx, coef, entropy_coef, *_):
        if coef is None and entropy_coef is None:
            return (None,) * 10
        call: LinearCall = ctx.call
        x, low, *head, labels, index, u, v, stash, lse, factor, logps, entropy, slope = (
            ctx.saved_tensors
        )
        if slope is not None:
            coef = slope * coef
        coef = torch.zeros_like(lse) if coef is None else coef.contiguous()
        if entropy_coef is not None:
            entropy_coef = entropy_coef.contiguous()
        # A backward pass inside the caller's autocast must not round dW to 16 bits.
        with without_autocast(ctx.device_type):
            dx, dlow, grads = gradients(
                call,
                States(x, low),
                HeadTensors(*head),
                labels,
                Saved(u, v, stash, lse, factor),
                logps,
                coef,
                entropy,
                entropy_coef,
                ctx.like,
                ctx.needs_input_grad[2:6],
            )
        dx, dlow = (unpick(t, index, ctx.rows) for t in (dx, dlow))
        return dx, dlow, *grads, None, None, None, None


_NOTHING = contextlib.nullcontext()


def without_autocast(kind: str):
    """The context in which autocast is off for this type of device, as it mostly is already."""
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else _NOTHING


def pick_states(hidden: Tensor, low: Tensor | None, index: Tensor | None) -> States:
    """The rows of both at these positions; None: all."""
    if index is None:
        return States(hidden, low)
    return States(
        hidden.index_select(0, index), None if low is None else low.index_select(0, index)
    )


def unpick(t: Tensor | None, index: Tensor | None, rows: int) -> Tensor | None:
    """The rows of t at their places among `rows`, 0 elsewhere."""
    if t is None or index is None:
        return t
    return t.new_zeros((rows, t.shape[1])).index_copy_(0, index, t)


def gradients(
    call: LinearCall,
    states: States,
    head: HeadTensors,
    labels: Tensor,
    saved: Saved,
    logps: Tensor,
    coef: Tensor,
    entropy: Tensor | None,
    entropy_coef: Tensor | None,
    like: list[tuple[torch.Size, torch.dtype] | None],
    wanted: tuple[bool, ...],
) -> tuple[Tensor | None, Tensor | None, list[Tensor | None]]:
    """Of the states [N, ..] and of the head's four tensors, whose shapes and dtypes are `like`."""
    kinds = [t if w else None for t, w in zip(like, wanted, strict=True)]
    # Vectors are summed in the statistics' dtype.
    dtypes = [None if t is None else t[1] if len(t[0]) == 2 else coef.dtype for t in kinds]
    out = [
        None if t is None else coef.new_empty(t[0], dtype=d)
        for t, d in zip(kinds, dtypes, strict=True)
    ]
    grads = HeadGrads(*out)
    dx = dlow = None
    if entropy_coef is not None:
        assert entropy is not None
        given = labels, saved, logps, coef, entropy, entropy_coef
        dx, dlow = both_grads(call, states, head, *given, grads)
    else:
        own = coef if saved.factor is None else coef * saved.factor
        if saved.u is not None:
            dx = scaled(call, saved.u, own)
        if saved.v is not None:
            dlow = scaled(call, saved.v, own)
        if any(wanted):
            kept = saved.stash.shape[0]
            if saved.factor is not None and kept < coef.shape[0]:  # what is made again needs none
                own = torch.cat([own[:kept], coef[kept:]])
            head_grads(call, states, head, labels, saved, logps, own, grads)
    pairs = zip(grads, kinds, strict=True)
    return dx, dlow, [None if g is None or t is None else g.to(t[1]) for g, t in pairs]
