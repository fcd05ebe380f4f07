"""The allocator's peak and history of a GPU, here with a pretended one."""

from __future__ import annotations

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


def test_a_history_is_written_and_ended(calls, tmp_path):
    file = tmp_path / "new" / "fastpref.pickle"
    with GpuMemory(str(file)):
        assert calls[-1][0] == "_record_memory_history"
    assert file.parent.is_dir()
    assert calls[-2:] == [
        ("_dump_snapshot", str(file)),
        ("_record_memory_history", ("enabled", None)),
    ]


def test_the_history_s_functions_take_these_arguments():
    import inspect

    history = inspect.signature(torch.cuda.memory._record_memory_history)
    history.bind(max_entries=1)
    history.bind(enabled=None)
    inspect.signature(torch.cuda.memory._dump_snapshot).bind("file")
