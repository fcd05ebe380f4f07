"""The two autograd functions as torch.library operators, for callers under torch.compile.

A compiled graph needs shapes before there are values, and how many tokens carry a label is a value.
Without `token_indices` the outputs of the operator therefore have room for all M positions; the
products and the kernels run on the labelled ones only.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fastpref.backends import choose
from fastpref.backends.tile import EXTRAS, Transform
from fastpref.logps.autograd import gradients, pick_states, unpick
from fastpref.logps.forward import HeadTensors, Saved, TokenStats, forward_pass, padded_rows
from fastpref.logps.logits import logits_backward, logits_forward
from fastpref.logps.options import HeadOptions, flat_options, from_flat
from fastpref.logps.plan import stash_room
from fastpref.logps.prepared import adjacent_head, compact, plan_call, scatter

_INPUTS = (
    "Tensor hidden, Tensor? low, Tensor weight, Tensor? bias, Tensor? up, Tensor? scale, "
    "Tensor labels, Tensor? token_indices"
)
# As `flat_options`, then the extras (joined by commas) and who needs a gradient.
_OPTIONS = (
    "float logit_scale, float? softcap, float temperature, SymInt ignore_index, str strategy, "
    "SymInt? memory_budget, str precision, SymInt fused, str? backend, "
    "str extras, bool hidden_grad, bool weight_grad"
)
_STATE = "Tensor u, Tensor v, Tensor stash, Tensor lse, Tensor factor, Tensor index, Tensor count"
_OUT = "Tensor logps, Tensor entropy, Tensor mean_logit, Tensor is_top1, Tensor log_sum_sq_probs"


def _split(flat: tuple) -> tuple[HeadOptions, tuple[str, ...], tuple[bool, bool]]:
    *options, extras, hidden_grad, weight_grad = flat
    names = tuple(extras.split(",")) if extras else ()
    return from_flat(options), names, (hidden_grad, weight_grad)


def _shapes(hidden, low, weight, token_indices, options: HeadOptions, extras, grads):
    """Of every output but the last, with their dtypes; sizes may be symbolic."""
    tokens = hidden.shape[0] if token_indices is None else token_indices.shape[0]
    vocab, size = weight.shape
    room = 0
    if grads[1]:
        memory = options.strategy, options.memory_budget
        room = stash_room(vocab, hidden.dtype, hidden.device, *memory)
    wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    positions = (hidden.shape[0],)
    given = [positions if name in extras else (0,) for name in TokenStats._fields[1:]]
    rank = 0 if low is None else low.shape[1]
    return (
        (positions, wide),
        (given[0], wide),
        (given[1], wide),
        (given[2], torch.bool),
        (given[3], wide),
        ((tokens if grads[0] else 0, size), hidden.dtype),
        ((tokens if grads[0] else 0, rank), hidden.dtype),
        (padded_rows(torch.sym_min(tokens, room), vocab, hidden.dtype), hidden.dtype),
        ((tokens,), wide),
        ((tokens if any(grads) else 0,), wide),
        ((tokens,), torch.int64),
    )


@torch.library.custom_op(
    "fastpref::linear_token_logps",
    mutates_args=(),
    schema=f"({_INPUTS}, {_OPTIONS}) -> ({_OUT}, {_STATE})",
)
def linear_forward(hidden, low, weight, bias, up, scale, labels, token_indices, *flat):
    options, extras, grads = _split(flat)
    head = HeadTensors(weight, bias, up, scale)
    p = compact(hidden, low, head, labels, options, extras, token_indices, grads)
    states = pick_states(p.rows, p.low, p.positions)
    n, index = p.labels.shape[0], p.positions
    shapes = _shapes(hidden, low, weight, token_indices, options, extras, grads)
    stash = hidden.new_empty(shapes[7][0])
    kept = min(n, stash.shape[0])
    call = p.call._replace(plan=replace(p.call.plan, stash_tokens=kept))
    out, saved = forward_pass(call, states, p.head, p.labels, stash[:kept, : weight.shape[0]])
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
    factor = torch.ones_like(saved.lse) if saved.factor is None else saved.factor
    vectors = fill(saved.lse, 8), fill(factor if any(grads) else None, 9), fill(index, 10)
    return *given, fill(saved.u, 5), fill(saved.v, 6), stash, *vectors, count


@linear_forward.register_fake
def _(hidden, low, weight, bias, up, scale, labels, token_indices, *flat):
    shapes = _shapes(hidden, low, weight, token_indices, *_split(flat))
    tensors = (hidden.new_empty(shape, dtype=dtype) for shape, dtype in shapes)
    return *tensors, torch.empty((), dtype=torch.int64, device="cpu")


@torch.library.custom_op(
    "fastpref::linear_token_logps_backward",
    mutates_args=(),
    schema=f"(Tensor coef, Tensor? entropy_coef, {_INPUTS}, Tensor logps, Tensor entropy, "
    f"{_STATE}, {_OPTIONS}, bool[] wanted) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def linear_backward(coef, entropy_coef, hidden, low, *rest):
    head, (labels, _, logps, entropy) = HeadTensors(*rest[:4]), rest[4:8]
    (u, v, stash, lse, factor, index, count), flat, wanted = rest[8:15], rest[15:-1], rest[-1]
    options, extras, grads = _split(flat)
    n, vocab = int(count), head.weight.shape[0]
    index = index[:n]
    call = plan_call(hidden, head, n, options, extras, grads)
    kept = min(n, stash.shape[0])
    call = call._replace(plan=replace(call.plan, stash_tokens=kept))
    on = grads[0]
    saved = Saved(
        u[:n] if on else None,
        v[:n] if on and low is not None else None,
        stash[:kept, :vocab],
        lse[:n],
        factor[:n],
    )
    like = [None if t is None else (t.shape, t.dtype) for t in head]
    dx, dlow, out = gradients(
        call,
        pick_states(hidden, low, index),
        adjacent_head(head),
        labels.index_select(0, index),
        saved,
        logps.index_select(0, index),
        coef.index_select(0, index),
        entropy.index_select(0, index) if entropy_coef is not None else None,
        entropy_coef.index_select(0, index) if entropy_coef is not None else None,
        like,
        wanted,
    )
    rows = hidden.shape[0]
    states = unpick(dx, index, rows), unpick(dlow, index, rows)
    return tuple(hidden.new_empty(0) if t is None else t for t in (*states, *out))


@linear_backward.register_fake
def _(coef, entropy_coef, hidden, low, *rest):
    head, wanted, on = rest[:4], rest[-1], rest[-3]
    states = (
        hidden.new_empty(hidden.shape if on else 0),
        hidden.new_empty(low.shape if on and low is not None else 0),
    )
    pairs = zip(head, wanted, strict=True)
    return *states, *(t.new_empty(t.shape) if w else hidden.new_empty(0) for t, w in pairs)


def _linear_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    tensors, ctx.flat = inputs[:8], inputs[8:]
    logps, entropy, mean_logit, is_top1, log_sum_sq_probs, *state = output
    ctx.save_for_backward(*tensors, logps, entropy, *state)
    ctx.has_entropy = "entropy" in ctx.flat[-3]
    ctx.has_low = tensors[1] is not None
    ctx.wanted = [t is not None and t.requires_grad for t in tensors[2:6]]
    ctx.mark_non_differentiable(mean_logit, is_top1, log_sum_sq_probs, *state)
    ctx.set_materialize_grads(False)


def _linear_gradients(ctx: Any, coef: Tensor | None, entropy_coef: Tensor | None, *_: Any):
    if not ctx.has_entropy:
        entropy_coef = None
    none = (None,) * (2 + len(ctx.flat))
    if coef is None and entropy_coef is None:
        return (None,) * 6 + none
    coef = torch.zeros_like(ctx.saved_tensors[8]) if coef is None else coef
    out = torch.ops.fastpref.linear_token_logps_backward(
        coef, entropy_coef, *ctx.saved_tensors, *ctx.flat, ctx.wanted
    )
    hidden_grad = ctx.flat[-2]
    given = hidden_grad, hidden_grad and ctx.has_low, *ctx.wanted
    return *(t if g else None for t, g in zip(out, given, strict=True)), *none


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


@dataclass(frozen=True)
class CompiledLogps:
    """The same under torch.compile: one operator, whose shapes do not depend on values."""

    hidden: Tensor
    low: Tensor | None
    head: HeadTensors
    labels: Tensor
    options: HeadOptions
    extras: tuple[str, ...]
    token_indices: Tensor | None
    grads: tuple[bool, bool]

    @property
    def has_grads(self) -> bool:
        return any(self.grads)

    @property
    def fused(self) -> bool:
        """Whether it may be: which kernel runs is not known yet."""
        return self.options.fused is not False and self.head.up is None and self.head.scale is None

    def run(self) -> Tensor | TokenStats:
        out = torch.ops.fastpref.linear_token_logps(
            self.hidden,
            self.low,
            *self.head,
            self.labels.reshape(-1),
            self.token_indices,
            *flat_options(self.options),
            ",".join(self.extras),
            *self.grads,
        )
        shape = self.labels.shape
        if not self.extras:
            return out[0].view(shape)
        given = (
            t.view(shape) if name in self.extras else None
            for name, t in zip(EXTRAS, out[1:5], strict=True)
        )
        return TokenStats(out[0].view(shape), *given)
