"""Token and sequence log-probabilities: the public functions and what they check."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastpref import backends
from fastpref.autograd import LinearCall, LinearTokenLogps, TokenLogps, TokenStats
from fastpref.backends.tile import EXTRAS, Transform
from fastpref.plan import plan_head

_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


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
    backend: str | None = None,
    token_indices: Tensor | None = None,
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
            inputs' dtype, the label's and the normaliser's alike.
        backend: "native", "eager" or None for the fastest that works.
        token_indices: [N] int64 positions of the labelled tokens in the flattened labels, where the
            caller knows them; saves a synchronisation on a GPU.

    Returns:
        [...] float32 (float64 for float64 inputs), 0 where ignored and never above 0; with extras
        a `TokenStats` of such tensors.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit together, a label outside [0, V), an
            unknown option. RuntimeError: a forced backend that cannot run here.
    """
    extras = _check_extras(extras)
    transform = Transform(float(scale), None if softcap is None else float(softcap), temperature)
    hidden = _autocast(hidden)
    check_head(hidden, weight, bias)
    _check_labels(labels, hidden.shape[:-1], "hidden without its last dimension", hidden.device)
    flat, index = labels.reshape(-1), token_indices
    if index is None:
        kept = flat != ignore_index
        index = None if hidden.device.type == "cpu" and bool(kept.all()) else kept.nonzero()[:, 0]
    elif index.dtype != torch.int64 or index.dim() != 1 or index.device != hidden.device:
        raise ValueError(
            f"token_indices: got {_describe(index)}, expected a vector of int64 on {hidden.device}"
        )
    else:
        _check_indices(index, flat, ignore_index)
    y = flat if index is None else flat.index_select(0, index)
    _check_range(y, weight.shape[0])

    grads = torch.is_grad_enabled()
    hidden_grad = grads and hidden.requires_grad
    weight_grad = grads and (weight.requires_grad or (bias is not None and bias.requires_grad))
    plan = plan_head(
        y.shape[0],
        weight.shape[1],
        weight.shape[0],
        hidden.dtype,
        device=hidden.device,
        hidden_grad=hidden_grad,
        weight_grad=weight_grad,
        memory_budget=memory_budget,
        strategy=strategy,
        precision=precision,
    )
    module = backends.choose(hidden.device, hidden.dtype, backend)
    call = LinearCall(plan, transform, extras, module, hidden_grad, weight_grad)
    rows = hidden.reshape(-1, hidden.shape[-1])
    if rows.shape[1] and rows.stride(1) != 1:
        rows = rows.contiguous()
    if weight.stride(1) != 1 and weight.shape[1] > 1:
        weight = weight.contiguous()
    with torch.autocast(hidden.device.type, enabled=False):
        out = LinearTokenLogps.apply(rows, weight, bias, y.contiguous(), index, call)
    logps = _scatter(out[0], index, labels.shape)
    if not extras:
        return logps
    others = (None if t is None else _scatter(t, index, labels.shape) for t in out[1:])
    return TokenStats(logps, *others)


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
        backend: "native", "eager" or None for the fastest that works.

    Returns:
        [...] float32 (float64 for float64 logits), 0 where ignored and never above 0.

    Raises:
        ValueError: shapes or dtypes that do not fit together, a label outside [0, V).
    """
    transform = Transform(float(scale), None if softcap is None else float(softcap), temperature)
    _check_float("logits", logits)
    if logits.dim() < 1 or logits.shape[-1] == 0:
        raise ValueError(f"logits: got shape {tuple(logits.shape)}, expected [..., V] with V > 0")
    _check_labels(labels, logits.shape[:-1], "logits without its last dimension", logits.device)
    flat = labels.reshape(-1)
    ignored = flat == ignore_index
    _check_range(flat, logits.shape[-1], ignored)
    if inplace_backward and 0 in logits.stride() and logits.numel() > 1:
        raise ValueError(
            "inplace_backward: got True with expanded logits, whose rows share memory; expected "
            "logits of their own"
        )
    rows = logits.reshape(-1, logits.shape[-1])
    if rows.stride(1) != 1 and rows.shape[1] > 1:
        rows = rows.contiguous()
    module = backends.choose(logits.device, logits.dtype, backend)
    y = flat.masked_fill(ignored, -1)
    return TokenLogps.apply(rows, y, transform, module, inplace_backward).view(labels.shape)


def sequence_logps(
    token_logps: Tensor,
    labels: Tensor | None = None,
    *,
    sequence_ids: Tensor | None = None,
    num_sequences: int | None = None,
    average: bool = False,
    ignore_index: int = -100,
) -> Tensor:
    """Sum, or mean, of token log-probabilities over the labelled tokens of each sequence.

    Args:
        token_logps: [S, T] with labels [S, T], or flat [N] with sequence_ids [N] in [0, S).
        num_sequences: S for the flat form; default: the largest id plus one.
        average: divide by the number of labelled tokens. A sequence without any has 0.
        labels: the positions with ignore_index do not count; optional in the flat form.

    Returns:
        [S], in token_logps' dtype.
    """
    if (sequence_ids is None) == (token_logps.dim() == 1):
        raise ValueError(
            f"token_logps: got shape {tuple(token_logps.shape)} "
            f"{'without' if sequence_ids is None else 'with'} sequence_ids, expected [S, T] with "
            "labels or [N] with sequence_ids"
        )
    if labels is None and sequence_ids is None:
        raise ValueError("labels: got None, expected the labels [S, T] of token_logps [S, T]")
    for name, other in (("labels", labels), ("sequence_ids", sequence_ids)):
        if other is not None and other.shape != token_logps.shape:
            raise ValueError(
                f"{name}: got shape {tuple(other.shape)}, expected {tuple(token_logps.shape)}, "
                "the shape of token_logps"
            )
    # In float64: a policy and its reference then have the same sums wherever they were formed.
    counted = torch.ones_like(token_logps) if labels is None else (labels != ignore_index)
    values = token_logps if labels is None else token_logps.masked_fill(~counted, 0.0)
    values, counted = values.double(), counted.double()
    if sequence_ids is None:
        sums, counts = values.sum(1), counted.sum(1)
    else:
        size = num_sequences
        if size is None:
            size = int(sequence_ids.max()) + 1 if sequence_ids.numel() else 0
        check_ids("sequence_ids", sequence_ids, size)
        zeros = values.new_zeros(size)
        sums, counts = (zeros.index_add(0, sequence_ids, v) for v in (values, counted))
    return (sums / counts.clamp(min=1) if average else sums).to(token_logps.dtype)


def _scatter(values: Tensor, index: Tensor | None, shape: torch.Size) -> Tensor:
    if index is None:
        return values.view(shape)
    return values.new_zeros(shape.numel()).index_copy(0, index, values).view(shape)


def _autocast(hidden: Tensor) -> Tensor:
    kind = hidden.device.type
    if torch.is_autocast_enabled(kind) and hidden.dtype != torch.float64:
        return hidden.to(torch.get_autocast_dtype(kind))
    return hidden


def _describe(t: Tensor) -> str:
    return f"{str(t.dtype)[6:]} {tuple(t.shape)} on {t.device}"


def _check_float(name: str, t: Tensor) -> None:
    if not isinstance(t, Tensor):
        raise ValueError(f"{name}: got {type(t).__name__}, expected a tensor")
    if t.dtype not in _FLOATS:
        raise ValueError(
            f"{name}: got {str(t.dtype)[6:]}, expected float64, float32, bfloat16 or float16"
        )


def _check_extras(extras: Sequence[str]) -> tuple[str, ...]:
    names = (extras,) if isinstance(extras, str) else tuple(extras)
    for name in names:
        if name not in EXTRAS:
            raise ValueError(f"extras: got {name!r}, expected some of {', '.join(EXTRAS)}")
    return names


def check_head(hidden: Tensor, weight: Tensor, bias: Tensor | None, prefix: str = "") -> None:
    """Raise ValueError unless the three fit together; prefix goes before their names."""
    hidden_name, weight_name, bias_name = (prefix + n for n in ("hidden", "weight", "bias"))
    _check_float(hidden_name, hidden)
    _check_float(weight_name, weight)
    if weight.dim() != 2 or weight.shape[0] == 0:
        raise ValueError(
            f"{weight_name}: got shape {tuple(weight.shape)}, expected [V, H] with V > 0"
        )
    if hidden.dim() < 1 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"{hidden_name}: got shape {tuple(hidden.shape)}, expected [..., {weight.shape[1]}] to "
            f"go with {weight_name} {tuple(weight.shape)}"
        )
    cast = torch.is_autocast_enabled(hidden.device.type) and weight.dtype != torch.float64
    if weight.dtype != hidden.dtype and not cast:
        raise ValueError(
            f"{weight_name}: got {str(weight.dtype)[6:]}, expected {str(hidden.dtype)[6:]}, the "
            f"dtype of {hidden_name} (they may differ under autocast)"
        )
    if weight.device != hidden.device:
        raise ValueError(f"{weight_name}: got device {weight.device}, expected {hidden.device}")
    if bias is None:
        return
    if bias.shape != weight.shape[:1]:
        raise ValueError(
            f"{bias_name}: got shape {tuple(bias.shape)}, expected [{weight.shape[0]}]"
        )
    if bias.dtype != weight.dtype:
        raise ValueError(
            f"{bias_name}: got {str(bias.dtype)[6:]}, expected {str(weight.dtype)[6:]}, as "
            f"{weight_name}"
        )
    if bias.device != hidden.device:
        raise ValueError(f"{bias_name}: got device {bias.device}, expected {hidden.device}")


def _check_labels(labels: Tensor, shape: torch.Size, of: str, device: torch.device) -> None:
    if not isinstance(labels, Tensor):
        raise ValueError(f"labels: got {type(labels).__name__}, expected a tensor")
    if labels.shape != shape:
        raise ValueError(
            f"labels: got shape {tuple(labels.shape)}, expected {tuple(shape)}, the shape of {of}"
        )
    if labels.dtype != torch.int64:
        raise ValueError(f"labels: got {str(labels.dtype)[6:]}, expected int64")
    if labels.device != device:
        raise ValueError(f"labels: got device {labels.device}, expected {device}")


def _check_range(labels: Tensor, vocab: int, ignored: Tensor | None = None) -> None:
    """At once on a CPU; on a GPU, where it would synchronise, only with FASTPREF_DEBUG=1."""
    if labels.numel() == 0 or not backends.may_synchronise(labels.device):
        return
    bad = (labels < 0) | (labels >= vocab)
    if ignored is not None:
        bad &= ~ignored
    if bool(bad.any()):
        value = int(labels[bad][0])
        raise ValueError(f"labels: got {value}, expected ignore_index or a value in [0, {vocab})")


def _check_indices(index: Tensor, labels: Tensor, ignore_index: int) -> None:
    """token_indices must be all labelled positions, in order; each counts once."""
    check_ids("token_indices", index, labels.shape[0])
    if not backends.may_synchronise(index.device):
        return
    expected = (labels != ignore_index).nonzero()[:, 0]
    if not torch.equal(index, expected):
        raise ValueError(
            f"token_indices: got {index.shape[0]} positions that are not the {expected.shape[0]} "
            "labelled ones in increasing order, expected those"
        )


def check_ids(name: str, ids: Tensor, size: int) -> None:
    if ids.dtype != torch.int64:
        raise ValueError(f"{name}: got {str(ids.dtype)[6:]}, expected int64")
    if ids.numel() and backends.may_synchronise(ids.device):
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high >= size:
            raise ValueError(
                f"{name}: got values from {low} to {high}, expected values in [0, {size})"
            )
