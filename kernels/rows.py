"""fold and grad: one pass over the rows of a tile of logits, one program per row.

A program goes over its row in blocks of REPEAT * LANES * VECTOR columns, one lane per thread: a
lane takes VECTOR neighbouring columns, 16 bytes, REPEAT times. In fold each lane keeps its own
running maximum and sums, which are combined once, at the end of the row: one exponential per logit,
one more per lane and block, and no barrier before the end.

An argument that a variant does not need is None, and Triton leaves out the code that depends on it.
The launches switch floating-point fusion off: z - max has to be exactly 0 at the maximum, where a
fused multiplication would leave its rounding error, 2^-24 |z|, which can exceed the whole loss of a
confident token. Wanted fmas are written out.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Not specialised on alignment: only the tile's accesses gain from it. The alignment of the vectors
# changes with the number of rows, which would compile more variants.
_VECTORS = [
    "labels",
    "max_",
    "sum_",
    "target",
    "lse",
    "logps",
    "weighted",
    "total",
    "squared",
    "argmax",
    "dlogp",
    "entropy",
    "dentropy",
]
_LOG2E = tl.constexpr(1.4426950408889634)
_NO_COLUMN = tl.constexpr(2**31 - 1)


@triton.jit
def _tanh(x):
    """tanh x, to 6e-7 of its size however small, and its derivative 1 - tanh(x)^2."""
    clamped = tl.minimum(x, 15.0, propagate_nan=tl.PropagateNan.ALL)
    e = tl.exp2(clamped * (2 * _LOG2E))
    # r = 1 / (1 + e): a division takes twice as many instructions as a root and a Newton step.
    r = tl.rsqrt(1.0 + e)
    r = r * r
    r = tl.fma(tl.fma(-1.0 - e, r, 1.0), r, r)
    # Near 0 the difference 1 - 2r has lost digits; the series has not.
    y = x * x
    series = tl.fma(y, tl.fma(y, tl.fma(y, 62 / 2835, -17 / 315), 2 / 15), -1 / 3)
    t = tl.where(y < 0.09, tl.fma(x * y, series, x), tl.fma(-2.0, r, 1.0))
    return t, 4.0 * e * r * r


@triton.jit
def minus_expm1(x):
    """1 - exp(x) for x <= 0, to 2 units in the last place: 1 - p of a label's log-prob."""
    x = tl.where(x < -30.0, -30.0, x)  # 1 from there on; a comparison lets NaN through
    k = tl.floor(x * _LOG2E + 0.5)
    r = tl.fma(k, 2.12194440e-4, x - k * 0.693359375)  # ln 2 in two parts, the first short
    p = tl.fma(r, tl.fma(r, 1 / 5040, 1 / 720), 1 / 120)
    p = tl.fma(r, tl.fma(r, p, 1 / 24), 1 / 6)
    p = tl.fma(r * r, tl.fma(r, p, 0.5), r)
    power = tl.exp2(k)
    return tl.fma(-power, p, 1.0 - power)


@triton.jit
def _columns(REPEAT: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr):
    """The columns of a block, [REPEAT, LANES * VECTOR].

    Two axes and not three: a tie between axes that are not contiguous would leave it to Triton's
    version which of them goes over the lanes.
    """
    width: tl.constexpr = LANES * VECTOR
    return tl.arange(0, REPEAT)[:, None] * width + tl.arange(0, width)[None, :]


@triton.jit
def _logit(raw, inner, outer):
    """z in float32: outer tanh(inner raw), or outer raw where inner is None."""
    z = raw.to(tl.float32)
    if inner is not None:
        z, _ = _tanh(z * inner)
    if outer is not None:
        z = z * outer
    return z


@triton.jit
def _or_zero(m):
    """m, or 0 where m is -inf: the base of z - m must be finite."""
    return tl.where(m == -float("inf"), 0.0, m)


@triton.jit
def _fold_block(
    z,
    terms,
    columns,
    m,
    s,
    w,
    q,
    t,
    a,
    SUMS: tl.constexpr,
    ARGMAX: tl.constexpr,
    REPEAT: tl.constexpr,
    LANES: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """Add one block [REPEAT, LANES * VECTOR] to the lanes' running statistics.

    Beyond the row's end z is -inf, which adds nothing but to the sum of z; terms, which that sum
    adds up, is 0 there.
    """
    z = tl.reshape(z, (REPEAT, LANES, VECTOR))
    high = tl.max(tl.max(z, 2), 0)
    if ARGMAX:
        columns = tl.reshape(columns, (REPEAT, LANES, VECTOR))
        at = tl.where(z == high[None, :, None], columns, _NO_COLUMN)
        a = tl.where(high > m, tl.min(tl.min(at, 2), 0), a)
    new = tl.maximum(m, high)
    base = _or_zero(new)
    d = z - base[None, :, None]
    e = tl.exp2(d * _LOG2E)
    shift = m - base
    rescale = tl.exp2(shift * _LOG2E)
    if SUMS:
        # A logit of -inf adds 0, not 0 * -inf; exp is 0 long before -200.
        moved = tl.where(rescale > 0, rescale * (w + s * shift), 0.0)
        w = moved + tl.sum(tl.sum(e * tl.maximum(d, -200.0), 2), 0)
        q = q * (rescale * rescale) + tl.sum(tl.sum(e * e, 2), 0)
        t += tl.sum(tl.sum(tl.reshape(terms, (REPEAT, LANES, VECTOR)), 2), 0)
    s = s * rescale + tl.sum(tl.sum(e, 2), 0)
    return new, s, w, q, t, a


@triton.jit(do_not_specialize=["stride", "col0"], do_not_specialize_on_alignment=_VECTORS)
def fold(
    # data
    tile,  # [n, columns]
    labels,  # [n] int64
    max_,  # [n] float32, and so to squared
    sum_,
    target,
    lse,
    logps,
    weighted,
    total,
    squared,
    argmax,  # [n] int64
    # strides and shapes
    stride,
    columns,
    col0,
    # options
    inner,
    outer,
    START: tl.constexpr,
    REPEAT: tl.constexpr,
    LANES: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """Fold a tile into its rows' statistics. START: its columns are the first of the vocabulary.

    stride: from row to row in units of VECTOR elements, so that rows are aligned to such units.
    """
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(labels + row)
    SUMS: tl.constexpr = weighted is not None
    ARGMAX: tl.constexpr = argmax is not None
    if label >= 0:
        BLOCK: tl.constexpr = REPEAT * LANES * VECTOR
        x = tile + row * stride * VECTOR
        y = label - col0
        hit = (y >= 0) & (y < columns)
        at_label = tl.load(x + y, mask=hit, other=float("nan"))
        offsets = _columns(REPEAT, LANES, VECTOR)
        m = tl.full((LANES,), -float("inf"), tl.float32)
        s = tl.zeros((LANES,), tl.float32)
        w = s
        q = s
        t = s
        a = tl.full((LANES,), _NO_COLUMN, tl.int32)
        # Whole blocks first: without a mask their accesses are 16 bytes wide whatever V is.
        whole = columns // BLOCK * BLOCK
        for start in range(0, whole, BLOCK):
            z = _logit(tl.load(x + start + offsets), inner, outer)
            m, s, w, q, t, a = _fold_block(
                z, z, start + offsets, m, s, w, q, t, a, SUMS, ARGMAX, REPEAT, LANES, VECTOR
            )
        if whole < columns:
            inside = whole + offsets < columns
            z = _logit(tl.load(x + whole + offsets, mask=inside, other=0.0), inner, outer)
            zero_outside = tl.where(inside, z, 0.0)
            z = tl.where(inside, z, -float("inf"))
            m, s, w, q, t, a = _fold_block(
                z,
                zero_outside,
                whole + offsets,
                m,
                s,
                w,
                q,
                t,
                a,
                SUMS,
                ARGMAX,
                REPEAT,
                LANES,
                VECTOR,
            )

        high = tl.max(m, 0)
        new = high
        if not START:
            old = tl.load(max_ + row)
            new = tl.maximum(old, high)
        base = _or_zero(new)
        shift = m - base
        rescale = tl.exp2(shift * _LOG2E)
        sum_all = tl.sum(s * rescale, 0)
        if SUMS:
            moved = tl.where(rescale > 0, rescale * (w + s * shift), 0.0)
            weighted_all = tl.sum(moved, 0)
            squared_all = tl.sum(q * (rescale * rescale), 0)
            total_all = tl.sum(t, 0)
        at_max = tl.min(tl.where(m == high, a, _NO_COLUMN), 0)
        better = high > -float("inf")
        before = 0
        z_label = _logit(at_label, inner, outer)
        if not START:
            shift = old - base
            rescale = tl.exp2(shift * _LOG2E)
            sum_old = tl.load(sum_ + row)
            if SUMS:
                weighted_old = rescale * (tl.load(weighted + row) + sum_old * shift)
                weighted_all += tl.where(rescale > 0, weighted_old, 0.0)
                squared_all += tl.load(squared + row) * (rescale * rescale)
                total_all += tl.load(total + row)
            sum_all += sum_old * rescale
            if ARGMAX:
                better = high > old  # strictly: the first of equal maxima wins
                before = tl.load(argmax + row)
            z_label = tl.where(hit, z_label, tl.load(target + row))
        log_sum = tl.log(sum_all)
        # target - max is exact where it matters, at saturated rows. Above 0 is a rounding of 0.
        logp = (z_label - new) - log_sum
        tl.store(max_ + row, new)
        tl.store(sum_ + row, sum_all)
        tl.store(target + row, z_label)
        tl.store(lse + row, new + log_sum)
        tl.store(logps + row, tl.where(logp > 0, 0.0, logp))
        if SUMS:
            tl.store(weighted + row, weighted_all)
            tl.store(squared + row, squared_all)
            tl.store(total + row, total_all)
        if ARGMAX:
            tl.store(argmax + row, tl.where(better, at_max + col0, before))
    else:  # an ignored row: its statistics mean nothing, and its logits are not read
        tl.store(max_ + row, 0.0)
        tl.store(sum_ + row, 1.0)
        tl.store(target + row, 0.0)
        tl.store(lse + row, 0.0)
        tl.store(logps + row, 0.0)
        if SUMS:
            tl.store(weighted + row, 0.0)
            tl.store(squared + row, 1.0)
            tl.store(total + row, 0.0)
        if ARGMAX:
            tl.store(argmax + row, 0)


@triton.jit
def _entry(raw, lse, gain, entropy, entropy_gain, inner, outer):
    """The gradient's entries in float32, all but the label's."""
    z = raw.to(tl.float32)
    if inner is not None:
        z, slope = _tanh(z * inner)
    if outer is not None:
        z = z * outer
    logp = z - lse
    p = tl.exp2(logp * _LOG2E)
    if entropy is not None:
        gain = tl.fma(tl.maximum(logp, -200.0) + entropy, entropy_gain, gain)
    d = -(p * gain)
    if inner is not None:
        d = d * slope
    return d


@triton.jit(
    do_not_specialize=["stride", "out_stride", "col0"], do_not_specialize_on_alignment=_VECTORS
)
def grad(
    # data
    tile,  # [n, columns]
    labels,  # [n] int64
    lse,  # [n] float32, and so to dentropy
    logps,
    dlogp,
    entropy,
    dentropy,
    out,  # [n, columns]
    # strides and shapes
    stride,
    out_stride,
    columns,
    col0,
    # options
    inner,
    outer,
    REPEAT: tl.constexpr,
    LANES: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """out = d logp / d raw logits, times dlogp unless it is None, and the entropy's gradient.

    stride, out_stride: from row to row in units of VECTOR elements. out may be the tile, or lie in
    its memory with the same row starts and narrower elements.
    """
    # From the last row to the first: the last ones that fold read are those still in the cache.
    row = (tl.num_programs(0) - 1 - tl.program_id(0)).to(tl.int64)
    label = tl.load(labels + row)
    BLOCK: tl.constexpr = REPEAT * LANES * VECTOR
    NARROWER: tl.constexpr = (
        out.dtype.element_ty.primitive_bitwidth < tile.dtype.element_ty.primitive_bitwidth
    )
    x = tile + row * stride * VECTOR
    o = out + row * out_stride * VECTOR
    offsets = _columns(REPEAT, LANES, VECTOR)
    whole = columns // BLOCK * BLOCK
    inside = whole + offsets < columns
    if label >= 0:
        y = label - col0
        hit = (y >= 0) & (y < columns)
        base = tl.load(lse + row)
        slope = 1.0
        if inner is not None:
            slope = slope * inner
        if outer is not None:
            slope = slope * outer
        gain = slope
        if dlogp is not None:
            gain = slope * tl.load(dlogp + row)
        # The label's entry comes from its log-prob, which may be more exact than its logit.
        logp = tl.load(logps + row)
        lacking = minus_expm1(logp)
        at_label = gain * lacking
        h = entropy
        entropy_gain = dentropy
        if entropy is not None:
            h = tl.load(entropy + row)
            entropy_gain = slope * tl.load(dentropy + row)
            at_label -= entropy_gain * (1.0 - lacking) * (tl.maximum(logp, -200.0) + h)
        if inner is not None:
            _, flatness = _tanh(tl.load(x + y, mask=hit, other=0.0).to(tl.float32) * inner)
            at_label = at_label * flatness
            tl.debug_barrier()  # all threads have read it before one of them overwrites it

        # In place, a thread writes where it has read, unless the gradient is narrower. Then block
        # [a, b) of a float32 row, bytes 4a to 4b, goes to bytes 2a to 2b: over earlier blocks, or
        # over itself, where other threads read. So a block is loaded, then comes a barrier, and
        # then it is stored. The loads of the next block may go ahead of that store, which ends at
        # byte 2b, since they start at 4b.
        if NARROWER:
            raw = tl.load(x + offsets, mask=offsets < whole)
            for start in range(0, whole, BLOCK):
                ahead = start + BLOCK + offsets
                following = tl.load(x + ahead, mask=ahead < whole)
                tl.debug_barrier()
                d = _entry(raw, base, gain, h, entropy_gain, inner, outer)
                tl.store(o + start + offsets, d.to(out.dtype.element_ty))
                raw = following
        else:
            for start in range(0, whole, BLOCK):
                raw = tl.load(x + start + offsets)
                d = _entry(raw, base, gain, h, entropy_gain, inner, outer)
                tl.store(o + start + offsets, d.to(out.dtype.element_ty))
        if whole < columns:
            raw = tl.load(x + whole + offsets, mask=inside)
            if NARROWER:
                tl.debug_barrier()
            d = _entry(raw, base, gain, h, entropy_gain, inner, outer)
            tl.store(o + whole + offsets, d.to(out.dtype.element_ty), mask=inside)
        tl.debug_barrier()  # the label's cell belongs to another thread, which has now written it
        tl.store(o + y, at_label.to(out.dtype.element_ty), mask=hit)
    else:
        zero = tl.zeros((REPEAT, LANES * VECTOR), out.dtype.element_ty)
        for start in range(0, whole, BLOCK):
            tl.store(o + start + offsets, zero)
        tl.store(o + whole + offsets, zero, mask=inside)
