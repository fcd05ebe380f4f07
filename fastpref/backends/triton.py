"""The tile primitives in Triton (kernels/): NVIDIA GPUs from Ampere on and AMD's, no compiler.

Triton is imported when it is first needed, so that a machine without it can import fastpref. The
kernels run on the current stream of the tensors' device; nothing here waits for the GPU.
"""
# ruff: noqa: F401  the imports complete the contract, `fastpref.backends.tile.Backend`

from __future__ import annotations

import functools
import importlib.util
import os
import warnings
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from fastpref.backends.column_choice import choose_columns
from fastpref.backends.columns import (
    gather_columns,
    project_rows,
    weighted_rows,
)
from fastpref.backends.gemm import linear, outer, project, scale_rows
from fastpref.backends.stats import Stats
from fastpref.backends.tile import Transform, fold_then_grad

NAME = "triton"
CLOSED_FORMS = frozenset({"sigmoid", "ipo"})
LOGIT_FREE_BY_DEFAULT = False  # not measured on a GPU yet
PROJECTS_AT_ONCE = False

_DTYPES = frozenset({torch.float32, torch.bfloat16, torch.float16})
_OLDEST = (3, 4)
_OLDEST_GPU = (8, 0)
_NOWHERE = nullcontext()

# Bytes of a row from which on -> lanes of a program. Many lanes hide the memory's latency where
# rows are few; short rows would leave them idle.
_LANES = ((65536, 512), (16384, 256), (4096, 128), (0, 64))
# Columns that a lane takes per block of fold: always the same, for a row's sum must not depend on
# which extras are computed.
_FOLD_COLUMNS = 16
# Rows and columns that a program adds up at a time: 256 bytes of a 16-bit row, in 4 warps.
_SUM_ROWS, _SUM_COLUMNS = 16, 128
_PAIR_TOKENS, _PAIR_SEQUENCES, _PAIR_LANES = 2048, 256, 256


@functools.cache
def _load() -> tuple[Any, str | None]:
    """fastpref.kernels with its modules imported, or why they cannot be."""
    try:
        import triton

        version = tuple(int(part) for part in triton.__version__.split(".")[:2])
        if version < _OLDEST:
            return None, f"triton {triton.__version__} is too old, 3.4 is needed"
        import fastpref.kernels.columns
        import fastpref.kernels.forward
        import fastpref.kernels.pairs
        import fastpref.kernels.rows
    except Exception as error:  # a broken installation may raise anything
        return None, f"triton cannot be imported: {type(error).__name__}: {error}"
    return fastpref.kernels, None


def _kernels() -> Any:
    return _load()[0]


@functools.cache
def _interpreted() -> bool:
    """Whether the kernels were imported under TRITON_INTERPRET=1 and so run on the CPU."""
    from triton import JITFunction

    return not isinstance(_kernels().rows.fold, JITFunction)


@functools.cache
def problem() -> str | None:
    """Why the kernels cannot run on this machine, or None."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed; run pip install triton"
    if not (os.environ.get("TRITON_INTERPRET") == "1" or torch.cuda.is_available()):
        return "torch finds no GPU"
    return _load()[1]


def describe() -> str:
    import triton

    where = "the interpreter" if _interpreted() else torch.cuda.get_device_name()
    return f"Triton {triton.__version__} kernels on {where}"


@functools.cache
def _gpu_problem(index: int | None) -> str | None:
    if torch.version.hip is None and torch.cuda.get_device_capability(index) < _OLDEST_GPU:
        return f"{torch.cuda.get_device_name(index)} is too old, compute capability 8.0 is needed"
    return None


def unavailable_reason(device: torch.device, dtype: torch.dtype) -> str | None:
    """As `Backend.unavailable_reason`."""
    reason = problem()
    if reason is not None:
        return reason
    if device.type == "cpu" and not _interpreted():
        return (
            "the triton backend has no kernels for cpu tensors; TRITON_INTERPRET=1, set before "
            "they are imported, runs them in Triton's interpreter, for tests"
        )
    if device.type not in ("cpu", "cuda"):
        return f"the triton backend has no kernels for {device.type} tensors"
    if dtype not in _DTYPES:
        return f"the triton backend has no {str(dtype)[6:]} kernels; use backend='eager'"
    return None if device.type == "cpu" else _gpu_problem(device.index)


@functools.cache
def _warp_size(device: torch.device) -> int:
    if device.type == "cpu":
        return 32
    return getattr(torch.cuda.get_device_properties(device), "warp_size", 32)


@functools.cache
def _shape(
    columns: int, itemsize: int, aligned: bool, per_lane: int, device: torch.device
) -> tuple[int, int, int, int]:
    """REPEAT, LANES, VECTOR and the number of warps for rows of so many columns."""
    lanes = next(n for size, n in _LANES if columns * itemsize >= size)
    if not aligned:
        lanes = min(lanes, 256)  # one address per column takes registers
    vector = 16 // itemsize if aligned else 1
    return per_lane // vector, lanes, vector, lanes // _warp_size(device)


def _grad_columns(aligned: bool, size: int, heavy: bool) -> int:
    """Columns that a lane takes per block of grad: fewer where more would take the registers that a
    second program on the same multiprocessor needs."""
    return 8 if not aligned or (heavy and size == 4) else 16


def _aligned(t: Tensor, vector: int) -> bool:
    """Whether every row starts at a multiple of vector elements, and the first at 16 bytes."""
    return t.stride(0) % vector == 0 and t.data_ptr() % 16 == 0


@contextmanager
def _in_interpreter():
    """NumPy does the arithmetic there. It warns of NaN and inf, which a GPU takes as they come, and
    of how older interpreters use it."""
    import numpy

    with numpy.errstate(all="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _on(device: torch.device):
    """The context in which kernels for tensors of this device are launched."""
    if device.type == "cpu":
        return _in_interpreter()
    if device.index == torch.cuda.current_device():
        return _NOWHERE
    return torch.cuda.device(device)


def _factors(t: Transform) -> tuple[float | None, float | None]:
    """inner and outer of z = outer tanh(inner raw); None where they are left out."""
    if t.softcap is not None:
        return t.scale / t.softcap, t.softcap / t.temperature
    factor = t.scale / t.temperature
    return None, None if factor == 1.0 else factor


def _check(tile: Tensor, labels: Tensor, *vectors: Tensor | None) -> None:
    """Assert the shapes, strides and dtypes that the kernels rely on.

    The public functions have checked the user's arguments before.
    """
    n = tile.shape[0]
    assert tile.dtype in _DTYPES and (tile.stride(1) == 1 or tile.shape[1] <= 1)
    assert labels.dtype == torch.int64 and labels.numel() == n and labels.is_contiguous()
    assert labels.device == tile.device
    for t in vectors:
        assert t is None or (t.dtype == torch.float32 and t.numel() == n and t.is_contiguous())


def column_sums(d: Tensor, row_scale: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """As `Backend.column_sums`."""
    rows, columns = d.shape
    programs = -(-columns // _SUM_COLUMNS)
    squares, totals = (torch.empty(columns, device=d.device) for _ in range(2))
    parts = torch.empty((rows, programs), device=d.device)
    with _on(d.device):
        _kernels().columns.column_sums[(programs,)](
            d,
            row_scale,
            squares,
            totals,
            parts,
            rows,
            columns,
            d.stride(0),
            _SUM_ROWS,
            _SUM_COLUMNS,
            num_warps=4,
        )
    return squares, totals, parts.sum(1)


def fold(tile: Tensor, labels: Tensor, col0: int, stats: Stats, transform: Transform) -> None:
    """As `Backend.fold`."""
    s = stats
    sums = s.max, s.sum, s.target, s.lse, s.logps, s.weighted, s.total, s.squared
    _check(tile, labels, *sums)
    rows, columns = tile.shape
    if rows == 0 or columns == 0:
        return
    size, device = tile.element_size(), tile.device
    aligned = _aligned(tile, 16 // size)
    repeat, lanes, vector, warps = _shape(columns, size, aligned, _FOLD_COLUMNS, device)
    with _on(device):
        _kernels().rows.fold[(rows,)](
            tile,
            labels,
            *sums,
            s.argmax,
            tile.stride(0) // vector,
            columns,
            col0,
            *_factors(transform),
            col0 == 0,
            repeat,
            lanes,
            vector,
            num_warps=warps,
            enable_fp_fusion=False,
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
    _check(tile, labels, lse, logps, dlogp, entropy, dentropy)
    assert d.shape == tile.shape and (d.stride(1) == 1 or d.shape[1] <= 1)
    assert (entropy is None) == (dentropy is None)
    rows, columns = tile.shape
    if rows == 0 or columns == 0:
        return
    size, device = tile.element_size(), tile.device
    aligned = _aligned(tile, 16 // size) and _aligned(d, 16 // size)
    heavy = transform.softcap is not None or entropy is not None
    per_lane = _grad_columns(aligned, size, heavy)
    repeat, lanes, vector, warps = _shape(columns, size, aligned, per_lane, device)
    with _on(device):
        _kernels().rows.grad[(rows,)](
            tile,
            labels,
            lse,
            logps,
            dlogp,
            entropy,
            dentropy,
            d,
            tile.stride(0) // vector,
            d.stride(0) // vector,
            columns,
            col0,
            *_factors(transform),
            repeat,
            lanes,
            vector,
            num_warps=warps,
            enable_fp_fusion=False,
        )


fold_grad = fold_then_grad(fold, grad)


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
    """As `Backend.pair_loss`: one launch, whatever the order of the tokens."""
    vectors = (logps, ref_logps, lengths, weight, margin)
    assert all(t is None or (t.dtype == torch.float32 and t.is_contiguous()) for t in vectors)
    assert sequence_ids.dtype == torch.int64 and sequence_ids.is_contiguous()
    ipo = loss_type == "ipo"
    loss, dlogp = logps.new_empty(()), torch.empty_like(logps)
    sequences, rewards, slopes = (logps.new_empty(2 * pairs) for _ in range(3))
    with _on(logps.device):
        _kernels().pairs.pair_loss[(1,)](
            logps,
            sequence_ids,
            *vectors[1:],
            loss,
            sequences,
            rewards,
            slopes,
            dlogp,
            logps.shape[0],
            pairs,
            float(beta),  # an int would be compiled in
            float(0.5 / beta if ipo else label_smoothing),
            ipo,
            _PAIR_TOKENS,
            _PAIR_SEQUENCES,
            num_warps=_PAIR_LANES // _warp_size(logps.device),
            enable_fp_fusion=False,
        )
    return loss, sequences, rewards, dlogp


def logit_free_reason(
    weight: Tensor,
    transform: Transform,
    extras: tuple[str, ...] = (),
    with_d: bool = True,
    required: bool = False,
) -> str | None:
    """As `Backend.logit_free_reason`."""
    if extras:
        return "the triton backend's logit-free product has no extras"
    return _kernels().forward.logit_free_reason(weight, transform, with_d, required)


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
    """As `Backend.logit_free_forward`."""
    assert u is None and (d is None or (d.dtype == x.dtype and _aligned(d, 8)))
    with _on(x.device):
        _kernels().forward.fused_logps(x, weight, labels, bias, transform, stats, d, row_scale)
