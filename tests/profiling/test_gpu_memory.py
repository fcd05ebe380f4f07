"""The allocator's peak and history of a GPU, here with a pretended one."""

from __future__ import annotations

import contextlib
import inspect

import pytest
import torch

from fastpref.profiling.gpu_memory import GpuMemory


@pytest.fixture
def calls(monkeypatch):
    made = []

    def pretend(module, name, result=None):
        def call(*args, **kwargs):
            made.append((name, *args, *kwargs.items()))
            return result

        monkeypatch.setattr(module, name, call)

    for name in ("synchronize", "reset_peak_memory_stats"):
        pretend(torch.cuda, name)
    pretend(torch.cuda, "max_memory_allocated", 1_000)
    pretend(torch.cuda, "max_memory_reserved", 1_500)
    pretend(torch.cuda.memory, "_record_memory_history")
    pretend(torch.cuda.memory, "_dump_snapshot")
    return made


def test_the_peak_is_that_of_the_block(calls):
    with GpuMemory() as memory:
        assert [name for name, *_ in calls] == ["synchronize", "reset_peak_memory_stats"]
    assert (memory.peak, memory.reserved) == (1_000, 1_500)
    assert not any("snapshot" in name or "history" in name for name, *_ in calls)


@pytest.mark.parametrize("fails", [False, True])
def test_a_history_is_written_and_ended(calls, fails):
    with contextlib.suppress(MemoryError), GpuMemory("fastpref.pickle"):
        assert calls[-1][0] == "_record_memory_history"
        if fails:
            raise MemoryError
    assert calls[-2:] == [
        ("_dump_snapshot", "fastpref.pickle"),
        ("_record_memory_history", ("enabled", None)),
    ]


def test_the_history_s_functions_take_these_arguments():
    history = inspect.signature(torch.cuda.memory._record_memory_history)
    history.bind(stacks="python", max_entries=1)
    history.bind(enabled=None)
    inspect.signature(torch.cuda.memory._dump_snapshot).bind("file")
