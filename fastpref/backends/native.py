"""The tile primitives in C++ (csrc/, module fastpref._cpu): fp32, bf16 and fp16 on CPUs.

Tensors cross the boundary as addresses, so the module links no torch. What torch would check is
checked here: device, dtype, unit inner stride. Tensors stay alive in the caller's locals.
"""
# ruff: noqa: F401  the imports complete the contract, `fastpref.backends.tile.Backend`

from __future__ import annotations

from typing import Any

import torch  # before _cpu: both then share the OpenMP pool that torch loads
from torch import Tensor

from fastpref.backends import gemm
from fastpref.backends.gemm import logit_free_forward, logit_free_reason, scale_rows
from fastpref.backends.tile import Stats, Transform, fold_then_grad

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
LOGIT_FREE_BY_DEFAULT = False

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_LOSSES = {"sigmoid": 0, "ipo": 1}
CLOSED_FORMS = frozenset(_LOSSES)


def problem() -> str | None:
    """Why the module cannot run on this machine, or None."""
    return _PROBLEM


def describe() -> str:
    product = "bf16 dot products" if _cpu.have_gemm(True) else "no bf16 dot products"
    return f"C++ row kernels ({_cpu.isa()}, {product}), {torch.get_num_threads()} threads"


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
        torch.get_num_threads(),
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
        torch.get_num_threads(),
    )


fold_grad = fold_then_grad(fold, grad)


def _product(a: Tensor, b: Tensor, out: Tensor) -> tuple | None:
    """The arguments of `_cpu.gemm` for out [m, n] = a [m, k] @ b [n, k]^T; None: torch's is better.

    bf16 operands with fp32 results: torch would round them. fp32: only where torch is slow.
    """
    bf16 = a.dtype == torch.bfloat16
    if a.dtype != b.dtype or out.dtype != torch.float32 or not (bf16 or a.dtype == out.dtype):
        return None
    if not (_cpu.have_gemm(True) if bf16 else _cpu.gemm_beats_library()):
        return None
    if 1 not in a.stride() or 1 not in b.stride() or out.stride(1) != 1 or 0 in out.shape:
        return None
    operands = a.data_ptr(), *a.stride(), b.data_ptr(), *b.stride()
    return *operands, *_rows(out), *out.shape, a.shape[1], bf16, torch.get_num_threads()


def linear(x: Tensor, weight: Tensor, out: Tensor, bias: Tensor | None = None) -> None:
    """As `Backend.linear`."""
    product = _product(x, weight, out)
    if product is None:
        gemm.linear(x, weight, out, bias)
        return
    _cpu.gemm(*product)
    if bias is not None:
        out += bias


def project(d: Tensor, weight: Tensor, out: Tensor) -> None:
    """As `Backend.project`."""
    product = _product(d, weight.t(), out)
    if product is None:
        gemm.project(d, weight, out)
    else:
        _cpu.gemm(*product)


def outer(d: Tensor, x: Tensor, out: Tensor) -> None:
    """As `Backend.outer`."""
    product = _product(d.t(), x.t(), out)
    if product is None:
        gemm.outer(d, x, out)
    else:
        _cpu.gemm(*product)


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
    """As `Backend.pair_loss`."""
    loss, dlogp = logps.new_empty(()), torch.empty_like(logps)
    sequences, rewards = logps.new_empty(2 * pairs), logps.new_empty(2 * pairs)
    _cpu.pair_loss(
        _LOSSES[loss_type],
        logps.shape[0],
        pairs,
        _vector(logps),
        _vector(sequence_ids, torch.int64),
        *(_vector(t) for t in (ref_logps, lengths, weight, margin)),
        beta,
        label_smoothing,
        *(_vector(t) for t in (loss, sequences, rewards, dlogp)),
    )
    return loss, sequences, rewards, dlogp
