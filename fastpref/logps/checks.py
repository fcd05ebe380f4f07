"""What the public functions check before any kernel runs: the argument's name, what was given, what
was expected.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastpref import validation
from fastpref.backends.tile import EXTRAS
from fastpref.logps.forward import HeadTensors
from fastpref.validation import check_float, check_ids


def check_extras(extras: Sequence[str]) -> tuple[str, ...]:
    names = (extras,) if isinstance(extras, str) else tuple(extras)
    for name in names:
        if name not in EXTRAS:
            raise ValueError(f"extras: got {name!r}, expected some of {', '.join(EXTRAS)}")
    return names


def check_head(hidden: Tensor, weight: Tensor, bias: Tensor | None, prefix: str = "") -> None:
    """Raise ValueError unless the three fit together; prefix goes before their names."""
    hidden_name, weight_name, bias_name = (prefix + n for n in ("hidden", "weight", "bias"))
    check_float(hidden_name, hidden)
    check_float(weight_name, weight)
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
    check_float(bias_name, bias)
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


def check_adapter(hidden: Tensor, head: HeadTensors, low: Tensor | None) -> None:
    """Raise ValueError unless low [..., r], up [V, r] and scale [V] fit the hidden states."""
    vocab = head.weight.shape[0]
    if (low is None) != (head.up is None):
        raise ValueError("low_rank: got one of its two tensors, expected (low, up)")
    for name, t in (("low_rank", low), ("low_rank", head.up), ("weight_scale", head.scale)):
        if t is None:
            continue
        check_float(name, t)
        if t.device != hidden.device:
            raise ValueError(f"{name}: got device {t.device}, expected {hidden.device}")
        cast = torch.is_autocast_enabled(hidden.device.type) and t.dtype != torch.float64
        if name == "low_rank" and t.dtype != hidden.dtype and not cast:
            raise ValueError(
                f"{name}: got {str(t.dtype)[6:]}, expected {str(hidden.dtype)[6:]}, the dtype of "
                "hidden (they may differ under autocast)"
            )
    if low is not None and head.up is not None:
        expected = (*hidden.shape[:-1], head.up.shape[-1]), (vocab, low.shape[-1])
        if (low.shape, head.up.shape) != expected:
            raise ValueError(
                f"low_rank: got shapes {tuple(low.shape)} and {tuple(head.up.shape)}, expected "
                f"[..., r] as hidden {tuple(hidden.shape)} and [{vocab}, r]"
            )
    if head.scale is not None and head.scale.shape != (vocab,):
        raise ValueError(f"weight_scale: got shape {tuple(head.scale.shape)}, expected [{vocab}]")


def check_labels(labels: Tensor, shape: torch.Size, of: str, device: torch.device) -> None:
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


def check_range(labels: Tensor, vocab: int, ignored: Tensor | None = None) -> None:
    """At once on a CPU; on a GPU, where it would synchronise, only with FASTPREF_DEBUG=1."""
    if labels.numel() == 0 or not validation.may_synchronise(labels.device):
        return
    bad = (labels < 0) | (labels >= vocab)
    if ignored is not None:
        bad &= ~ignored
    if bool(bad.any()):
        value = int(labels[bad][0])
        raise ValueError(f"labels: got {value}, expected ignore_index or a value in [0, {vocab})")


def check_indices(index: Tensor, labels: Tensor, ignore_index: int) -> None:
    """token_indices must be all labelled positions, in order; each counts once."""
    check_ids("token_indices", index, labels.shape[0])
    if index.device != labels.device:
        raise ValueError(f"token_indices: got device {index.device}, expected {labels.device}")
    if not validation.may_synchronise(index.device):
        return
    expected = (labels != ignore_index).nonzero()[:, 0]
    if not torch.equal(index, expected):
        raise ValueError(
            f"token_indices: got {index.shape[0]} positions that are not the {expected.shape[0]} "
            "labelled ones in increasing order, expected those"
        )
