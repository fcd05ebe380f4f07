"""PEFT adapters on the output layer as arguments of `linear_token_logps`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastpref.heads.layer import HeadAdapter

_ROWS = 8192  # of the weight at a time, whose lengths DoRA divides by


def check_adapters(adapters: Sequence[HeadAdapter], training: bool = False) -> None:
    """Raise ValueError if the adapters cannot be used unmerged; training: as if they trained."""
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
            what = "dropout" if dropout else "lora_bias" if adapter.bias is not None else "others"
            raise ValueError(
                f"the output head carries a DoRA adapter with {what}; expected it alone, with "
                "lora_dropout=0 and without lora_bias"
            )


def adapter_options(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, adapters: Sequence[HeadAdapter]
) -> dict[str, Any]:
    """low_rank, weight_scale and bias of `linear_token_logps` for a head with its adapters.

    hidden [..., H], weight [V, H], bias [V] or None. An adapter that trains has its dropout applied
    here, drawn anew by each call. Nothing of the weight's size is made.

    Raises:
        ValueError: an adapter that is not whole on this process (ZeRO-3); DoRA together with
            another adapter, with dropout or with a bias in its B, where PEFT computes something
            else than magnitude / norm * (hidden W^T + low B^T).
    """
    check_adapters(adapters)
    scale = None
    lows, ups = [], []
    for adapter in adapters:
        dropped = F.dropout(hidden, adapter.dropout, adapter.training)
        low = F.linear(dropped.to(adapter.lora_A.dtype), adapter.lora_A) * adapter.scaling
        lows.append(low.to(hidden.dtype))
        ups.append(adapter.lora_B.to(hidden.dtype))
        if adapter.bias is not None:
            own = adapter.scaling * adapter.bias.to(weight.dtype)
            bias = own if bias is None else bias + own
        if adapter.magnitude is not None:
            lengths = _lengths(weight, adapter).to(adapter.magnitude.dtype)
            scale = adapter.magnitude / lengths.masked_fill(lengths == 0, 1.0)  # rows of zeros: 0
    options: dict[str, Any] = {"bias": bias, "weight_scale": scale}
    if lows:
        options["low_rank"] = torch.cat(lows, -1), torch.cat(ups, -1)
    return options


@torch.no_grad()
def _lengths(weight: Tensor, adapter: HeadAdapter) -> Tensor:
    """The length [V] of each row of weight + scaling B A, to which DoRA gives no gradient."""
    wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
    a = adapter.lora_A.to(wide)
    with torch.autocast(weight.device.type, enabled=False):
        parts = zip(weight.split(_ROWS), adapter.lora_B.split(_ROWS), strict=True)
        rows = (torch.addmm(w.to(wide), b.to(wide), a, alpha=adapter.scaling) for w, b in parts)
        return torch.cat([torch.linalg.vector_norm(r, dim=1) for r in rows])
