"""`linear_token_logps`: token log-probabilities from hidden states and the head."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastpref.logps.checks import (
    check_adapter,
    check_extras,
    check_head,
    check_labels,
)
from fastpref.logps.compile import CompiledLogps
from fastpref.logps.forward import HeadTensors, TokenStats
from fastpref.logps.options import HeadOptions
from fastpref.logps.prepared import PreparedLogps, adjacent, compact
from fastpref.validation import cached_options


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
        strategy, memory_budget (bytes): see `fastpref.plan_head`, which chooses.
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
    options = cached_options(HeadOptions, given)
    low, up = (None, None) if low_rank is None else low_rank
    head = HeadTensors(weight, bias, up, weight_scale)
    return prepare(hidden, head, labels, options, extras, token_indices, low).run()


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


def _autocast(hidden: Tensor) -> Tensor:
    kind = hidden.device.type
    if torch.is_autocast_enabled(kind) and hidden.dtype != torch.float64:
        return hidden.to(torch.get_autocast_dtype(kind))
    return hidden
