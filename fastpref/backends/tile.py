"""The contract of a backend, the transform of the logits, and both passes over a tile in one call.

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
from fastpref.backends.stats import Stats
from fastpref.validation import check_number


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
    LOGIT_FREE_BY_DEFAULT: (
        bool  # whether passes with gradients take the logit-free product by default
    )
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
        required: bool = False,
    ) -> str | None:
        """Why this head does not go through the logit-free product; None: it does.

        with_d: whether D is written.
        required: whether the caller insists on this product. It is then refused only where it is
        impossible, and not where it is slow.
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
        """Write the statistics, and D where d and row_scale are given, without logits in memory.

        D is row_scale d, row by row. With u, which needs `PROJECTS_AT_ONCE`, u = D weight is
        written and D is never whole in memory. Of stats lse and logps are written, and what the
        extras need. Called only where `logit_free_reason` is None.
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
        """Write columns of d as `fastpref.logps.columns` needs them; returns r [n].

        r, the remainder of a row, is its sum without its kept entries. out[:, :K] is
        (d[:, index] - r mean) factor. The last column of out is r less the row's sum over the
        columns of index that are not kept.
        """

    def weighted_rows(
        self,
        q: Tensor,  # [B, V], float32, or float64 with a float64 weight
        weight: Tensor,  # [V, H]
    ) -> Tensor:
        """q weight [B, H], in q's dtype, in one pass over the weight."""

    def project_rows(
        self,
        d: Tensor,  # [n, K], or [n, K + 1] with last
        weight: Tensor,  # [V, H]
        index: Tensor,  # [K] int64
        last: Tensor | None,  # [H]
        memory: Tensor,  # [K + 1, H], in weight's dtype
        out: Tensor,  # [n, H]
    ) -> None:
        """out = d weight[index], with `last` as one more row of the weight's.

        memory is scratch memory that it may use: fresh pages cost as much as a pass over them.
        """


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
