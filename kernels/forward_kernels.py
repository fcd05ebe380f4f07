"""The logit-free product in Triton: the kernels. `forward.py` launches them.

Each program multiplies one tile of tokens with one tile of the vocabulary, as in a matrix product,
but in place of the logits it stores two numbers per token: the largest exponent r in the tile and
the sum s of 2^(exponent - r). A second, small kernel folds them over the vocabulary, always in the
same order. There are no atomics and nothing depends on how many tokens there are, so a token's
log-prob is bitwise the same in every batch.

Exponents are logits in units of log2: one FMA and one EX2 per logit. With u the raw logit x.w + b,

    z log2(e) = u c                       where c = scale log2(e) / temperature
              = c - 2 c / (1 + 2^(u k))         c = softcap log2(e) / temperature,
                                                k = 2 log2(e) scale / softcap

r is rounded, but the terms of s are taken relative to the rounded r, each with one rounding, so
that lse = r + log2(s) loses nothing where logits are large. The label's exponent is formed in the
same way from the same accumulator: log p <= 0 up to the rounding of s, and is clamped there.

A pass with gradients stores d as well, in bf16: minus the terms of s, but relative to a base that
the row has from the start, its label's exponent + OFFSET. The gradient of the log-prob in u is then
row_scale d, with one row_scale per token (docs/algorithm.md, "The logit-free product"). d stays
below 2^LIMIT: a tile whose largest exponent is further above the base takes that exponent for base,
and `finish` brings such a row, whose label's probability is below 2^-120, to its normaliser.

The logits' raw values are x w + b. c and k are the constants above; partial_ptr is scratch memory:

    r [tiles, N], s [tiles, N], the label's raw logit [N], and for d
    the base [N], the largest exponent [N], the normaliser [N]
"""

from __future__ import annotations

import math

import triton
import triton.language as tl
from fastpref.kernels.rows import minus_expm1

LN2 = tl.constexpr(math.log(2))
OFFSET = tl.constexpr(56.0)
LIMIT = tl.constexpr(64.0)
TILES = 64  # how many `combine` takes at a time


@triton.jit
def _exponent(raw, c, k, base, SOFTCAP: tl.constexpr):
    """The logit in units of log2, less base. Monotonic in raw; falls if scale is negative."""
    if SOFTCAP:
        return tl.fma(1.0 / (1.0 + tl.exp2(raw * k)), -2.0 * c, c - base)
    else:
        return tl.fma(raw, c, -base)


@triton.jit
def _slope(raw, k, SOFTCAP: tl.constexpr):
    """The derivative of tanh, 4 g / (1 + g)^2 with g = 2^(raw k); exact however small."""
    if SOFTCAP:
        growth = tl.exp2(raw * k)
        part = 1.0 / (1.0 + growth)
        return 4.0 * part * (tl.minimum(growth, 1e30) * part)
    else:
        return 1.0


@triton.jit
def _terms(raw, columns, base, gain, d_ptr, d_rows, inside, V, c, k, SOFTCAP: tl.constexpr):
    """The sum of 2^(exponent - base) of these columns; with d_ptr they are written to d."""
    terms = tl.exp2(_exponent(raw, c, k, base[:, None], SOFTCAP))
    if d_ptr is not None:
        d = -gain[:, None] * terms * _slope(raw, k, SOFTCAP)
        there = inside[:, None] & (columns < V)[None, :]
        # Read next by another kernel: what this one reads again stays in the cache.
        at = d_ptr + d_rows[:, None] + columns[None, :]
        tl.store(at, d.to(tl.bfloat16), mask=there, cache_modifier=".cs")
    return tl.sum(terms, 1)


@triton.jit
def _tile(index, num_m, num_n, GROUP: tl.constexpr):
    """Groups of GROUP token blocks, which stay in the L2 cache while the weight streams by."""
    width = GROUP * num_n
    first = index // width * GROUP
    within = index % width
    size = min(num_m - first, GROUP)
    return first + within % size, within // size


@triton.jit
def _reduce(
    acc,
    pm,
    pn,
    num_n,
    labels_ptr,
    bias_ptr,
    partial_ptr,
    d_ptr,
    stride_d,
    N,
    V,
    c,
    k,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SOFTCAP: tl.constexpr,
    NEGATIVE: tl.constexpr,
    HALVES: tl.constexpr,
):
    """Store r and s of a tile of raw logits [BLOCK_M, BLOCK_N], d unless d_ptr is None, and the
    raw logits of the labels that are in it."""
    rows = pm * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = rows < N
    if bias_ptr is not None:  # padded to whole tiles with what makes a logit -inf
        acc += tl.load(bias_ptr + pn * BLOCK_N + tl.arange(0, BLOCK_N))[None, :]
    label = tl.load(labels_ptr + rows, mask=inside, other=-1)
    in_tile = inside & (label >= pn * BLOCK_N) & (label < pn * BLOCK_N + BLOCK_N)
    column = label.to(tl.int32)[:, None]
    if HALVES:
        left, right = tl.split(tl.permute(tl.reshape(acc, BLOCK_M, 2, BLOCK_N // 2), 0, 2, 1))
    # Most tiles hold no label of their rows. This branch must not come last: then triton 3.6 cannot
    # flatten the loop, and 3.9 serializes the products.
    if tl.max(in_tile.to(tl.int32), 0) > 0:
        if HALVES:
            at = pn * BLOCK_N + tl.arange(0, BLOCK_N // 2)[None, :]
            target = tl.sum(tl.where(at == column, left, 0.0), 1)
            target += tl.sum(tl.where(at + BLOCK_N // 2 == column, right, 0.0), 1)
        else:
            at = pn * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
            target = tl.sum(tl.where(at == column, acc, 0.0), 1)
        tl.store(partial_ptr + 2 * num_n * N + rows, target, mask=in_tile)
    if NEGATIVE:
        extreme = tl.min(acc, 1)
    else:
        extreme = tl.max(acc, 1)
    r = _exponent(extreme, c, k, 0.0, SOFTCAP)
    base = tl.where(r == float("-inf"), 0.0, r)  # -inf - -inf is not a number
    d_rows = rows.to(tl.int64) * stride_d
    gain = base
    if d_ptr is not None:
        start = tl.load(partial_ptr + (2 * num_n + 1) * N + rows, mask=inside, other=0.0)
        gain = tl.where(base - start > LIMIT, 1.0, tl.exp2(base - start))
    if HALVES:
        at = pn * BLOCK_N + tl.arange(0, BLOCK_N // 2)
        s = _terms(left, at, base, gain, d_ptr, d_rows, inside, V, c, k, SOFTCAP)
        at += BLOCK_N // 2
        s += _terms(right, at, base, gain, d_ptr, d_rows, inside, V, c, k, SOFTCAP)
    else:
        at = pn * BLOCK_N + tl.arange(0, BLOCK_N)
        s = _terms(acc, at, base, gain, d_ptr, d_rows, inside, V, c, k, SOFTCAP)
    if SOFTCAP and bias_ptr is not None:
        # The cap has lifted the padding from -inf to -softcap. No logit is below that, so its share
        # of the whole sum is at most its share of the columns: taking it out again is harmless.
        s -= tl.maximum((pn + 1) * BLOCK_N - V, 0) * tl.exp2((c - base) - 2.0 * c)
    tl.store(partial_ptr + pn * N + rows, r, mask=inside)
    tl.store(partial_ptr + (num_n + pn) * N + rows, s, mask=inside)


@triton.jit(do_not_specialize=["N"])
def by_descriptor(
    # data
    x_desc,  # [N, H]
    weight_desc,  # [V, H]
    labels_ptr,  # [N]
    bias_ptr,  # [tiles * BLOCK_N] or None
    partial_ptr,
    d_ptr,  # [N, V] or None
    # strides and shapes
    stride_d,
    N,
    V,
    H,
    # options
    c,
    k,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    SOFTCAP: tl.constexpr,
    NEGATIVE: tl.constexpr,
    HALVES: tl.constexpr,
    FLATTEN: tl.constexpr,
):
    """The product by a persistent kernel. Outside of the tensors a descriptor reads zeros."""
    num_m = tl.cdiv(N, BLOCK_M)
    num_n = tl.cdiv(V, BLOCK_N)
    blocks = tl.cdiv(H, BLOCK_K)
    tl.assume(blocks > 0)
    start = tl.program_id(0)
    for index in tl.range(start, num_m * num_n, tl.num_programs(0), flatten=FLATTEN):
        pm, pn = _tile(index, num_m, num_n, GROUP)
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for block in range(blocks):
            x = x_desc.load([pm * BLOCK_M, block * BLOCK_K])
            w = weight_desc.load([pn * BLOCK_N, block * BLOCK_K])
            acc = tl.dot(x, w.T, acc)
        _reduce(
            acc, pm, pn, num_n, labels_ptr, bias_ptr, partial_ptr, d_ptr, stride_d, N, V, c, k,
            BLOCK_M, BLOCK_N, SOFTCAP, NEGATIVE, HALVES,
        )  # fmt: skip


@triton.jit(do_not_specialize=["N"])
def by_pointer(
    # data
    x_ptr,  # [N, H]
    weight_ptr,  # [V, H]
    labels_ptr,  # [N]
    bias_ptr,  # [tiles * BLOCK_N] or None
    partial_ptr,
    d_ptr,  # [N, V] or None
    # strides and shapes
    stride_d,
    N,
    V,
    H,
    stride_x,
    stride_w,
    # options
    c,
    k,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    SOFTCAP: tl.constexpr,
    NEGATIVE: tl.constexpr,
    HALVES: tl.constexpr,
    EVEN_H: tl.constexpr,
):
    """The product, one tile per program: for GPUs on which triton does not pipeline descriptors."""
    num_m = tl.cdiv(N, BLOCK_M)
    num_n = tl.cdiv(V, BLOCK_N)
    pm, pn = _tile(tl.program_id(0), num_m, num_n, GROUP)
    rows = pm * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = pn * BLOCK_N + tl.arange(0, BLOCK_N)
    h = tl.arange(0, BLOCK_K)
    # Beyond the end, row 0 is read: those rows are not stored, those columns get a bias of -inf.
    x_row = tl.where(rows < N, rows, 0).to(tl.int64) * stride_x
    w_row = tl.where(columns < V, columns, 0).to(tl.int64) * stride_w
    x_at = x_ptr + x_row[:, None] + h[None, :]
    w_at = weight_ptr + w_row[None, :] + h[:, None]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    blocks = tl.cdiv(H, BLOCK_K)
    tl.assume(blocks > 0)
    for block in range(blocks):
        if EVEN_H:
            x = tl.load(x_at)
            w = tl.load(w_at)
        else:
            left = H - block * BLOCK_K
            x = tl.load(x_at, mask=h[None, :] < left, other=0.0)
            w = tl.load(w_at, mask=h[:, None] < left, other=0.0)
        acc = tl.dot(x, w, acc)
        x_at += BLOCK_K
        w_at += BLOCK_K
    _reduce(
        acc, pm, pn, num_n, labels_ptr, bias_ptr, partial_ptr, d_ptr, stride_d, N, V, c, k,
        BLOCK_M, BLOCK_N, SOFTCAP, NEGATIVE, HALVES,
    )  # fmt: skip


@triton.jit(do_not_specialize=["N"])
def combine(
    # data
    partial_ptr,
    labels_ptr,  # [N]
    lse_ptr,  # [N]
    logps_ptr,  # [N]
    # shapes
    N,
    V,
    num_n,
    # options
    c,
    k,
    ROWS: tl.constexpr,
    TILES: tl.constexpr,
    SOFTCAP: tl.constexpr,
    KEEP: tl.constexpr,
):
    """Fold the tiles' r and s, in the vocabulary's order, into lse and the label's log-prob."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = rows < N
    m = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float64)  # next to a confident token's 1 the others are tiny
    for first in range(0, num_n, TILES):
        tiles = first + tl.arange(0, TILES)
        at = tiles[:, None] * N + rows[None, :]
        there = (tiles < num_n)[:, None] & inside[None, :]
        r = tl.load(partial_ptr + at, mask=there, other=float("-inf"))
        s = tl.load(partial_ptr + num_n * N + at, mask=there, other=0.0)
        higher = tl.maximum(m, tl.max(r, 0))
        base = tl.where(higher == float("-inf"), 0.0, higher)
        total *= tl.exp2(m - base).to(tl.float64)
        total += tl.sum((s * tl.exp2(r - base[None, :])).to(tl.float64), 0)
        m = higher
    base = tl.where(m == float("-inf"), 0.0, m)
    log_total = tl.log2(total.to(tl.float32))
    tl.store(lse_ptr + rows, (m + log_total) * LN2, mask=inside)
    label = tl.load(labels_ptr + rows, mask=inside, other=-1)
    known = (label >= 0) & (label < V)
    target = tl.load(partial_ptr + 2 * num_n * N + rows, mask=known, other=float("nan"))
    logp = (_exponent(target, c, k, base, SOFTCAP) - log_total) * LN2
    tl.store(logps_ptr + rows, tl.where(logp > 0, 0.0, logp), mask=inside)  # NaN stays NaN
    if KEEP:  # for `finish`
        tl.store(partial_ptr + (2 * num_n + 2) * N + rows, m, mask=inside)
        tl.store(partial_ptr + (2 * num_n + 3) * N + rows, m + log_total, mask=inside)


@triton.jit(do_not_specialize=["N"])
def bases(
    # data
    x_ptr,  # [N, H]
    weight_ptr,  # [V, H]
    labels_ptr,  # [N]
    bias_ptr,  # [V] or None
    base_ptr,  # [N]
    # shapes and strides
    N,
    V,
    H,
    stride_x,
    stride_w,
    # options
    c,
    k,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    SOFTCAP: tl.constexpr,
):
    """Store the rows' bases. Any number would do, so the rounding of these sums does not matter."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    label = tl.load(labels_ptr + rows, mask=rows < N, other=-1)
    known = (label >= 0) & (label < V)
    x = x_ptr + tl.where(known, rows, 0).to(tl.int64)[:, None] * stride_x
    w = weight_ptr + tl.where(known, label, 0)[:, None] * stride_w
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    for first in range(0, H, BLOCK):
        h = first + tl.arange(0, BLOCK)[None, :]
        there = known[:, None] & (h < H)
        left = tl.load(x + h, mask=there, other=0.0).to(tl.float32)
        total += left * tl.load(w + h, mask=there, other=0.0).to(tl.float32)
    raw = tl.sum(total, 1)
    if bias_ptr is not None:
        raw += tl.load(bias_ptr + tl.where(known, label, 0))
    z = _exponent(raw, c, k, 0.0, SOFTCAP)
    # Where the label's logit is not finite, every tile takes its largest exponent for base.
    z = tl.where(tl.abs(z) < float("inf"), z + OFFSET, float("-inf"))
    z = tl.where(known, z, 0.0)
    tl.store(base_ptr + rows, z, mask=rows < N)


@triton.jit(do_not_specialize=["N"])
def finish(
    # data
    partial_ptr,
    labels_ptr,  # [N]
    logps_ptr,  # [N]
    d_ptr,  # [N, V]
    row_scale_ptr,  # [N]
    # strides and shapes
    stride_d,
    N,
    V,
    num_n,
    # options
    slope,
    k,
    BLOCK_N: tl.constexpr,
    BLOCK: tl.constexpr,
    SOFTCAP: tl.constexpr,
):
    """Store a row's row_scale and its label's entry of d. The entry comes from the log-prob: a
    difference of probabilities would lose its digits where the log-prob is close to 0."""
    row = tl.program_id(0)
    rest = partial_ptr + 2 * num_n * N + row
    raw, start = tl.load(rest), tl.load(rest + N)
    high, normaliser = tl.load(rest + 2 * N), tl.load(rest + 3 * N)
    d = d_ptr + row.to(tl.int64) * stride_d
    moves = high - start > LIMIT
    if moves:
        for first in range(0, V, BLOCK):
            at = first + tl.arange(0, BLOCK)
            r = tl.load(partial_ptr + (at // BLOCK_N) * N + row, mask=at < V, other=0.0)
            gain = tl.exp2(tl.where(r - start > LIMIT, r, start) - normaliser)
            value = tl.load(d + at, mask=at < V, other=0.0).to(tl.float32) * gain
            tl.store(d + at, value.to(tl.bfloat16), mask=at < V)
        tl.debug_barrier()  # the label's cell belongs to another thread, which has now written it
    gap = tl.where(moves, 0.0, start - normaliser)
    # Unbounded where logits are so large that two orders of summation differ much.
    gap = tl.where(gap > 90.0, 90.0, gap)
    label = tl.load(labels_ptr + row)
    known = (label >= 0) & (label < V)
    # An unknown label spoils its row, as it does the log-prob.
    tl.store(row_scale_ptr + row, tl.where(known, slope * tl.exp2(gap), float("nan")))
    entry = minus_expm1(tl.load(logps_ptr + row)) * _slope(raw, k, SOFTCAP) * tl.exp2(-gap)
    tl.store(d + tl.where(known, label, 0), entry.to(tl.bfloat16), mask=known)
