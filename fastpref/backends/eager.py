"""The tile primitives in plain torch: every device, every dtype, the oracle in float64."""
# ruff: noqa: F401  the imports complete the contract, `fastpref.backends.tile.Backend`

from __future__ import annotations

import math
from typing import NoReturn

import torch
from torch import Tensor

from fastpref.backends.column_choice import choose_columns
from fastpref.backends.columns import (
    column_sums,
    gather_columns,
    project_rows,
    weighted_rows,
)
from fastpref.backends.gemm import (
    linear,
    logit_free_forward,
    logit_free_reason,
    outer,
    project,
    scale_rows,
)
from fastpref.backends.stats import Stats
from fastpref.backends.tile import Transform, fold_then_grad

NAME = "eager"
CLOSED_FORMS: frozenset[str] = frozenset()  # every loss runs through autograd
LOGIT_FREE_BY_DEFAULT = False
PROJECTS_AT_ONCE = False


def problem() -> str | None:
    """None: torch is always there."""
    return None


def describe() -> str:
    return "plain torch, any device and dtype"


def unavailable_reason(device: torch.device, dtype: torch.dtype) -> str | None:
    """None: torch has every device and dtype that tensors have."""
    return None


def _hits(labels: Tensor, col0: int, columns: int) -> tuple[Tensor, Tensor]:
    """Which rows have their label in [col0, col0 + columns), and its column (0 elsewhere)."""
    column = labels - col0
    hit = (column >= 0) & (column < columns)
    return hit, column.masked_fill(~hit, 0)


def fold(tile: Tensor, labels: Tensor, col0: int, stats: Stats, transform: Transform) -> None:
    """As `Backend.fold`."""
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
    d: Tensor,
    transform: Transform,
    dlogp: Tensor | None = None,
    entropy: Tensor | None = None,
    dentropy: Tensor | None = None,
) -> None:
    """As `Backend.grad`."""
    z, tanh = transform(tile.to(lse.dtype))
    logp = z - lse[:, None]
    hit, column = _hits(labels, col0, tile.shape[1])
    at = column[:, None]
    if tile.shape[1]:  # the label's own log-prob: its logit in the tile may be the rounded one
        logp.scatter_(1, at, torch.where(hit[:, None], logps[:, None], logp.gather(1, at)))
    p = logp.exp()
    exact = -p
    if tile.shape[1]:
        entry = torch.where(hit, -torch.expm1(logps), exact.gather(1, at)[:, 0])
        exact.scatter_(1, at, entry[:, None])
    if dlogp is not None:
        exact *= dlogp[:, None]
    if entropy is not None and dentropy is not None:
        exact -= dentropy[:, None] * p * (logp.clamp_min(-1e30) + entropy[:, None])
    if tanh is not None:
        exact *= 1 - tanh * tanh
    exact *= transform.scale / transform.temperature
    exact.masked_fill_((labels < 0)[:, None], 0.0)
    d.copy_(exact)


fold_grad = fold_then_grad(fold, grad)


def pair_loss(*_: object, **__: object) -> NoReturn:
    """No closed form: CLOSED_FORMS is empty."""
    raise NotImplementedError("the eager backend has no closed forms")
