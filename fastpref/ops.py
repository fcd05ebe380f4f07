"""The two autograd functions as torch.library operators, for callers under torch.compile.

A compiled graph needs shapes before there are values, and how many tokens carry a label is a value.
Without `token_indices` the outputs of the operator therefore have room for all M positions; the
products and the kernels run on the labelled ones only.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fastpref.autograd import (
    Saved,
    TokenStats,
    both_grads,
    forward_pass,
    logits_backward,
    logits_forward,
    padded_rows,
    scaled,
    weight_grads,
)
from fastpref.backends import choose
from fastpref.backends.tile import Transform
from fastpref.logps import adjacent, compact, plan_call, scatter
from fastpref.options import HeadOptions
from fastpref.plan import stash_room

_INPUTS = "Tensor hidden, Tensor weight, Tensor labels, Tensor? bias, Tensor? token_indices"
# HeadOptions field by field, then the extras (joined by commas) and who needs a gradient.
_OPTIONS = (
    "float scale, float? softcap, float temperature, SymInt ignore_index, str strategy, "
    "SymInt? memory_budget, str precision, bool? fused, str? backend, "
    "str extras, bool hidden_grad, bool weight_grad"
)
_STATE = "Tensor u, Tensor stash, Tensor lse, Tensor index, Tensor count"
_OUT = "Tensor logps, Tensor entropy, Tensor mean_logit, Tensor is_top1, Tensor log_sum_sq_probs"


def _split(flat: tuple) -> tuple[HeadOptions, tuple[str, ...], tuple[bool, bool]]:
    *options, extras, hidden_grad, weight_grad = flat
    names = tuple(extras.split(",")) if extras else ()
    return HeadOptions(*options), names, (hidden_grad, weight_grad)


def _shapes(hidden, weight, token_indices, options: HeadOptions, extras, grads):
    """Of every output, with their dtypes; sizes may be symbolic."""
    tokens = hidden.shape[0] if token_indices is None else token_indices.shape[0]
    vocab, size = weight.shape
    room = 0
    if grads[1]:
        memory = options.strategy, options.memory_budget
        room = stash_room(vocab, hidden.dtype, hidden.device, *memory)
    wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    positions = (hidden.shape[0],)
    given = [positions if name in extras else (0,) for name in TokenStats._fields[1:]]
    return (
        (positions, wide),
        (given[0], wide),
        (given[1], wide),
        (given[2], torch.bool),
        (given[3], wide),
        ((tokens if grads[0] else 0, size), hidden.dtype),
        (padded_rows(torch.sym_min(tokens, room), vocab, hidden.dtype), hidden.dtype),
        ((tokens,), wide),
        ((tokens,), torch.int64),
    )


@torch.library.custom_op(
    "fastpref::linear_token_logps",
    mutates_args=(),
    schema=f"({_INPUTS}, {_OPTIONS}) -> ({_OUT}, {_STATE})",
)
def linear_forward(hidden, weight, labels, bias, token_indices, *flat):
    options, extras, grads = _split(flat)
    prepared = compact(hidden, weight, labels, bias, options, extras, token_indices, grads)
    rows, index = prepared.rows, prepared.index
    x = rows if index is None else rows.index_select(0, index)
    n = x.shape[0]
    shapes = _shapes(hidden, weight, token_indices, options, extras, grads)
    stash = hidden.new_empty(shapes[6][0])
    kept = min(n, stash.shape[0])
    call = replace(prepared.call, plan=replace(prepared.call.plan, stash_tokens=kept))
    out, saved = forward_pass(
        call, x, prepared.weight, prepared.bias, prepared.labels, stash[:kept, : weight.shape[0]]
    )
    given = (
        hidden.new_empty(0, dtype=dtype) if t is None else scatter(t, index, labels.shape)
        for t, (_, dtype) in zip(out, shapes[:5], strict=True)
    )
    if index is None:
        index = torch.arange(n, device=hidden.device)
    elif index is token_indices:
        index = index.clone()  # an output must not be an input

    def fill(t: Tensor | None, at: int) -> Tensor:
        shape, dtype = shapes[at]
        if t is not None and t.shape == torch.Size(shape):
            return t
        padded = hidden.new_empty(shape, dtype=dtype)
        if t is not None:
            padded[: t.shape[0]] = t
        return padded

    # The count stays on the host: the backward pass needs it there to know its shapes.
    count = torch.tensor(n, device="cpu")
    return *given, fill(saved.u, 5), stash, fill(saved.lse, 7), fill(index, 8), count


@linear_forward.register_fake
def _(hidden, weight, labels, bias, token_indices, *flat):
    shapes = _shapes(hidden, weight, token_indices, *_split(flat))
    tensors = (hidden.new_empty(shape, dtype=dtype) for shape, dtype in shapes)
    return *tensors, torch.empty((), dtype=torch.int64, device="cpu")


@torch.library.custom_op(
    "fastpref::linear_token_logps_backward",
    mutates_args=(),
    schema=f"(Tensor coef, Tensor? entropy_coef, {_INPUTS}, Tensor logps, Tensor entropy, "
    f"{_STATE}, {_OPTIONS}, bool weight_wanted, bool bias_wanted) -> (Tensor, Tensor, Tensor)",
)
def linear_backward(
    coef,
    entropy_coef,
    hidden,
    weight,
    labels,
    bias,
    _,
    logps,
    entropy,
    u,
    stash,
    lse,
    index,
    count,
    *flat,
):
    options, extras, grads = _split(flat[:-2])
    weight_wanted, bias_wanted = flat[-2:]
    n, vocab = int(count), weight.shape[0]
    index = index[:n]
    call = plan_call(hidden, weight, n, options, extras, grads)
    kept = min(n, stash.shape[0])
    call = replace(call, plan=replace(call.plan, stash_tokens=kept))
    saved = Saved(u[:n] if grads[0] else None, stash[:kept, :vocab], lse[:n])
    x, y = adjacent(hidden).index_select(0, index), labels.index_select(0, index)
    coef, logps = coef.index_select(0, index), logps.index_select(0, index)
    dx = hidden.new_empty((0, hidden.shape[1]))
    weight = adjacent(weight)
    dw = weight.new_empty(weight.shape) if weight_wanted else None
    db = coef.new_empty(vocab) if bias_wanted else None
    parts = None
    if entropy_coef is not None:
        stats = entropy.index_select(0, index), entropy_coef.index_select(0, index)
        parts = both_grads(call, x, weight, bias, y, saved, logps, coef, *stats, dw, db)
    else:
        if saved.u is not None:
            parts = scaled(call, saved.u, coef)
        if dw is not None or db is not None:
            weight_grads(call, x, weight, bias, y, saved, logps, coef, dw, db)
    if parts is not None:
        dx = hidden.new_zeros(hidden.shape).index_copy_(0, index, parts)
    if db is not None:
        db = db.to(bias.dtype)
    nothing = weight.new_empty(0)
    return dx, nothing if dw is None else dw, nothing.clone() if db is None else db


@linear_backward.register_fake
def _(coef, entropy_coef, hidden, weight, labels, bias, _, logps, *rest):
    hidden_grad, _, weight_wanted, bias_wanted = rest[-4:]
    return (
        hidden.new_empty((hidden.shape[0] if hidden_grad else 0, hidden.shape[1])),
        weight.new_empty(weight.shape if weight_wanted else 0),
        weight.new_empty(weight.shape[:1] if bias_wanted else 0),
    )


def _linear_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    hidden, weight, labels, bias, token_indices, *flat = inputs
    logps, entropy, mean_logit, is_top1, log_sum_sq_probs, *state = output
    ctx.save_for_backward(hidden, weight, labels, bias, token_indices, logps, entropy, *state)
    ctx.flat, ctx.has_entropy = flat, "entropy" in flat[-3]
    ctx.wanted = weight.requires_grad, bias is not None and bias.requires_grad
    ctx.mark_non_differentiable(mean_logit, is_top1, log_sum_sq_probs, *state)
    ctx.set_materialize_grads(False)


def _linear_gradients(ctx: Any, coef: Tensor | None, entropy_coef: Tensor | None, *_: Any):
    if not ctx.has_entropy:
        entropy_coef = None
    none = (None,) * (5 + len(ctx.flat))
    if coef is None and entropy_coef is None:
        return none
    logps = ctx.saved_tensors[5]
    coef = torch.zeros_like(logps) if coef is None else coef
    dx, dw, db = torch.ops.fastpref.linear_token_logps_backward(
        coef, entropy_coef, *ctx.saved_tensors, *ctx.flat, *ctx.wanted
    )
    weight_wanted, bias_wanted = ctx.wanted
    hidden_grad = ctx.flat[-2]
    return (
        dx if hidden_grad else None,
        dw if weight_wanted else None,
        None,
        db if bias_wanted else None,
        *none[4:],
    )


linear_forward.register_autograd(_linear_gradients, setup_context=_linear_context)


@torch.library.custom_op(
    "fastpref::token_logps",
    mutates_args=(),
    schema="(Tensor logits, Tensor labels, float scale, float? softcap, float temperature, "
    "str? backend) -> (Tensor, Tensor)",
)
def token_forward(logits, labels, scale, softcap, temperature, backend):
    module = choose(logits.device, logits.dtype, backend)
    return logits_forward(logits, labels, Transform(scale, softcap, temperature), module)


@token_forward.register_fake
def _(logits, labels, *_):
    wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
    return tuple(logits.new_empty(labels.shape, dtype=wide) for _ in range(2))


@torch.library.custom_op(
    "fastpref::token_logps_backward",
    mutates_args=(),
    schema="(Tensor coef, Tensor logits, Tensor labels, Tensor lse, Tensor logps, float scale, "
    "float? softcap, float temperature, str? backend) -> Tensor",
)
def token_backward(coef, logits, labels, lse, logps, scale, softcap, temperature, backend):
    out = torch.empty_like(logits)
    module = choose(logits.device, logits.dtype, backend)
    transform = Transform(scale, softcap, temperature)
    logits_backward(logits, labels, lse, logps, coef.contiguous(), out, transform, module)
    return out


@token_backward.register_fake
def _(coef, logits, *_):
    return torch.empty_like(logits)


def _token_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    logits, labels, *ctx.options = inputs
    logps, lse = output
    ctx.save_for_backward(logits, labels, lse, logps)
    ctx.mark_non_differentiable(lse)
    ctx.set_materialize_grads(False)


def _token_gradients(ctx: Any, coef: Tensor | None, _: Any):
    grad = None
    if coef is not None:
        saved, options = ctx.saved_tensors, ctx.options
        grad = torch.ops.fastpref.token_logps_backward(coef, *saved, *options)
    return grad, None, None, None, None, None


token_forward.register_autograd(_token_gradients, setup_context=_token_context)
