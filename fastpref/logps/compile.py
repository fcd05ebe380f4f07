"""The two autograd functions as torch.library operators, for callers under torch.compile.

A compiled graph needs shapes before there are values, and how many tokens carry a label is a value.
Without `token_indices` the operator's outputs therefore have room for all M positions; products and
kernels run on the labelled ones alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fastpref.backends import choose
from fastpref.backends.stats import EXTRAS
from fastpref.backends.tile import Transform
from fastpref.logps.autograd import gradients, pick_rows, unpick
from fastpref.logps.first_order import check_first_order
from fastpref.logps.forward import HeadTensors, Saved, TokenStats, forward_pass, padded_rows
from fastpref.logps.logits import logits_backward, logits_forward
from fastpref.logps.options import HeadOptions, flat_options, from_flat
from fastpref.logps.plan import stash_room
from fastpref.logps.prepared import adjacent_head, compact, plan_call, scatter

_INPUTS = (
    "Tensor hidden, Tensor? lora_hidden, Tensor weight, Tensor? bias, Tensor? lora_B, "
    "Tensor? dora_scale, Tensor labels, Tensor? token_indices"
)
# The values of `flat_options`, then the extras (joined by commas) and which gradients are needed.
_OPTIONS = (
    "float scale, float? softcap, float temperature, SymInt ignore_index, str strategy, "
    "SymInt? memory_budget, str precision, SymInt fused, str? backend, "
    "float? gradient_tolerance, float? head_gradient_tolerance, SymInt gradient_seed, "
    "str extras, bool hidden_grad, bool weight_grad"
)
_STATE = (
    "Tensor u, Tensor v, Tensor stash, Tensor lse, Tensor row_scale, Tensor index, Tensor count"
)
_OUT = "Tensor logps, Tensor entropy, Tensor mean_logit, Tensor is_top1, Tensor log_sum_sq_probs"


# A shape, whose sizes may be symbolic, and a dtype.
_Kind = tuple[tuple[Any, ...], torch.dtype]


def _split(flat: Sequence[Any]) -> tuple[HeadOptions, tuple[str, ...], tuple[bool, bool]]:
    *options, extras, hidden_grad, weight_grad = flat
    names = tuple(extras.split(",")) if extras else ()
    return from_flat(options), names, (hidden_grad, weight_grad)


def _kinds(
    hidden: Tensor,
    lora_hidden: Tensor | None,
    weight: Tensor,
    token_indices: Tensor | None,
    options: HeadOptions,
    extras: tuple[str, ...],
    grads: tuple[bool, bool],
) -> tuple[_Kind, ...]:
    """The shape and the dtype of every output but the count."""
    tokens = hidden.shape[0] if token_indices is None else token_indices.shape[0]
    vocab, size = weight.shape
    room = 0
    if grads[1]:
        memory = options.strategy, options.memory_budget
        room = stash_room(vocab, hidden.dtype, hidden.device, *memory)
    wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    positions = (hidden.shape[0],)
    optional = [positions if name in extras else (0,) for name in TokenStats._fields[1:]]
    rank = 0 if lora_hidden is None else lora_hidden.shape[1]
    return (
        (positions, wide),
        (optional[0], wide),
        (optional[1], wide),
        (optional[2], torch.bool),
        (optional[3], wide),
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
def linear_forward(
    hidden: Tensor,
    lora_hidden: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    lora_B: Tensor | None,
    dora_scale: Tensor | None,
    labels: Tensor,
    token_indices: Tensor | None,
    *flat: Any,
) -> tuple[Tensor, ...]:
    options, extras, grads = _split(flat)
    head = HeadTensors(weight, bias, lora_B, dora_scale)
    p = compact(hidden, lora_hidden, head, labels, options, extras, token_indices, grads)
    inputs = pick_rows(p.hidden, p.lora_hidden, p.positions)
    n, index = p.labels.shape[0], p.positions
    kinds = _kinds(hidden, lora_hidden, weight, token_indices, options, extras, grads)
    stash = hidden.new_empty(kinds[7][0])
    stashed = min(n, stash.shape[0])
    call = p.call._replace(plan=replace(p.call.plan, stash_tokens=stashed))
    out, saved = forward_pass(call, inputs, p.head, p.labels, stash[:stashed, : weight.shape[0]])
    outputs = (
        hidden.new_empty(0, dtype=dtype) if t is None else scatter(t, index, labels.shape)
        for t, (_, dtype) in zip(out, kinds[:5], strict=True)
    )
    if index is None:
        index = torch.arange(n, device=hidden.device)
    elif index is token_indices:
        index = index.clone()  # an output must not be an input

    def fill(t: Tensor | None, at: int) -> Tensor:
        shape, dtype = kinds[at]
        if t is not None and t.shape == torch.Size(shape):
            return t
        padded = hidden.new_empty(shape, dtype=dtype)
        if t is not None:
            padded[: t.shape[0]] = t
        return padded

    # The count stays on the host: the backward pass needs it there to know its shapes.
    count = torch.tensor(n, device="cpu")
    row_scale = torch.ones_like(saved.lse) if saved.row_scale is None else saved.row_scale
    vectors = fill(saved.lse, 8), fill(row_scale if any(grads) else None, 9), fill(index, 10)
    return *outputs, fill(saved.u, 5), fill(saved.v, 6), stash, *vectors, count


@linear_forward.register_fake
def _(
    hidden: Tensor,
    lora_hidden: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    lora_B: Tensor | None,
    dora_scale: Tensor | None,
    labels: Tensor,
    token_indices: Tensor | None,
    *flat: Any,
) -> tuple[Tensor, ...]:
    kinds = _kinds(hidden, lora_hidden, weight, token_indices, *_split(flat))
    tensors = (hidden.new_empty(shape, dtype=dtype) for shape, dtype in kinds)
    return *tensors, torch.empty((), dtype=torch.int64, device="cpu")


@torch.library.custom_op(
    "fastpref::linear_token_logps_backward",
    mutates_args=(),
    schema=f"(Tensor dlogp, Tensor? dentropy, {_INPUTS}, Tensor logps, Tensor entropy, "
    f"{_STATE}, {_OPTIONS}, bool[] wanted) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def linear_backward(
    dlogp: Tensor,
    dentropy: Tensor | None,
    hidden: Tensor,
    lora_hidden: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, ...]:
    head, (labels, _, logps, entropy) = HeadTensors(*rest[:4]), rest[4:8]
    (u, v, stash, lse, row_scale, index, count), flat, wanted = rest[8:15], rest[15:-1], rest[-1]
    options, extras, grads = _split(flat)
    n, vocab = int(count), head.weight.shape[0]
    index = index[:n]
    call = plan_call(hidden, head, n, options, extras, grads)
    stashed = min(n, stash.shape[0])
    call = call._replace(plan=replace(call.plan, stash_tokens=stashed))
    hidden_grad = grads[0]
    saved = Saved(
        u[:n] if hidden_grad else None,
        v[:n] if hidden_grad and lora_hidden is not None else None,
        stash[:stashed, :vocab],
        lse[:n],
        row_scale[:n],
    )
    dx, dlora_hidden, dhead = gradients(
        call,
        pick_rows(hidden, lora_hidden, index),
        adjacent_head(head),
        labels.index_select(0, index),
        saved,
        logps.index_select(0, index),
        dlogp.index_select(0, index),
        entropy.index_select(0, index) if dentropy is not None else None,
        dentropy.index_select(0, index) if dentropy is not None else None,
        [None if t is None else (t.shape, t.dtype) for t in head],
        wanted,
    )
    inputs = (unpick(t, index, hidden.shape[0]) for t in (dx, dlora_hidden))
    return tuple(hidden.new_empty(0) if t is None else t for t in (*inputs, *dhead))


@linear_backward.register_fake
def _(
    dlogp: Tensor,
    dentropy: Tensor | None,
    hidden: Tensor,
    lora_hidden: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, ...]:
    head, wanted, hidden_grad = rest[:4], rest[-1], rest[-3]
    inputs = (
        hidden.new_empty(hidden.shape if hidden_grad else 0),
        hidden.new_empty(lora_hidden.shape if hidden_grad and lora_hidden is not None else 0),
    )
    pairs = zip(head, wanted, strict=True)
    return *inputs, *(t.new_empty(t.shape) if w else hidden.new_empty(0) for t, w in pairs)


def _linear_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    tensors, ctx.flat = inputs[:8], inputs[8:]
    logps, entropy, mean_logit, is_top1, log_sum_sq_probs, *state = output
    ctx.save_for_backward(*tensors, logps, entropy, *state)
    ctx.has_entropy = "entropy" in ctx.flat[-3]
    ctx.has_lora = tensors[1] is not None
    ctx.wanted = [t is not None and t.requires_grad for t in tensors[2:6]]
    ctx.mark_non_differentiable(mean_logit, is_top1, log_sum_sq_probs, *state)
    ctx.set_materialize_grads(False)


def _linear_gradients(
    ctx: Any, dlogp: Tensor | None, dentropy: Tensor | None, *_: Any
) -> tuple[Tensor | None, ...]:
    check_first_order(dlogp, dentropy)
    if not ctx.has_entropy:
        dentropy = None
    none = (None,) * (2 + len(ctx.flat))
    if dlogp is None and dentropy is None:
        return (None,) * 6 + none
    dlogp = torch.zeros_like(ctx.saved_tensors[8]) if dlogp is None else dlogp
    out = torch.ops.fastpref.linear_token_logps_backward(
        dlogp, dentropy, *ctx.saved_tensors, *ctx.flat, ctx.wanted
    )
    hidden_grad = ctx.flat[-2]
    wanted = hidden_grad, hidden_grad and ctx.has_lora, *ctx.wanted
    return *(t if w else None for t, w in zip(out, wanted, strict=True)), *none


linear_forward.register_autograd(_linear_gradients, setup_context=_linear_context)


@torch.library.custom_op(
    "fastpref::token_logps",
    mutates_args=(),
    schema="(Tensor logits, Tensor labels, float scale, float? softcap, float temperature, "
    "str? backend) -> (Tensor, Tensor)",
)
def token_forward(
    logits: Tensor,
    labels: Tensor,
    scale: float,
    softcap: float | None,
    temperature: float,
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    module = choose(logits.device, logits.dtype, backend)
    return logits_forward(logits, labels, Transform(scale, softcap, temperature), module)


@token_forward.register_fake
def _(logits: Tensor, labels: Tensor, *_: Any) -> tuple[Tensor, ...]:
    wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
    return tuple(logits.new_empty(labels.shape, dtype=wide) for _ in range(2))


@torch.library.custom_op(
    "fastpref::token_logps_backward",
    mutates_args=(),
    schema="(Tensor dlogp, Tensor logits, Tensor labels, Tensor lse, Tensor logps, float scale, "
    "float? softcap, float temperature, str? backend) -> Tensor",
)
def token_backward(
    dlogp: Tensor,
    logits: Tensor,
    labels: Tensor,
    lse: Tensor,
    logps: Tensor,
    scale: float,
    softcap: float | None,
    temperature: float,
    backend: str | None,
) -> Tensor:
    dlogits = torch.empty_like(logits)
    module = choose(logits.device, logits.dtype, backend)
    transform = Transform(scale, softcap, temperature)
    logits_backward(logits, labels, lse, logps, dlogp.contiguous(), dlogits, transform, module)
    return dlogits


@token_backward.register_fake
def _(dlogp: Tensor, logits: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(logits)


def _token_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    logits, labels, *ctx.options = inputs
    logps, lse = output
    ctx.save_for_backward(logits, labels, lse, logps)
    ctx.mark_non_differentiable(lse)
    ctx.set_materialize_grads(False)


def _token_gradients(ctx: Any, dlogp: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
    check_first_order(dlogp)
    dlogits = None
    if dlogp is not None:
        saved, options = ctx.saved_tensors, ctx.options
        dlogits = torch.ops.fastpref.token_logps_backward(dlogp, *saved, *options)
    return dlogits, None, None, None, None, None


token_forward.register_autograd(_token_gradients, setup_context=_token_context)


@dataclass(frozen=True)
class CompiledLogps:
    """A `PreparedLogps` under torch.compile: one operator, whose shapes depend on no values."""

    hidden: Tensor  # [M, H]
    lora_hidden: Tensor | None  # [M, r]
    head: HeadTensors
    labels: Tensor  # [...], M in all
    options: HeadOptions
    extras: tuple[str, ...]
    token_indices: Tensor | None  # [N]
    grads: tuple[bool, bool]

    @property
    def has_grads(self) -> bool:
        return any(self.grads)

    @property
    def logit_free(self) -> bool:
        """Whether the call may be logit-free; the backend, which decides, is not known yet."""
        adapter = self.head.lora_B is not None or self.head.dora_scale is not None
        return self.options.fused is not False and not adapter

    def __post_init__(self) -> None:
        if self.options.head_gradient_tolerance is not None and self.grads[1]:
            raise ValueError(
                "head_gradient_tolerance: got a number under torch.compile, whose shapes may not "
                "depend on D; expected None"
            )

    def compute(self) -> Sequence[Tensor | None]:
        """The fields of a `TokenStats` of all positions [M]."""
        out = torch.ops.fastpref.linear_token_logps(
            self.hidden,
            self.lora_hidden,
            *self.head,
            self.labels.reshape(-1),
            self.token_indices,
            *flat_options(self.options),
            ",".join(self.extras),
            *self.grads,
        )
        names = zip(EXTRAS, out[1:5], strict=True)
        return out[0], *(t if name in self.extras else None for name, t in names)

    def spread(self, out: Sequence[Tensor | None]) -> TokenStats:
        """The result of `compute`, shaped as the labels."""
        shape = self.labels.shape
        fields = (None if t is None else t.view(shape) for t in out)
        return TokenStats(*fields)  # type: ignore[arg-type]
