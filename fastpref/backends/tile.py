"""The contract of a backend, and what all backends share: transform, statistics, two passes in one.

Shapes: n rows (tokens) and v columns (vocabulary entries) of a tile; N tokens, vocabulary V, hidden
size H, P pairs. Matrices have adjacent columns; vectors are contiguous. The statistics' dtype is
float32, and float64 for float64 tiles.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from fastpref.backends.column_choice import Chosen
from fastpref.validation import check_number

EXTRAS = ("entropy", "mean_logit", "is_top1", "log_sum_sq_probs")


@dataclass(frozen=True)
class Transform:
    """z = softcap * tanh(scale * raw / softcap) / temperature; softcap None leaves tanh out."""

    scale: float = 1.0
    softcap: float | None = None
    temperature: float = 1.0

    def __post_init__(self) -> None:
        check_number("scale", self.scale)
        check_number("temperature", self.temperature)
        if self.softcap is not None:
            check_number("softcap", self.softcap)
        if not -math.inf < self.scale < math.inf:
            raise ValueError(f"scale: got {self.scale}, expected a finite number")
        if self.softcap is not None and not 0 < self.softcap < math.inf:
            raise ValueError(f"softcap: got {self.softcap}, expected a positive number or None")
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"temperature: got {self.temperature}, expected a positive number")

    def __call__(self, raw: Tensor) -> tuple[Tensor, Tensor | None]:
        """z and, with a softcap, the tanh it is made of, which the derivative needs again."""
        tanh = None
        z = raw * self.scale if self.scale != 1.0 else raw
        if self.softcap is not None:
            tanh = torch.tanh(z / self.softcap)
            z = tanh * self.softcap
        return (z / self.temperature if self.temperature != 1.0 else z), tanh


class Stats(NamedTuple):
    """Running statistics of n rows, folded from tiles of their logits z, left to right.

    max, sum: the running maximum m and the sum of exp(z - m).
    target: the label's logit; NaN until the tile that holds it has been folded.
    lse, logps: the normaliser and the label's log-probability, never above 0.
    weighted: the sum of exp(z - m) (z - m); total: the sum of z; squared: the sum of exp(2(z - m)).
    argmax: the first index of the maximum.
    The last four are None unless an extra output needs them. float32, or float64 for float64 tiles.
    The memory is not initialised: the tile that starts at column 0 does that.
    """

    max: Tensor
    sum: Tensor
    target: Tensor
    lse: Tensor
    logps: Tensor
    weighted: Tensor | None = None
    total: Tensor | None = None
    squared: Tensor | None = None
    argmax: Tensor | None = None

    @classmethod
    def empty(cls, n: int, device: torch.device, dtype: torch.dtype, extras=()) -> Stats:
        sums = any(name in extras for name in ("entropy", "mean_logit", "log_sum_sq_probs"))
        # lse and logps leave the call, so they are tensors of their own. The others share one
        # allocation: on a GPU each takes longer than what it is for.
        shared = torch.empty((6 if sums else 3, n), device=device, dtype=dtype)
        high, total, target, *rest = shared.unbind()
        lse = torch.empty((n,), device=device, dtype=dtype)
        argmax = torch.empty_like(lse, dtype=torch.int64) if "is_top1" in extras else None
        weighted, both, squared = rest if sums else (None, None, None)
        logps = torch.empty_like(lse)
        return cls(high, total, target, lse, logps, weighted, both, squared, argmax)

    def rows(self, start: int, stop: int) -> Stats:
        """A view of the rows [start, stop)."""
        if start == 0 and stop == self.lse.shape[0]:
            return self
        return Stats(*(None if t is None else t[start:stop] for t in self))  # type: ignore[arg-type]

    def finish(self) -> None:
        """Write lse and logps from max, sum and target."""
        log_sum = self.sum.log()
        torch.add(self.max, log_sum, out=self.lse)
        # (target - max) is exact where it matters, at saturated rows; target - lse is not. A
        # positive value can only be the rounding of a zero. `clamp` keeps NaN.
        torch.sub(self.target - self.max, log_sum, out=self.logps).clamp_(max=0.0)

    def replace_target(self, target: Tensor) -> None:
        """Put the exact logit of the label where a rounded one was, in the normaliser as well.

        With only the target exact, log-probabilities would come out above 0; with both, the error
        of a confident token falls to that of the other logits' tiny share.
        """
        # Where the label is the maximum its exact logit becomes the base, so that a saturated row
        # keeps the tiny share of the others: 1 + tiny, and not exp(rounding) + tiny.
        base = torch.where(self.target == self.max, target, self.max)
        shift = self.max - base
        rescale = shift.exp()
        old, new = self.target - self.max, target - base
        old_e, new_e = old.exp(), new.exp()
        others = (self.sum - old_e).clamp_min(0)
        if self.weighted is not None and self.squared is not None and self.total is not None:
            weighted = self.weighted - old_e * old
            self.weighted.copy_(rescale * (weighted + shift * others) + new_e * new)
            squared = (self.squared - old_e * old_e).clamp_min(0)
            self.squared.copy_(rescale * rescale * squared + new_e * new_e)
            self.total.add_(target - self.target)
        self.sum.copy_(rescale * others + new_e)
        self.max.copy_(base)
        self.target.copy_(target)
        self.finish()

    def entropy(self) -> Tensor:
        assert self.weighted is not None
        return self.sum.log() - self.weighted / self.sum

    def mean_logit(self, vocab: int) -> Tensor:
        assert self.total is not None
        return self.total / vocab

    def log_sum_sq_probs(self) -> Tensor:
        assert self.squared is not None
        return self.squared.log() - 2 * self.sum.log()


# The losses with a closed form, in the order of PAIR_FORMS in csrc/tile.h.
PAIR_FORMS = (
    *("sigmoid", "sigmoid_norm", "ipo", "hinge", "exo_pair", "robust", "nca_pair", "bco_pair"),
    *("sppo_hard", "apo_zero", "apo_down", "discopop", "cpo", "simpo", "alphapo", "orpo"),
)


class PairLossInputs(NamedTuple):
    """The arguments of `Backend.pair_loss` after the token log-probs, in their order."""

    sequence_ids: Tensor  # [N] int64 in [0, 2P), the chosen sequences in [0, P)
    pairs: int  # P
    ref_logps: Tensor | None  # [2P]
    loss_type: str  # of CLOSED_FORMS
    beta: float
    label_smoothing: float
    lengths: Tensor | None  # [2P] the denominators of a loss per token; None: sums
    weight: Tensor | None  # [P]
    margin: Tensor | None  # [P]
    option: float = 0.0  # discopop_tau or simpo_gamma
    shape: float = 0.0  # AlphaPO's alpha


class Backend(Protocol):
    """The tile primitives of one kind of device, as functions of a module."""

    NAME: str
    CLOSED_FORMS: frozenset[str]  # the losses that `pair_loss` has
    LOGIT_FREE_BY_DEFAULT: bool  # whether passes with gradients take the logit-free product unasked
    PROJECTS_AT_ONCE: bool  # whether the logit-free product can multiply D while it makes it

    def problem(self) -> str | None:
        """Why the backend cannot run on this machine; None: it can."""

    def describe(self) -> str:
        """What runs, for `fastpref doctor`."""

    def unavailable_reason(self, device: torch.device, dtype: torch.dtype) -> str | None:
        """Why tensors of this device and dtype cannot run here; None: they can."""

    def linear(
        self,
        x: Tensor,  # [n, H]
        weight: Tensor,  # [v, H]
        out: Tensor,  # [n, v]
        bias: Tensor | None = None,  # [v]
    ) -> None:
        """out = x weight^T + bias, in out's dtype and rounded once."""

    def project(
        self,
        d: Tensor,  # [n, v]
        weight: Tensor,  # [v, H]
        out: Tensor,  # [n, H]
    ) -> None:
        """out = d weight: the sum over the vocabulary, rounded once."""

    def outer(
        self,
        d: Tensor,  # [N, v]
        x: Tensor,  # [N, H]
        out: Tensor,  # [v, H]
    ) -> None:
        """out = d^T x: the sum over the tokens, rounded once."""

    def scale_rows(
        self,
        x: Tensor,  # [N, H]
        row_scale: Tensor,  # [N]
        out: Tensor,  # [N, H], which may be x
    ) -> None:
        """out = row_scale x, row by row, rounded once from row_scale's dtype."""

    def fold(
        self,
        tile: Tensor,  # [n, v] raw logits
        labels: Tensor,  # [n] int64
        col0: int,
        stats: Stats,  # [n]
        transform: Transform,
    ) -> None:
        """Fold the logits of the vocabulary entries [col0, col0 + v) into the rows' statistics.

        The tile with col0 = 0 starts the statistics, whatever they held; the others continue them.
        A negative label is an ignored row, whose statistics mean nothing.
        """

    def grad(
        self,
        tile: Tensor,  # [n, v] raw logits
        labels: Tensor,  # [n] int64
        col0: int,
        lse: Tensor,  # [n]
        logps: Tensor,  # [n]
        d: Tensor,  # [n, v]
        transform: Transform,
        dlogp: Tensor | None = None,  # [n]
        entropy: Tensor | None = None,  # [n]
        dentropy: Tensor | None = None,  # [n]
    ) -> None:
        """d = the gradient of the log-probs in the raw logits, times dlogp where given.

        d[t, v] = (1[v = label] - p[t, v]) dz/draw, with -expm1(logp) as the label's entry. With
        entropy and dentropy, dentropy times the gradient of the entropy is added. d may lie in the
        tile's memory, with the same row starts, and may have a narrower dtype. Rows with a negative
        label become 0.
        """

    def fold_grad(
        self,
        tile: Tensor,  # [n, V] raw logits
        labels: Tensor,  # [n] int64
        stats: Stats,  # [n]
        transform: Transform,
        d: Tensor | None,  # [n, V]
        target: Tensor | None = None,  # [n]
    ) -> None:
        """`fold` of whole rows, then `grad` into d unless it is None.

        target: the labels' exact logits, which replace the tile's as in `Stats.replace_target`. The
        statistics are the same bits with d and without.
        """

    def pair_loss(
        self,
        logps: Tensor,  # [N]
        sequence_ids: Tensor,  # [N] int64
        pairs: int,
        ref_logps: Tensor | None,  # [2P]
        loss_type: str,
        beta: float,
        label_smoothing: float,
        lengths: Tensor | None,  # [2P]
        weight: Tensor | None,  # [P]
        margin: Tensor | None,  # [P]
        option: float = 0.0,
        shape: float = 0.0,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Token log-probs to (loss [], sequence log-probs [2P], rewards [2P], dloss/dlogp [N]).

        The inputs are those of `PairLossInputs`; all floating tensors are float32.
        """

    def logit_free_reason(
        self,
        weight: Tensor,  # [V, H], in the compute dtype; V may be 0
        transform: Transform,
        extras: tuple[str, ...] = (),
        with_d: bool = True,
        asked: bool = False,
    ) -> str | None:
        """Why this head does not go through the logit-free product; None: it does.

        with_d: whether D is written. asked: whether the caller insists, so that a product that is
        possible but slow is no reason.
        """

    def logit_free_forward(
        self,
        x: Tensor,  # [N, H]
        weight: Tensor,  # [V, H]
        labels: Tensor,  # [N] int64
        bias: Tensor | None,  # [V]
        stats: Stats,  # [N]
        transform: Transform,
        d: Tensor | None = None,  # [N, V], rows start at multiples of 16 bytes
        row_scale: Tensor | None = None,  # [N]
        u: Tensor | None = None,  # [N, H]
    ) -> None:
        """Statistics, and D where d and row_scale are given, without logits in memory.

        D is row_scale d, row by row. With u, which needs `PROJECTS_AT_ONCE`, u = D weight and D
        stands nowhere. Writes stats.lse and stats.logps, and with extras what they
        need. Only where `logit_free_reason` gives none.
        """

    def column_sums(
        self,
        d: Tensor,  # [n, V]
        row_scale: Tensor | None,  # [n]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(sums of squares [V], sums [V]) of the columns of row_scale d, and d's row sums [n].

        In d's dtype, or in float32 for 16 bits; in one pass over d.
        """

    def choose_columns(
        self,
        squares: Tensor,  # [V], of `column_sums`
        labels: Tensor,  # [n]
        distance: Tensor,  # [V], of the rows of W from their mean
        norm: Tensor,  # [], of u squared
        tolerances: tuple[float | None, float | None],  # of u, of dW
        state: Tensor,  # [] int64, of `block_hash`
        count: int | None = None,
    ) -> Chosen | None:
        """Which columns of a block of D are kept and drawn; None: all of them are needed."""

    def gather_columns(
        self,
        d: Tensor,  # [n, V]
        index: Tensor,  # [K] int64
        kept: Tensor,  # [K] bool
        factor: Tensor,  # [K], 1 where kept
        mean: Tensor,  # [K], 0 where kept
        row_sums: Tensor,  # [n], of d
        out: Tensor,  # [n, K + 1]
    ) -> Tensor:
        """Columns of d, as `fastpref.logps.columns` has them; returns the rows' rest r [n].

        r = row_sums less the row's kept entries; out[:, :K] = (d[:, index] - r mean) factor; the
        last column is r less the row's sum of the columns that are not kept.
        """

    def weighted_rows(
        self,
        q: Tensor,  # [V], float32, or float64 with a float64 weight
        weight: Tensor,  # [V, H]
    ) -> Tensor:
        """q^T weight [H], in q's dtype."""

    def gather_rows(
        self,
        weight: Tensor,  # [V, H]
        index: Tensor,  # [K] int64
        last: Tensor,  # [H]
        out: Tensor,  # [K + 1, H], in weight's dtype
    ) -> None:
        """out = weight[index], and `last` as one more row."""


class FoldGrad(Protocol):
    """`Backend.fold_grad` as a function."""

    def __call__(
        self,
        tile: Tensor,
        labels: Tensor,
        stats: Stats,
        transform: Transform,
        d: Tensor | None,
        target: Tensor | None = None,
    ) -> None: ...


def fold_then_grad(fold: Callable[..., None], grad: Callable[..., None]) -> FoldGrad:
    """`Backend.fold_grad` for a backend that has no kernel for both."""

    def fold_grad(
        tile: Tensor,
        labels: Tensor,
        stats: Stats,
        transform: Transform,
        d: Tensor | None,
        target: Tensor | None = None,
    ) -> None:
        fold(tile, labels, 0, stats, transform)
        if target is not None:
            stats.replace_target(target)
        if d is not None:
            grad(tile, labels, 0, stats.lse, stats.logps, d, transform)

    return fold_grad
