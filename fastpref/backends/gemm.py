"""The three products of the head with torch's GEMMs, and the scaling of rows, on any device.

torch has no logit-free product. Each product writes its output once. Where the output is wider than
the inputs, or the device has no fast GEMM for the inputs' dtype, slices of the operands are widened
one at a time: never a whole weight.
"""

from __future__ import annotations

import contextlib
import threading
from collections import Counter
from collections.abc import Iterator
from typing import Any, NoReturn

import torch
from torch import Tensor

# Vocabulary rows widened at a time: on a CPU 4 MiB at H = 1024, which stay in cache; on a GPU many,
# to keep it busy.
_SLICE = {"cpu": 1024, "cuda": 16384}

# State of `_full_sums`, whose settings are the whole process's: for each setting the number of open
# `with` blocks, and its value before the first of them.
_lock = threading.Lock()
_users: Counter[str] = Counter()
_restored: dict[str, Any] = {}


def _gemm_dtype(x: Tensor) -> torch.dtype:
    """fp16 has no fast GEMM on CPUs (measured: 1 to 28 GFLOP/s where fp32 does 180)."""
    return torch.float32 if x.dtype == torch.float16 and x.device.type == "cpu" else x.dtype


def _has_wide_gemm(x: Tensor) -> bool:
    """Whether torch multiplies 16-bit matrices into fp32 here: on NVIDIA GPUs, not on AMD's."""
    return x.is_cuda and torch.version.hip is None


def _slices(size: int, x: Tensor) -> Iterator[tuple[int, int]]:
    step = _SLICE.get(x.device.type, 1024)
    return ((i, min(i + step, size)) for i in range(0, size, step))


def linear(x: Tensor, weight: Tensor, out: Tensor, bias: Tensor | None = None) -> None:
    """As `Backend.linear`."""
    dtype = torch.promote_types(out.dtype, _gemm_dtype(x))
    if x.dtype == out.dtype == dtype:
        if bias is None:
            _mm(x, weight.t(), out)
        else:
            with _full_sums(x):
                torch.addmm(bias.to(dtype), x, weight.t(), out=out)
        return
    if _has_wide_gemm(x) and out.dtype == torch.float32:
        torch.mm(x, weight.t(), out_dtype=torch.float32, out=out)
        if bias is not None:
            out += bias
        return
    x = x.to(dtype)
    for a, b in _slices(weight.shape[0], weight):
        tile = out[:, a:b] if out.dtype == dtype else x.new_empty((x.shape[0], b - a))
        torch.mm(x, weight[a:b].to(dtype).t(), out=tile)
        if bias is not None:
            tile += bias[a:b]
        if out.dtype != dtype:
            out[:, a:b] = tile


@contextlib.contextmanager
def _full_sums(a: Tensor) -> Iterator[None]:
    """The context in which a GPU accumulates products of 16-bit matrices in fp32 throughout.

    By default torch lets the partial sums of a long product be added in 16 bits.
    """
    if not (a.is_cuda and a.dtype.itemsize == 2):
        yield
        return
    settings = torch.backends.cuda.matmul
    name = f"allow_{'bf16' if a.dtype == torch.bfloat16 else 'fp16'}_reduced_precision_reduction"
    with _lock:
        if not _users[name]:
            split_k = getattr(settings, f"{name}_split_k", None)  # newer torch: a second half
            more = () if split_k is None else (split_k,)
            before = getattr(settings, name)
            _restored[name] = (before, *more) if more else before
            setattr(settings, name, (False, *more) if more else False)
        _users[name] += 1
    try:
        yield
    finally:
        with _lock:
            _users[name] -= 1
            if not _users[name]:
                setattr(settings, name, _restored[name])


def _mm(a: Tensor, b: Tensor, out: Tensor) -> None:
    with _full_sums(a):
        torch.mm(a, b, out=out)


def project(d: Tensor, weight: Tensor, out: Tensor) -> None:
    """As `Backend.project`."""
    dtype = torch.promote_types(out.dtype, _gemm_dtype(d))
    if d.dtype == out.dtype == dtype:
        _mm(d, weight, out)
    elif _has_wide_gemm(d) and out.dtype == torch.float32:
        torch.mm(d, weight, out_dtype=torch.float32, out=out)
    else:
        total = torch.zeros(out.shape, dtype=dtype, device=out.device)
        for a, b in _slices(weight.shape[0], weight):
            total.addmm_(d[:, a:b].to(dtype), weight[a:b].to(dtype))
        out.copy_(total)


def outer(d: Tensor, x: Tensor, out: Tensor) -> None:
    """As `Backend.outer`."""
    dtype = torch.promote_types(out.dtype, _gemm_dtype(d))
    if d.dtype == out.dtype == dtype:
        _mm(d.t(), x, out)
    elif _has_wide_gemm(d) and out.dtype == torch.float32:
        torch.mm(d.t(), x, out_dtype=torch.float32, out=out)
    else:
        x = x.to(dtype)
        for a, b in _slices(out.shape[0], out):
            out[a:b] = torch.mm(d[:, a:b].to(dtype).t(), x)


def scale_rows(x: Tensor, row_scale: Tensor, out: Tensor) -> None:
    """As `Backend.scale_rows`."""
    if x.device.type != "cpu":
        torch.mul(x, row_scale[:, None], out=out)  # one launch, no temporary
        return
    for a in range(0, x.shape[0], 256):  # the product is wider than x: in blocks
        out[a : a + 256] = x[a : a + 256] * row_scale[a : a + 256, None]


def logit_free_reason(*_: object, **__: object) -> str | None:
    """As `Backend.logit_free_reason`."""
    return "this backend has no logit-free product"


def logit_free_forward(*_: object, **__: object) -> NoReturn:
    """As `Backend.logit_free_forward`: never called, since there is always a reason."""
    raise NotImplementedError(logit_free_reason())
