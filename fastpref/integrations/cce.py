"""Linear cross-entropy with the signatures of cut-cross-entropy and of torch.

    - from cut_cross_entropy import linear_cross_entropy
    + from fastpref.integrations.cce import linear_cross_entropy

    - torch.nn.functional.linear_cross_entropy(...)
    + fastpref.integrations.torch_linear_cross_entropy(...)

Both are the negated `linear_token_logps`; docs/cce.md lists the differences from the originals.
"""

from __future__ import annotations

import enum
import re
from typing import Any

import torch
from torch import Tensor, nn

from fastpref.logps.linear import linear_token_logps
from fastpref.logps.options import HEAD_OPTIONS, HeadOptions
from fastpref.validation import check_number

__all__ = [
    "LinearCrossEntropy",
    "LinearCrossEntropyImpl",
    "linear_cross_entropy",
    "torch_linear_cross_entropy",
]

_REDUCTIONS = ("mean", "sum", "none")
_ROWS = 8192  # rows of the head per block, when label smoothing sums over it
# The tensors' names in `linear_token_logps` -> their names in the function, for error messages.
_CCE = {"hidden": "e", "weight": "c", "labels": "targets"}
_TORCH = {"hidden": "input", "weight": "linear_weight", "labels": "target", "bias": "linear_bias"}


class _InputError(ValueError, RuntimeError):
    """An input for which torch's function raises a RuntimeError or a ValueError."""


class _TargetError(ValueError, IndexError):
    """A target outside [0, V), for which torch's function raises an IndexError."""


class LinearCrossEntropyImpl(enum.IntEnum):
    """cut-cross-entropy's implementations. Accepted for compatibility, without effect."""

    CCE = enum.auto()
    TORCH_COMPILE = enum.auto()


def linear_cross_entropy(
    e: Tensor,
    c: Tensor,
    targets: Tensor,
    ignore_index: int = -100,
    softcap: float | None = None,
    reduction: str = "mean",
    shift: bool | int = False,
    filter_eps: float | str | None = "high",
    impl: str | LinearCrossEntropyImpl = LinearCrossEntropyImpl.CCE,
    *,
    bias: Tensor | None = None,
    **head: Any,
) -> Tensor:
    """Cross-entropy of softcap(e c^T + bias) without the logits (Wijmans et al., arXiv:2411.09009).

    Args:
        e: [..., H] hidden states. c: [V, H] head, in e's dtype. bias: [V] or None.
        targets: [...] int64; ignore_index where a position does not count.
        softcap: s in s * tanh(logits / s), or None.
        reduction: "mean" over the positions that count, "sum" or "none".
        shift: e[..., t, :] predicts targets[..., t + shift]; True means 1. e is not copied.
        filter_eps: checked but without effect, since no gradient is filtered.
        impl: checked but without effect.
        head: scale, temperature, strategy, memory_budget, precision, fused, backend,
            gradient_tolerance, head_gradient_tolerance, gradient_seed of `linear_token_logps`.

    Returns:
        [] or, with "none", [...] ([..., T - shift] with shift), 0 where ignored; float32, or
        float64 for float64 inputs. The mean over no position is 0 and connected to the graph.

    Raises:
        ValueError: shapes or dtypes that do not fit together, an unknown reduction, filter_eps or
            impl, a target outside [0, V).
        TypeError: an unknown keyword.
    """
    if isinstance(filter_eps, str):
        if filter_eps not in ("auto", "high"):
            raise ValueError(
                f"filter_eps: got {filter_eps!r}, expected a number, 'auto', 'high' or None"
            )
    elif filter_eps is not None:
        check_number("filter_eps", filter_eps)
    _check_options("linear_cross_entropy", head)
    impl_name = getattr(impl, "name", impl)  # also of cut-cross-entropy's own enumeration
    if not isinstance(impl_name, str) or impl_name.lower() not in ("cce", "torch_compile"):
        raise ValueError(f"impl: got {impl!r}, expected 'cce' or 'torch_compile'")
    offset = int(shift)
    _check("e", e, "c", c, "targets", targets, reduction)
    if offset < 0 or offset and (targets.dim() < 1 or targets.shape[-1] < offset):
        raise ValueError(
            f"shift: got {shift!r} with targets {tuple(targets.shape)}, expected False, True or a "
            "number of positions that there are"
        )
    labels = targets
    if offset:  # shifting the labels costs less than slicing the hidden states
        labels = torch.full_like(targets, ignore_index)
        labels[..., :-offset] = targets[..., offset:]
    losses = -_logps(_CCE, e, c, labels, bias, ignore_index, softcap=softcap, **head)
    if reduction == "none":
        return losses[..., :-offset] if offset else losses
    total = losses.sum()
    return total / (labels != ignore_index).sum().clamp(min=1) if reduction == "mean" else total


class LinearCrossEntropy(nn.Module):
    """`linear_cross_entropy` as a module; the arguments of the constructor are its options."""

    def __init__(
        self,
        ignore_index: int = -100,
        softcap: float | None = None,
        reduction: str = "mean",
        filter_eps: float | str | None = "high",
        shift: bool | int = False,
        impl: str | LinearCrossEntropyImpl = LinearCrossEntropyImpl.CCE,
        **head: Any,
    ):
        super().__init__()
        _check_options("LinearCrossEntropy", head)
        self.ignore_index, self.softcap, self.reduction = ignore_index, softcap, reduction
        self.filter_eps, self.shift, self.impl, self.head = filter_eps, shift, impl, head

    def forward(self, e: Tensor, c: Tensor, targets: Tensor, bias: Tensor | None = None) -> Tensor:
        return linear_cross_entropy(
            e,
            c,
            targets,
            self.ignore_index,
            self.softcap,
            self.reduction,
            self.shift,
            self.filter_eps,
            self.impl,
            bias=bias,
            **self.head,
        )


def torch_linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    options: Any = None,
    **head: Any,
) -> Tensor:
    """`torch.nn.functional.linear_cross_entropy` (torch 2.13) without the logits.

    With w the class weights and e the label smoothing, the loss of a position is
    -(1 - e) w_y log p_y - e/V sum_v w_v log p_v, and the mean divides by the sum of the w_y. The
    second term needs no logits: sum_v w_v log p_v = x . (W^T w) + b . w - lse sum_v w_v. With label
    smoothing the backward pass allocates a second tensor of the head's size.

    Args:
        input: [H] or [..., H]. linear_weight: [V, H]. linear_bias: [V] or None.
        target: [] or [...] int64. weight: [V] class weights or None.
        reduction: "mean", "sum" or "none".
        ignore_index: None means -100.
        label_smoothing: e, in [0, 1].
        options: without effect; the size of tiles follows `memory_budget`.
        head: softcap, scale and temperature (without label_smoothing), strategy, memory_budget,
            precision, fused, backend, gradient_tolerance, head_gradient_tolerance, gradient_seed of
            `linear_token_logps`.

    Returns:
        [] or, with reduction "none", like target; float32 (float64 for float64 inputs), where
        torch returns the input's dtype. The mean over no position is 0 instead of NaN.

    Raises:
        ValueError: as `linear_cross_entropy`; class probabilities as target or a K-dimensional
            loss, which need a tensor of the logits' size. The error is also a RuntimeError or an
            IndexError if torch raises one.
        TypeError: an unknown keyword.
    """
    _check_options("torch_linear_cross_entropy", head)
    try:
        return _torch_loss(
            input,
            linear_weight,
            target,
            linear_bias,
            weight,
            reduction,
            -100 if ignore_index is None else ignore_index,
            label_smoothing,
            head,
        )
    except IndexError:
        raise
    except ValueError as error:
        raise _InputError(str(error)) from None


def _torch_loss(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    linear_bias: Tensor | None,
    weight: Tensor | None,
    reduction: str,
    ignored: int,
    label_smoothing: float,
    head: dict[str, Any],
) -> Tensor:
    _check_tensors(input=input, linear_weight=linear_weight, target=target)
    if linear_weight.dim() > 2:
        raise ValueError(
            f"linear_weight: got shape {tuple(linear_weight.shape)}, expected [V, H]; for a "
            "K-dimensional loss use torch.nn.functional.linear_cross_entropy"
        )
    if target.dtype.is_floating_point:
        raise ValueError(
            f"target: got {str(target.dtype)[6:]}, expected int64 class indices; class "
            "probabilities are as large as the logits: use "
            "torch.nn.functional.linear_cross_entropy"
        )
    check_number("label_smoothing", label_smoothing)
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing: got {label_smoothing}, expected a value in [0, 1]")
    if weight is not None:
        _check_tensors(weight=weight)
    if weight is not None and weight.shape != linear_weight.shape[:1]:
        raise ValueError(
            f"weight: got shape {tuple(weight.shape)}, expected [{linear_weight.shape[0]}]"
        )
    _check("input", input, "linear_weight", linear_weight, "target", target, reduction)
    for name in ("scale", "softcap", "temperature"):
        if label_smoothing and name in head:
            raise ValueError(f"{name}: not supported with label_smoothing")
    logps = _logps(_TORCH, input, linear_weight, target, linear_bias, ignored, **head)
    counted = target != ignored
    labels = target.masked_fill(~counted, 0)
    label_weights = counted.to(logps.dtype)
    if weight is not None:
        label_weights = label_weights * weight.to(logps.dtype)[labels]
    losses = -logps * label_weights
    if label_smoothing:
        inputs = input, linear_weight, linear_bias, labels, weight
        uniform = _uniform_loss(*inputs, logps).masked_fill(~counted, 0.0)
        share = label_smoothing / linear_weight.shape[0]
        losses = (1 - label_smoothing) * losses + share * uniform
    if reduction == "none":
        return losses
    total = losses.sum()
    if reduction == "sum":
        return total
    size = label_weights.sum()
    return total / (size + (size == 0))


def _uniform_loss(
    x: Tensor,
    head: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    weight: Tensor | None,
    logps: Tensor,
) -> Tensor:
    """-sum_v w_v log p_v of every position [...], from the label's log-prob logps [...]."""
    device_type = x.device.type
    if torch.is_autocast_enabled(device_type):  # the same operands as in logps
        x, head = (t.to(torch.get_autocast_dtype(device_type)) for t in (x, head))
    wide = logps.dtype
    with torch.autocast(device_type, enabled=False):
        x = x.to(wide)
        rows = head.index_select(0, labels.reshape(-1)).view(*labels.shape, -1)
        label_logit = (x * rows.to(wide)).sum(-1)
        w = label_logit.new_ones(head.shape[0]) if weight is None else weight.to(wide)
        blocks = zip(w.split(_ROWS), head.split(_ROWS), strict=True)  # avoids a copy of the head
        weighted_logits = x @ sum(w_block @ rows.to(wide) for w_block, rows in blocks)
        if bias is not None:
            label_logit = label_logit + bias.to(wide)[labels]
            weighted_logits = weighted_logits + bias.to(wide) @ w
        return (label_logit - logps) * w.sum() - weighted_logits  # label_logit - logps is lse


def _logps(
    names: dict[str, str],
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    ignored: int,
    **head: Any,
) -> Tensor:
    """`linear_token_logps`, with the caller's names for the tensors in its errors.

    names: maps the names of `linear_token_logps` to the caller's.
    """
    try:
        out = linear_token_logps(hidden, weight, labels, bias, ignore_index=ignored, **head)
    except ValueError as error:
        text = re.sub(rf"\b({'|'.join(names)})\b", lambda found: names[found[0]], str(error))
        raise (_TargetError if "a value in [0, " in text else ValueError)(text) from None
    assert isinstance(out, Tensor)
    return out


def _check_options(function: str, head: dict[str, Any]) -> None:
    """Raise TypeError for a keyword that is not an option of the head, with Python's message."""
    if "extras" in head:
        raise ValueError("extras: not an option of a cross-entropy; use linear_token_logps")
    for name in head:
        if name not in HEAD_OPTIONS:
            raise TypeError(f"{function}() got an unexpected keyword argument {name!r}")
    HeadOptions(**head)


def _check_tensors(**tensors: Any) -> None:
    for name, t in tensors.items():
        if not isinstance(t, Tensor):
            raise ValueError(f"{name}: got {type(t).__name__}, expected a tensor")


def _check(
    x_name: str,
    x: Tensor,
    head_name: str,
    head: Tensor,
    labels_name: str,
    labels: Tensor,
    reduction: str,
) -> None:
    """Check the tensors' shapes and the reduction; `linear_token_logps` checks the rest."""
    _check_tensors(**{x_name: x, head_name: head, labels_name: labels})
    if reduction not in _REDUCTIONS:
        raise ValueError(f"reduction: got {reduction!r}, expected one of {', '.join(_REDUCTIONS)}")
    if head.dim() != 2 or x.dim() < 1 or x.shape[-1] != head.shape[1]:
        raise ValueError(
            f"{x_name}: got shape {tuple(x.shape)} with {head_name} {tuple(head.shape)}, expected "
            "[..., H] and [V, H]"
        )
    if labels.shape != x.shape[:-1]:
        raise ValueError(
            f"{labels_name}: got shape {tuple(labels.shape)}, expected {tuple(x.shape[:-1])}, "
            f"that of {x_name} without its last dimension"
        )
