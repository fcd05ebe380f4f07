"""The CUDA backend where there is a GPU: streams, devices, graphs, and the two CUDA runtimes of one
process, torch's and the module's own, which meet in the device's primary context."""

from __future__ import annotations

import os

import machine
import pytest
import torch

from fastpref.backends import cuda, cuda_module
from fastpref.backends.stats import Stats
from fastpref.backends.tile import Transform

pytestmark = pytest.mark.skipif(not machine.HAS_GPU, reason="torch finds no GPU")


@pytest.fixture(autouse=True)
def runs():
    if cuda.problem() is not None:
        pytest.skip(str(cuda.problem()))


def _problem(device, n=64, vocab=40000):
    tile = torch.randn(n, vocab, device=device) * 3
    labels = torch.randint(vocab, (n,), device=device)
    return tile, labels, Stats.empty(n, device, torch.float32), torch.empty_like(tile)


def _run(tile, labels, stats, out):
    cuda.fold_grad(tile, labels, stats, Transform(), out)


def _check(tile, labels, stats, out):
    z = tile.double()
    logps = z.log_softmax(1)
    wanted = -logps.exp()
    wanted[torch.arange(len(labels), device=tile.device), labels] += 1
    at_label = logps.gather(1, labels[:, None])[:, 0]
    torch.testing.assert_close(stats.logps.double(), at_label, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out.double(), wanted, rtol=1e-4, atol=1e-6)


def test_two_runtimes():
    """Memory, a stream and events of torch's runtime, a launch by the module's: what one writes the
    other reads, in the order of the stream, back and forth."""
    device = torch.device("cuda", torch.cuda.current_device())
    error, _, architecture, runtime, driver = cuda_module.ready(device.index)
    assert (
        error is None and architecture >= 80 and 0 < runtime and driver // 1000 >= runtime // 1000
    )
    stream, done = torch.cuda.Stream(device), torch.cuda.Event()
    tile, labels, stats, out = _problem(device)
    late = tile.clone()
    tile.fill_(torch.nan)
    torch.cuda.synchronize(device)
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        tile.copy_(late)  # torch's runtime
        _run(tile, labels, stats, out)  # the module's, on the same stream
        out.mul_(2)  # torch's again
        done.record(stream)
    assert torch.cuda.current_device() == device.index
    done.synchronize()
    _check(tile, labels, stats, out / 2)
    assert torch.cuda.memory_allocated(device) > 0  # and torch's runtime still works
    torch.ones(1, device=device).sum().item()


def test_it_allocates_nothing_and_waits_for_nothing():
    device = torch.device("cuda", torch.cuda.current_device())
    given = _problem(device)
    _run(*given)
    torch.cuda.synchronize(device)
    before, reserved = torch.cuda.memory_allocated(device), torch.cuda.mem_get_info(device)[0]
    torch.cuda.set_sync_debug_mode("error")
    try:
        _run(*given)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize(device)
    assert torch.cuda.memory_allocated(device) == before
    if "PYTEST_XDIST_WORKER" not in os.environ:  # other processes use the GPU, too
        assert torch.cuda.mem_get_info(device)[0] == reserved
    _check(*given)


def test_in_a_graph():
    device = torch.device("cuda", torch.cuda.current_device())
    tile, labels, stats, out = _problem(device)
    _run(tile, labels, stats, out)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        _run(tile, labels, stats, out)
    tile.copy_(torch.randn_like(tile) * 3)
    out.fill_(torch.nan)
    graph.replay()
    _check(tile, labels, stats, out)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_on_a_gpu_that_is_not_the_current_one():
    current = torch.cuda.current_device()
    other = torch.device("cuda", (current + 1) % torch.cuda.device_count())
    given = _problem(other)
    _run(*given)
    _check(*given)
    assert torch.cuda.current_device() == current
    here = _problem(torch.device("cuda", current))
    _run(*here)  # and back
    _check(*here)
