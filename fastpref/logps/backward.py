"""The backward pass over the head: the gradients of the weight and of what else the head has.

It is vocabulary-outer: for a slice of v entries the tile [N, v] is whole, so dW[v] is one product.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastpref.logps.forward import (
    HeadGrads,
    HeadTensors,
    LinearCall,
    Saved,
    States,
    in_place,
    padded_rows,
    write_logits,
)
from fastpref.logps.plan import tile_dtype


def needs_logits_again(call: LinearCall, tokens: int) -> bool:
    """Whether the backward pass multiplies by the weight, and so has to keep it."""
    entropy = "entropy" in call.extras and (call.hidden_grad or call.weight_grad)
    return entropy or (call.weight_grad and call.plan.stash_tokens < tokens)


def scaled(call: LinearCall, x: Tensor, coef: Tensor) -> Tensor:
    """x [N, H] * coef [N], in x's dtype."""
    out = torch.empty_like(x)
    call.backend.scale_rows(x, coef, out)
    return out


def _slices(call: LinearCall):
    step, vocab = call.plan.block_vocab, call.plan.vocab_size
    return ((a, min(a + step, vocab)) for a in range(0, vocab, step))


def _logits_again(call: LinearCall, states: States, head: HeadTensors, kept: int):
    """Slices [a, b) of the vocabulary, whole in N: the logits of the tokens from `kept` on, in a
    tile with room for all N, and that part of the head in the compute dtype."""
    x, low = states
    n = x.shape[0]
    rest = States(x[kept:], None if low is None else low[kept:])
    dtype = tile_dtype(x.dtype, call.plan.precision)
    buffer = x.new_empty(n * padded_rows(n, call.plan.block_vocab, dtype)[1], dtype=dtype)
    for a, b in _slices(call):
        width = padded_rows(n, b - a, dtype)[1]
        tile = buffer[: n * width].view(n, width)[:, : b - a]
        part = head.part(a, b).to(x.dtype)
        write_logits(call, rest, part, tile[kept:])
        yield a, b, tile, part


def _grad_again(
    call: LinearCall, tile: Tensor, rows: tuple, d: Tensor, head: HeadTensors, *factors
) -> None:
    """Write D over the logits; rows: labels, first column, lse, log-probs."""
    call.backend.grad(tile, *rows, d, call.transform, *factors)
    if head.scale is not None:
        d *= head.scale


def head_grads(
    call: LinearCall,
    states: States,
    head: HeadTensors,
    labels: Tensor,
    saved: Saved,
    logps: Tensor,
    coef: Tensor,
    grads: HeadGrads,
) -> None:
    """Write the head's gradients from the stashed D, and from D computed again where it was not
    kept; only then, and for the gradient of its scale, is the head itself read. coef [N]: with D's
    factor, where what is stashed lacks one."""
    stash = saved.stash
    kept, vocab = stash.shape
    times_c = _times_c(call, states, coef, grads)
    if kept == states.x.shape[0]:
        _products(call, stash, times_c, grads, 0, vocab)
        if grads.bias is not None or grads.scale is not None:
            for a, b in _slices(call):  # these widen D
                _sums(call, stash[:, a:b], times_c, head, coef, grads, a, b)
        return
    for a, b, tile, part in _logits_again(call, states, head, kept):
        d = in_place(tile, states.x.dtype)
        rows = labels[kept:], a, saved.lse[kept:], logps[kept:]
        _grad_again(call, tile[kept:], rows, d[kept:], part)
        d[:kept].copy_(stash[:, a:b])
        _products(call, d, times_c, grads, a, b)
        _sums(call, d, times_c, head, coef, grads, a, b)


def _times_c(call: LinearCall, states: States, coef: Tensor, grads: HeadGrads) -> States:
    """c goes on X: D stays free of the loss. What no wanted product multiplies stays as it is."""
    x, low = states
    if grads.weight is not None or grads.scale is not None:
        x = scaled(call, x, coef)
    if low is not None and (grads.up is not None or grads.scale is not None):
        low = scaled(call, low, coef)
    return States(x, low)


def _products(call: LinearCall, d: Tensor, times_c: States, grads: HeadGrads, a: int, b: int):
    if grads.weight is not None:
        call.backend.outer(d, times_c.x, grads.weight[a:b])
    if grads.up is not None:
        call.backend.outer(d, times_c.low, grads.up[a:b])


def _sums(
    call: LinearCall,
    d: Tensor,
    times_c: States,
    head: HeadTensors,
    coef: Tensor | None,
    grads: HeadGrads,
    a: int,
    b: int,
) -> None:
    """The gradients that are vectors, from D [N, v] with the head's scale in it."""
    if grads.bias is not None:
        wide = d.to(grads.bias.dtype)
        out = wide.sum(0) if coef is None else torch.mv(wide.t(), coef)
        grads.bias[a:b] = out if head.scale is None else _unscaled(out, head.scale[a:b])
    if grads.scale is not None:
        # sum_t c D (x W^T + low up^T), without these logits: <W, D^T c X> + <up, D^T c Low>.
        assert head.scale is not None
        total = torch.zeros_like(grads.scale[a:b])
        for t, other in ((times_c.x, head.weight), (times_c.low, head.up)):
            if t is not None and other is not None:
                product = t.new_empty((b - a, t.shape[1]), dtype=total.dtype)
                call.backend.outer(d, t, product)
                total += (product * other[a:b]).sum(1)
        grads.scale[a:b] = _unscaled(total, head.scale[a:b])


def _unscaled(t: Tensor, scale: Tensor) -> Tensor:
    """t / scale; 0 where the scale is 0, as DoRA's never is: its start is a norm."""
    return torch.where(scale == 0, 0.0, t / scale)


def both_grads(
    call: LinearCall,
    states: States,
    head: HeadTensors,
    labels: Tensor,
    saved: Saved,
    logps: Tensor,
    coef: Tensor,
    entropy: Tensor,
    entropy_coef: Tensor,
    grads: HeadGrads,
) -> tuple[Tensor | None, Tensor | None]:
    """All gradients when the entropy has one too: it is not a multiple of u, so D is made again.

    Writes the head's gradients and returns those of the states, None where they need none.
    """
    wide = torch.promote_types(states.x.dtype, torch.float32)
    sums: list[Tensor | None] = [None, None]
    if call.hidden_grad:
        sums = [None if t is None else torch.zeros_like(t, dtype=wide) for t in states]
    for a, b, tile, part in _logits_again(call, states, head, 0):
        d = in_place(tile, states.x.dtype)
        rows = labels, a, saved.lse, logps
        _grad_again(call, tile, rows, d, part, coef, entropy, entropy_coef)
        for total, other in zip(sums, (part.weight, part.up), strict=True):
            if total is not None:
                piece = torch.empty_like(total)
                call.backend.project(d, other, piece)
                total += piece
        _products(call, d, states, grads, a, b)
        _sums(call, d, states, head, None, grads, a, b)
    dx, dlow = (None if total is None else total.to(states.x.dtype) for total in sums)
    return dx, dlow
