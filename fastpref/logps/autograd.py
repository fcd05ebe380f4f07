"""The autograd function around the forward and the backward pass over the head."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastpref.backends.tile import PairLossInputs
from fastpref.logps.backward import all_grads, head_grads, needs_head_again, scaled
from fastpref.logps.columns import ColumnBlock
from fastpref.logps.first_order import FirstOrderFunction, first_order
from fastpref.logps.forward import (
    HeadGrads,
    HeadInputs,
    HeadTensors,
    LinearCall,
    Saved,
    TokenStats,
    forward_pass,
)
from fastpref.validation import autocasts

# The shape and the dtype that a gradient has in the end.
Like = tuple[torch.Size, torch.dtype]


class LinearTokenLogps(FirstOrderFunction):
    """The head's inputs and tensors to a `TokenStats`, or to a preference loss.

    With pair_loss the outputs are those of `Backend.pair_loss` without the last, which is its
    derivative: loss [], sequence log-probs [2P], rewards [2P].
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,  # [M, H]
        lora_hidden: Tensor | None,  # [M, r]
        weight: Tensor,  # [V, H]
        bias: Tensor | None,  # [V]
        lora_B: Tensor | None,  # [V, r]
        dora_scale: Tensor | None,  # [V]
        labels: Tensor,  # [N]
        index: Tensor | None,  # [N], the rows of hidden that the labels belong to; None: all
        call: LinearCall,
        pair_loss: PairLossInputs | None,
    ) -> tuple[Tensor | None, ...]:
        inputs, shard = pick_rows(hidden, lora_hidden, index), call.shard
        if shard is not None:
            lora = inputs.lora_hidden
            inputs = HeadInputs(
                shard.gather(inputs.x), None if lora is None else shard.gather(lora)
            )
            labels = shard.local_labels(shard.gather(labels))
        others = (None if t is None else t.detach() for t in (bias, lora_B, dora_scale))
        head = HeadTensors(weight.detach(), *others)
        out, saved = forward_pass(call, inputs, head, labels)
        results = out if shard is None else TokenStats(*map(shard.own, out))  # type: ignore[arg-type]
        pair = None if pair_loss is None else call.backend.pair_loss(results.logps, *pair_loss)
        head_again = needs_head_again(call, labels.shape[0]) or ctx.needs_input_grad[5]
        ctx.call, ctx.rows, ctx.device_type = call, hidden.shape[0], hidden.device.type
        ctx.like = [None if t is None else (t.shape, t.dtype) for t in head]
        if call.hidden_grad or call.weight_grad:
            ctx.save_for_backward(
                *(inputs if call.weight_grad or head_again else (None, None)),
                *((weight, bias, lora_B) if head_again else (None, None, None)),
                dora_scale,
                labels,
                index,
                *saved[:-1],
                *(_own(t) if head_again else None for t in (out.logps, out.entropy)),
                None if pair is None else pair[-1],
                *(t for block in saved.columns for t in block),
            )
        ctx.set_materialize_grads(False)
        if pair is not None:
            ctx.mark_non_differentiable(*pair[1:-1])
            return pair[:-1]
        ctx.mark_non_differentiable(*(t for t in results[2:] if t is not None))
        return tuple(results)

    @staticmethod
    @first_order
    def backward(
        ctx: Any, dout: Tensor | None, dentropy: Tensor | None, *_: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        if dout is None and dentropy is None:
            return (None,) * 10
        tensors = ctx.saved_tensors
        x, lora_hidden, *head, labels, index = tensors[:8]
        *saved, logps, entropy, loss_dlogp = tensors[8:16]
        columns = tuple(ColumnBlock(*tensors[i : i + 3]) for i in range(16, len(tensors), 3))
        dlogp = dout if loss_dlogp is None else loss_dlogp * dout
        lse, shard = saved[3], ctx.call.shard
        if dlogp is not None:
            dlogp = as_vector(dlogp if shard is None else shard.gather(dlogp))
        else:
            dlogp = torch.zeros_like(lse)
        if dentropy is not None:
            dentropy = as_vector(dentropy if shard is None else shard.gather(dentropy))
        # A backward pass inside the caller's autocast must not round dW to 16 bits.
        with without_autocast(ctx.device_type):
            dx, dlora_hidden, grads = gradients(
                ctx.call,
                HeadInputs(x, lora_hidden),
                HeadTensors(*head),
                labels,
                Saved(*saved)._replace(columns=columns),
                logps,
                dlogp,
                entropy,
                dentropy,
                ctx.like,
                ctx.needs_input_grad[2:6],
            )
            if shard is not None:
                dx, dlora_hidden = map(shard.summed, (dx, dlora_hidden))
                shard.finish_gradients(grads)
        dx, dlora_hidden = (unpick(t, index, ctx.rows) for t in (dx, dlora_hidden))
        return dx, dlora_hidden, *grads, None, None, None, None


def _own(t: Tensor | None) -> Tensor | None:
    """A copy of an output for the backward pass: the caller may change the output in place."""
    return None if t is None else t.clone()


def as_vector(dout: Tensor) -> Tensor:
    """A gradient [N] as the kernels read it: contiguous, without torch's lazy negation."""
    return dout.resolve_neg().contiguous()


_NOTHING = contextlib.nullcontext()


def without_autocast(device_type: str) -> contextlib.AbstractContextManager[Any]:
    """The context in which autocast is off for this type of device."""
    if autocasts(device_type):
        return torch.autocast(device_type, enabled=False)
    return _NOTHING


def pick_rows(
    hidden: Tensor,  # [M, H]
    lora_hidden: Tensor | None,  # [M, r]
    index: Tensor | None,  # [N]
) -> HeadInputs:
    """The rows at these positions; None: all."""
    if index is None:
        return HeadInputs(hidden, lora_hidden)
    return HeadInputs(
        hidden.index_select(0, index),
        None if lora_hidden is None else lora_hidden.index_select(0, index),
    )


def unpick(
    t: Tensor | None,  # [N, ...]
    index: Tensor | None,  # [N]
    rows: int,
) -> Tensor | None:
    """The rows of t at their places among so many rows, 0 elsewhere."""
    if t is None or index is None:
        return t
    return t.new_zeros((rows, t.shape[1])).index_copy_(0, index, t)


def gradients(
    call: LinearCall,
    inputs: HeadInputs,
    head: HeadTensors,
    labels: Tensor,  # [N]
    saved: Saved,
    logps: Tensor | None,  # [N]; None: no logits are recomputed
    dlogp: Tensor,  # [N]
    entropy: Tensor | None,  # [N]
    dentropy: Tensor | None,  # [N]
    like: Sequence[Like | None],
    needs_grad: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, list[Tensor | None]]:
    """The gradients of x, of lora_hidden and of the head's four tensors.

    like, needs_grad: the shape and dtype of each of the four, and whether it needs a gradient.
    """
    kinds = [t if w else None for t, w in zip(like, needs_grad, strict=True)]
    # Vectors are summed in the statistics' dtype.
    out = [
        None if t is None else dlogp.new_empty(t[0], dtype=t[1] if len(t[0]) == 2 else dlogp.dtype)
        for t in kinds
    ]
    grads = HeadGrads(*out)
    dx = dlora_hidden = None
    if dentropy is not None:
        assert logps is not None and entropy is not None
        vectors = logps, dlogp, entropy, dentropy
        dx, dlora_hidden = all_grads(call, inputs, head, labels, saved.lse, *vectors, grads)
    else:
        row_dlogp = dlogp if saved.row_scale is None else dlogp * saved.row_scale
        if saved.u is not None:
            dx = scaled(call, saved.u, row_dlogp)
        if saved.v is not None:
            dlora_hidden = scaled(call, saved.v, row_dlogp)
        if any(needs_grad):
            stashed = saved.stash.shape[0]
            if saved.row_scale is not None and not saved.columns and stashed < dlogp.shape[0]:
                # A recomputed D needs no row_scale.
                row_dlogp = torch.cat([row_dlogp[:stashed], dlogp[stashed:]])
            head_grads(call, inputs, head, labels, saved, logps, row_dlogp, grads)
    pairs = zip(grads, kinds, strict=True)
    return dx, dlora_hidden, [None if g is None or t is None else g.to(t[1]) for g, t in pairs]
