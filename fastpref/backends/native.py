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

from fastpref.backends import gemm
from fastpref.backends.gemm import scale_rows
from fastpref.backends.processor import bf16_is_fast
from fastpref.backends.tile import PAIR_FORMS, Stats, Transform, fold_then_grad

_cpu: Any = None
_PROBLEM: str | None = None
try:
    from fastpref import _cpu  # type: ignore[no-redef]
except ImportError as error:
    _PROBLEM = (
        f"fastpref._cpu is not built ({error}); install a C++ compiler and run "
        "pip install --force-reinstall --no-deps fastpref"
    )

NAME = "native"
LOGIT_FREE_BY_DEFAULT = True
PROJECTS_AT_ONCE = True

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
CLOSED_FORMS = frozenset(PAIR_FORMS)


# Whether the kernels have had threads, and whether those stayed behind in a parent process.
_had_threads = _lost_threads = False


def _note_fork() -> None:
    global _lost_threads
    _lost_threads = _had_threads


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_note_fork)


def _threads() -> int:
    """How many threads a kernel takes: torch's number.

    A process that was forked after its parent's kernels had threads takes one: OpenMP would wait
    for the parent's threads, which it does not have, for ever.
    """
    global _had_threads
    threads = 1 if _lost_threads else torch.get_num_threads()
    _had_threads = _had_threads or threads > 1
    return threads


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


def _rows(t: Tensor) -> tuple[int, int]:
    """Address and row stride of a matrix, whose columns must be adjacent."""
    assert t.dim() == 2 and t.device.type == "cpu" and (t.stride(1) == 1 or t.shape[1] <= 1)
    return t.data_ptr(), t.stride(0)


def _vector(t: Tensor | None, dtype: torch.dtype = torch.float32) -> int:
    if t is None:
        return 0
    assert t.dtype == dtype and t.device.type == "cpu" and t.is_contiguous()
    return t.data_ptr()


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
    # torch rounds the products of 16-bit matrices, and is slow without bf16 units.
    has_units = dtype == torch.bfloat16 and bf16_is_fast("cpu")
    exact = fastest in ("amx_bf16", "avx512_bf16")  # at the units' rate
    return None if has_units and (out == dtype or not exact) else fastest


def _product_arguments(a: Tensor, b: Tensor, out: Tensor, kernel: str) -> tuple:
    """The arguments of `_cpu.product` for out [m, n] = a [m, k] @ b [n, k]^T."""
    operands = a.data_ptr(), *a.stride(), b.data_ptr(), *b.stride(), _DTYPES[a.dtype]
    address, stride = _rows(out)
    result = address, _DTYPES[out.dtype], stride, *out.shape, a.shape[1]
    return *operands, *result, kernel, _threads()


def _product(a: Tensor, b: Tensor, out: Tensor) -> tuple | None:
    """`_product_arguments` with the kernel of these dtypes; None: torch's product is better."""
    if a.dtype != b.dtype or 0 in out.shape:
        return None
    kernel = product_kernel(a.dtype, out.dtype)
    if kernel is None or 1 not in a.stride() or 1 not in b.stride() or out.stride(1) != 1:
        return None
    return _product_arguments(a, b, out, kernel)


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
    asked: bool = False,
) -> str | None:
    """As `Backend.logit_free_reason`; the pass has the statistics of all extras."""
    if weight.dtype == torch.float16 and with_d:
        return "the weight is float16, whose exponents are too few for an unnormalised D"
    if product_kernel(weight.dtype, torch.float32) is None and not asked:
        return "torch's products are faster on this processor"
    if weight.shape[1] > _cpu.finish_words:
        return f"the hidden size is more than {_cpu.finish_words}"
    if transform.scale == 0:
        return "the scale is 0"  # 0 * -inf, where the vocabulary is padded
    return None


# What a logit-free pass keeps in scratch memory at most, if it keeps more than 512 tokens' part.
SCRATCH_BYTES = 2**25
# COLUMN_BLOCK and SLICE of csrc/product.h: entries of the vocabulary that are folded together, and
# those whose D stands in memory where it is multiplied at once.
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


def column_sums(d: Tensor, row_scale: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """As `Backend.column_sums`."""
    rows, cols = d.shape
    squares, totals, row_sums = (torch.empty(size) for size in (cols, cols, rows))
    address, stride = _rows(d)
    sums = map(_vector, (row_scale, squares, totals, row_sums))
    _cpu.column_sums(address, _DTYPES[d.dtype], rows, cols, stride, *sums, _threads())
    return squares, totals, row_sums


def gather_columns(
    d: Tensor,
    index: Tensor,
    kept: Tensor,
    factor: Tensor,
    mean: Tensor,
    row_sums: Tensor,
    out: Tensor,
) -> Tensor:
    """As `Backend.gather_columns`; the kept columns come first."""
    assert out.dtype == d.dtype and out.shape == (d.shape[0], index.shape[0] + 1)
    rest = torch.empty_like(row_sums)
    address, stride = _rows(d)
    _cpu.gather_columns(
        address,
        _DTYPES[d.dtype],
        d.shape[0],
        stride,
        _vector(index, torch.int64),
        index.shape[0],
        int(kept.sum()),
        *map(_vector, (factor, mean, row_sums)),
        *_rows(out),
        _vector(rest),
        _threads(),
    )
    return rest


def weighted_rows(q: Tensor, weight: Tensor) -> Tensor:
    """As `Backend.weighted_rows`."""
    out = torch.empty(weight.shape[1])
    address, stride = _rows(weight)
    kind = _DTYPES[weight.dtype]
    vectors = _vector(q), _vector(out)
    _cpu.weighted_rows(address, kind, *weight.shape, stride, *vectors, _threads())
    return out


def gather_rows(weight: Tensor, index: Tensor, last: Tensor, out: Tensor) -> None:
    """As `Backend.gather_rows`."""
    assert out.is_contiguous() and out.dtype == weight.dtype
    address, stride = _rows(weight)
    kind, hidden = _DTYPES[weight.dtype], weight.shape[1]
    rows = _vector(index, torch.int64), index.shape[0], _vector(last), out.data_ptr()
    _cpu.gather_rows(address, kind, hidden, stride, *rows, _threads())


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
