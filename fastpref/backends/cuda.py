"""The tile primitives in CUDA C++ (csrc/cuda/, module fastpref._cuda): NVIDIA GPUs from Ampere on.

The module is built where nvcc is found when fastpref is installed. As with `native`, tensors cross
the boundary as addresses, so it links no torch; its launches are on torch's current stream of the
tensors' device, allocate nothing and wait for nothing. It has a CUDA runtime of its own beside
torch's: both work in the device's primary context, where addresses and streams mean the same.

The products are torch's. A pass without gradients in one kernel, `linear_logps`, is Triton's.
"""

from __future__ import annotations

import functools
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from fastpref.backends import triton
from fastpref.backends.gemm import linear, outer, project, scale_rows
from fastpref.backends.tile import Stats, Transform

_cuda: Any = None
_PROBLEM: str | None = None
try:
    from fastpref import _cuda  # type: ignore[no-redef]
except ImportError as error:
    _PROBLEM = (
        f"fastpref._cuda is not built ({error}); install the CUDA toolkit, with nvcc, and run "
        "pip install --force-reinstall --no-deps fastpref"
    )

NAME = "cuda"
__all__ = [
    "CLOSED_FORMS",
    "NAME",
    "describe",
    "fold",
    "fold_grad",
    "fused_is_fast",
    "grad",
    "linear",
    "linear_logps",
    "outer",
    "pair_loss",
    "problem",
    "project",
    "scale_rows",
    "why_not",
]

# As PAIR_FORMS in csrc/cuda/launch.h, by which they are numbered.
_PAIR_FORMS = (
    "sigmoid",
    "sigmoid_norm",
    "ipo",
    "hinge",
    "exo_pair",
    "robust",
    "nca_pair",
    "bco_pair",
    "sppo_hard",
    "apo_zero",
    "apo_down",
    "discopop",
    "cpo",
    "simpo",
    "alphapo",
    "orpo",
)
CLOSED_FORMS = frozenset(_PAIR_FORMS)
_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_CLUSTERS_FROM = 90  # the first architecture whose thread blocks can share a row
_MOST_BLOCKS_TO_A_ROW = 8
_NOWHERE = nullcontext()
_REBUILD = "pip install --force-reinstall --no-deps fastpref"


def _emulated() -> bool:
    """Whether the module is the one of the tests, which runs the kernels on the CPU."""
    return _cuda is not None and _cuda.emulated


@functools.cache
def _ready(index: int) -> tuple[str | None, str | None, int, int, int]:
    """What the module finds on this GPU: an error and its message, or None; the architecture of the
    kernels that would run; the versions of its runtime and of the driver."""
    if _emulated():
        return _cuda.ready(index)
    with torch.cuda.device(index):
        return _cuda.ready(index)


def _index(device: torch.device) -> int:
    if device.type == "cpu":
        return 0
    return torch.cuda.current_device() if device.index is None else device.index


def _version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"


def _gpu_problem(index: int) -> str | None:
    """Why this GPU cannot run the kernels, or None."""
    error, message, _, runtime, driver = _ready(index)
    if error is None:
        return None
    if error in ("cudaErrorInsufficientDriver", "cudaErrorUnsupportedPtxVersion"):
        return (
            f"the driver knows CUDA {_version(driver)} and fastpref._cuda was built with "
            f"{_version(runtime)}; update the driver, or rebuild with an older toolkit: {_REBUILD}"
        )
    if error in ("cudaErrorNoKernelImageForDevice", "cudaErrorInvalidDeviceFunction"):
        major, minor = torch.cuda.get_device_capability(index)
        return (
            f"fastpref._cuda was not compiled for {torch.cuda.get_device_name(index)}; rebuild it: "
            f"FASTPREF_CUDA_ARCH={major}{minor} {_REBUILD}"
        )
    return f"fastpref._cuda cannot run: {message} ({error})"


@functools.cache
def _machine_problem() -> str | None:
    if torch.version.hip is not None:
        return "fastpref._cuda is for NVIDIA GPUs; torch is built for AMD's"
    if not torch.cuda.is_available():
        return "torch finds no GPU"
    return _gpu_problem(torch.cuda.current_device())


def problem() -> str | None:
    """Why the module cannot run on this machine, or None."""
    if _PROBLEM is not None:
        return _PROBLEM
    return None if _emulated() else _machine_problem()


def describe() -> str:
    if _emulated():
        return "CUDA kernels, emulated on the CPU"
    index = torch.cuda.current_device()
    _, _, architecture, runtime, _ = _ready(index)
    name = torch.cuda.get_device_name(index)
    return f"CUDA {_version(runtime)} kernels for sm_{architecture} on {name}"


def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why tensors of this device and dtype cannot run here, or None."""
    reason = problem()
    if reason is not None:
        return reason
    if device.type != ("cpu" if _emulated() else "cuda"):
        return f"the cuda backend has no kernels for {device.type} tensors"
    if dtype not in _DTYPES:
        return f"the cuda backend has no {str(dtype)[6:]} kernels; use backend='eager'"
    return None if device.type == "cpu" else _gpu_problem(_index(device))


@functools.cache
def _clusters(index: int) -> int:
    """The most thread blocks that can share a row, as the kernels that run there were compiled."""
    return _MOST_BLOCKS_TO_A_ROW if _ready(index)[2] >= _CLUSTERS_FROM else 1


def _on(device: torch.device):
    """The context in which kernels for tensors of this device are launched."""
    if device.type == "cpu" or device.index == torch.cuda.current_device():
        return _NOWHERE
    return torch.cuda.device(device)


def _launch(function: Any, device: torch.device, *args: Any, clusters: bool = True) -> None:
    """Call the module; the device, its current stream and what a row may take come last."""
    index = _index(device)
    stream = 0 if device.type == "cpu" else torch.cuda.current_stream(device).cuda_stream
    more = (_clusters(index),) if clusters else ()
    with _on(device):
        function(*args, index, stream, *more)


def _vector(t: Tensor | None, like: Tensor, dtype: torch.dtype = torch.float32) -> int:
    if t is None:
        return 0
    assert t.dtype == dtype and t.device == like.device and t.is_contiguous()
    return t.data_ptr()


def _rows(t: Tensor, like: Tensor) -> tuple[int, int, int]:
    """Address, dtype and row stride of a matrix in the tile's shape."""
    assert t.shape == like.shape and t.device == like.device
    assert t.stride(1) == 1 or t.shape[1] <= 1
    return t.data_ptr(), _DTYPES[t.dtype], t.stride(0)


def _tile(tile: Tensor, labels: Tensor, col0: int, transform: Transform) -> tuple:
    address, dtype, stride = _rows(tile, tile)
    assert labels.shape[0] == tile.shape[0]
    return (
        address,
        dtype,
        *tile.shape,
        stride,
        col0,
        _vector(labels, tile, torch.int64),
        transform.scale,
        transform.softcap or 0.0,
        1.0 / transform.temperature,
    )


def _fold(
    tile: Tensor,
    labels: Tensor,
    col0: int,
    stats: Stats,
    transform: Transform,
    exact: Tensor | None,
    out: tuple[int, int, int],
) -> None:
    _launch(
        _cuda.fold,
        tile.device,
        *_tile(tile, labels, col0, transform),
        *(_vector(getattr(stats, name), tile) for name in Stats.FIELDS[:-1]),
        _vector(stats.argmax, tile, torch.int64),
        _vector(exact, tile),
        *out,
    )


def fold(tile: Tensor, labels: Tensor, col0: int, stats: Stats, transform: Transform) -> None:
    """As `eager.fold`."""
    _fold(tile, labels, col0, stats, transform, None, (0, 0, 0))


def fold_grad(
    tile: Tensor,
    labels: Tensor,
    stats: Stats,
    transform: Transform,
    out: Tensor | None,
    target: Tensor | None = None,
) -> None:
    """`fold` of whole rows [n, V] and `grad` into out [n, V], reading each logit once.

    out may be the tile's own memory, as in `eager.grad`; None leaves `grad` out, and the statistics
    are the same to the last bit. target [n]: the labels' exact logits, which take the place of the
    tile's as in `Stats.replace_target`.
    """
    address = (0, 0, 0) if out is None else _rows(out, tile)
    _fold(tile, labels, 0, stats, transform, target, address)


def grad(
    tile: Tensor,
    labels: Tensor,
    col0: int,
    lse: Tensor,
    logps: Tensor,
    out: Tensor,
    transform: Transform,
    coef: Tensor | None = None,
    entropy: Tensor | None = None,
    entropy_coef: Tensor | None = None,
) -> None:
    """As `eager.grad`."""
    assert (entropy is None) == (entropy_coef is None)
    _launch(
        _cuda.grad,
        tile.device,
        *_tile(tile, labels, col0, transform),
        *(_vector(t, tile) for t in (lse, logps, coef, entropy, entropy_coef)),
        *_rows(out, tile),
    )


def pair_loss(
    logps: Tensor,
    sequence_ids: Tensor,
    pairs: int,
    ref_logps: Tensor | None,
    *,
    loss_type: str,
    beta: float,
    label_smoothing: float,
    lengths: Tensor | None,
    weight: Tensor | None,
    margin: Tensor | None,
    option: float = 0.0,
    shape: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `native.pair_loss`, for every loss in CLOSED_FORMS; one launch, whatever the order of the
    tokens. option: discopop_tau or simpo_gamma; shape: AlphaPO's alpha."""
    loss, coef = logps.new_empty(()), torch.empty_like(logps)
    sequences, rewards, slopes = (logps.new_empty(2 * pairs) for _ in range(3))
    starts = sequence_ids.new_empty(2 * pairs + 1)
    _launch(
        _cuda.pair_loss,
        logps.device,
        _PAIR_FORMS.index(loss_type),
        logps.shape[0],
        pairs,
        _vector(logps, logps),
        _vector(sequence_ids, logps, torch.int64),
        *(_vector(t, logps) for t in (ref_logps, lengths, weight, margin)),
        beta,
        label_smoothing,
        option,
        shape,
        *(_vector(t, logps) for t in (loss, sequences, rewards, coef)),
        _vector(starts, logps, torch.int64),
        _vector(slopes, logps),
        clusters=False,
    )
    return loss, sequences, rewards, coef


def fused_is_fast(weight: Tensor) -> bool:
    """Whether `linear_logps` has a kernel made for this GPU and for this weight's alignment."""
    from fastpref.backends import cuda_forward

    if cuda_forward.why_not(weight) is None:
        return True
    return triton.why_not(weight.device, weight.dtype) is None and triton.fused_is_fast(weight)


def linear_logps(
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    stats: Stats,
    transform: Transform,
) -> None:
    """As `triton.linear_logps`, which it is but for Hopper GPUs. ValueError, with the reason, where
    neither can run."""
    from fastpref.backends import cuda_forward

    own = cuda_forward.why_not(weight, transform)
    if own is None:
        cuda_forward.linear_logps(x, weight, labels, bias, stats, transform)
        return
    reason = triton.why_not(x.device, x.dtype)
    if reason is not None:
        raise ValueError(f"fused: got True, expected False: {own}; and not in Triton: {reason}")
    triton.linear_logps(x, weight, labels, bias, stats, transform)
