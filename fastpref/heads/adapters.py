"""PEFT adapters on the output layer as arguments of `linear_token_logps`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastpref.heads.layer import HeadAdapter

_ROWS = 8192  # rows of the weight per block, when DoRA's norms are computed


def check_adapters(adapters: Sequence[HeadAdapter], training: bool = False) -> None:
    """Raise ValueError if the adapters cannot be applied without merging them into the weight.

    Args:
        adapters: the adapters of the output layer.
        training: check them as if they were in training mode, where dropout is active.
    """
    for adapter in adapters:
        if adapter.lora_A.numel() == 0 or adapter.lora_B.numel() == 0:
            raise ValueError(
                "the output head's adapter is sharded among processes (ZeRO-3); expected whole "
                "tensors: leave 'lm_head' out of target_modules, or use another strategy"
            )
        if adapter.magnitude is None:
            continue
        dropout = adapter.dropout > 0 and (training or adapter.training)
        if len(adapters) > 1 or dropout or adapter.bias is not None:
            extra = "dropout" if dropout else "lora_bias" if adapter.bias is not None else "others"
            raise ValueError(
                f"the output head carries a DoRA adapter with {extra}; expected it alone, with "
                "lora_dropout=0 and without lora_bias"
            )


def adapter_options(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, adapters: Sequence[HeadAdapter]
) -> dict[str, Any]:
    """The arguments lora_hidden, lora_B, dora_scale and bias of `linear_token_logps`.

    An adapter in training mode has its dropout applied here, with a new mask in each call. No
    tensor of the weight's size is allocated.

    Args:
        hidden: [..., H]. weight: [V, H]. bias: [V] or None.
        adapters: the active adapters of the output layer.

    Raises:
        ValueError: an adapter that is not whole on this process (ZeRO-3); DoRA together with
            another adapter, with dropout or with a bias of lora_B, for which PEFT does not compute
            magnitude / norm * (hidden W^T + x A^T B^T).
    """
    check_adapters(adapters)
    dora_scale = None
    lora_hidden, lora_B = [], []  # [..., r] and [V, r] of each adapter
    for adapter in adapters:
        dropped = F.dropout(hidden, adapter.dropout, adapter.training)
        product = F.linear(dropped.to(adapter.lora_A.dtype), adapter.lora_A) * adapter.scaling
        lora_hidden.append(product.to(hidden.dtype))
        lora_B.append(adapter.lora_B.to(hidden.dtype))
        if adapter.bias is not None:
            lora_bias = adapter.scaling * adapter.bias.to(weight.dtype)
            bias = lora_bias if bias is None else bias + lora_bias
        if adapter.magnitude is not None:
            norms = _row_norms(weight, adapter).to(adapter.magnitude.dtype)
            dora_scale = adapter.magnitude / norms.masked_fill(norms == 0, 1.0)  # of a zero row: 0
    options: dict[str, Any] = {"bias": bias, "dora_scale": dora_scale}
    if lora_hidden:
        options["lora_hidden"] = torch.cat(lora_hidden, -1)
        options["lora_B"] = torch.cat(lora_B, -1)
    return options


@torch.no_grad()
def _row_norms(weight: Tensor, adapter: HeadAdapter) -> Tensor:
    """The norm [V] of each row of weight + scaling B A; DoRA treats it as a constant."""
    wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
    a = adapter.lora_A.to(wide)
    with torch.autocast(weight.device.type, enabled=False):
        parts = zip(weight.split(_ROWS), adapter.lora_B.split(_ROWS), strict=True)
        rows = (torch.addmm(w.to(wide), b.to(wide), a, alpha=adapter.scaling) for w, b in parts)
        return torch.cat([torch.linalg.vector_norm(r, dim=1) for r in rows])
