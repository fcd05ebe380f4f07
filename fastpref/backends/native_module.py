"""fastpref._cpu: whether it is there, and how tensors and threads are passed to it.

Tensors cross the boundary as addresses, so the module links no torch. What torch would check is
checked here: device, dtype, unit inner stride. Tensors stay alive in the caller's locals.
"""

from __future__ import annotations

import os
from typing import Any

import torch  # before _cpu: both then share the OpenMP pool that torch loads
from torch import Tensor

MODULE: Any = None
PROBLEM: str | None = None
try:
    from fastpref import _cpu as MODULE  # type: ignore[no-redef]  # noqa: F401
except ImportError as error:
    PROBLEM = (
        f"fastpref._cpu is not built ({error}); install a C++ compiler and run "
        "pip install --force-reinstall --no-deps fastpref"
    )

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


# Whether the kernels have had threads, and whether those stayed behind in a parent process.
_had_threads = _lost_threads = False


def _note_fork() -> None:
    global _lost_threads
    _lost_threads = _had_threads


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_note_fork)


def threads() -> int:
    """How many threads a kernel takes: torch's number.

    A process that was forked after its parent's kernels had threads takes one: OpenMP would wait
    for ever for the parent's threads, which a fork does not copy.
    """
    global _had_threads
    count = 1 if _lost_threads else torch.get_num_threads()
    _had_threads = _had_threads or count > 1
    return count


def rows_of(t: Tensor) -> tuple[int, int]:
    """Address and row stride of a matrix, whose columns must be adjacent."""
    assert t.dim() == 2 and t.device.type == "cpu" and (t.stride(1) == 1 or t.shape[1] <= 1)
    return t.data_ptr(), t.stride(0)


def vector(t: Tensor | None, dtype: torch.dtype = torch.float32) -> int:
    if t is None:
        return 0
    assert t.dtype == dtype and t.device.type == "cpu" and t.is_contiguous()
    return t.data_ptr()
