"""Gradients from the columns of D that matter: `gradient_tolerance`, `head_gradient_tolerance`.

D is replaced by a sparse random matrix whose mean is D. For a block of n tokens, W [V, H]:

    squares, totals = column_sums(D)          sums over the block of each column of D
    S, J  = choose_columns(squares, ...)      S: the largest columns and all labels; J: drawn from
                                              the others, R, as often as pi [V] on average
    q     = totals[R] / sum(totals[R])        the mean distribution on R
    r     = sum of D[:, R]                    per row
    G     = [D[:, S], (D[:, J] - r q[J]) / pi[J]],   a = r - sum of G's drawn columns
    u     = G W[S, J] + a (q^T W)             one product of k + t columns
    dW    = G^T (c X), added to the rows S and J, + q^T (a^T (c X))

Each block has its own q: it makes the columns of (D - r q)[:, R] sum to 0, or nearly, as the
error of dW needs it. q^T W takes a pass over W, which several blocks share: a (q^T W) is added
to their u afterwards. A u of 16 bits, which would be rounded twice, takes a as one more column
of its product. The distances that the choice and the bound take are from the mean of about
_MEAN_ROWS rows of W.

Nothing but u and dW is approximated: log-probs and losses come from the whole product.
"""

from __future__ import annotations

import math
import threading
from typing import NamedTuple

import torch
from torch import Tensor

from fastpref.backends.column_choice import HEAD_MARGIN, block_hash
from fastpref.backends.tile import Backend
from fastpref.logps.plan import BLOCKS_TOGETHER

_ROWS = 2048  # of the weight that are widened at a time
_MEAN_ROWS = 4096  # of the weight, whose mean stands for that of all
_SUM_LENGTH = 16384  # of the vocabulary
_NORM_TOKENS = 64  # of a block, whose u is estimated before the columns are chosen
_NORM_SHARE = 128  # one column in so many is enough for that


class ColumnOptions(NamedTuple):
    """The tolerances of one call's gradients; None: exact."""

    tolerance: float | None  # relative root mean square error of u
    head_tolerance: float | None  # of the gradients of the head's matrices
    seed: int


class GradientReport(NamedTuple):
    """The error of one call's gradients by columns. All fields but tokens are tensors [].

    columns: multiplied columns over V, the mean over the call's blocks.
    error: the expected relative root mean square error of u, or of dW where u takes no columns.
        It is estimated from the columns' sums, rather too high than too low.
    left_out: the mean over tokens of |r|, which is probability mass where scale and temperature
        are 1 and there is no softcap.
    bound_mean, bound_max: over tokens, of a bound on the error of u without the drawn columns,
        relative to the root mean square norm of u. It is |r| (max |W_v - w| + |w - q^T W|), w the
        mean of some rows of W, and so no less than |r| max |W_v - q^T W|.
    """

    tokens: int
    columns: Tensor
    error: Tensor
    left_out: Tensor
    bound_mean: Tensor
    bound_max: Tensor


class ColumnBlock(NamedTuple):
    """A block of D by columns: [G, a] at these columns, and q."""

    g: Tensor  # [n, K + 1], rows lack row_scale
    columns: Tensor  # [K] int64
    q: Tensor  # [V], 0 on S


_last = threading.local()


def last_gradient_report() -> GradientReport | None:
    """The report of this thread's last call that took columns; None before the first.

    Reading a value of it on a GPU waits for the device.
    """
    return getattr(_last, "report", None)


class Spread(NamedTuple):
    """How far the rows of W are from the mean of some of them.

    Any vector would do in place of the mean: the nearer, the smaller are the bounds and estimates.
    """

    mean: Tensor  # [H]
    distance: Tensor  # [V], |W_v - mean|


def spread(weight: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Spread:
    """The `Spread` of scale W in this dtype; scale [V] or None."""
    vocab = weight.shape[0]
    step = max(1, vocab // _MEAN_ROWS)
    some = weight[::step].to(dtype)
    mean = (some if scale is None else some * scale[::step, None]).mean(0)
    distance = torch.empty(vocab, dtype=dtype, device=weight.device)
    for a in range(0, vocab, _ROWS):
        rows = weight[a : a + _ROWS].to(dtype)
        if scale is not None:
            rows = rows * scale[a : a + _ROWS, None]
        distance[a : a + _ROWS] = torch.linalg.vector_norm(rows - mean, dim=1)
    return Spread(mean, distance)


class _Waiting(NamedTuple):
    """A block that lacks q^T W."""

    q: Tensor  # [V], times dora_scale
    u: Tensor | None  # [n, H], lacks row_scale
    a: Tensor | None  # [n], where a (q^T W) is to be added to u
    r: Tensor  # [n], lacks row_scale
    row_scale: Tensor | None  # [n]
    farthest: Tensor  # [], max |W_v - mean| over R
    norm: Tensor  # [], |u|^2 without u
    size: Tensor  # [], |D|^2
    variance: Tensor  # []
    head_variance: Tensor  # []


class Sampler:
    """Columns of a call's blocks, one after the other."""

    def __init__(
        self,
        options: ColumnOptions,
        backend: Backend,
        weight: Tensor,  # [V, H], in the compute dtype
        dora_scale: Tensor | None,  # [V]
        count: int | None,
        needs_head: bool,
    ) -> None:
        self.tolerances = options.tolerance, options.head_tolerance if needs_head else None
        self.needs_head = self.tolerances[1] is not None
        self.backend, self.weight = backend, weight
        self.count, self.seed = count, options.seed
        dtype = torch.promote_types(weight.dtype, torch.float32)
        self.scale = None if dora_scale is None else dora_scale.to(dtype)
        self.spread = spread(weight, self.scale, dtype)
        self.blocks: list[ColumnBlock] = []
        self.remainders: list[Tensor] = []  # |r| of the rows
        self.bounds: list[Tensor] = []  # on the error of the rows of u
        self.sums: list[Tensor] = []  # [4] of each block: |u|^2, variance, |D|^2, variance of D
        self._waiting: list[_Waiting] = []
        self._adds_later = weight.dtype == dtype
        self.multiplied = 0  # columns times tokens
        # On a CPU, |u|^2 of the last block over the sum of squares times distance^2, with W's mean
        # for q^T W: blocks of one call are alike, so that the next need not estimate it.
        self._ratio: float | None = None
        self._memories: dict[str, Tensor] = {}  # of one block, for the next

    def add(
        self,
        d: Tensor,  # [n, V], without dora_scale
        labels: Tensor,  # [n]
        lse: Tensor,  # [n]
        row_scale: Tensor | None,  # [n]
        u: Tensor | None,  # [n, H]
    ) -> None:
        """Write u of a block, and keep the block by columns where dW needs it.

        u may lack its last part until `finish`.
        """
        backend, vocab = self.backend, d.shape[1]
        squares, totals, row_sums = backend.column_sums(d, row_scale)
        tolerances = (None if u is None else self.tolerances[0]), self.tolerances[1]
        estimated = u is None or (self.count is None and tolerances[0] is not None)
        norm = squares.new_ones(())
        spread_out = _sum(squares * self.spread.distance.square())
        if estimated and self._ratio is not None:
            norm = spread_out * self._ratio
        elif estimated:
            norm = self._u_norm(d, labels, row_scale, squares)
        state = block_hash(labels, lse, self.seed)
        sizes = squares, labels, self.spread.distance, norm
        chosen = backend.choose_columns(*sizes, tolerances, state, self.count)
        self.multiplied += d.shape[0] * (vocab if chosen is None else chosen.columns.shape[0])
        if chosen is None:
            self._add_all(d, row_scale, u, squares)
            return
        index, kept, factor, variance, head_variance = chosen
        # 1 on R; a column that is drawn twice writes the same number twice.
        in_rest = torch.ones_like(totals).scatter_(0, index, (~kept).to(totals.dtype))
        # The block's own distribution: with another one, r q is no small part of the columns that
        # are rarely drawn, and the error of dW is several times as large.
        q = totals * in_rest
        sum_q = _sum(q)
        q = torch.where(sum_q == 0, 0.0, q / sum_q)
        shape = d.shape[0], index.shape[0] + 1
        g = d.new_empty(shape) if self.needs_head else self._memory("g", *shape)
        mean = q[index].masked_fill(kept, 0.0)
        r = backend.gather_columns(d, index, kept, factor, mean, row_sums, g)
        if self.scale is not None:
            q = q * self.scale
            g[:, :-1] *= self.scale[index]
        m = a = None
        if u is not None and tolerances[0] is None:
            backend.project(d, self.weight, u)
        elif u is not None:
            memory = self._memory("rows", g.shape[1], self.weight.shape[1])
            taken = g
            if self._adds_later:
                taken, a = g[:, :-1], g[:, -1].clone()
            else:
                m = backend.weighted_rows(q[None], self.weight)[0]
            backend.project_rows(taken, self.weight, index, m, memory, u)
        if self.needs_head:
            self.blocks.append(ColumnBlock(g, index, q))
        if u is not None and u.device.type == "cpu":
            # W's mean stands for q^T W, where that is still to come.
            known = u if a is None else torch.addr(u, a, self.spread.mean)
            ratio = float(self._squared(known, row_scale, squares.dtype) / spread_out)
            self._ratio = ratio if 0 < ratio < math.inf else None
        farthest, size = (self.spread.distance * in_rest).max(), _sum(squares)
        block = _Waiting(q, u, a, r, row_scale, farthest, norm, size, variance, head_variance)
        if m is not None:
            self._complete(block, m)
            return
        self._waiting.append(block)
        if len(self._waiting) == BLOCKS_TOGETHER:
            self._complete_waiting()

    def _complete_waiting(self) -> None:
        """q^T W of the blocks that lack it."""
        if not self._waiting:
            return
        means = self.backend.weighted_rows(torch.stack([b.q for b in self._waiting]), self.weight)
        for block, m in zip(self._waiting, means.unbind(), strict=True):
            self._complete(block, m)
        self._waiting.clear()

    def _complete(self, b: _Waiting, m: Tensor) -> None:
        """Add a m to u, and note its error. m: q^T W [H]."""
        if b.u is not None and b.a is not None:
            b.u.addr_(b.a, m)
        farthest = b.farthest + torch.linalg.vector_norm(self.spread.mean - m)
        sizes = b.norm, b.size, b.variance, b.head_variance
        self._note(b.r, b.row_scale, farthest, b.u, *sizes)

    def _memory(self, name: str, rows: int, cols: int) -> Tensor:
        """The memory of the last block once more: fresh pages cost as much as a pass over them."""
        flat = self._memories.get(name)
        if flat is None or flat.numel() < rows * cols:
            flat = self._memories[name] = self.weight.new_empty(rows * cols)
        return flat[: rows * cols].view(rows, cols)

    def _u_norm(
        self, d: Tensor, labels: Tensor, row_scale: Tensor | None, squares: Tensor
    ) -> Tensor:
        """An estimate of |u|^2 of a block, from some of its rows and its largest columns.

        Without a softcap each row of D sums to 0, so that u does not depend on W's mean row.
        """
        vocab = squares.shape[0]
        step = max(1, d.shape[0] // _NORM_TOKENS)
        large = squares.index_fill(0, labels.clamp(0, vocab - 1), math.inf)
        count = min(vocab, vocab // _NORM_SHARE + labels.shape[0])
        index = large.topk(count, sorted=False).indices
        rows = d[::step].index_select(1, index).to(squares.dtype)
        if row_scale is not None:
            rows = rows * row_scale[::step, None]
        weight = self.weight.index_select(0, index).to(squares.dtype)
        if self.scale is not None:
            weight = weight * self.scale[index, None]
        u = rows @ (weight - self.spread.mean)
        return self._squared(u, None, u.dtype) * (d.shape[0] / max(rows.shape[0], 1))

    @staticmethod
    def _squared(u: Tensor, row_scale: Tensor | None, dtype: torch.dtype) -> Tensor:
        """|u|^2 [], of rows that lack row_scale."""
        lengths = torch.linalg.vector_norm(u, dim=1, dtype=dtype)
        scaled: Tensor = lengths if row_scale is None else lengths * row_scale
        return scaled.square().sum()

    def _add_all(
        self, d: Tensor, row_scale: Tensor | None, u: Tensor | None, squares: Tensor
    ) -> None:
        """A block whose columns are all needed: its products are exact."""
        vocab = d.shape[1]
        scaled = d if self.scale is None else (d * self.scale).to(d.dtype)
        if u is not None:
            self.backend.project(scaled, self.weight, u)
        if self.needs_head:
            g = torch.nn.functional.pad(scaled, (0, 1))
            index = torch.arange(vocab, device=d.device)
            self.blocks.append(ColumnBlock(g, index, torch.zeros_like(squares)))
        zero = squares.new_zeros(())
        nothing = squares.new_zeros(d.shape[0])
        self._note(nothing, row_scale, zero, u, zero, _sum(squares), zero, zero)

    def _note(
        self,
        r: Tensor,  # [n], lacks row_scale
        row_scale: Tensor | None,  # [n]
        farthest: Tensor,  # []
        u: Tensor | None,  # [n, H], lacks row_scale
        norm: Tensor,  # [], |u|^2 without u
        size: Tensor,  # [], |D|^2
        variance: Tensor,  # []
        head_variance: Tensor,  # []
    ) -> None:
        remainder = r.abs() if row_scale is None else (r * row_scale).abs()
        if u is not None:
            norm = self._squared(u, row_scale, r.dtype)
        self.remainders.append(remainder)
        self.bounds.append(remainder * farthest)
        sums = norm, variance, size, head_variance
        self.sums.append(torch.stack([t.double() for t in sums]))

    def finish(self) -> tuple[ColumnBlock, ...]:
        """The kept blocks, after u is whole and the report is left for `last_gradient_report`."""
        self._complete_waiting()
        n = sum(t.shape[0] for t in self.remainders)
        if n:
            norm, variance, size, head_variance = torch.stack(self.sums).sum(0).unbind()
            by_u = self.tolerances[0] is not None
            error = (
                _quotient(variance, norm)
                if by_u
                else _quotient(head_variance, size) * HEAD_MARGIN**2
            )
            remainders, bounds = torch.cat(self.remainders), torch.cat(self.bounds).double()
            unit = (norm / n).sqrt()
            # Filled on the device: a copy of a number from the host would wait for it.
            columns = norm.new_full((), self.multiplied / (n * self.weight.shape[0]))
            bound = (_quotient(t, unit) for t in (bounds.mean(), bounds.max()))
            _last.report = GradientReport(n, columns, error.sqrt(), remainders.mean(), *bound)
        return tuple(self.blocks)


def _sum(t: Tensor) -> Tensor:
    """The sum [] of t [V]: on a CPU the same bits with any number of threads."""
    if t.device.type != "cpu":
        return t.sum()
    # torch gives no part of so few numbers to another thread.
    return torch.stack([part.sum() for part in t.split(_SUM_LENGTH)]).sum()


def _quotient(part: Tensor, whole: Tensor) -> Tensor:
    """part / whole, and 0 where the part is 0."""
    return torch.where(part == 0, 0.0, part / whole)


def head_grad(
    backend: Backend,
    blocks: tuple[ColumnBlock, ...],
    inputs: Tensor,  # [N, H], times dloss/dlogp
    out: Tensor,  # [V, H]
) -> None:
    """out = D^T inputs by columns. 16-bit gradients are added up in float32."""
    wide = torch.promote_types(inputs.dtype, torch.float32)
    total = out if out.dtype == wide else out.new_empty(out.shape, dtype=wide)
    parts = inputs.split([b.g.shape[0] for b in blocks])
    means = [
        torch.mv(x.to(wide).t(), b.g[:, -1].to(wide)) for x, b in zip(parts, blocks, strict=True)
    ]
    torch.mm(torch.stack([b.q for b in blocks], 1), torch.stack(means), out=total)
    for x, (g, index, _) in zip(parts, blocks, strict=True):
        product = total.new_empty((index.shape[0], out.shape[1]))
        backend.outer(g[:, :-1], x, product)
        _add_rows(total, index, product)
    if total is not out:
        out.copy_(total)


def _add_rows(total: Tensor, index: Tensor, rows: Tensor) -> None:
    """Add each row to total[its index]; the rows of one index are added in one order."""
    if total.device.type == "cpu":
        total.index_add_(0, index, rows)
    else:  # index_add_ is atomic on GPUs, index_put_ on CPUs
        total.index_put_((index,), rows, accumulate=True)


def bias_grad(
    blocks: tuple[ColumnBlock, ...],
    dlogp: Tensor,  # [N]
    out: Tensor,  # [V]
) -> None:
    """out = D^T dlogp by columns."""
    out.zero_()
    start = 0
    for g, index, q in blocks:
        product = torch.mv(g.to(dlogp.dtype).t(), dlogp[start : start + g.shape[0]])
        out += q * product[-1]
        _add_rows(out, index, product[:-1])
        start += g.shape[0]
