"""fastpref._cuda: whether it is there and runs, and how it is called."""

from __future__ import annotations

import functools
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

MODULE: Any = None
PROBLEM: str | None = None
try:
    from fastpref import _cuda as MODULE  # type: ignore[no-redef]
except ImportError as error:
    PROBLEM = (
        f"fastpref._cuda is not built ({error}); install the CUDA toolkit, with nvcc, and run "
        "pip install --force-reinstall --no-deps fastpref"
    )

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_CLUSTERS_FROM = 90  # the first architecture whose thread blocks can share a row
_MOST_BLOCKS_TO_A_ROW = 8
_NOWHERE = nullcontext()
_REBUILD = "pip install --force-reinstall --no-deps fastpref"


def emulated() -> bool:
    """Whether the module is the one of the tests, which runs the kernels on the CPU."""
    return MODULE is not None and MODULE.emulated


@functools.cache
def ready(index: int) -> tuple[str | None, str | None, int, int, int]:
    """What the module finds on this GPU: an error and its message, or None; the architecture of the
    kernels that would run; the versions of its runtime and of the driver."""
    if emulated():
        return MODULE.ready(index)
    with torch.cuda.device(index):
        return MODULE.ready(index)


def index_of(device: torch.device) -> int:
    if device.type == "cpu":
        return 0
    return torch.cuda.current_device() if device.index is None else device.index


def _version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"


def gpu_problem(index: int) -> str | None:
    """Why this GPU cannot run the kernels, or None."""
    error, message, _, runtime, driver = ready(index)
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
def machine_problem() -> str | None:
    if torch.version.hip is not None:
        return "fastpref._cuda is for NVIDIA GPUs; torch is built for AMD's"
    if not torch.cuda.is_available():
        return "torch finds no GPU"
    return gpu_problem(torch.cuda.current_device())


def problem() -> str | None:
    """Why the module cannot run on this machine, or None."""
    if PROBLEM is not None:
        return PROBLEM
    return None if emulated() else machine_problem()


def describe() -> str:
    if emulated():
        return "CUDA kernels, emulated on the CPU"
    index = torch.cuda.current_device()
    _, _, architecture, runtime, _ = ready(index)
    name = torch.cuda.get_device_name(index)
    return f"CUDA {_version(runtime)} kernels for sm_{architecture} on {name}"


def unavailable_reason(device: torch.device, dtype: torch.dtype) -> str | None:
    """As `Backend.unavailable_reason`."""
    reason = problem()
    if reason is not None:
        return reason
    if device.type != ("cpu" if emulated() else "cuda"):
        return f"the cuda backend has no kernels for {device.type} tensors"
    if dtype not in DTYPES:
        return f"the cuda backend has no {str(dtype)[6:]} kernels; use backend='eager'"
    return None if device.type == "cpu" else gpu_problem(index_of(device))


@functools.cache
def clusters_of(index: int) -> int:
    """The most thread blocks that can share a row, as the kernels that run there were compiled."""
    return _MOST_BLOCKS_TO_A_ROW if ready(index)[2] >= _CLUSTERS_FROM else 1


@functools.cache
def forward_works(index: int) -> bool:
    """Whether the forward pass for Hopper was compiled for this GPU."""
    if emulated():
        return MODULE.forward_works(index)
    with torch.cuda.device(index):  # the module makes it the current one
        return MODULE.forward_works(index)


def _on(device: torch.device):
    """The context in which kernels for tensors of this device are launched."""
    if device.type == "cpu" or device.index == torch.cuda.current_device():
        return _NOWHERE
    return torch.cuda.device(device)


def launch(name: str, device: torch.device, *args: Any, clusters: bool = True) -> None:
    """Call the module's function `name` with args, the device's index and its current stream.

    clusters: also pass the largest cluster of thread blocks that the device runs.
    """
    index = index_of(device)
    stream = 0 if device.type == "cpu" else torch.cuda.current_stream(device).cuda_stream
    more = (clusters_of(index),) if clusters else ()
    with _on(device):
        getattr(MODULE, name)(*args, index, stream, *more)


def vector(t: Tensor | None, like: Tensor, dtype: torch.dtype = torch.float32) -> int:
    if t is None:
        return 0
    assert t.dtype == dtype and t.device == like.device and t.is_contiguous()
    return t.data_ptr()


def rows_of(t: Tensor, like: Tensor) -> tuple[int, int, int]:
    """Address, dtype and row stride of a matrix in the tile's shape."""
    assert t.shape == like.shape and t.device == like.device
    assert t.stride(1) == 1 or t.shape[1] <= 1
    return t.data_ptr(), DTYPES[t.dtype], t.stride(0)
