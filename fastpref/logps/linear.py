"""Token and sequence log-probabilities: the public functions and what they check."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fastpref import backends
from fastpref.autograd import LinearTokenLogps, Solve, TokenLogps, without_autocast
from fastpref.backends.tile import EXTRAS, Transform
from fastpref.checks import (
    check_adapter,
    check_extras,
    check_float,
    check_head,
    check_indices,
    check_labels,
    check_range,
)
from fastpref.options import HeadOptions, checked, flat_options
from fastpref.passes import HeadTensors, LinearCall, TokenStats
from fastpref.plan import plan_head

_WIDEST_CAP = 100.0  # where the error of a logit is 1e-5; models have 30 to 50


def linear_token_logps(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    *,
    scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    ignore_index: int = -100,
    extras: Sequence[str] = (),
    strategy: str = "auto",
    memory_budget: int | None = None,
    precision: str = "exact",
    fused: bool | str | None = None,
    backend: str | None = None,
    token_indices: Tensor | None = None,
    low_rank: tuple[Tensor, Tensor] | None = None,
    weight_scale: Tensor | None = None,
) -> Tensor | TokenStats:
    """Log-probability of each label under the head, without the logits.

    The logits are z = softcap * tanh(scale * (hidden W^T + bias) / softcap) / temperature and the
    result is z[label] - logsumexp(z). Tokens whose label is ignored are dropped before the first
    product, and the gradients are formed as in docs/algorithm.md: the forward pass computes
    u = d logp / d hidden, so that the backward pass of any loss is a scaling of u and one product.

    Args:
        hidden: [..., H] or [N, H], float64, float32, bfloat16 or float16; any strides. Under
            autocast it is cast to the autocast dtype, as `F.linear` would.
        weight: [V, H], in hidden's dtype (or float32 under autocast).
        labels: [...] int64, aligned with hidden: labels[t] is predicted from hidden[t].
        bias: [V] or None.
        scale, softcap, temperature: the logits' transform.
        ignore_index: the label of positions that do not count.
        extras: of "entropy" (nats, differentiable), "mean_logit", "is_top1", "log_sum_sq_probs";
            at no extra product.
        strategy, memory_budget (bytes): see `fastpref.plan.plan_head`, which chooses.
        precision: "exact" keeps the logits of 16-bit inputs in fp32; "fast" rounds them to the
            inputs' dtype, all but the label's, which is exact there and in the normaliser.
        fused: whether the product keeps its logits to itself, where the backend has one that can:
            without gradients there is then no N x V memory, with gradients there is that of D. None
            takes the faster way, False a tile of logits, and "match" the way that None takes in the
            same call with gradients, whose log-probs it then has to the last bit.
        backend: "native", "triton", "eager" or None for the fastest that works.
        token_indices: [N] int64 positions of the labelled tokens in the flattened labels, where the
            caller knows them; saves a synchronisation on a GPU.
        low_rank: a LoRA adapter on the head, as (low [..., r], up [V, r]): low up^T is added to
            hidden W^T, which is never merged with it. low is scaling * dropout(hidden) A^T, and up
            is B.
        weight_scale: [V], DoRA's: factors on hidden W^T + low up^T, before the bias.

    Returns:
        [...] float32 (float64 for float64 inputs), 0 where ignored and never above 0; with extras
        a `TokenStats` of such tensors.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit together, a label outside [0, V), an
            unknown option. RuntimeError: a forced backend that cannot run here.
    """
    given = dict(
        scale=scale,
        softcap=softcap,
        temperature=temperature,
        ignore_index=ignore_index,
        strategy=strategy,
        memory_budget=memory_budget,
        precision=precision,
        fused=fused,
        backend=backend,
    )
    options = checked(HeadOptions, given)
    low, up = (None, None) if low_rank is None else low_rank
    head = HeadTensors(weight, bias, up, weight_scale)
    return prepare(hidden, head, labels, options, extras, token_indices, low).run()


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


def prepare(
    hidden: Tensor,
    head: HeadTensors,
    labels: Tensor,
    options: HeadOptions,
    extras: Sequence[str] = (),
    token_indices: Tensor | None = None,
    low: Tensor | None = None,
    prefix: str = "",
) -> PreparedLogps | CompiledLogps:
    """Everything of `linear_token_logps` that comes before the first product.

    prefix goes before the names hidden, weight and bias in the messages of errors.
    """
    extras = check_extras(extras)
    check_head(hidden, head.weight, head.bias, prefix)
    check_adapter(hidden, head, low)
    hidden = _autocast(hidden)
    where = f"{prefix}hidden without its last dimension"
    check_labels(labels, hidden.shape[:-1], where, hidden.device)
    on = torch.is_grad_enabled()
    states_grad = hidden.requires_grad or (low is not None and low.requires_grad)
    grads = on and states_grad, on and any(t is not None and t.requires_grad for t in head)
    rows = adjacent(hidden.reshape(-1, hidden.shape[-1]))
    if low is not None:
        low = adjacent(low.to(hidden.dtype).reshape(-1, low.shape[-1]))
    call = CompiledLogps if torch.compiler.is_compiling() else compact
    return call(rows, low, head, labels, options, extras, token_indices, grads)


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
    if not backends.may_synchronise(y.device):
        # A negative label that got here is a mistake, not an ignored token: NaN, as any other.
        y = y.masked_fill(y < 0, head.weight.shape[0])
    call = plan_call(rows, head, y.shape[0], options, extras, grads)
    return PreparedLogps(rows, low, adjacent_head(head), y.contiguous(), index, labels.shape, call)


def token_logps(
    logits: Tensor,
    labels: Tensor,
    *,
    scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    ignore_index: int = -100,
    inplace_backward: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Log-probability of each label under ready logits, read once forward.

    Args:
        logits: [..., V], float64, float32, bfloat16 or float16.
        labels: [...] int64, aligned with logits.
        scale, softcap, temperature: applied to the logits as in `linear_token_logps`.
        ignore_index: the label of positions that do not count.
        inplace_backward: write the gradient over the logits, which halves the memory of the
            backward pass. Nobody may read the logits afterwards, and a second backward pass raises.
            Under torch.compile, which plans memory itself, it makes no difference.
        backend: "native", "triton", "eager" or None for the fastest that works.

    Returns:
        [...] float32 (float64 for float64 logits), 0 where ignored and never above 0.

    Raises:
        ValueError: shapes or dtypes that do not fit together, a label outside [0, V).
    """
    transform = Transform(scale, softcap, temperature)
    check_float("logits", logits)
    if logits.dim() < 1 or logits.shape[-1] == 0:
        raise ValueError(f"logits: got shape {tuple(logits.shape)}, expected [..., V] with V > 0")
    check_labels(labels, logits.shape[:-1], "logits without its last dimension", logits.device)
    flat = labels.reshape(-1)
    ignored = flat == ignore_index
    check_range(flat, logits.shape[-1], ignored)
    if inplace_backward and 0 in logits.stride() and logits.numel() > 1:
        raise ValueError(
            "inplace_backward: got True with expanded logits, whose rows share memory; expected "
            "logits of their own"
        )
    rows = adjacent(logits.reshape(-1, logits.shape[-1]))
    # Any other negative label must not pass for an ignored one: out of range, it gives NaN.
    y = flat.masked_fill(flat < 0, logits.shape[-1]).masked_fill(ignored, -1)
    if torch.compiler.is_compiling():  # which plans the memory of the backward pass itself
        op = torch.ops.fastpref.token_logps
        return op(rows, y, scale, softcap, temperature, backend)[0].view(labels.shape)
    module = backends.choose(logits.device, logits.dtype, backend)
    return TokenLogps.apply(rows, y, transform, module, inplace_backward).view(labels.shape)


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


def _autocast(hidden: Tensor) -> Tensor:
    kind = hidden.device.type
    if torch.is_autocast_enabled(kind) and hidden.dtype != torch.float64:
        return hidden.to(torch.get_autocast_dtype(kind))
    return hidden
