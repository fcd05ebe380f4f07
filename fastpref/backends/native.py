"""The tile primitives in C++ (csrc/, module fastpref._cpu): fp32, bf16 and fp16 on CPUs.

Tensors cross the boundary as addresses, so the module links no torch. What torch would check is
checked here: device, dtype, unit inner stride. Tensors stay alive in the caller's locals.
"""
# ruff: noqa: F401  the imports complete the contract, `fastpref.backends.tile.Backend`

from __future__ import annotations

import functools
import os
from typing import Any

import torch  # before _cpu: both then share the OpenMP pool that torch loads
from torch import Tensor

from fastpref.backends import columns, gemm
from fastpref.backends.gemm import scale_rows
from fastpref.backends.native_columns import (
    choose_columns,
    column_sums,
    gather_columns,
    weighted_rows,
)
from fastpref.backends.native_module import DTYPES as _DTYPES
from fastpref.backends.native_module import MODULE as _cpu
from fastpref.backends.native_module import PROBLEM as _PROBLEM
from fastpref.backends.native_module import rows_of as _rows
from fastpref.backends.native_module import threads as _threads
from fastpref.backends.native_module import vector as _vector
from fastpref.backends.processor import bf16_is_fast
from fastpref.backends.stats import Stats
from fastpref.backends.tile import PAIR_FORMS, Transform, fold_then_grad

NAME = "native"
LOGIT_FREE_BY_DEFAULT = True
PROJECTS_AT_ONCE = True

CLOSED_FORMS = frozenset(PAIR_FORMS)


def problem() -> str | None:
    """Why the module cannot run on this machine, or None."""
    return _PROBLEM


def describe() -> str:
    products = ", ".join(
        f"{str(dtype)[6:]}: {product_kernel(dtype, torch.float32) or 'torch'}" for dtype in _DTYPES
    )
    threads = torch.get_num_threads()
    return f"C++ row kernels ({_cpu.isa()}), products ({products}), {threads} threads"


def unavailable_reason(device: torch.device, dtype: torch.dtype) -> str | None:
    """As `Backend.unavailable_reason`."""
    if _PROBLEM is not None:
        return _PROBLEM
    if device.type != "cpu":
        return f"the native backend has no kernels for {device.type} tensors"
    if dtype not in _DTYPES:
        return f"the native backend has no {str(dtype)[6:]} kernels; use backend='eager'"
    return None


def _tile(tile: Tensor, labels: Tensor, col0: int, transform: Transform) -> tuple:
    data, stride = _rows(tile)
    assert labels.shape[0] == tile.shape[0]
    return (
        data,
        _DTYPES[tile.dtype],
        *tile.shape,
        stride,
        col0,
        _vector(labels, torch.int64),
        transform.scale,
        transform.softcap or 0.0,
        1.0 / transform.temperature,
    )


def fold(tile: Tensor, labels: Tensor, col0: int, stats: Stats, transform: Transform) -> None:
    """As `Backend.fold`."""
    _cpu.fold(
        *_tile(tile, labels, col0, transform),
        *map(_vector, stats[:-1]),
        _vector(stats.argmax, torch.int64),
        _threads(),
    )


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
    address, stride = _rows(d)
    assert d.shape == tile.shape
    assert tile.dtype == torch.float32 or d.dtype in (tile.dtype, torch.float32)
    _cpu.grad(
        *_tile(tile, labels, col0, transform),
        _vector(lse),
        _vector(logps),
        _vector(dlogp),
        _vector(entropy),
        _vector(dentropy),
        address,
        _DTYPES[d.dtype],
        stride,
        _threads(),
    )


fold_grad = fold_then_grad(fold, grad)


@functools.cache
def _product_kernels(dtype: torch.dtype) -> tuple[str, ...]:
    """The micro-kernels of this processor for operands of this dtype, the fastest first."""
    return tuple(_cpu.product_kernels(_DTYPES[dtype])) if dtype in _DTYPES else ()


@functools.cache
def product_kernel(dtype: torch.dtype, out: torch.dtype) -> str | None:
    """The micro-kernel for these dtypes of operands and product; None: torch's product is better.

    The choice is the same in every process on a machine: results would differ in their last bits.
    """
    if out not in (dtype, torch.float32) or not (kernels := _product_kernels(dtype)):
        return None
    fastest = kernels[0]
    if fastest in ("neon", "portable"):  # a fallback where torch has no such product at all
        return fastest if dtype != torch.float32 and out == torch.float32 else None
    if dtype == torch.float32:
        return fastest if _cpu.is_amd() else None
    if not (dtype == torch.bfloat16 and bf16_is_fast("cpu")):
        return fastest  # torch is slow without bf16 units
    if fastest not in ("amx_bf16", "avx512_bf16"):
        return None  # torch's runs at the units' rate, ours would not
    # torch rounds its products to 16 bits, and its library serves AMD's processors badly.
    return None if out == dtype and not _cpu.is_amd() else fastest


def _product_arguments(
    a: Tensor,
    b: Tensor,
    out: Tensor,
    kernel: str,
    index: Tensor | None = None,
    last: Tensor | None = None,
) -> tuple:
    """The arguments of `_cpu.product` for out [m, n] = a [m, k] @ b [n, k]^T.

    index: these columns of b instead, and after them `last` [n] if it is given: k in all.
    """
    operands = a.data_ptr(), *a.stride(), b.data_ptr(), *b.stride(), _DTYPES[a.dtype]
    address, stride = _rows(out)
    result = address, _DTYPES[out.dtype], stride, *out.shape, a.shape[1]
    scattered = _vector(index, torch.int64), 0 if last is None else last.data_ptr()
    return *operands, *result, *scattered, kernel, _threads()


def _product(a: Tensor, b: Tensor, out: Tensor, *scattered: Tensor | None) -> tuple | None:
    """`_product_arguments` with the kernel of these dtypes; None: torch's product is better."""
    if a.dtype != b.dtype or 0 in out.shape:
        return None
    kernel = product_kernel(a.dtype, out.dtype)
    if kernel is None or 1 not in a.stride() or 1 not in b.stride() or out.stride(1) != 1:
        return None
    return _product_arguments(a, b, out, kernel, *scattered)


def own_product(x: Tensor, weight: Tensor, out: Tensor) -> None:
    """out = x weight^T with the native product, wherever torch's may be better."""
    _cpu.product(*_product_arguments(x, weight, out, _product_kernels(x.dtype)[0]))


def peak_rate(dtype: torch.dtype, seconds: float = 0.05) -> float:
    """FLOP/s that no product of this dtype exceeds on this processor with torch's threads.

    It is the rate of the fastest micro-kernel's multiply-adds on packed operands in the first
    cache.
    """
    kernel, threads = _product_kernels(dtype)[0], _threads()
    return _cpu.peak_rate(_DTYPES[dtype], kernel, threads, seconds)


def linear(x: Tensor, weight: Tensor, out: Tensor, bias: Tensor | None = None) -> None:
    """As `Backend.linear`."""
    product = _product(x, weight, out)
    if product is None:
        gemm.linear(x, weight, out, bias)
        return
    _cpu.product(*product)
    if bias is not None:
        out += bias


def project(d: Tensor, weight: Tensor, out: Tensor) -> None:
    """As `Backend.project`."""
    product = _product(d, weight.t(), out)
    if product is None:
        gemm.project(d, weight, out)
    else:
        _cpu.product(*product)


def project_rows(
    d: Tensor, weight: Tensor, index: Tensor, last: Tensor | None, memory: Tensor, out: Tensor
) -> None:
    """As `Backend.project_rows`."""
    count = index.shape[0]
    assert d.shape[1] == count + (last is not None)
    row = None if last is None else last.to(weight.dtype).contiguous()
    # C++ takes rows whose elements are adjacent, and at least one.
    adjacent = count > 0 and weight.stride(1) == 1
    product = _product(d, weight.t(), out, index, row) if adjacent else None
    if product is None:
        columns.project_rows(d, weight, index, last, memory, out)
    else:
        _cpu.product(*product)


def outer(d: Tensor, x: Tensor, out: Tensor) -> None:
    """As `Backend.outer`."""
    product = _product(d.t(), x.t(), out)
    if product is None:
        gemm.outer(d, x, out)
    else:
        _cpu.product(*product)


def logit_free_reason(
    weight: Tensor,
    transform: Transform,
    extras: tuple[str, ...] = (),
    with_d: bool = True,
    required: bool = False,
) -> str | None:
    """As `Backend.logit_free_reason`; the pass has the statistics of all extras."""
    if weight.dtype == torch.float16 and with_d:
        return "the weight is float16, whose exponents are too few for an unnormalised D"
    if product_kernel(weight.dtype, torch.float32) is None and not required:
        return "torch's products are faster on this processor"
    if weight.shape[1] > _cpu.finish_words:
        return f"the hidden size is more than {_cpu.finish_words}"
    if transform.scale == 0:
        return "the scale is 0"  # 0 * -inf, where the vocabulary is padded
    return None


# The most scratch memory of a logit-free pass. Where 512 tokens need more, it takes more.
SCRATCH_BYTES = 2**25
# COLUMN_BLOCK and SLICE of csrc/product.h: entries of the vocabulary that are folded together, and
# entries whose D is in memory at a time where D is multiplied at once.
COLUMN_BLOCK, SLICE = 512, 2048


def scratch_bytes_of_token(
    hidden: int, vocab: int, itemsize: int, extras: bool, projects: bool
) -> int:
    """Bytes for each token: statistics of its blocks, and with u its part of D and its sums."""
    blocks = -(-vocab // COLUMN_BLOCK) * (16 + (64 if extras else 0))
    return blocks + (SLICE * itemsize + 4 * hidden if projects else 0)


def logit_free_forward(
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    stats: Stats,
    transform: Transform,
    d: Tensor | None = None,
    row_scale: Tensor | None = None,
    u: Tensor | None = None,
) -> None:
    """As `Backend.logit_free_forward`: the same statistics with d, with u and with neither.

    It takes so many tokens at a time as the scratch memory allows. Labels that are negative or V
    and more give NaN.
    """
    assert all(t is None or t.dtype == x.dtype for t in (weight, d, u))
    kernel = product_kernel(x.dtype, torch.float32) or _product_kernels(x.dtype)[0]
    bias = None if bias is None else bias.float().contiguous()
    extras = stats.weighted is not None or stats.argmax is not None
    vocab, hidden = weight.shape
    token_bytes = scratch_bytes_of_token(hidden, vocab, x.dtype.itemsize, extras, u is not None)
    step = max(SCRATCH_BYTES // max(token_bytes, 1), 512)
    for start in range(0, x.shape[0], step):
        rows = slice(start, start + step)
        part = stats.rows(start, min(start + step, x.shape[0]))
        block = x[rows] if x.stride(1) == 1 else x[rows].contiguous()
        _cpu.logit_free_forward(
            *_rows(block),
            *_rows(weight),
            _DTYPES[x.dtype],
            block.shape[0],
            *weight.shape,
            _vector(labels[rows], torch.int64),
            _vector(bias),
            transform.scale,
            transform.softcap or 0.0,
            1.0 / transform.temperature,
            *map(_vector, part[:-1]),
            _vector(part.argmax, torch.int64),
            *((0, 0) if d is None else _rows(d[rows])),
            0 if row_scale is None else _vector(row_scale[rows]),
            *((0, 0) if u is None else _rows(u[rows])),
            kernel,
            _threads(),
        )


def pair_loss(
    logps: Tensor,
    sequence_ids: Tensor,
    pairs: int,
    ref_logps: Tensor | None,
    loss_type: str,
    beta: float,
    label_smoothing: float,
    lengths: Tensor | None,
    weight: Tensor | None,
    margin: Tensor | None,
    option: float = 0.0,
    shape: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `Backend.pair_loss`: the sums in one pass over the tokens, in their order."""
    loss, dlogp = logps.new_empty(()), torch.empty_like(logps)
    sequences, rewards = logps.new_empty(2 * pairs), logps.new_empty(2 * pairs)
    _cpu.pair_loss(
        PAIR_FORMS.index(loss_type),
        logps.shape[0],
        pairs,
        _vector(logps),
        _vector(sequence_ids, torch.int64),
        *(_vector(t) for t in (ref_logps, lengths, weight, margin)),
        beta,
        label_smoothing,
        option,
        shape,
        *(_vector(t) for t in (loss, sequences, rewards, dlogp)),
    )
    return loss, sequences, rewards, dlogp
