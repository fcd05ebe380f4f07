"""The fully fused forward pass: token log-probs from hidden states, no logits in memory.

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
"""

from __future__ import annotations

import functools
import math

import torch
import triton
import triton.language as tl
from fastpref.kernels.forward_config import (
    DTYPES,
    SHIPPED,
    Case,
    Config,
    arch_name,
    config,
    has_config,
    launch_tokens,
    padded_bias,
    rows_are_aligned,
    with_aligned_rows,
)
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

__all__ = ["SHIPPED", "Case", "Config", "config", "fused_logps", "launch_tokens", "why_not"]

LOG2E = math.log2(math.e)
LN2 = tl.constexpr(math.log(2))


@triton.jit
def _exponent(raw, c, k, base, SOFTCAP: tl.constexpr):
    """The logit in units of log2, less base. Monotonic in raw; falls if scale is negative."""
    if SOFTCAP:
        return tl.fma(1.0 / (1.0 + tl.exp2(raw * k)), -2.0 * c, c - base)
    else:
        return tl.fma(raw, c, -base)


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
    """From a tile of raw logits to r, s and, where the label is in it, the label's raw logit."""
    rows = pm * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = rows < N
    if bias_ptr is not None:  # padded to whole tiles with what makes a logit -inf
        acc += tl.load(bias_ptr + pn * BLOCK_N + tl.arange(0, BLOCK_N))[None, :]
    label = tl.load(labels_ptr + rows, mask=inside, other=-1)
    own = inside & (label >= pn * BLOCK_N) & (label < pn * BLOCK_N + BLOCK_N)
    column = label.to(tl.int32)[:, None]
    if HALVES:
        left, right = tl.split(tl.permute(tl.reshape(acc, BLOCK_M, 2, BLOCK_N // 2), 0, 2, 1))
    # Most tiles hold no label of theirs. This must not be the last thing that a tile does: then
    # triton 3.6 cannot flatten the loop, and 3.9 serializes the products.
    if tl.max(own.to(tl.int32), 0) > 0:
        if HALVES:
            at = pn * BLOCK_N + tl.arange(0, BLOCK_N // 2)[None, :]
            target = tl.sum(tl.where(at == column, left, 0.0), 1)
            target += tl.sum(tl.where(at + BLOCK_N // 2 == column, right, 0.0), 1)
        else:
            at = pn * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
            target = tl.sum(tl.where(at == column, acc, 0.0), 1)
        tl.store(partial_ptr + 2 * num_n * N + rows, target, mask=own)
    if NEGATIVE:
        extreme = tl.min(acc, 1)
    else:
        extreme = tl.max(acc, 1)
    r = _exponent(extreme, c, k, 0.0, SOFTCAP)
    base = tl.where(r == float("-inf"), 0.0, r)  # -inf - -inf is not a number
    if HALVES:
        s = tl.sum(tl.exp2(_exponent(left, c, k, base[:, None], SOFTCAP)), 1)
        s += tl.sum(tl.exp2(_exponent(right, c, k, base[:, None], SOFTCAP)), 1)
    else:
        s = tl.sum(tl.exp2(_exponent(acc, c, k, base[:, None], SOFTCAP)), 1)
    if SOFTCAP and bias_ptr is not None:
        # The cap has lifted the padding from -inf to -softcap. No logit is below that, so its share
        # of the whole sum is at most its share of the columns: taking it out again is harmless.
        s -= tl.maximum((pn + 1) * BLOCK_N - V, 0) * tl.exp2((c - base) - 2.0 * c)
    tl.store(partial_ptr + pn * N + rows, r, mask=inside)
    tl.store(partial_ptr + (num_n + pn) * N + rows, s, mask=inside)


@triton.jit(do_not_specialize=["N"])
def _by_descriptor(
    x_desc,
    weight_desc,
    labels_ptr,
    bias_ptr,
    partial_ptr,
    N,
    V,
    H,
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
    """Persistent. Outside of the tensors a descriptor reads zeros."""
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
            acc, pm, pn, num_n, labels_ptr, bias_ptr, partial_ptr, N, V, c, k,
            BLOCK_M, BLOCK_N, SOFTCAP, NEGATIVE, HALVES,
        )  # fmt: skip


@triton.jit(do_not_specialize=["N"])
def _by_pointer(
    x_ptr,
    weight_ptr,
    labels_ptr,
    bias_ptr,
    partial_ptr,
    N,
    V,
    H,
    stride_x,
    stride_w,
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
    """One tile per program. For GPUs before sm_90, where triton does not pipeline descriptors."""
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
        acc, pm, pn, num_n, labels_ptr, bias_ptr, partial_ptr, N, V, c, k,
        BLOCK_M, BLOCK_N, SOFTCAP, NEGATIVE, HALVES,
    )  # fmt: skip


@triton.jit(do_not_specialize=["N"])
def _combine(
    partial_ptr,
    labels_ptr,
    lse_ptr,
    logps_ptr,
    N,
    V,
    num_n,
    c,
    k,
    ROWS: tl.constexpr,
    TILES: tl.constexpr,
    SOFTCAP: tl.constexpr,
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


@functools.cache
def _device(device: torch.device) -> tuple[str, int]:
    """The architecture and the number of multiprocessors."""
    if device.type != "cuda":  # the interpreter
        return "sm_90", 3
    properties = torch.cuda.get_device_properties(device)
    return arch_name(properties), properties.multi_processor_count


def _blocks(size: int, block: int) -> int:
    return -(-size // block)  # triton.cdiv takes microseconds


def made_for(weight: Tensor) -> bool:
    """Whether there is a kernel for this GPU and alignment, and not only the one for any."""
    return rows_are_aligned(weight) and has_config(_device(weight.device)[0])


def why_not(x: Tensor, weight: Tensor, transform) -> str | None:
    """Why `fused_logps` cannot take this head, or None."""
    if x.dtype not in DTYPES or weight.dtype != x.dtype:
        return f"hidden is {x.dtype} and weight {weight.dtype}, not both bfloat16 or both float16"
    if weight.stride(1) != 1:
        return "the weight's rows are not contiguous"
    if transform.scale == 0:
        return "the scale is 0"  # 0 * -inf, where the vocabulary is padded
    return None


def fused_logps(
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    transform,
    stats,
    *,
    chosen: Config | None = None,
) -> None:
    """Fill stats.lse and stats.logps [N], fp32, for the logits x weight^T + bias; nothing else.

    x [N, H] and weight [V, H] bfloat16 or float16; labels [N] int64: negative is an ignored row,
    whose statistics mean nothing, V or more gives NaN; bias [V] of any floating dtype or None;
    transform: scale, softcap, temperature. chosen replaces what `config` would choose. Launches on
    the current device and stream, without host synchronisation; all memory comes from torch.
    ValueError where `why_not` has a reason.
    """
    reason = why_not(x, weight, transform)
    if reason is not None:
        raise ValueError(f"the fused forward pass cannot run: {reason}")
    (n, hidden), vocab = x.shape, weight.shape[0]
    if n == 0:
        return
    labels = labels.contiguous()
    aligned = rows_are_aligned(weight)
    if x.stride(1) != 1 or aligned:
        x = with_aligned_rows(x)
    arch, multiprocessors = _device(x.device)
    capped = transform.softcap is not None
    if chosen is None:
        given = {"softcap": capped, "bias": bias is not None, "aligned": aligned}
        chosen = config(arch, hidden, vocab, x.dtype, **given)
    c = (transform.softcap if capped else transform.scale) * LOG2E / transform.temperature
    k = 2 * LOG2E * transform.scale / transform.softcap if capped else 0.0
    tiles = _blocks(vocab, chosen.block_n)
    bias = padded_bias(bias, weight, tiles * chosen.block_n, transform.scale)
    shape = {
        "BLOCK_M": chosen.block_m,
        "BLOCK_N": chosen.block_n,
        "BLOCK_K": chosen.block_k,
        "GROUP": chosen.group(hidden),
        "SOFTCAP": capped,
        "NEGATIVE": transform.scale < 0,
        "HALVES": chosen.halves,
    }
    most = launch_tokens(chosen, n, vocab)
    scratch = torch.empty((2 * tiles + 1) * most, device=x.device, dtype=torch.float32)
    if chosen.descriptors:
        weight_desc = _descriptor(weight, chosen.block_n, chosen.block_k)
    for start in range(0, n, most):
        part, label = x[start : start + most], labels[start : start + most]
        count = part.shape[0]
        work = _blocks(count, chosen.block_m) * tiles
        if chosen.descriptors:
            _by_descriptor[(min(work, multiprocessors * chosen.per_sm),)](
                _descriptor(part, chosen.block_m, chosen.block_k), weight_desc,
                label, bias, scratch, count, vocab, hidden, c, k,
                **shape, FLATTEN=chosen.flatten, **chosen.options(),
            )  # fmt: skip
        else:
            _by_pointer[(work,)](
                part, weight, label, bias, scratch, count, vocab, hidden,
                part.stride(0), weight.stride(0), c, k,
                **shape, EVEN_H=hidden % chosen.block_k == 0, **chosen.options(),
            )  # fmt: skip
        _combine[(_blocks(count, 32),)](
            scratch, label, stats.lse[start:], stats.logps[start:], count, vocab, tiles, c, k,
            ROWS=32, TILES=64, SOFTCAP=capped, num_warps=4,
        )  # fmt: skip


def _descriptor(matrix: Tensor, rows: int, columns: int) -> TensorDescriptor:
    return TensorDescriptor(matrix, list(matrix.shape), [matrix.stride(0), 1], [rows, columns])
