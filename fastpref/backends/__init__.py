"""Which implementation of the tile primitives runs, and why.

A backend is a module that implements the contract `fastpref.backends.tile.Backend`. `choose` picks
the fastest one that works for a tensor; FASTPREF_BACKEND or `backend=` forces one.
"""

from __future__ import annotations

import functools
import os
import warnings
from dataclasses import dataclass

import torch

from fastpref.backends import cuda, eager, native, triton
from fastpref.backends.tile import Backend

NAMES = ("native", "cuda", "triton", "eager")
_MODULES: dict[str, Backend] = {
    "native": native,
    "cuda": cuda,
    "triton": triton,
    "eager": eager,
}
# The backends of each device, in the order in which they are tried. Triton precedes cuda until both
# have been measured on a GPU. Predicted bytes that a step moves per logit, beside the products:
#   triton  10   fold reads 4; grad reads 4 and writes 2
#   cuda     6   fold_grad reads 4 and writes 2; on GPUs before sm_90 as triton
#            0   on sm_90 in bf16, where the logit-free product writes D
_PREFERRED: dict[str, tuple[Backend, ...]] = {"cpu": (native,), "cuda": (triton, cuda)}


@dataclass(frozen=True)
class BackendStatus:
    """One line of `fastpref doctor`."""

    name: str
    works: bool
    reason: str
    devices: tuple[str, ...]


def report() -> list[BackendStatus]:
    """Every backend: whether it works on this machine, and if not, why not."""
    out = []
    for module in _MODULES.values():
        problem = module.problem()
        reason = module.describe() if problem is None else problem
        devices = tuple(d for d, known in _PREFERRED.items() if module in known) or ("any",)
        out.append(BackendStatus(module.NAME, problem is None, reason, devices))
    return out


def active(device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> str:
    """The name of the backend that runs for tensors of this device and dtype."""
    return choose(torch.device(device), dtype).NAME


def choose(device: torch.device, dtype: torch.dtype, backend: str | None = None) -> Backend:
    """The backend module for tensors of this device and dtype.

    Raises ValueError for an unknown name and RuntimeError, with the reason, where the one that was
    forced by argument or by FASTPREF_BACKEND cannot run.
    """
    source = "backend"
    if backend in (None, "auto"):
        source, backend = "FASTPREF_BACKEND", os.environ.get("FASTPREF_BACKEND") or None
    if backend in (None, "auto"):
        reasons: list[str] = []
        for module in _PREFERRED.get(device.type, ()):
            reason = module.unavailable_reason(device, dtype)
            if reason is None:
                if reasons:
                    _say_once(f"fastpref runs on its {module.NAME} backend: {'; '.join(reasons)}")
                return module
            reasons.append(reason)
        if dtype != torch.float64 and reasons:
            _say_once(f"fastpref runs on plain torch, slower and larger: {'; '.join(reasons)}")
        return eager
    if backend not in _MODULES:
        raise ValueError(f"{source}: got {backend!r}, expected one of {', '.join(NAMES)} or auto")
    module = _MODULES[backend]
    reason = module.unavailable_reason(device, dtype)
    if reason is not None:
        raise RuntimeError(f"{source}={backend!r} cannot run here: {reason}")
    return module


@functools.cache
def _say_once(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=4)
