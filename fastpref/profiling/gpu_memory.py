"""The memory of a GPU while something runs: what torch's allocator gives and holds, its history."""

from __future__ import annotations

import contextlib
from typing import Any

import torch

_MOST_EVENTS = 10**6  # of a history; earlier ones are dropped


class GpuMemory:
    """Watches the allocator of torch's current GPU, as a context.

    Attributes:
        snapshot: a file for the history of allocations with their Python stacks, which
            https://pytorch.org/memory_viz shows; None: no history.
        peak: the most bytes of tensors while the context was open.
        reserved: the most bytes that the allocator held, with those that were free in it.
    """

    def __init__(self, snapshot: str | None = None) -> None:
        self.snapshot = snapshot
        self.peak = self.reserved = 0

    def __enter__(self) -> GpuMemory:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        if self.snapshot is not None:
            torch.cuda.memory._record_memory_history(stacks="python", max_entries=_MOST_EVENTS)
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        torch.cuda.synchronize()
        self.peak = torch.cuda.max_memory_allocated()
        self.reserved = torch.cuda.max_memory_reserved()
        if self.snapshot is not None:
            # An error inside the context, such as too little memory, is the one to be raised.
            hidden = () if error is None else (OSError, RuntimeError)
            with contextlib.suppress(*hidden):
                torch.cuda.memory._dump_snapshot(self.snapshot)
            torch.cuda.memory._record_memory_history(enabled=None)
