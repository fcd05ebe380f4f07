"""What a process may take: of the machine, or of a container with less."""

from __future__ import annotations

import pytest

from fastpref.backends import host_memory
from fastpref.planning.devices import own_memory

FILES = "memory.max", "memory.current", "inactive_file"


def group(folder, limit, taken, cached):
    folder.mkdir()
    for name, text in zip(FILES, (limit, taken, f"anon 1\ninactive_file {cached}"), strict=True):
        (folder / {"inactive_file": "memory.stat"}.get(name, name)).write_text(f"{text}\n")
    return (str(folder), *FILES)


def test_a_containers_limit_counts_and_its_cache_is_free(tmp_path, monkeypatch):
    whole, free = host_memory.memory_limit(), host_memory.free_memory()
    if whole is None or free is None:
        pytest.skip("this system does not tell")
    unlimited = group(tmp_path / "none", "max", 100, 10)
    absent = (str(tmp_path / "absent"), *FILES)
    monkeypatch.setattr(host_memory, "_GROUPS", [unlimited, absent])
    assert host_memory.memory_limit() == whole and host_memory.free_memory() > 0
    small = group(tmp_path / "small", 5000, 3000, 1000)
    monkeypatch.setattr(host_memory, "_GROUPS", [unlimited, small])
    assert host_memory.memory_limit() == 5000 and host_memory.free_memory() == 3000
    assert own_memory("cpu") == 5000


def test_a_container_that_tells_only_its_limit(tmp_path, monkeypatch):
    if host_memory.memory_limit() is None:
        pytest.skip("this system does not tell")
    told = group(tmp_path / "told", 5000, 3000, 1000)
    (tmp_path / "told" / "memory.stat").unlink()
    monkeypatch.setattr(host_memory, "_GROUPS", [told])
    assert host_memory.memory_limit() == 5000 and host_memory.free_memory() == 2000
    (tmp_path / "told" / "memory.current").unlink()
    assert host_memory.memory_limit() == host_memory.free_memory() == 5000
