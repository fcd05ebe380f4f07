"""Checks of arguments, for every layer.

A failed check raises a ValueError that names the argument, its value and what was expected.
"""

from __future__ import annotations

import functools
import os
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import Parameter

_TORCH_CLASSES = (Tensor, Parameter)
_PROXY = torch._C._TorchDispatchModeKey.PROXY
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def check_number(name: str, value: object) -> None:
    """Raise ValueError unless value is a plain number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{name}: got {value!r}, expected a number")


def check_integer(name: str, value: object) -> None:
    """Raise ValueError unless value is an integer; a bool is none."""
    if isinstance(value, bool) or not isinstance(value, int | torch.SymInt):
        raise ValueError(f"{name}: got {value!r}, expected an integer")


def is_fake(t: Tensor) -> bool:
    """Whether t is a FakeTensor, which has a shape, a dtype and a device, and no values."""
    return type(t) not in _TORCH_CLASSES and isinstance(t, FakeTensor)


def is_traced(*tensors: Tensor | None) -> bool:
    """Whether operations on these tensors are recorded, or only their shapes are computed.

    That is so under torch.compile, torch.export and make_fx, and for fake and meta tensors.
    """
    if torch.compiler.is_compiling():
        return True
    if any(t is not None and (t.is_meta or is_fake(t)) for t in tensors):
        return True
    # make_fx is a dispatch mode, and there is seldom any.
    return (
        torch._C._len_torch_dispatch_stack() > 0 and torch._C._get_dispatch_mode(_PROXY) is not None
    )


def autocasts(device_type: str) -> bool:
    """Whether autocast is on for this type of device; meta tensors have none."""
    return device_type != "meta" and torch.is_autocast_enabled(device_type)


def check_dense(name: str, t: Tensor) -> None:
    """Raise ValueError unless t is a tensor whose values lie in one piece of memory."""
    if not isinstance(t, Tensor):
        raise ValueError(f"{name}: got {type(t).__name__}, expected a tensor")
    if t.is_nested:
        raise ValueError(
            f"{name}: got a nested tensor, expected a dense one: torch.nested.to_padded_tensor "
            "makes one, and so does values() for the flat form with sequence_ids"
        )
    if t.layout != torch.strided:
        raise ValueError(
            f"{name}: got a tensor of layout {t.layout}, expected a dense one: to_dense() makes one"
        )
    if type(t) in _TORCH_CLASSES or torch.compiler.is_compiling() or isinstance(t, FakeTensor):
        return
    if torch._C._dispatch_keys(t).has(torch._C.DispatchKey.Python):
        raise ValueError(
            f"{name}: got a {type(t).__name__}, expected a plain tensor: full_tensor() of a "
            "DTensor, dequantize() of a quantised one"
        )


def check_device(name: str, t: Tensor, device: torch.device) -> None:
    """Raise ValueError unless t is on this device."""
    if t.device != device:
        raise ValueError(f"{name}: got device {t.device}, expected {device}")


def check_float(name: str, t: Tensor) -> None:
    """Raise ValueError unless t is a dense tensor of float64, float32, bfloat16 or float16."""
    check_dense(name, t)
    if t.dtype not in FLOATS:
        raise ValueError(
            f"{name}: got {str(t.dtype)[6:]}, expected float64, float32, bfloat16 or float16"
        )


def check_ids(name: str, ids: Tensor, size: int) -> None:
    """Raise ValueError unless ids is a vector of int64 with values in [0, size).

    The values are read only where `may_synchronise` allows it.
    """
    if isinstance(ids, Tensor):
        check_dense(name, ids)
    if not isinstance(ids, Tensor) or ids.dtype != torch.int64 or ids.dim() != 1:
        description = type(ids).__name__
        if isinstance(ids, Tensor):
            description = f"{str(ids.dtype)[6:]} of shape {tuple(ids.shape)}"
        raise ValueError(f"{name}: got {description}, expected a vector of int64")
    if ids.numel() and may_synchronise(ids):
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high >= size:
            raise ValueError(
                f"{name}: got values from {low} to {high}, expected values in [0, {size})"
            )


def may_synchronise(t: Tensor) -> bool:
    """Whether a check may read a tensor's values, which synchronises a GPU with the host.

    True on a CPU, and on a GPU with FASTPREF_DEBUG=1. False for a tensor that is traced, which has
    no values.
    """
    if is_traced(t):
        return False
    return t.device.type == "cpu" or os.environ.get("FASTPREF_DEBUG") == "1"


_Options = TypeVar("_Options")
_CACHEABLE = frozenset({str, int, float, bool, type(None)})


@functools.lru_cache(maxsize=256, typed=True)
def _construct(options_class: Any, **values: Any) -> Any:
    return options_class(**values)


def cached_options(options_class: type[_Options], values: dict[str, Any]) -> _Options:
    """options_class(**values), from a cache if all values are strings, numbers, booleans or None.

    Every training step passes the same values. Checking them again would take the host as long as
    several kernels run.
    """
    cacheable = all(type(value) in _CACHEABLE for value in values.values())
    if torch.compiler.is_compiling() or not cacheable:
        return options_class(**values)
    return _construct(options_class, **values)  # type: ignore[arg-type]
