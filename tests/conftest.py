"""Fixtures of all tests: seeds, threads, backends, and poisoned memory."""

from __future__ import annotations

import sys

import pytest
import torch

from fastpref.backends import eager, native


def _poison(t: torch.Tensor) -> torch.Tensor:
    """What uninitialised memory may hold: whoever reads it before writing it gets caught."""
    if t.is_floating_point():
        t.fill_(float("nan"))
    elif t.dtype == torch.int64:
        t.fill_(-(2**62))
    return t


@pytest.fixture(scope="session", autouse=True)
def poisoned_memory():
    """torch.empty and its kin return NaN to callers in fastpref."""
    patch = pytest.MonkeyPatch()

    def poison(owner, name):
        real = getattr(owner, name)

        def allocate(*args, **kwargs):
            t = real(*args, **kwargs)
            caller = sys._getframe(1).f_globals.get("__name__") or ""
            return _poison(t) if caller.split(".")[0] == "fastpref" else t

        patch.setattr(owner, name, allocate)

    for name in ("empty", "empty_like", "empty_strided"):
        poison(torch, name)
    for name in ("new_empty", "new_empty_strided"):
        poison(torch.Tensor, name)
    yield
    patch.undo()


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def threads():
    """torch.set_num_threads, undone afterwards. One thread unless a test asks for more: its idle
    workers spin, and on a busy machine small tests then take ten times as long."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield torch.set_num_threads
    torch.set_num_threads(before)


def _skip_where_missing(name: str) -> str:
    if name == "native" and native.problem() is not None:
        pytest.skip(native.problem())
    return name


@pytest.fixture(params=["eager", "native"])
def backend(request) -> str:
    """The name of each backend."""
    return _skip_where_missing(request.param)


@pytest.fixture(params=["eager", "native"])
def tiles(request):
    """The module of each backend, with its tile primitives."""
    return {"eager": eager, "native": native}[_skip_where_missing(request.param)]
