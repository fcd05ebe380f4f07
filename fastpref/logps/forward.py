"""The forward pass over the head: tiles in, token log-probabilities and their gradient out.

It is token-outer: a tile [n, V] is whole, so the statistics of its tokens and u = D W are final
when it is done. Each output is written once; nothing is accumulated across tiles but [N]
statistics. The backward pass is in backward.py.

The raw logits are scale * (x W^T + low up^T) + bias. The second product, of a rank of tens, is a
LoRA adapter on the head, whose first factor has already been applied; scale, one factor per entry
of the vocabulary, is DoRA's. Neither is ever merged into a copy of the weight.
"""

from __future__ import annotations

from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from fastpref.backends.tile import Stats, Transform
from fastpref.logps.plan import HeadPlan, tile_dtype


class TokenStats(NamedTuple):
    """Per-token outputs, each shaped like the labels and 0 (False) where the label is ignored.

    logps: log-probability of the label. entropy: of the distribution, in nats (differentiable).
    mean_logit: mean over the vocabulary of the transformed logits. is_top1: the label is the first
    argmax. log_sum_sq_probs: log of the sum of squared probabilities. None: not asked for.
    """

    logps: Tensor
    entropy: Tensor | None = None
    mean_logit: Tensor | None = None
    is_top1: Tensor | None = None
    log_sum_sq_probs: Tensor | None = None


class LinearCall(NamedTuple):
    """What one call of the linear function needs besides its tensors."""

    plan: HeadPlan
    transform: Transform
    extras: tuple[str, ...]
    backend: ModuleType
    hidden_grad: bool  # of the hidden states, or of the adapter's part of them
    weight_grad: bool  # of anything that D^T is multiplied for: weight, bias, up, scale


class States(NamedTuple):
    """What the head multiplies: x [N, H] and, with an adapter, low [N, r] or None."""

    x: Tensor
    low: Tensor | None = None


class HeadTensors(NamedTuple):
    """weight [V, H], bias [V] or None, up [V, r] or None, scale [V] or None."""

    weight: Tensor
    bias: Tensor | None = None
    up: Tensor | None = None
    scale: Tensor | None = None

    def part(self, a: int, b: int) -> HeadTensors:
        """The vocabulary entries [a, b)."""
        return HeadTensors(*(None if t is None else t[a:b] for t in self))  # type: ignore[arg-type]

    def to(self, dtype: torch.dtype) -> HeadTensors:
        """With its matrices in the compute dtype: a copy only under autocast."""
        if self.weight.dtype == dtype and self.up is None:
            return self
        up = None if self.up is None else self.up.to(dtype)
        return self._replace(weight=self.weight.to(dtype), up=up)


class HeadGrads(NamedTuple):
    """Where the gradients of a `HeadTensors` go, in its shapes; None: not wanted."""

    weight: Tensor | None = None
    bias: Tensor | None = None
    up: Tensor | None = None
    scale: Tensor | None = None


class Saved(NamedTuple):
    """What the forward pass leaves for the backward pass.

    D is the gradient of the log-prob in x W^T, [N, V]. stash [S, V]: D of the first S tokens.
    u [N, H] = D W and v [N, r] = D up, or None. lse [N]. factor [N], if there is one, has still to
    go on the rows of all three.
    """

    u: Tensor | None
    v: Tensor | None
    stash: Tensor
    lse: Tensor
    factor: Tensor | None = None


def _outputs(stats: Stats, labels: Tensor, vocab: int, extras: tuple[str, ...]) -> TokenStats:
    return TokenStats(
        logps=stats.logps,
        entropy=stats.entropy() if "entropy" in extras else None,
        mean_logit=stats.mean_logit(vocab) if "mean_logit" in extras else None,
        is_top1=None if stats.argmax is None else stats.argmax.eq(labels),
        log_sum_sq_probs=stats.log_sum_sq_probs() if "log_sum_sq_probs" in extras else None,
    )


def write_logits(call: LinearCall, states: States, head: HeadTensors, tile: Tensor) -> None:
    """Write the raw logits [n, v] of these tokens and of this part of the vocabulary."""
    x, low = states
    call.backend.linear(x, head.weight, tile, head.bias if head.scale is None else None)
    if low is not None and head.up is not None:
        tile.addmm_(low.to(tile.dtype), head.up.to(tile.dtype).t())
    if head.scale is not None:
        tile *= head.scale
        if head.bias is not None:
            tile += head.bias


def _target_logits(call: LinearCall, states: States, head: HeadTensors, labels: Tensor) -> Tensor:
    """The labels' transformed logits [n] in fp32: H multiplications each, next to nothing."""
    inside = labels.clamp(0, head.weight.shape[0] - 1)
    raw = (states.x.float() * head.weight.index_select(0, inside).float()).sum(1)
    if states.low is not None and head.up is not None:
        raw += (states.low.float() * head.up.index_select(0, inside).float()).sum(1)
    if head.scale is not None:
        raw *= head.scale.index_select(0, inside).float()
    if head.bias is not None:
        raw += head.bias.index_select(0, inside).float()
    return call.transform(raw.masked_fill(inside != labels, torch.nan))[0]


def padded_rows(n: int, columns: int, dtype: torch.dtype) -> tuple[int, int]:
    """The shape of n rows that each start at a multiple of 16 bytes, as GEMMs like it."""
    step = 16 // dtype.itemsize
    return n, -(-columns // step) * step


def _rows(x: Tensor, n: int, columns: int, dtype: torch.dtype) -> Tensor:
    shape = padded_rows(n, columns, dtype)
    rows = x.new_empty(shape, dtype=dtype)
    return rows if shape[1] == columns else rows[:, :columns]


def _block(t: Tensor, a: int, b: int) -> Tensor:
    """Rows [a, b). With a small batch they are all of them, and a view takes the host as long as
    the launch of a kernel."""
    return t if a == 0 and b == t.shape[0] else t[a:b]


def in_place(tile: Tensor, dtype: torch.dtype) -> Tensor:
    """The memory of a tile's rows, seen as rows of a narrower dtype that start where they start."""
    if tile.dtype == dtype:
        return tile
    return tile.view(dtype)[:, : tile.shape[1]]


def forward_pass(
    call: LinearCall,
    states: States,
    head: HeadTensors,
    labels: Tensor,
    stash: Tensor | None = None,
) -> tuple[TokenStats, Saved]:
    """The outputs [N] for labels [N], and what is kept.

    stash: memory for D of the first plan.stash_tokens tokens, if the caller has it already.
    """
    plan, extras, backend = call.plan, call.extras, call.backend
    x, low = states
    n, vocab = x.shape[0], head.weight.shape[0]
    head = head.to(x.dtype)
    with_grads = call.hidden_grad or call.weight_grad
    # A product that keeps its logits writes D right away, but for a factor of each row.
    tile_type = x.dtype if plan.fused else tile_dtype(x.dtype, plan.precision)
    stats_type = torch.float64 if x.dtype == torch.float64 else torch.float32
    stats = Stats.empty(n, x.device, stats_type, extras)
    u = torch.empty_like(x) if call.hidden_grad else None
    v = torch.empty_like(low) if call.hidden_grad and low is not None else None
    if stash is None:
        stash = _rows(x, plan.stash_tokens, vocab, x.dtype)
    factor = torch.empty_like(stats.lse) if plan.fused and with_grads else None
    saved = Saved(u, v, stash, stats.lse, factor)
    if plan.fused and not with_grads:
        backend.linear_logps(x, head.weight, labels, head.bias, stats, call.transform)
        return _outputs(stats, labels, vocab, extras), saved
    all_kept = plan.stash_tokens == n

    def project(d: Tensor, start: int, stop: int) -> None:
        if u is not None:
            backend.project(d, head.weight, _block(u, start, stop))
        if v is not None and head.up is not None:
            backend.project(d, head.up, _block(v, start, stop))

    in_stash = all_kept and tile_type == x.dtype  # and so without a tile of its own
    buffer = stash if in_stash else _rows(x, min(plan.block_tokens, n), vocab, tile_type)
    for start in range(0, n, plan.block_tokens):
        stop = min(start + plan.block_tokens, n)
        rows, y = stats.rows(start, stop), _block(labels, start, stop)
        block = States(_block(x, start, stop), None if low is None else _block(low, start, stop))
        kept = _block(stash, start, min(stop, plan.stash_tokens))
        # D overwrites the logits, in the stash itself where the two have the same width.
        whole = kept.shape[0] == stop - start and tile_type == x.dtype
        tile = kept if whole else _block(buffer, 0, stop - start)
        d = None
        if u is not None or kept.shape[0] > 0:
            d = kept if kept.shape[0] == stop - start else in_place(tile, x.dtype)
        if factor is None:
            _logits_to_d(call, block, head, y, tile, rows, d)
        else:
            given = block.x, head.weight, y, head.bias, rows, call.transform
            if d is None:
                backend.linear_logps(*given)
            else:
                backend.linear_grad(*given, d, _block(factor, start, stop))
        if d is None:
            continue
        if not all_kept:
            project(d, start, stop)
        if kept.shape[0] < stop - start:
            kept.copy_(d[: kept.shape[0]])
    del buffer
    if all_kept:
        project(stash, 0, n)  # one tall product is faster than many flat ones
    return _outputs(stats, labels, vocab, extras), saved


def _logits_to_d(
    call: LinearCall,
    block: States,
    head: HeadTensors,
    labels: Tensor,
    tile: Tensor,
    rows: Stats,
    d: Tensor | None,
) -> None:
    """Write the logits, fold them into the rows' statistics and write D over them, if wanted."""
    backend = call.backend
    write_logits(call, block, head, tile)
    exact = None if tile.dtype == rows.lse.dtype else _target_logits(call, block, head, labels)
    if hasattr(backend, "fold_grad"):
        backend.fold_grad(tile, labels, rows, call.transform, d, exact)
    else:
        backend.fold(tile, labels, 0, rows, call.transform)
        if exact is not None:
            rows.replace_target(exact)
        if d is not None:
            backend.grad(tile, labels, 0, rows.lse, rows.logps, d, call.transform)
    if d is not None and head.scale is not None:
        d *= head.scale
