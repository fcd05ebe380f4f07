"""Checks of arguments, for every layer.

A failed check raises a ValueError that names the argument, its value and what was expected.
"""

from __future__ import annotations

import functools
import os
from typing import Any, TypeVar

import torch
from torch import Tensor

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def check_number(name: str, value: object) -> None:
    """Raise ValueError unless value is a plain number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{name}: got {value!r}, expected a number")


def check_integer(name: str, value: object) -> None:
    """Raise ValueError unless value is an integer; a bool is none."""
    if isinstance(value, bool) or not isinstance(value, int | torch.SymInt):
        raise ValueError(f"{name}: got {value!r}, expected an integer")


def check_float(name: str, t: Tensor) -> None:
    """Raise ValueError unless t is a dense tensor of float64, float32, bfloat16 or float16."""
    if not isinstance(t, Tensor):
        raise ValueError(f"{name}: got {type(t).__name__}, expected a tensor")
    if t.dtype not in FLOATS:
        raise ValueError(
            f"{name}: got {str(t.dtype)[6:]}, expected float64, float32, bfloat16 or float16"
        )
    if t.layout is not torch.strided:
        raise ValueError(f"{name}: got layout {str(t.layout)[6:]}, expected a dense tensor")


def check_ids(name: str, ids: Tensor, size: int) -> None:
    """Raise ValueError unless ids is a vector of int64 with values in [0, size).

    The values are read only where `may_synchronise` allows it.
    """
    if not isinstance(ids, Tensor) or ids.dtype != torch.int64 or ids.dim() != 1:
        description = type(ids).__name__
        if isinstance(ids, Tensor):
            description = f"{str(ids.dtype)[6:]} of shape {tuple(ids.shape)}"
        raise ValueError(f"{name}: got {description}, expected a vector of int64")
    if ids.numel() and may_synchronise(ids.device):
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high >= size:
            raise ValueError(
                f"{name}: got values from {low} to {high}, expected values in [0, {size})"
            )


def may_synchronise(device: torch.device) -> bool:
    """Whether a check may read a tensor's values, which synchronises a GPU with the host.

    True on a CPU, and on a GPU with FASTPREF_DEBUG=1. False while torch.compile traces, since a
    traced tensor has no values.
    """
    if torch.compiler.is_compiling():
        return False
    return device.type == "cpu" or os.environ.get("FASTPREF_DEBUG") == "1"


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
