"""Checks of what users give, which every layer may use.

They raise a ValueError with the argument's name, what was given and what was expected.
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


def check_float(name: str, t: Tensor) -> None:
    if not isinstance(t, Tensor):
        raise ValueError(f"{name}: got {type(t).__name__}, expected a tensor")
    if t.dtype not in FLOATS:
        raise ValueError(
            f"{name}: got {str(t.dtype)[6:]}, expected float64, float32, bfloat16 or float16"
        )


def check_ids(name: str, ids: Tensor, size: int) -> None:
    """Raise ValueError unless ids is a vector of int64 with values in [0, size)."""
    if not isinstance(ids, Tensor) or ids.dtype != torch.int64 or ids.dim() != 1:
        given = type(ids).__name__
        if isinstance(ids, Tensor):
            given = f"{str(ids.dtype)[6:]} of shape {tuple(ids.shape)}"
        raise ValueError(f"{name}: got {given}, expected a vector of int64")
    if ids.numel() and may_synchronise(ids.device):
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high >= size:
            raise ValueError(
                f"{name}: got values from {low} to {high}, expected values in [0, {size})"
            )


def may_synchronise(device: torch.device) -> bool:
    """Whether checks may read tensors: on a CPU always, on a GPU with FASTPREF_DEBUG=1; never while
    torch.compile traces, where there are none to read."""
    if torch.compiler.is_compiling():
        return False
    return device.type == "cpu" or os.environ.get("FASTPREF_DEBUG") == "1"


_Options = TypeVar("_Options")
_PLAIN = frozenset({str, int, float, bool, type(None)})


@functools.lru_cache(maxsize=256, typed=True)
def _made(kind: Any, **given: Any) -> Any:
    return kind(**given)


def cached_options(kind: type[_Options], given: dict[str, Any]) -> _Options:
    """kind(**given), remembered: every step of a training run gives the same plain values, and
    checking them anew takes the host as long as several kernels run."""
    if torch.compiler.is_compiling() or not all(type(value) in _PLAIN for value in given.values()):
        return kind(**given)
    return _made(kind, **given)  # type: ignore[arg-type]
