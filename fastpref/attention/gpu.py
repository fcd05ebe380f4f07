"""Attention over rows of segments on a GPU: flash-attention, or else FlexAttention.

Neither has been run on a GPU yet. `check_attention` compares whichever is used with separate rows
before a run relies on it.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastpref.data.segments import RowPlan


@functools.cache
def has_flash() -> bool:
    """Whether the package flash-attn is installed."""
    return importlib.util.find_spec("flash_attn") is not None


def flash_reason(query: Tensor, value: Tensor, sinks: Tensor | None) -> str | None:
    """Why flash-attention cannot compute this; None: it can."""
    if not has_flash():
        return "flash-attn is not installed"
    if query.dtype not in (torch.float16, torch.bfloat16):
        return f"flash-attn has no {query.dtype}"
    if sinks is not None or query.shape[-1] != value.shape[-1] or query.shape[-1] > 256:
        return "flash-attn has no sinks, no values of another size and no heads above 256"
    return None


def flash_attention(
    query: Tensor,  # [R, heads, T, D]
    key: Tensor,  # [R, key heads, T, D]
    value: Tensor,  # [R, key heads, T, D]
    plan: RowPlan,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """The output [R, T, heads, D] by flash-attention's call for sequences of different lengths.

    A segment's keys are its prefix's and its own, so that there are more keys than queries. Causal
    masks are then aligned at the end, since flash-attn 2.1.
    """
    from flash_attn import flash_attn_varlen_func

    indices = _varlen(plan, query.device)
    queries, keys, starts, key_starts, longest, longest_keys, tokens = indices
    flat = [t.transpose(1, 2).flatten(0, 1) for t in (query, key, value)]  # [R * T, heads, D]
    q = flat[0].index_select(0, queries)
    k, v = (t.index_select(0, keys) for t in flat[1:])
    out = flash_attn_varlen_func(
        q, k, v, starts, key_starts, longest, longest_keys,
        softmax_scale=scale,
        causal=True,
        window_size=(-1, -1) if window is None else (window - 1, 0),
        softcap=softcap or 0.0,
    )  # fmt: skip
    whole = out.new_zeros((tokens, *out.shape[1:])).index_copy(0, queries, out)
    return whole.view(*plan.shape, *out.shape[1:])


def _varlen(plan: RowPlan, device: Any) -> tuple[Any, ...]:
    """The arguments of the call: which flat tokens are queries and keys, and where segments start.

    A prefix's keys are repeated for each segment that sees them, since flash-attention reads keys
    of consecutive tokens.
    """
    name = "varlen", str(device)
    if name not in plan.cache:
        queries: list[np.ndarray] = [np.zeros(0, np.int64)]
        keys: list[np.ndarray] = [np.zeros(0, np.int64)]
        sizes, key_sizes = [0], [0]
        for r, row in enumerate(plan.rows):
            for segment in row:
                query = np.arange(segment.start, segment.stop) + r * plan.shape[1]
                visible_keys = [query]
                if segment.prefix is not None:
                    prefix = row[segment.prefix]
                    visible_keys.insert(0, np.arange(prefix.start, prefix.stop) + r * plan.shape[1])
                queries.append(query)
                keys.extend(visible_keys)
                sizes.append(len(query))
                key_sizes.append(sum(map(len, visible_keys)))
        flat = (torch.from_numpy(np.concatenate(t)).to(device) for t in (queries, keys))
        starts = (
            torch.from_numpy(np.cumsum(t).astype(np.int32)).to(device) for t in (sizes, key_sizes)
        )
        tokens = plan.shape[0] * plan.shape[1]
        plan.cache[name] = (*flat, *starts, max(sizes), max(key_sizes), tokens)
    return plan.cache[name]


@functools.cache
def _compiled_flex() -> Callable[..., Any]:
    """FlexAttention, compiled once for all lengths."""
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=True)


def flex_attention(
    query: Tensor,  # [R, heads, T, D]
    key: Tensor,  # [R, key heads, T, D]
    value: Tensor,  # [R, key heads, T, E]
    plan: RowPlan,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """The output [R, T, heads, E] by FlexAttention, which skips blocks that no query sees."""
    score_mod = None
    if softcap is not None:

        def score_mod(score: Tensor, b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
            return softcap * torch.tanh(score / softcap)

    out = _compiled_flex()(
        query,
        key,
        value,
        score_mod=score_mod,
        block_mask=_block_mask(plan, window, query.device),
        scale=scale,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return out.transpose(1, 2).contiguous()


def _block_mask(plan: RowPlan, window: int | None, device: Any) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    name = "flex", window, str(device)
    if name not in plan.cache:
        trees, branches, positions = plan.tensors(device)

        def sees(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
            branch = branches[b, kv]
            visible = (trees[b, q] == trees[b, kv]) & ((branch == 0) | (branch == branches[b, q]))
            visible = visible & (kv <= q)
            if window is None:
                return visible
            return visible & (positions[b, q] - positions[b, kv] < window)

        rows, width = plan.shape
        plan.cache[name] = create_block_mask(sees, rows, None, width, width, device=device)
    return plan.cache[name]
