"""What this machine runs of each backend: on which device, in which dtypes, at which sizes.

Triton's kernels run on the GPU if there is one, and in Triton's interpreter otherwise, at about
10 ms a row: there they get fewer rows (`sized`) and fewer cases (`thinned`). So do those of CUDA in
their emulation, which takes about a millisecond.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from itertools import combinations
from typing import Any, TypeVar

import cuda_emulated
import torch

from fastpref import backends

if importlib.util.find_spec("triton") is None:
    INTERPRETED = False
else:  # before anything imports triton, which is then told to interpret where there is no GPU
    from triton_interpret import INTERPRETED

T = TypeVar("T")
HAS_GPU = torch.cuda.is_available()
# Plain torch is a backend of GPUs as well; its tests run on both devices where there are two.
CASES = (*backends.NAMES, "eager-cuda") if HAS_GPU else backends.NAMES


def backend_of(case: str) -> str:
    return case.removesuffix("-cuda")


def device_of(case: str) -> torch.device:
    on_gpu = HAS_GPU and case in ("triton", "cuda", "eager-cuda")
    return torch.device("cuda" if on_gpu else "cpu")


def why_not(case: str, dtypes: Sequence[torch.dtype] = ()) -> str | None:
    """Why the case's backend cannot run here, or not in one of these dtypes; or None."""
    module = backends._MODULES[backend_of(case)]
    if module.NAME == "cuda" and not HAS_GPU:
        reason = cuda_emulated.install()
        if reason is not None:
            return reason
    reasons = (
        module.unavailable_reason(device_of(case), dtype) for dtype in dtypes or [torch.float32]
    )
    return next((reason for reason in reasons if reason is not None), None)


def free_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def sized(backend: str, full: T, interpreted: T) -> T:
    """A size for this backend: `interpreted` where a GPU is interpreted or emulated."""
    return interpreted if backend in slow() else full


def slow() -> tuple[str, ...]:
    """The backends that do not run on what they are made for."""
    return ("triton",) * INTERPRETED + ("cuda",) * (not HAS_GPU)


def thinned(cases: Sequence[dict[str, Any]], together: int) -> list[int]:
    """Which of the cases, each the values of its parameters, will do for every so many values of
    different parameters to meet in one: few of them, not the fewest."""
    # By identity: the cases share the objects, which need not be hashable.
    names = [sorted((name, id(value)) for name, value in case.items()) for case in cases]
    shown = [set(combinations(values, min(together, len(values)))) for values in names]
    missing, kept = set().union(*shown), []
    while missing:
        best = max(range(len(cases)), key=lambda i: len(shown[i] & missing))
        kept.append(best)
        missing -= shown[best]
    return kept
