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


def _outputs(stats: Stats, labels: Tensor, vocab: int, extras: tuple[str, ...]) -> TokenStats:
    return TokenStats(
        logps=stats.logps(),
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


def _in_place(tile: Tensor, dtype: torch.dtype) -> Tensor:
    """The memory of a tile's rows, seen as rows of a narrower dtype that start where they start."""
    if tile.dtype == dtype:
        return tile
    return tile.view(dtype)[:, : tile.shape[1]]


class LinearTokenLogps(torch.autograd.Function):
    """hidden [M, H], weight [V, H], bias [V] or None, labels [N], index [N] or None -> TokenStats.

    index: which rows of hidden the labels belong to; None means all, M = N. The outputs are [N].
    """

    @staticmethod
    def forward(ctx, hidden, weight, bias, labels, index, call: LinearCall):
        plan, extras, backend = call.plan, call.extras, call.backend
        x = hidden if index is None else hidden.index_select(0, index)
        w = weight.to(x.dtype)  # a copy only under autocast, whose own cast this is
        b = None if bias is None else bias.detach()
        n, vocab = x.shape[0], w.shape[0]
        tile_type = tile_dtype(x.dtype, plan.precision)
        stats_type = torch.float64 if x.dtype == torch.float64 else torch.float32
        stats = Stats.empty(n, x.device, stats_type, extras)
        u = torch.empty_like(x) if call.hidden_grad else None
        stash = x.new_empty((plan.stash_tokens, vocab))
        all_kept = plan.stash_tokens == n
        rows_of_buffer = 0 if all_kept and tile_type == x.dtype else min(plan.block_tokens, n)
        buffer = x.new_empty((rows_of_buffer, vocab), dtype=tile_type)
        for start in range(0, n, plan.block_tokens):
            stop = min(start + plan.block_tokens, n)
            rows, y = stats.rows(start, stop), labels[start:stop]
            kept = stash[start : min(stop, plan.stash_tokens)]
            # D overwrites the logits, in the stash itself where the two have the same width.
            whole = kept.shape[0] == stop - start and tile_type == x.dtype
            tile = kept if whole else buffer[: stop - start]
            backend.linear(x[start:stop], w, tile, b)
            backend.fold(tile, y, 0, rows, call.transform)
            if tile_type != stats_type:
                rows.replace_target(_target_logits(call, x[start:stop], w, b, y))
            if u is None and kept.shape[0] == 0:
                continue
            d = kept if kept.shape[0] == stop - start else _in_place(tile, x.dtype)
            backend.grad(tile, y, 0, rows.lse(), rows.logps(), d, call.transform)
            if u is not None and not all_kept:
                backend.project(d, w, u[start:stop])
            if kept.shape[0] < stop - start:
                kept.copy_(d[: kept.shape[0]])
        del buffer
        if u is not None and all_kept:
            backend.project(stash, w, u)  # one tall product is faster than many flat ones
        out = _outputs(stats, labels, vocab, extras)

        ctx.call, ctx.rows, ctx.weight_dtype = call, hidden.shape[0], weight.dtype
        ctx.device_type = hidden.device.type
        ctx.bias_dtype = None if bias is None else bias.dtype
        again = call.weight_grad and plan.stash_tokens < n  # logits once more, in backward
        if call.hidden_grad or call.weight_grad:
            again = again or out.entropy is not None
            ctx.save_for_backward(
                x if call.weight_grad or again else None,
                weight if again else None,
                bias if again else None,
                labels,
                index,
                u,
                stash,
                stats.lse(),
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
        # A backward pass inside the caller's autocast must not round dW to 16 bits.
        with torch.autocast(ctx.device_type, enabled=False):
            return LinearTokenLogps._gradients(ctx, coef, entropy_coef)

    @staticmethod
    def _gradients(ctx, coef, entropy_coef):
        x, weight, bias, labels, index, u, stash, lse, logps, entropy = ctx.saved_tensors
        call: LinearCall = ctx.call
        coef = torch.zeros_like(lse) if coef is None else coef.contiguous()
        dx = dw = db = None
        if entropy_coef is not None:
            dx, dw, db = _recompute_both(
                call, x, weight, bias, labels, lse, logps, coef, entropy, entropy_coef.contiguous()
            )
        else:
            if call.hidden_grad:
                dx = _scaled(u, coef)
            if call.weight_grad:
                dw, db = _weight_grads(ctx, x, weight, bias, labels, stash, lse, logps, coef)
        if dx is not None and index is not None:
            dx = dx.new_zeros((ctx.rows, dx.shape[1])).index_copy_(0, index, dx)
        return (
            dx,
            dw if ctx.needs_input_grad[1] else None,
            db.to(ctx.bias_dtype) if db is not None and ctx.needs_input_grad[2] else None,
            None,
            None,
            None,
        )


def _scaled(x: Tensor, coef: Tensor) -> Tensor:
    """x [N, H] times coef [N], rounded once; in blocks, for the product is wider than x."""
    out = torch.empty_like(x)
    for a in range(0, x.shape[0], 256):
        out[a : a + 256] = x[a : a + 256] * coef[a : a + 256, None]
    return out


def _weight_grads(ctx, x, weight, bias, labels, stash, lse, logps, coef):
    """dW [V, H] and db [V] from the stashed D, and from D computed again where it was not kept."""
    call, plan = ctx.call, ctx.call.plan
    n, kept, vocab = x.shape[0], stash.shape[0], plan.vocab_size
    cx = _scaled(x, coef)  # c goes on X: D stays free of the loss
    dw = None  # stays so where only the bias trains
    if ctx.needs_input_grad[1]:
        dw = x.new_empty((vocab, x.shape[1]), dtype=ctx.weight_dtype)
    has_bias = ctx.bias_dtype is not None
    db = coef.new_empty(vocab) if has_bias else None
    if kept == n:
        if dw is not None:
            call.backend.outer(stash, cx, dw)
        if db is not None:
            for a in range(0, vocab, plan.block_vocab):
                db[a : a + plan.block_vocab] = _bias_grad(stash[:, a : a + plan.block_vocab], coef)
        return dw, db
    buffer = x.new_empty(n * plan.block_vocab, dtype=tile_dtype(x.dtype, plan.precision))
    for a in range(0, vocab, plan.block_vocab):
        b = min(a + plan.block_vocab, vocab)
        tile = buffer[: n * (b - a)].view(n, b - a)
        w, bias_slice = weight[a:b].to(x.dtype), None if bias is None else bias[a:b]
        again = tile[kept:]
        call.backend.linear(x[kept:], w, again, bias_slice)
        d = _in_place(tile, x.dtype)
        rows = labels[kept:], a, lse[kept:], logps[kept:]
        call.backend.grad(again, *rows, d[kept:], call.transform)
        d[:kept].copy_(stash[:, a:b])
        if dw is not None:
            call.backend.outer(d, cx, dw[a:b])
        if db is not None:
            db[a:b] = _bias_grad(d, coef)
    return dw, db


def _bias_grad(d: Tensor, coef: Tensor) -> Tensor:
    return torch.mv(d.t().to(coef.dtype), coef)


def _recompute_both(call, x, weight, bias, labels, lse, logps, coef, entropy, entropy_coef):
    """All gradients when the entropy has one too: it is not a multiple of u, so D is made again."""
    plan, n = call.plan, x.shape[0]
    wide = torch.promote_types(x.dtype, torch.float32)
    dx = torch.zeros(x.shape, dtype=wide, device=x.device) if call.hidden_grad else None
    dw = torch.empty_like(weight) if call.weight_grad else None
    db = coef.new_empty(plan.vocab_size) if call.weight_grad and bias is not None else None
    buffer = x.new_empty(n * plan.block_vocab, dtype=tile_dtype(x.dtype, plan.precision))
    part = torch.empty(x.shape, dtype=wide, device=x.device)
    for a in range(0, plan.vocab_size, plan.block_vocab):
        b = min(a + plan.block_vocab, plan.vocab_size)
        tile = buffer[: n * (b - a)].view(n, b - a)
        w = weight[a:b].to(x.dtype)
        call.backend.linear(x, w, tile, None if bias is None else bias[a:b])
        d = _in_place(tile, x.dtype)
        call.backend.grad(
            tile, labels, a, lse, logps, d, call.transform, coef, entropy, entropy_coef
        )
        if dx is not None:
            call.backend.project(d, w, part)
            dx += part
        if dw is not None:
            call.backend.outer(d, x, dw[a:b])
        if db is not None:
            db[a:b] = d.to(coef.dtype).sum(0)
    return None if dx is None else dx.to(x.dtype), dw, db


def _row_blocks(logits: Tensor):
    """Ranges of rows of 2^24 logits: a backend's temporaries stay small beside them."""
    size = max(16, 2**24 // logits.shape[1])
    return ((a, min(a + size, logits.shape[0])) for a in range(0, logits.shape[0], size))


class TokenLogps(torch.autograd.Function):
    """logits [N, V], labels [N] (negative: ignored) -> log-probabilities [N], 0 where ignored."""

    @staticmethod
    def forward(ctx, logits, labels, transform: Transform, backend, inplace: bool):
        dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
        stats = Stats.empty(logits.shape[0], logits.device, dtype)
        for a, b in _row_blocks(logits):
            backend.fold(logits[a:b], labels[a:b], 0, stats.rows(a, b), transform)
        ignored = labels < 0
        logps = stats.logps().masked_fill(ignored, 0.0)
        ctx.save_for_backward(logits, labels, stats.lse().masked_fill(ignored, 0.0), logps)
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
        coef = coef.contiguous()
        for a, b in _row_blocks(logits):
            rows = labels[a:b], 0, lse[a:b], logps[a:b]
            ctx.backend.grad(logits.data[a:b], *rows, out[a:b], ctx.transform, coef[a:b])
        return out, None, None, None, None
