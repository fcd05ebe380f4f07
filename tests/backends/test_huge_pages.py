"""Large fresh blocks of a CPU may be mapped in huge pages; other tensors are left alone."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

import fastpref
from fastpref.backends import huge_pages
from fastpref.backends.huge_pages import LEAST_BYTES, in_huge_pages

SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")


@pytest.fixture
def advised(monkeypatch):
    """The (address, bytes) of each call of madvise."""
    calls = []

    def note(address, size, advice):
        assert advice == 14
        calls.append((address.value, size.value))
        return 0

    monkeypatch.setattr(huge_pages, "_madvise", lambda: note)
    return calls


def test_whole_pages_inside_a_large_tensor_are_advised(advised):
    whole = torch.empty(LEAST_BYTES // 4 + 5000)
    t = whole[3:]
    assert in_huge_pages(t) is t
    ((address, size),) = advised
    assert address % 4096 == size % 4096 == 0
    assert t.data_ptr() <= address < t.data_ptr() + 4096
    assert address + size <= t.data_ptr() + t.nbytes < address + size + 4096


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.empty(LEAST_BYTES // 4 - 1),
        lambda: torch.empty(LEAST_BYTES, device="meta"),
        lambda: torch.nn.Parameter(torch.empty(LEAST_BYTES // 4)),
    ],
    ids=["small", "meta", "a subclass"],
)
def test_other_tensors_are_left_alone(advised, make):
    t = make()
    assert in_huge_pages(t) is t and not advised


def test_a_system_without_the_call_is_none(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    assert huge_pages._madvise.__wrapped__() is None


def test_d_and_the_heads_gradient_are_advised(advised):
    vocab = LEAST_BYTES // 4 // 512
    x, weight = torch.randn(512, 8, requires_grad=True), torch.randn(vocab, 8)
    fastpref.linear_token_logps(x, weight.requires_grad_(), torch.zeros(512, dtype=torch.int64))
    assert len(advised) == 1 and advised[0][1] >= LEAST_BYTES - 4096


@pytest.mark.skipif(
    not SETTING.exists() or "[never]" in SETTING.read_text(),
    reason="this system has no huge pages",
)
def test_the_pages_are_huge():
    def huge_kib() -> int:
        lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("AnonHugePages"))

    before = huge_kib()
    t = in_huge_pages(torch.empty(2 * LEAST_BYTES // 4))
    t.fill_(1)
    assert huge_kib() - before >= LEAST_BYTES // 1024
