"""Freed memory that is kept: no page faults in the next step, and the allocator as it was after."""

from __future__ import annotations

import subprocess
import sys
import threading

import pytest
import tiny

from fastpref.body import keep_cpu_memory, memory, unkept_reason

needs_glibc = pytest.mark.skipif(unkept_reason() is not None, reason=str(unkept_reason()))

# In a process of its own, and in its main thread: the arenas that glibc gives to other threads, and
# to a thread whose allocation has failed, return their large blocks at once.
PROGRAM = """
import resource
from pathlib import Path
import torch
from fastpref.body import keep_cpu_memory

SIZE = 48 << 20  # bytes of a block that glibc maps by itself

def faults():
    torch.ones(SIZE, dtype=torch.uint8)  # freed at once
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(SIZE, dtype=torch.uint8)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def held():
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

found = [faults()]
with keep_cpu_memory():
    faults()
    found.append(faults())
    with keep_cpu_memory():
        pass
    found.append(faults())  # the first context is still open
    kept = held()
print(*found, kept - held())
"""


@pytest.mark.slow
@needs_glibc
def test_a_second_block_costs_no_page_faults():
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True, timeout=300
    )
    before, kept, still_kept, returned = map(int, done.stdout.split())
    pages = (48 << 20) // 4096
    if before < pages // 4:
        pytest.skip("the system maps large pages")
    assert max(kept, still_kept) < pages // 20
    assert returned > 40 << 20


@needs_glibc
def test_contexts_of_two_threads(monkeypatch):
    calls = []
    monkeypatch.setattr(memory, "_set", calls.append)
    inside, go_on = threading.Event(), threading.Event()

    def second():
        with keep_cpu_memory():
            inside.set()
            go_on.wait(60)

    with pytest.raises(ZeroDivisionError), keep_cpu_memory():
        thread = threading.Thread(target=second)
        thread.start()
        inside.wait(60)
        raise ZeroDivisionError
    assert calls == [memory._KEEPING]
    go_on.set()
    thread.join()
    assert calls == [memory._KEEPING, memory._ORDINARY]


@pytest.mark.parametrize(
    "variable, value",
    [
        ("MALLOC_TRIM_THRESHOLD_", "1000"),
        ("GLIBC_TUNABLES", "glibc.malloc.mmap_max=3"),
        ("LD_PRELOAD", "/usr/lib/libtcmalloc.so.4"),
    ],
)
def test_an_allocator_that_the_user_has_set_is_left_alone(monkeypatch, variable, value):
    monkeypatch.setenv(variable, value)
    monkeypatch.setattr(memory, "_set", None)  # must not be called
    with keep_cpu_memory():
        assert variable in unkept_reason() or unkept_reason() == "the C library is not glibc"


@pytest.mark.parametrize("wanted", [True, False])
def test_the_trainer_keeps_memory_while_it_works(tmp_path, monkeypatch, wanted):
    seen = []
    monkeypatch.setattr(memory, "unkept_reason", lambda: None)
    monkeypatch.setattr(memory, "_set", lambda values: seen.append(values is memory._KEEPING))
    monkeypatch.setattr(memory, "_glibc", lambda name: lambda value: 0)
    t = tiny.trainer(tmp_path, eval_dataset=tiny.rows(2), max_steps=1, keep_cpu_memory=wanted)
    assert not seen
    t.train()
    t.evaluate()
    expected = [True, False] * 2 if t.accelerator.device.type == "cpu" and wanted else []
    assert seen == expected
