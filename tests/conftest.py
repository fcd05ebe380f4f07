"""Fixtures of all tests: seeds, threads, backends on their devices, poisoned memory, and TRL
without the patch."""

from __future__ import annotations

import gc
import os
import signal
import sys
from collections import defaultdict

import line_coverage  # before whatever imports fastpref
import machine
import own_warnings
import pytest
import torch

import fastpref
from fastpref import backends

# Folders of training runs, commands and whole models.
TRAINING = {
    "bench", "benchmarks", "cli", "planning", "profiling", "reference", "scripts", "trainer",
}  # fmt: skip


def pytest_configure(config):
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as a shell starts what is not to wait
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if line_coverage.ON:
        config.pluginmanager.register(line_coverage)
    config.addinivalue_line(
        "markers", "only_if(holds): the test is for the parameters of which holds(**parameters)"
    )
    config.addinivalue_line(
        "markers", "few: without a GPU, each parameter's values are tried once, not every two"
    )
    if machine.why_not("native") is not None:  # which is then said of every default on a CPU
        said = "ignore:fastpref runs on plain torch:RuntimeWarning"
        config.addinivalue_line("filterwarnings", said)


def pytest_itemcollected(item):
    if item.path.parent.name in TRAINING:
        item.add_marker("train")


@pytest.hookimpl(wrapper=True)
def pytest_collection():
    gc.disable()  # what is imported stays: to look for garbage in it takes a quarter of the time
    try:
        with own_warnings.failing():
            return (yield)
    finally:
        gc.enable()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol():
    with own_warnings.failing():
        result = yield
    if len(sys.modules) > _frozen_modules + 100:  # TRL, the compiler of torch, ...
        _freeze()
    return result


def _dtypes(params) -> list[torch.dtype]:
    return [params[name] for name in ("dtype", "out_dtype") if name in params]


def _is_possible(item, params) -> bool:
    """Whether some machine can run the case. The others are deselected, not skipped."""
    case = params.get("backend") or params.get("tiles")
    if case in machine.CASES and torch.float64 in _dtypes(params):
        return machine.backend_of(case) == "eager"  # no kernel computes in float64
    return all(mark.args[0](**params) for mark in item.iter_markers("only_if"))


def _params(item) -> dict:
    return item.callspec.params if hasattr(item, "callspec") else {}


def _emulated(items) -> list[list]:
    """The cases of each test that run in Triton's interpreter, and those in the emulation of CUDA;
    on a GPU there are none."""
    groups = defaultdict(list)
    for item in items:
        params = _params(item)
        given = params.get("backend"), params.get("tiles")
        for name in machine.slow():
            if name in given and machine.why_not(name, _dtypes(params)) is None:
                groups[item.path, item.originalname, name].append(item)
    return list(groups.values())


def _thinned(cases, together: int) -> set:
    kept = machine.thinned([item.callspec.params for item in cases], together)
    return {cases[i] for i in kept}


@pytest.hookimpl(wrapper=True)
def pytest_collection_modifyitems(config, items):
    """Cases of parameters that do not go together are deselected.

    Triton's interpreter and the emulation of CUDA get so many cases of a test that each two
    values of its parameters meet in one, or that each value is in one. The others are deselected.
    Without the mark `slow` each value is in one. On a GPU, and on the other backends, all cases
    run."""
    possible = {item for item in items if _is_possible(item, _params(item))}
    for cases in _emulated(item for item in items if item in possible):
        for item in set(cases) - _thinned(cases, 1):
            item.add_marker("slow")
    yield  # to the options -m and -k
    left_out = {item for item in items if item not in possible}
    for cases in _emulated(item for item in items if item in possible):
        together = 1 if cases[0].get_closest_marker("few") else 2
        left_out |= set(cases) - _thinned(cases, together)
    config.hook.pytest_deselected(items=[item for item in items if item in left_out])
    items[:] = [item for item in items if item not in left_out]
    # Compilers come first, so that no worker ends with one while the others have nothing to do.
    quick = {item.path for item in items if item.get_closest_marker("slow") is None}
    items.sort(key=lambda item: item.path in quick)


_frozen_modules = 0  # that were imported when objects were frozen last


def _freeze() -> None:
    """The libraries' objects leave the garbage collector's lists: each of the many hundred
    collections of a run, which trainers and benchmarks ask for, would look at a million of them
    again."""
    global _frozen_modules
    gc.collect()
    gc.freeze()
    _frozen_modules = len(sys.modules)


def pytest_collection_finish():
    _freeze()


def pytest_unconfigure():
    gc.unfreeze()  # or extension modules report at the exit that their objects were leaked


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
    with torch.device("cpu"):
        torch.zeros(())  # torch notes, once, which functions take the default device: the real ones
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
    # torch.manual_seed notes, with a traceback, that GPUs are to be seeded once there are some.
    seeded = torch if machine.HAS_GPU else torch.default_generator
    seeded.manual_seed(0)


@pytest.fixture(autouse=True)
def threads():
    """torch.set_num_threads, undone afterwards. One thread unless a test asks for more: its idle
    workers spin, and on a busy machine small tests then take ten times as long. `make sanitize`
    asks for eight in all tests."""
    before = torch.get_num_threads()
    torch.set_num_threads(int(os.environ.get("FASTPREF_TEST_THREADS", "1")))
    yield torch.set_num_threads
    torch.set_num_threads(before)


def _ready(request) -> torch.device:
    """The device of the case, to be the default one. Skips where the case's backend cannot run, or
    not in the test's dtypes."""
    reason = machine.why_not(request.param, _dtypes(request.node.callspec.params))
    if reason is not None:
        pytest.skip(reason)
    return machine.device_of(request.param)


@pytest.fixture(params=machine.CASES)
def backend(request):
    """The name of each backend. Tensors that a test makes are on its device."""
    with _ready(request):
        yield machine.backend_of(request.param)


@pytest.fixture(params=machine.CASES)
def tiles(request):
    """The module of each backend, with its tile primitives; otherwise as `backend`."""
    with _ready(request):
        yield backends._MODULES[machine.backend_of(request.param)]


@pytest.fixture
def unpatched():
    """TRL as it is installed, before the test and after it, which may fail while it is patched."""
    fastpref.unpatch_trl()
    yield
    fastpref.unpatch_trl()


@pytest.fixture(autouse=True)
def _compiled_frames():
    """What a test has compiled is forgotten: later tests that compile the same functions would
    otherwise reach torch's limit of recompilations, depending on which tests ran before."""
    yield
    dynamo = sys.modules.get("torch._dynamo.utils")
    if dynamo is not None and dynamo.counters["frames"]["total"]:
        torch.compiler.reset()
        dynamo.counters.clear()


@pytest.fixture(autouse=True)
def _environment():
    """os.environ stays one object. `Dataset.map(num_proc=...)` replaces it by a copy, in which what
    a test has set would stay for all later ones."""
    environment = os.environ
    yield
    os.environ = environment  # noqa: B003
