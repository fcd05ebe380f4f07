"""The checks of the public functions' arguments, before any kernel runs.

An error names the argument, what was given and what was expected.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastpref import validation
from fastpref.backends.stats import EXTRAS
from fastpref.logps.forward import HeadTensors
from fastpref.validation import autocasts, check_dense, check_device, check_float, check_ids


def check_extras(extras: Sequence[str]) -> tuple[str, ...]:
    """The names of the extras; ValueError for an unknown one."""
    if not hasattr(extras, "__iter__"):
        raise ValueError(f"extras: got {extras!r}, expected some of {', '.join(EXTRAS)}")
    names = (extras,) if isinstance(extras, str) else tuple(extras)
    for name in names:
        if name not in EXTRAS:
            raise ValueError(f"extras: got {name!r}, expected some of {', '.join(EXTRAS)}")
    return names


def check_head(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, prefix: str = "", in_parts: bool = False
) -> None:
    """Raise ValueError unless hidden [..., H], weight [V, H] and bias [V] fit together.

    prefix goes before their names in the messages. in_parts: whether V may be 0.
    """
    hidden_name, weight_name, bias_name = (prefix + n for n in ("hidden", "weight", "bias"))
    check_float(hidden_name, hidden)
    check_float(weight_name, weight)
    if weight.dim() != 2 or (weight.shape[0] == 0 and not in_parts):
        raise ValueError(
            f"{weight_name}: got shape {tuple(weight.shape)}, expected [V, H] with V > 0"
        )
    if hidden.dim() < 1 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"{hidden_name}: got shape {tuple(hidden.shape)}, expected [..., {weight.shape[1]}] to "
            f"go with {weight_name} {tuple(weight.shape)}"
        )
    cast = autocasts(hidden.device.type) and weight.dtype != torch.float64
    if weight.dtype != hidden.dtype and not cast:
        raise ValueError(
            f"{weight_name}: got {str(weight.dtype)[6:]}, expected {str(hidden.dtype)[6:]}, the "
            f"dtype of {hidden_name} (they may differ under autocast)"
        )
    check_device(weight_name, weight, hidden.device)
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
    check_device(bias_name, bias, hidden.device)


def adapter_tensors(
    low_rank: tuple[Tensor, Tensor] | None,
    weight_scale: Tensor | None,
    lora_hidden: Tensor | None,
    lora_B: Tensor | None,
    dora_scale: Tensor | None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """lora_hidden, lora_B and dora_scale, from either form; ValueError for both forms at once."""
    if low_rank is not None:
        if lora_hidden is not None or lora_B is not None:
            raise ValueError(
                "low_rank: got it with lora_hidden or lora_B, expected low_rank alone or both of "
                "the others"
            )
        if not isinstance(low_rank, tuple | list) or len(low_rank) != 2:
            raise ValueError(
                f"low_rank: got {type(low_rank).__name__}, expected the pair (lora_hidden, lora_B)"
            )
        lora_hidden, lora_B = low_rank
    if weight_scale is not None:
        if dora_scale is not None:
            raise ValueError("weight_scale: got it with dora_scale, expected one of the two")
        dora_scale = weight_scale
    return lora_hidden, lora_B, dora_scale


def check_adapter(hidden: Tensor, head: HeadTensors, lora_hidden: Tensor | None) -> None:
    """Raise ValueError unless lora_hidden [..., r], lora_B [V, r] and dora_scale [V] fit hidden."""
    vocab, lora_B, dora_scale = head.weight.shape[0], head.lora_B, head.dora_scale
    if (lora_hidden is None) != (lora_B is None):
        missing = "lora_hidden" if lora_hidden is None else "lora_B"
        raise ValueError(f"{missing}: got None, expected both lora_hidden and lora_B (low_rank)")
    for name, t in (("lora_hidden", lora_hidden), ("lora_B", lora_B), ("dora_scale", dora_scale)):
        if t is None:
            continue
        check_float(name, t)
        check_device(name, t, hidden.device)
        cast = autocasts(hidden.device.type) and t.dtype != torch.float64
        if name != "dora_scale" and t.dtype != hidden.dtype and not cast:
            raise ValueError(
                f"{name}: got {str(t.dtype)[6:]}, expected {str(hidden.dtype)[6:]}, the dtype of "
                "hidden (they may differ under autocast)"
            )
    if lora_hidden is not None and lora_B is not None:
        if lora_B.dim() != 2 or lora_B.shape[0] != vocab or lora_B.shape[1] == 0:
            raise ValueError(
                f"lora_B: got shape {tuple(lora_B.shape)}, expected [{vocab}, r] with r > 0"
            )
        if lora_hidden.shape != (*hidden.shape[:-1], lora_B.shape[1]):
            raise ValueError(
                f"lora_hidden: got shape {tuple(lora_hidden.shape)}, expected [..., r] as hidden "
                f"{tuple(hidden.shape)} and lora_B {tuple(lora_B.shape)}"
            )
    if dora_scale is not None and dora_scale.shape != (vocab,):
        raise ValueError(f"dora_scale: got shape {tuple(dora_scale.shape)}, expected [{vocab}]")


def check_labels(labels: Tensor, shape: torch.Size, of: str, device: torch.device) -> None:
    """Raise ValueError unless the labels are int64, of this shape and on this device."""
    check_dense("labels", labels)
    if labels.shape != shape:
        raise ValueError(
            f"labels: got shape {tuple(labels.shape)}, expected {tuple(shape)}, the shape of {of}"
        )
    if labels.dtype != torch.int64:
        raise ValueError(f"labels: got {str(labels.dtype)[6:]}, expected int64")
    check_device("labels", labels, device)


def check_range(labels: Tensor, vocab: int, ignored: Tensor | None = None) -> None:
    """Raise ValueError for a label outside [0, vocab) that is not ignored.

    On a GPU, where looking would synchronise, only with FASTPREF_DEBUG=1.
    """
    if labels.numel() == 0 or not validation.may_synchronise(labels):
        return
    bad = (labels < 0) | (labels >= vocab)
    if ignored is not None:
        bad &= ~ignored
    if bool(bad.any()):
        value = int(labels[bad][0])
        raise ValueError(f"labels: got {value}, expected ignore_index or a value in [0, {vocab})")


def check_indices(index: Tensor, labels: Tensor, ignore_index: int) -> None:
    """Raise ValueError unless token_indices are all labelled positions, increasing."""
    check_ids("token_indices", index, labels.shape[0])
    check_device("token_indices", index, labels.device)
    if not validation.may_synchronise(index):
        return
    expected = (labels != ignore_index).nonzero()[:, 0]
    if not torch.equal(index, expected):
        raise ValueError(
            f"token_indices: got {index.shape[0]} positions that are not the {expected.shape[0]} "
            "labelled ones in increasing order, expected those"
        )
