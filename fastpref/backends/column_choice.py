"""Which columns of a block of D are kept and which are drawn, in plain torch on any device."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

# The relative error of dW over that of D. The hidden states of all tokens share a component, so the
# errors of a column's tokens add up. Measured on a language model, for coefficients of one size.
HEAD_MARGIN = 1.5


class Chosen(NamedTuple):
    """The columns of a block: kept ones first, then drawn ones, which may repeat."""

    columns: Tensor  # [K] int64
    kept: Tensor  # [K] bool
    factor: Tensor  # [K], 1 or 1 / pi
    variance: Tensor  # [] of u, the sum over the block; an upper estimate
    head_variance: Tensor  # [] of D


def _signed(value: int) -> int:
    return value - 2**64 if value >= 2**63 else value


_STEP = _signed(0x9E3779B97F4A7C15)
_MIX = _signed(0xBF58476D1CE4E5B9), _signed(0x94D049BB133111EB)


def _mix(x: Tensor) -> Tensor:
    """The finaliser of splitmix64: int64 to int64, modulo 2^64."""
    for shift, factor in zip((30, 27), _MIX, strict=True):
        x = (x ^ ((x >> shift) & (2 ** (64 - shift) - 1))) * factor
    return x ^ ((x >> 31) & (2**33 - 1))


def block_hash(labels: Tensor, lse: Tensor, seed: int) -> Tensor:
    """A hash [] int64 of a block's labels and normalisers and of the caller's seed.

    The same call draws the same columns, also after a resume; another step draws others.
    """
    bits = lse.view(torch.int64 if lse.dtype == torch.float64 else torch.int32).long()
    place = torch.arange(1, lse.shape[0] + 1, device=lse.device) * _STEP
    return _mix(
        _mix(_mix(bits + place) + labels).sum() + _signed(seed * 0xD1342543DE82EF95 % 2**64)
    )


def uniforms(state: Tensor, count: int) -> Tensor:
    """Numbers [count] float64 in [0, 1) from a hash []."""
    x = _mix(state + torch.arange(1, count + 1, device=state.device) * _STEP)
    return ((x >> 11) & (2**53 - 1)).double() * 2.0**-53


def _tails(t: Tensor) -> Tensor:
    """[V + 1]: for each index the sum of t from there to the end."""
    return torch.cat([t.flip(0).cumsum(0).flip(0), t.new_zeros(1)])


def choose_columns(
    squares: Tensor,  # [V]
    labels: Tensor,  # [n]
    distance: Tensor,  # [V]
    norm: Tensor,  # [], of u squared
    tolerances: tuple[float | None, float | None],
    state: Tensor,  # []
    count: int | None = None,
) -> Chosen | None:
    """As `Backend.choose_columns`.

    With pi proportional to s, the roots of the squares, t draws give u a variance of at most
    sum s sum (s distance^2) / t, and D one of (sum s)^2 / t, sums over R. dW is taken to have
    HEAD_MARGIN times the error of D. k, the number of kept columns, is the one
    that needs the fewest columns in all. Where `count` gives the number of all columns, k has the
    least variance, and no value is read on the host.
    """
    vocab, device = squares.shape[0], squares.device
    if count is not None and count >= vocab:
        return None
    s = squares.double().sqrt()
    forced = torch.zeros(vocab, dtype=torch.bool, device=device)
    forced[labels.clamp(0, vocab - 1)] = True
    order = s.masked_fill(forced, math.inf).argsort(descending=True, stable=True)
    sorted_s = s[order]
    total, spread_total = _tails(sorted_s), _tails(sorted_s * distance.double()[order].square())
    # The tolerances are relative to squared_norms, of u and of D. `variances` are t times those of
    # t draws.
    squared_norms = norm.double(), squares.double().sum() / HEAD_MARGIN**2
    variances = total * spread_total, total.square()
    places = torch.arange(vocab + 1, device=device)
    too_few = places < forced.sum()
    if count is None:
        draws = torch.zeros_like(total)
        for tolerance, size, variance in zip(tolerances, squared_norms, variances, strict=True):
            if tolerance is not None:
                draws = torch.maximum(draws, variance / (tolerance**2 * size))
        cost = (places + draws.ceil()).masked_fill(too_few, math.inf)
        k = cost.argmin()
        least = float(cost[k])
        if not least < vocab:  # also where it is no number
            return None
        count = int(least)
    else:
        goal = variances[0] if tolerances[0] is not None else variances[1]
        excess = goal / (count - places).clamp_min(1)
        k = excess.masked_fill(too_few | (places >= count), math.inf).argmin()
    place = torch.arange(count, device=device)
    kept, t = place < k, (count - k).clamp_min(1)
    # One draw from each of t equal parts of the sum over R: a column is drawn pi times on average.
    cumulative = sorted_s.cumsum(0)
    tail = total.gather(0, k[None])
    start = cumulative[-1] - tail
    points = start + (place - k + uniforms(state, count)) / t * tail
    drawn = torch.searchsorted(cumulative, points, right=True).clamp(max=vocab - 1).maximum(k)
    column = torch.where(kept, place, drawn)
    weights = sorted_s[column] * t
    factor = torch.where(kept, 1.0, torch.where(weights > 0, tail / weights, 0.0))
    variance, head_variance = (v.gather(0, k[None])[0] / t for v in variances)
    index = order[column]
    if device.type == "cpu":  # in the order of memory
        first = int(k)
        index[:first] = index[:first].sort().values
        index[first:], places = index[first:].sort(stable=True)
        factor[first:] = factor[first:][places]
    return Chosen(index, kept, factor.to(squares.dtype), variance, head_variance)
