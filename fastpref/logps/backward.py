"""The backward pass over the head: the gradients of the weight and of what else the head has.

It is vocabulary-outer: for a slice of v entries the tile [N, v] is whole, so dW[v] is one product.
D that was not stashed is made again from recomputed logits.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fastpref.logps.columns import bias_grad, head_grad
from fastpref.logps.forward import (
    HeadGrads,
    HeadInputs,
    HeadTensors,
    LinearCall,
    Saved,
    in_place,
    padded_rows,
    write_logits,
)
from fastpref.logps.plan import tile_dtype


def needs_head_again(call: LinearCall, tokens: int) -> bool:
    """Whether the backward pass multiplies by the weight, and so has to keep it."""
    entropy = "entropy" in call.extras and (call.hidden_grad or call.weight_grad)
    made_again = call.plan.stash_tokens < tokens and not call.plan.head_columns
    return entropy or (call.weight_grad and made_again)


def scaled(
    call: LinearCall,
    x: Tensor,  # [N, H]
    row_scale: Tensor,  # [N]
) -> Tensor:
    """row_scale x, row by row, in x's dtype."""
    out = torch.empty_like(x)
    call.backend.scale_rows(x, row_scale, out)
    return out


def _slices(call: LinearCall) -> Iterator[tuple[int, int]]:
    step, vocab = call.plan.block_vocab, call.plan.vocab_size
    return ((a, min(a + step, vocab)) for a in range(0, vocab, step))


def _recomputed_logits(
    call: LinearCall, inputs: HeadInputs, head: HeadTensors, first: int
) -> Iterator[tuple[int, int, Tensor, HeadTensors]]:
    """For each slice of the vocabulary: a, b, a tile [N, b - a], the head's slice in x's dtype.

    The tile holds the logits of the tokens from `first` on; the rows before them are free memory.
    """
    x = inputs.x
    n = x.shape[0]
    dtype = tile_dtype(x.dtype, call.plan.precision)
    buffer = x.new_empty(n * padded_rows(n, call.plan.block_vocab, dtype)[1], dtype=dtype)
    for a, b in _slices(call):
        width = padded_rows(n, b - a, dtype)[1]
        tile = buffer[: n * width].view(n, width)[:, : b - a]
        part = head.part(a, b).to(x.dtype)
        write_logits(call, inputs.rows(first, n), part, tile[first:])
        yield a, b, tile, part


def head_grads(
    call: LinearCall,
    inputs: HeadInputs,
    head: HeadTensors,
    labels: Tensor,  # [N]
    saved: Saved,
    logps: Tensor | None,  # [N]; None: all of D is stashed
    dlogp: Tensor,  # [N], times saved.row_scale for the stashed rows
    grads: HeadGrads,
) -> None:
    """Write the head's gradients, from the stashed D and from D made again for the other tokens.

    The head is read only where D is made again, and for the gradient of its dora_scale.
    """
    stash = saved.stash
    stashed, vocab = stash.shape
    scaled_inputs = _scale_inputs(call, inputs, dlogp, grads)
    if saved.columns:
        for t, out in zip(scaled_inputs, (grads.weight, grads.lora_B), strict=True):
            if t is not None and out is not None:
                head_grad(call.backend, saved.columns, t, out)
        if grads.bias is not None:
            bias_grad(saved.columns, dlogp, grads.bias)
        return
    if stashed == inputs.x.shape[0]:
        _products(call, stash, scaled_inputs, grads, 0, vocab)
        if grads.bias is not None or grads.dora_scale is not None:
            for a, b in _slices(call):  # in slices, since sums widen D
                _sums(call, stash[:, a:b], scaled_inputs, head, dlogp, grads, a, b)
        return
    assert logps is not None
    for a, b, tile, part in _recomputed_logits(call, inputs, head, stashed):
        d = in_place(tile, inputs.x.dtype)
        lse, rest_logps = saved.lse[stashed:], logps[stashed:]
        recomputed = tile[stashed:], labels[stashed:], a, lse, rest_logps, d[stashed:]
        call.backend.grad(*recomputed, call.transform)
        if part.dora_scale is not None:
            d[stashed:] *= part.dora_scale
        d[:stashed].copy_(stash[:, a:b])
        _products(call, d, scaled_inputs, grads, a, b)
        _sums(call, d, scaled_inputs, head, dlogp, grads, a, b)


def _scale_inputs(
    call: LinearCall,
    inputs: HeadInputs,
    dlogp: Tensor,  # [N]
    grads: HeadGrads,
) -> HeadInputs:
    """The inputs times dlogp where gradients need them so; D itself does not depend on the loss."""
    x, lora_hidden = inputs
    if grads.weight is not None or grads.dora_scale is not None:
        x = scaled(call, x, dlogp)
    if lora_hidden is not None and (grads.lora_B is not None or grads.dora_scale is not None):
        lora_hidden = scaled(call, lora_hidden, dlogp)
    return HeadInputs(x, lora_hidden)


def _products(
    call: LinearCall,
    d: Tensor,  # [N, b - a]
    scaled_inputs: HeadInputs,
    grads: HeadGrads,
    a: int,
    b: int,
) -> None:
    """Write the gradients that are matrices, for the vocabulary entries [a, b)."""
    if a == b:  # a shard of no rows
        return
    if grads.weight is not None:
        call.backend.outer(d, scaled_inputs.x, grads.weight[a:b])
    if grads.lora_B is not None:
        assert scaled_inputs.lora_hidden is not None
        call.backend.outer(d, scaled_inputs.lora_hidden, grads.lora_B[a:b])


def _sums(
    call: LinearCall,
    d: Tensor,  # [N, b - a], with dora_scale in it
    scaled_inputs: HeadInputs,
    head: HeadTensors,
    dlogp: Tensor | None,  # [N]; None: d has it
    grads: HeadGrads,
    a: int,
    b: int,
) -> None:
    """Write the gradients that are vectors, for the vocabulary entries [a, b)."""
    if grads.bias is not None:
        wide = d.to(grads.bias.dtype)
        out = wide.sum(0) if dlogp is None else torch.mv(wide.t(), dlogp)
        grads.bias[a:b] = out if head.dora_scale is None else _unscaled(out, head.dora_scale[a:b])
    if grads.dora_scale is not None:
        # The sum over tokens of dlogp D (x W^T + lora_hidden lora_B^T), without these logits:
        # <W, D^T (dlogp x)> + <lora_B, D^T (dlogp lora_hidden)>.
        assert head.dora_scale is not None
        total = torch.zeros_like(grads.dora_scale[a:b])
        matrices = head.weight, head.lora_B
        for t, matrix in zip(scaled_inputs, matrices, strict=True):
            if t is not None and matrix is not None:
                product = t.new_empty((b - a, t.shape[1]), dtype=total.dtype)
                call.backend.outer(d, t, product)
                total += (product * matrix[a:b]).sum(1)
        grads.dora_scale[a:b] = _unscaled(total, head.dora_scale[a:b])


def _unscaled(t: Tensor, scale: Tensor) -> Tensor:
    """t / scale, and 0 where the scale is 0. DoRA's scale starts as a norm, which is not 0."""
    return torch.where(scale == 0, 0.0, t / scale)


def all_grads(
    call: LinearCall,
    inputs: HeadInputs,
    head: HeadTensors,
    labels: Tensor,  # [N]
    lse: Tensor,  # [N]
    logps: Tensor,  # [N]
    dlogp: Tensor,  # [N]
    entropy: Tensor,  # [N]
    dentropy: Tensor,  # [N]
    grads: HeadGrads,
) -> tuple[Tensor | None, Tensor | None]:
    """All gradients where the entropy has one: it is no multiple of u, so D is made again.

    Writes the head's gradients and returns those of the inputs, None where they need none.
    """
    x = inputs.x
    wide = torch.promote_types(x.dtype, torch.float32)
    sums: list[Tensor | None] = [None, None]
    if call.hidden_grad:
        sums = [None if t is None else torch.zeros_like(t, dtype=wide) for t in inputs]
    for a, b, tile, part in _recomputed_logits(call, inputs, head, 0):
        d = in_place(tile, x.dtype)
        derivatives = dlogp, entropy, dentropy
        call.backend.grad(tile, labels, a, lse, logps, d, call.transform, *derivatives)
        if part.dora_scale is not None:
            d *= part.dora_scale
        for total, matrix in zip(sums, (part.weight, part.lora_B), strict=True):
            if total is not None and matrix is not None:
                piece = torch.empty_like(total)
                call.backend.project(d, matrix, piece)
                total += piece
        _products(call, d, inputs, grads, a, b)
        _sums(call, d, inputs, head, None, grads, a, b)
    dx, dlora_hidden = (None if total is None else total.to(x.dtype) for total in sums)
    return dx, dlora_hidden
