"""The tile primitives in plain torch: every device, every dtype, the oracle in float64."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastpref.backends.gemm import linear, outer, project, scale_rows
from fastpref.backends.tile import Stats, Transform

NAME = "eager"
CLOSED_FORMS: frozenset[str] = frozenset()  # every loss runs through autograd

__all__ = ["NAME", "fold", "grad", "linear", "outer", "project", "scale_rows"]


def _hits(labels: Tensor, col0: int, columns: int) -> tuple[Tensor, Tensor]:
    """Which rows have their label in [col0, col0 + columns), and its column (0 elsewhere)."""
    column = labels - col0
    hit = (column >= 0) & (column < columns)
    return hit, column.masked_fill(~hit, 0)


def fold(tile: Tensor, labels: Tensor, col0: int, stats: Stats, transform: Transform) -> None:
    """Fold raw logits [n, v], the vocabulary entries [col0, col0 + v), into the rows' statistics.

    labels [n] int64; a negative label is an ignored row, whose statistics mean nothing. The tile
    with col0 = 0 starts the statistics, whatever they held; the next ones go on from there.
    """
    if tile.shape[1] == 0:
        return
    if col0 == 0:
        stats.max.fill_(-math.inf)
        stats.target.fill_(math.nan)
        for t in (stats.sum, stats.weighted, stats.total, stats.squared, stats.argmax):
            if t is not None:
                t.zero_()
    z, _ = transform(tile.to(stats.max.dtype))
    tile_max, where = z.max(1)
    if stats.argmax is not None:
        # Strictly greater: the first of equal maxima wins, as in argmax over the whole row.
        stats.argmax.copy_(torch.where(tile_max > stats.max, where + col0, stats.argmax))
    new_max = torch.maximum(stats.max, tile_max)
    shift = stats.max - new_max
    shift = shift.masked_fill(stats.max == -math.inf, -math.inf)  # -inf - -inf is not a number
    rescale = shift.exp()
    if stats.total is not None:
        stats.total.add_(z.sum(1))
    # A tile of nothing but -inf adds nothing; it must not become -inf - -inf.
    z = z - new_max.masked_fill(new_max == -math.inf, 0.0)[:, None]
    e = z.exp()
    if stats.weighted is not None and stats.squared is not None:
        moved = torch.where(rescale > 0, rescale * (stats.weighted + stats.sum * shift), 0.0)
        # A logit of -inf has probability 0 and adds 0 to the entropy, not 0 * -inf.
        stats.weighted.copy_(moved + (e * z.clamp_min(-1e30)).sum(1))
        stats.squared.mul_(rescale * rescale).add_((e * e).sum(1))
    stats.sum.mul_(rescale).add_(e.sum(1))
    stats.max.copy_(new_max)
    hit, column = _hits(labels, col0, tile.shape[1])
    raw = tile.gather(1, column[:, None])[:, 0].to(stats.max.dtype)
    stats.target.copy_(torch.where(hit, transform(raw)[0], stats.target))
    stats.finish()


def grad(
    tile: Tensor,
    labels: Tensor,
    col0: int,
    lse: Tensor,
    logps: Tensor,
    out: Tensor,
    transform: Transform,
    coef: Tensor | None = None,
    entropy: Tensor | None = None,
    entropy_coef: Tensor | None = None,
) -> None:
    """out [n, v] = D = d logp / d raw logits, times coef [n] where given.

    D[t, v] = (1[v = label] - p[t, v]) dz/draw, with the label's entry from -expm1(logp). With
    entropy and entropy_coef, entropy_coef times the gradient of the entropy is added. lse, logps,
    coef, entropy [n] in the statistics' dtype. out may be the tile itself or a view of its memory
    with the same row starts; it may have a narrower dtype. Rows with a negative label become 0.
    """
    z, tanh = transform(tile.to(lse.dtype))
    logp = z - lse[:, None]
    hit, column = _hits(labels, col0, tile.shape[1])
    at = column[:, None]
    if tile.shape[1]:  # the label's own log-prob: its logit in the tile may be the rounded one
        logp.scatter_(1, at, torch.where(hit[:, None], logps[:, None], logp.gather(1, at)))
    p = logp.exp()
    d = -p
    if tile.shape[1]:
        entry = torch.where(hit, -torch.expm1(logps), d.gather(1, at)[:, 0])
        d.scatter_(1, at, entry[:, None])
    if coef is not None:
        d *= coef[:, None]
    if entropy is not None and entropy_coef is not None:
        d -= entropy_coef[:, None] * p * (logp.clamp_min(-1e30) + entropy[:, None])
    if tanh is not None:
        d *= 1 - tanh * tanh
    d *= transform.scale / transform.temperature
    d.masked_fill_((labels < 0)[:, None], 0.0)
    out.copy_(d)
