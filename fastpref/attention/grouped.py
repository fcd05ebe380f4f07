"""Attention over rows of segments by one small product per segment, on every device.

A segment's queries meet the keys of its prefix and its own, and no others. So the work is that of
the visible entries, and no mask of a whole row is made.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastpref.data.segments import RowPlan


def grouped_attention(
    query: Tensor,  # [R, heads, T, D]
    key: Tensor,  # [R, key heads, T, D]
    value: Tensor,  # [R, key heads, T, E]
    plan: RowPlan,
    *,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,  # [heads]
) -> Tensor:
    """The attention's output [R, T, heads, E]; 0 at padding.

    Args:
        scale: factor of the scores; by default 1 / sqrt(D).
        window: a query sees only keys less than so many positions below it.
        softcap: scores z become softcap * tanh(z / softcap).
        sinks: a further score of each head, which takes probability and has no value.
    """
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = (t.repeat_interleave(groups, 1) for t in (key, value))
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    plain = softcap is None and sinks is None
    out = []
    for row, *tensors in zip(plan.rows, query, key, value, strict=True):
        sizes = [segment.length for segment in row]
        sizes.append(plan.shape[1] - sum(sizes))
        # One split has one gradient; a slice for each segment would have one of a whole row each.
        q, k, v = (t.split(sizes, 1) for t in tensors)
        parts = []
        for i, segment in enumerate(row):
            keys, values = k[i], v[i]
            if segment.prefix is not None:
                keys, values = (torch.cat([t[segment.prefix], t[i]], 1) for t in (k, v))
            if plain:
                parts.append(_sdpa(q[i], keys, values, plan, scale, window))
            else:
                mask = _mask(plan, q[i].shape[1], keys.shape[1], window, q[i].device)
                parts.append(_eager(q[i], keys, values, mask, scale, softcap, sinks))
        parts.append(torch.zeros_like(v[-1]))
        out.append(torch.cat(parts, 1))
    return torch.stack(out).transpose(1, 2).contiguous()


def _sdpa(
    q: Tensor, k: Tensor, v: Tensor, plan: RowPlan, scale: float, window: int | None
) -> Tensor:
    """One segment, [heads, length, D] each, by torch's own attention."""
    queries, keys = q.shape[1], k.shape[1]
    causal = queries == keys and (window is None or window >= keys)
    mask = None if causal else _mask(plan, queries, keys, window, q.device)
    out = F.scaled_dot_product_attention(
        q[None], k[None], v[None], attn_mask=mask, is_causal=causal, scale=scale
    )
    return out[0]


def _eager(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """One segment with softcap or sinks, which torch's attention does not have."""
    scores = q @ k.transpose(1, 2) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~mask, -torch.inf)
    if sinks is not None:
        extra = sinks.to(scores.dtype)[:, None, None].expand(-1, scores.shape[1], 1)
        scores = torch.cat([scores, extra], -1)
    wide = torch.promote_types(scores.dtype, torch.float32)
    weights = scores.softmax(-1, dtype=wide).to(v.dtype)
    return weights[..., : k.shape[1]] @ v


def _mask(plan: RowPlan, queries: int, keys: int, window: int | None, device: Any) -> Tensor:
    """Whether one of the last `queries` positions sees a key, bool [queries, keys]."""
    name = "grouped", queries, keys, window, str(device)
    if name not in plan.cache:
        positions = torch.arange(keys, device=device)
        distance = positions[keys - queries :, None] - positions
        visible = distance >= 0
        plan.cache[name] = visible if window is None else visible & (distance < window)
    return plan.cache[name]
