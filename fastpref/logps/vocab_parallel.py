"""The head with its vocabulary divided among processes.

Process i holds the rows [start_i, start_i + v_i) of the weight W [V, H]. A block of n tokens takes
these steps:

    tile [n, v_i] = x W_i^T                     local
    max_i, sum_i, target_i, ... = fold(tile)    local
    max = all-reduce MAX of max_i               [n]
    sum, target, extras = all-reduce SUM        one packed [k, n]; sum_i times exp(max_i - max)
    D_i = grad(tile, lse, logps)                local: exact columns of D
    u_i = D_i W_i                               local: a partial sum of u = d logp / d x

The loss needs the log-probs alone, which are the same bits on every process. In the backward pass
dX is the all-reduce SUM of dlogp u_i, and dW_i = D_i^T (dlogp X) is local. Strategies differ in
what they keep of D_i, as without processes.

With `gathers_tokens` the processes have tokens of their own, as in data parallelism. Then x and the
labels are gathered first, and each process keeps the log-probs of its own tokens. In the backward
pass dlogp is gathered and dX is scattered: the weight never moves.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch import distributed as dist

from fastpref.backends.stats import Stats
from fastpref.backends.tile import Transform
from fastpref.validation import check_float, check_integer, may_synchronise

if TYPE_CHECKING:
    from fastpref.logps.options import HeadOptions


@dataclass(frozen=True, eq=False)
class VocabParallelWeight:
    """The rows of a head's weight on this process, as the argument `weight` of `linear_*`.

    All processes of the group call the function, and its backward pass, in the same order. The
    arguments bias, lora_B and dora_scale are this process's rows, too.

    Attributes:
        local: [v, H], the rows [vocab_start, vocab_start + v) of the weight; v may be 0.
        vocab_start: the first of them.
        vocab_size: V, the rows of all processes.
        group: the process group; None is the default group.
        gathers_tokens: whether processes have different tokens. False: all pass the same hidden
            states and labels, and get the same results, as in tensor parallelism. True: each passes
            its own tokens, as many as it likes, and gets their results, as in data parallelism.
        mean_gradient: with gathers_tokens, whether the gradients of the head are the mean over the
            processes of what each loss contributes, as in DDP and FSDP, instead of the sum.
    """

    local: Tensor
    vocab_start: int
    vocab_size: int
    group: Any = None
    gathers_tokens: bool = False
    mean_gradient: bool = False

    def __post_init__(self) -> None:
        check_float("weight", self.local)
        check_integer("vocab_start", self.vocab_start)
        check_integer("vocab_size", self.vocab_size)
        if self.local.dim() != 2:
            raise ValueError(
                f"weight: got shape {tuple(self.local.shape)}, expected [v, H], rows of [V, H]"
            )
        end = self.vocab_start + self.local.shape[0]
        if self.vocab_start < 0 or end > self.vocab_size:
            raise ValueError(
                f"vocab_start: got rows [{self.vocab_start}, {end}), expected rows in "
                f"[0, vocab_size={self.vocab_size})"
            )
        if self.mean_gradient and not self.gathers_tokens:
            raise ValueError(
                "mean_gradient: got True with gathers_tokens=False, expected False: all processes "
                "have the same loss, so that there is no mean of several"
            )
        if not (dist.is_available() and dist.is_initialized()):
            raise ValueError(
                "group: torch.distributed is not initialised, expected a process group"
            )

    @property
    def shape(self) -> torch.Size:
        """(V, H), of all processes together."""
        return torch.Size((self.vocab_size, self.local.shape[1]))

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the rows."""
        return self.local.dtype

    @property
    def device(self) -> torch.device:
        """The device of the rows."""
        return self.local.device

    @property
    def is_meta(self) -> bool:
        """Whether the rows have no values."""
        return self.local.is_meta

    @property
    def requires_grad(self) -> bool:
        """Whether the rows require a gradient."""
        return self.local.requires_grad


class VocabShard(NamedTuple):
    """Which part of the vocabulary this process has in a call, and whose tokens."""

    start: int
    rows: int
    vocab_size: int
    group: Any
    counts: tuple[int, ...] | None = None  # tokens of each process, where these are gathered
    mean_gradient: bool = False

    @classmethod
    def of(cls, weight: VocabParallelWeight) -> VocabShard:
        """The shard of a weight, before its tokens are counted."""
        size = weight.vocab_size
        group = weight.group if weight.group is not None else dist.group.WORLD
        return cls(weight.vocab_start, weight.local.shape[0], size, group)

    def count_tokens(self, tokens: int, weight: VocabParallelWeight) -> VocabShard:
        """The shard with the token counts of all processes, if their tokens are gathered."""
        if not weight.gathers_tokens:
            return self
        count = torch.tensor([tokens], device=weight.device)
        counts = [torch.empty_like(count) for _ in range(dist.get_world_size(self.group))]
        dist.all_gather(counts, count, group=self.group)
        all_counts = tuple(torch.cat(counts).tolist())
        return self._replace(counts=all_counts, mean_gradient=weight.mean_gradient)

    def planned_rows(self) -> int:
        """The vocabulary that a plan counts with: alike on all processes, as their blocks are."""
        return -(-self.vocab_size // dist.get_world_size(self.group))

    # ---- tokens ----

    def _own(self) -> slice:
        assert self.counts is not None
        rank = dist.get_rank(self.group)
        start = sum(self.counts[:rank])
        return slice(start, start + self.counts[rank])

    def gather(self, local: Tensor) -> Tensor:  # [n_i, ...] -> [N, ...]
        """The rows of all processes, in the order of their ranks."""
        if self.counts is None:
            return local
        longest = max(self.counts)
        padded = local.new_zeros((longest, *local.shape[1:]))
        padded[: local.shape[0]] = local
        parts = [torch.empty_like(padded) for _ in self.counts]
        dist.all_gather(parts, padded, group=self.group)
        return torch.cat([part[:n] for part, n in zip(parts, self.counts, strict=True)])

    def own(self, t: Tensor | None) -> Tensor | None:  # [N, ...] -> [n_i, ...]
        """This process's rows, in memory of their own."""
        return t if t is None or self.counts is None else t[self._own()].clone()

    def summed(self, partial: Tensor | None) -> Tensor | None:  # [N, ...] -> [n_i, ...]
        """The sum over the processes of their rows; of gathered tokens, this process's.

        It is formed in float32 at least: the sum of rows of 16 bits is rounded once.
        """
        if partial is None:
            return None
        wide = partial.to(torch.promote_types(partial.dtype, torch.float32)).contiguous()
        if self.counts is None:
            dist.all_reduce(wide, group=self.group)
            return wide.to(partial.dtype)
        longest = max(self.counts)
        parts = [wide.new_zeros((longest, *wide.shape[1:])) for _ in self.counts]
        for part, rows in zip(parts, wide.split(list(self.counts)), strict=True):
            part[: rows.shape[0]] = rows
        out = torch.empty_like(parts[0])
        dist.reduce_scatter(out, parts, group=self.group)
        return out[: self.counts[dist.get_rank(self.group)]].to(partial.dtype)

    def finish_gradients(self, grads: Sequence[Tensor | None]) -> None:
        """Divide the head's gradients by the number of processes, where they are means."""
        if self.mean_gradient:
            for grad in grads:
                if grad is not None:
                    grad /= dist.get_world_size(self.group)

    # ---- labels and statistics ----

    def local_labels(self, labels: Tensor) -> Tensor:  # [N]
        """Labels as column indices of this process.

        A label of earlier columns becomes `rows`, and one of later columns a larger number.
        """
        column = labels - self.start
        after = torch.where(column < self.rows, column, column + 1)
        return torch.where(column < 0, self.rows, after)

    def fold_grad(
        self,
        backend: Any,
        tile: Tensor,  # [n, v]
        labels: Tensor,  # [n], of `local_labels`
        stats: Stats,  # [n]
        transform: Transform,
        d: Tensor | None,  # [n, v]
    ) -> None:
        """`Backend.fold_grad` of rows whose other columns other processes have."""
        if self.rows:
            backend.fold(tile, labels, 0, stats, transform)
        else:
            _start_empty(stats)
        self._combine(labels, stats)
        if d is not None and self.rows:
            backend.grad(tile, labels, 0, stats.lse, stats.logps, d, transform)

    def _combine(self, labels: Tensor, stats: Stats) -> None:
        """Make the statistics of this process's columns those of all columns."""
        high = stats.max.clone()
        dist.all_reduce(high, dist.ReduceOp.MAX, group=self.group)
        owned = labels < self.rows
        shift = stats.max - high
        rescale = shift.exp()  # 0 for columns that are all -inf
        packed = [rescale * stats.sum, torch.where(owned, stats.target, 0.0), owned.to(high.dtype)]
        if stats.weighted is not None and stats.total is not None and stats.squared is not None:
            moved = rescale * (stats.weighted + stats.sum * shift)
            packed += [torch.where(rescale > 0, moved, 0.0), stats.total]
            packed.append(rescale * rescale * stats.squared)
        if stats.argmax is not None:
            packed.append(self._first(labels, stats, high))
        stacked = torch.stack(packed)
        dist.all_reduce(stacked, group=self.group)
        total, target, owners, *extras = stacked.unbind()
        self._check_owners(owners)
        stats.max.copy_(high)
        stats.sum.copy_(total)
        stats.target.copy_(torch.where(owners == 1, target, math.nan))
        if stats.argmax is not None:
            # The argmax serves is_top1 alone, which compares it with the label.
            stats.argmax.copy_(torch.where(extras.pop() == 1, labels, -1))
        for t, value in zip((stats.weighted, stats.total, stats.squared), extras, strict=False):
            if t is not None:
                t.copy_(value)
        stats.finish()

    def _first(self, labels: Tensor, stats: Stats, high: Tensor) -> Tensor:
        """Numbers [n] whose sum over the processes is 1 where the label is the first maximum.

        The process of the label adds 1 if the label is its first maximum. A process that has an
        equal maximum in earlier columns takes away 1.
        """
        assert stats.argmax is not None
        is_label = (stats.argmax == labels) & (labels < self.rows)
        is_after = labels > self.rows
        return torch.where(stats.max == high, is_label.to(high.dtype) - is_after.to(high.dtype), 0)

    def _check_owners(self, owners: Tensor) -> None:
        if may_synchronise(owners) and bool((owners != 1).any()):
            count = int(owners[owners != 1][0])
            raise ValueError(
                f"vocab_start: a label is in the rows of {count} processes, expected one: their "
                f"rows are to be [0, vocab_size={self.vocab_size}) together"
            )


def _start_empty(stats: Stats) -> None:
    """The statistics of no columns."""
    stats.max.fill_(-math.inf)
    for t in (stats.sum, stats.weighted, stats.total, stats.squared):
        if t is not None:
            t.zero_()
    stats.target.fill_(math.nan)
    if stats.argmax is not None:
        stats.argmax.fill_(-1)


def check_vocab_parallel(options: HeadOptions) -> None:
    """Raise ValueError for an option that a head in parts does not support."""
    expected = "with the vocabulary divided among processes, expected"
    if options.fused:
        raise ValueError(
            f"fused: got True {expected} None or False: a product without logits knows its own "
            "columns' normaliser alone"
        )
    if options.precision != "exact":
        raise ValueError(f"precision: got {options.precision!r} {expected} 'exact'")
    for name in ("gradient_tolerance", "head_gradient_tolerance"):
        if getattr(options, name) is not None:
            raise ValueError(
                f"{name}: got {getattr(options, name)} {expected} None: columns are chosen "
                "from all of D"
            )
