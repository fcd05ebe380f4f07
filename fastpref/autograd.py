"""The autograd functions: tiles in, token log-probabilities and their gradients out.

Forward is token-outer: a tile [n, V] is whole, so the statistics of its tokens and u = D W are
final when it is done. Backward is vocabulary-outer: for a slice the tile [N, v] is whole, so dW[v]
is one GEMM. Each output is written once; nothing is accumulated across tiles but [N] statistics.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastpref.backends.tile import Stats, Transform
from fastpref.plan import HeadPlan, tile_dtype


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


@dataclass(frozen=True)
class LinearCall:
    """What one call of the linear function needs besides its tensors."""

    plan: HeadPlan
    transform: Transform
    extras: tuple[str, ...]
    backend: ModuleType
    hidden_grad: bool
    weight_grad: bool


class Saved(NamedTuple):
    """What the forward pass leaves for the backward pass.

    u [N, H] = d logp / d hidden, or None. stash [S, V]: D of the first S tokens. lse [N].
    """

    u: Tensor | None
    stash: Tensor
    lse: Tensor


def _outputs(stats: Stats, labels: Tensor, vocab: int, extras: tuple[str, ...]) -> TokenStats:
    return TokenStats(
        logps=stats.logps,
        entropy=stats.entropy() if "entropy" in extras else None,
        mean_logit=stats.mean_logit(vocab) if "mean_logit" in extras else None,
        is_top1=None if stats.argmax is None else stats.argmax.eq(labels),
        log_sum_sq_probs=stats.log_sum_sq_probs() if "log_sum_sq_probs" in extras else None,
    )


def _target_logits(
    call: LinearCall, x: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor
):
    """The labels' transformed logits [n] in fp32: H multiplications each, next to nothing."""
    inside = labels.clamp(0, weight.shape[0] - 1)
    raw = (x.float() * weight.index_select(0, inside).float()).sum(1)
    if bias is not None:
        raw += bias.index_select(0, inside).float()
    return call.transform(raw.masked_fill(inside != labels, torch.nan))[0]


def padded_rows(n: int, columns: int, dtype: torch.dtype) -> tuple[int, int]:
    """The shape of n rows that each start at a multiple of 16 bytes, as GEMMs like it."""
    step = 16 // dtype.itemsize
    return n, -(-columns // step) * step


def _rows(x: Tensor, n: int, columns: int, dtype: torch.dtype) -> Tensor:
    return x.new_empty(padded_rows(n, columns, dtype), dtype=dtype)[:, :columns]


def _in_place(tile: Tensor, dtype: torch.dtype) -> Tensor:
    """The memory of a tile's rows, seen as rows of a narrower dtype that start where they start."""
    if tile.dtype == dtype:
        return tile
    return tile.view(dtype)[:, : tile.shape[1]]


def forward_pass(
    call: LinearCall,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    stash: Tensor | None = None,
) -> tuple[TokenStats, Saved]:
    """x [N, H], weight [V, H], bias [V] or None, labels [N]: the outputs [N] and what is kept.

    stash: memory for D of the first plan.stash_tokens tokens, if the caller has it already.
    """
    plan, extras, backend = call.plan, call.extras, call.backend
    w = weight.to(x.dtype)  # a copy only under autocast, whose own cast this is
    n, vocab = x.shape[0], w.shape[0]
    tile_type = tile_dtype(x.dtype, plan.precision)
    stats_type = torch.float64 if x.dtype == torch.float64 else torch.float32
    stats = Stats.empty(n, x.device, stats_type, extras)
    u = torch.empty_like(x) if call.hidden_grad else None
    if stash is None:
        stash = _rows(x, plan.stash_tokens, vocab, x.dtype)
    if plan.fused:
        backend.linear_logps(x, w, labels, bias, stats, call.transform)
        return _outputs(stats, labels, vocab, extras), Saved(u, stash, stats.lse)
    all_kept = plan.stash_tokens == n
    rows_of_buffer = 0 if all_kept and tile_type == x.dtype else min(plan.block_tokens, n)
    buffer = _rows(x, rows_of_buffer, vocab, tile_type)
    for start in range(0, n, plan.block_tokens):
        stop = min(start + plan.block_tokens, n)
        rows, y = stats.rows(start, stop), labels[start:stop]
        kept = stash[start : min(stop, plan.stash_tokens)]
        # D overwrites the logits, in the stash itself where the two have the same width.
        whole = kept.shape[0] == stop - start and tile_type == x.dtype
        tile = kept if whole else buffer[: stop - start]
        backend.linear(x[start:stop], w, tile, bias)
        backend.fold(tile, y, 0, rows, call.transform)
        if tile_type != stats_type:
            rows.replace_target(_target_logits(call, x[start:stop], w, bias, y))
        if u is None and kept.shape[0] == 0:
            continue
        d = kept if kept.shape[0] == stop - start else _in_place(tile, x.dtype)
        backend.grad(tile, y, 0, rows.lse, rows.logps, d, call.transform)
        if u is not None and not all_kept:
            backend.project(d, w, u[start:stop])
        if kept.shape[0] < stop - start:
            kept.copy_(d[: kept.shape[0]])
    del buffer
    if u is not None and all_kept:
        backend.project(stash, w, u)  # one tall product is faster than many flat ones
    return _outputs(stats, labels, vocab, extras), Saved(u, stash, stats.lse)


def needs_logits_again(call: LinearCall, tokens: int) -> bool:
    """Whether the backward pass multiplies by the weight, and so has to keep it."""
    entropy = "entropy" in call.extras and (call.hidden_grad or call.weight_grad)
    return entropy or (call.weight_grad and call.plan.stash_tokens < tokens)


def scaled(call: LinearCall, x: Tensor, coef: Tensor) -> Tensor:
    out = torch.empty_like(x)
    call.backend.scale_rows(x, coef, out)
    return out


def _logits_again(call: LinearCall, x: Tensor, weight: Tensor, bias: Tensor | None, kept: int):
    """Slices [a, b) of the vocabulary, whole in N: the logits of the tokens from `kept` on, in a
    tile with room for all N, and the slice of the weight in the compute dtype."""
    n, step = x.shape[0], call.plan.block_vocab
    buffer = x.new_empty(n * step, dtype=tile_dtype(x.dtype, call.plan.precision))
    for a in range(0, weight.shape[0], step):
        b = min(a + step, weight.shape[0])
        tile = buffer[: n * (b - a)].view(n, b - a)
        w = weight[a:b].to(x.dtype)
        call.backend.linear(x[kept:], w, tile[kept:], None if bias is None else bias[a:b])
        yield a, b, tile, w


def weight_grads(
    call: LinearCall,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    labels: Tensor,
    saved: Saved,
    logps: Tensor,
    coef: Tensor,
    dw: Tensor | None,
    db: Tensor | None,
) -> None:
    """Write dW [V, H] and db [V] (None: not wanted) from the stashed D, and from D computed again
    where it was not kept; weight and bias are read only then."""
    stash = saved.stash
    n, kept, vocab = x.shape[0], stash.shape[0], stash.shape[1]
    cx = scaled(call, x, coef)  # c goes on X: D stays free of the loss

    if kept == n:
        if dw is not None:
            call.backend.outer(stash, cx, dw)
        if db is not None:
            for a in range(0, vocab, call.plan.block_vocab):  # in slices, for the sum widens D
                b = min(a + call.plan.block_vocab, vocab)
                _column_sums(stash[:, a:b], coef, db[a:b])
        return
    assert weight is not None
    for a, b, tile, _ in _logits_again(call, x, weight, bias, kept):
        d = _in_place(tile, x.dtype)
        rows = labels[kept:], a, saved.lse[kept:], logps[kept:]
        call.backend.grad(tile[kept:], *rows, d[kept:], call.transform)
        d[:kept].copy_(stash[:, a:b])
        if dw is not None:
            call.backend.outer(d, cx, dw[a:b])
        if db is not None:
            _column_sums(d, coef, db[a:b])


def _column_sums(d: Tensor, coef: Tensor, out: Tensor) -> None:
    torch.mv(d.t().to(coef.dtype), coef, out=out)


def both_grads(
    call: LinearCall,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    saved: Saved,
    logps: Tensor,
    coef: Tensor,
    entropy: Tensor,
    entropy_coef: Tensor,
    dw: Tensor | None,
    db: Tensor | None,
) -> Tensor | None:
    """All gradients when the entropy has one too: it is not a multiple of u, so D is made again.

    Writes dw and db where wanted and returns dx [N, H], or None where hidden needs no gradient.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    dx = torch.zeros(x.shape, dtype=wide, device=x.device) if call.hidden_grad else None
    part = torch.empty(x.shape, dtype=wide, device=x.device)
    for a, b, tile, w in _logits_again(call, x, weight, bias, 0):
        d = _in_place(tile, x.dtype)
        rows = labels, a, saved.lse, logps
        call.backend.grad(tile, *rows, d, call.transform, coef, entropy, entropy_coef)
        if dx is not None:
            call.backend.project(d, w, part)
            dx += part
        if dw is not None:
            call.backend.outer(d, x, dw[a:b])
        if db is not None:
            torch.sum(d, 0, dtype=coef.dtype, out=db[a:b])
    return None if dx is None else dx.to(x.dtype)


class LinearTokenLogps(torch.autograd.Function):
    """hidden [M, H], weight [V, H], bias [V] or None, labels [N], index [N] or None -> TokenStats.

    index: which rows of hidden the labels belong to; None means all, M = N. The outputs are [N].
    """

    @staticmethod
    def forward(ctx, hidden, weight, bias, labels, index, call: LinearCall):
        x = hidden if index is None else hidden.index_select(0, index)
        b = None if bias is None else bias.detach()
        out, saved = forward_pass(call, x, weight, b, labels)
        again = needs_logits_again(call, x.shape[0])
        ctx.call, ctx.rows, ctx.device_type = call, hidden.shape[0], hidden.device.type
        ctx.weight_dtype = weight.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        if call.hidden_grad or call.weight_grad:
            ctx.save_for_backward(
                x if call.weight_grad or again else None,
                weight if again else None,
                bias if again else None,
                labels,
                index,
                *saved,
                out.logps,
                out.entropy,
            )
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*(t for t in out[2:] if t is not None))
        return tuple(out)

    @staticmethod
    @once_differentiable
    def backward(ctx, coef, entropy_coef, *_):
        if coef is None and entropy_coef is None:
            return None, None, None, None, None, None
        call: LinearCall = ctx.call
        x, weight, bias, labels, index, u, stash, lse, logps, entropy = ctx.saved_tensors
        saved = Saved(u, stash, lse)
        coef = torch.zeros_like(lse) if coef is None else coef.contiguous()
        dx = dw = db = None
        # A backward pass inside the caller's autocast must not round dW to 16 bits.
        with torch.autocast(ctx.device_type, enabled=False):
            if ctx.needs_input_grad[1]:
                dw = x.new_empty((stash.shape[1], x.shape[1]), dtype=ctx.weight_dtype)
            if ctx.needs_input_grad[2]:
                db = coef.new_empty(stash.shape[1])
            if entropy_coef is not None:
                head = weight, bias, labels, saved, logps
                dx = both_grads(call, x, *head, coef, entropy, entropy_coef.contiguous(), dw, db)
            else:
                if u is not None:
                    dx = scaled(call, u, coef)
                if dw is not None or db is not None:
                    weight_grads(call, x, weight, bias, labels, saved, logps, coef, dw, db)
        if dx is not None and index is not None:
            dx = dx.new_zeros((ctx.rows, dx.shape[1])).index_copy_(0, index, dx)
        return dx, dw, None if db is None else db.to(ctx.bias_dtype), None, None, None


def _row_blocks(logits: Tensor):
    """Ranges of rows of 2^24 logits: a backend's temporaries stay small beside them."""
    size = max(16, 2**24 // logits.shape[1])
    return ((a, min(a + size, logits.shape[0])) for a in range(0, logits.shape[0], size))


def logits_forward(
    logits: Tensor, labels: Tensor, transform: Transform, backend: ModuleType
) -> tuple[Tensor, Tensor]:
    """Ready logits [N, V], labels [N] (negative: ignored): log-probs and lse [N], 0 if ignored."""
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    stats = Stats.empty(logits.shape[0], logits.device, dtype)
    for a, b in _row_blocks(logits):
        backend.fold(logits[a:b], labels[a:b], 0, stats.rows(a, b), transform)
    ignored = labels < 0
    return stats.logps.masked_fill(ignored, 0.0), stats.lse.masked_fill(ignored, 0.0)


def logits_backward(
    logits: Tensor,
    labels: Tensor,
    lse: Tensor,
    logps: Tensor,
    coef: Tensor,
    out: Tensor,
    transform: Transform,
    backend: ModuleType,
) -> None:
    """Write d loss / d logits [N, V], coef [N] being d loss / d logps; out may be the logits."""
    for a, b in _row_blocks(logits):
        rows = labels[a:b], 0, lse[a:b], logps[a:b]
        backend.grad(logits[a:b], *rows, out[a:b], transform, coef[a:b])


class TokenLogps(torch.autograd.Function):
    """logits [N, V], labels [N] (negative: ignored) -> log-probabilities [N], 0 where ignored."""

    @staticmethod
    def forward(ctx, logits, labels, transform: Transform, backend, inplace: bool):
        logps, lse = logits_forward(logits, labels, transform, backend)
        ctx.save_for_backward(logits, labels, lse, logps)
        ctx.transform, ctx.backend, ctx.inplace, ctx.used = transform, backend, inplace, False
        return logps

    @staticmethod
    @once_differentiable
    def backward(ctx, coef):
        logits, labels, lse, logps = ctx.saved_tensors
        if ctx.used:
            raise RuntimeError(
                "token_logps: inplace_backward=True overwrote the logits in the first backward "
                "pass; a second one needs inplace_backward=False"
            )
        ctx.used = ctx.inplace
        # Through .data: autograd's version counter guards others against this write, not ourselves.
        out = logits.data if ctx.inplace else torch.empty_like(logits)
        rows = labels, lse, logps, coef.contiguous()
        logits_backward(logits.data, *rows, out, ctx.transform, ctx.backend)
        return out, None, None, None, None
