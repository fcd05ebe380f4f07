"""The account of a step's memory: blocks to components, the peak, and what is measured of it."""

from __future__ import annotations

import pytest
import torch

from fastpref.profiling.account import Event, Known, account_of, known_blocks, read_profiler


def test_blocks_have_the_component_of_their_phase():
    known = [Known(1, 100, "weights"), Known(2, 50, "optimiser")]
    events = [
        Event(0, 0, 0, "body forward"),
        Event(1, 10, 30),
        Event(2, 0, 0, "head"),
        Event(3, 11, 500),
        Event(4, 11, -500),
        Event(5, 0, 0, "body backward"),
        Event(6, 12, 40),
        Event(7, 10, -30),
        Event(8, 0, 0, "gradients"),
        Event(9, 0, 0, "optimiser"),
        Event(10, 11, 700),  # an address that is used again
        Event(11, 11, -700),
    ]
    account = account_of(known, events[:-2], [{12, 1}])
    assert account.peak_bytes == 680 and account.peak_phase == "head"
    expected = {"weights": 100, "optimiser": 50, "activations": 30, "head": 500}
    assert {k: v for k, v in account.components.items() if v} == expected
    account = account_of(known, events, [{12, 1}])
    assert account.peak_bytes == 890 and account.peak_phase == "optimiser"
    assert account.components["gradients"] == 40 and account.components["weights"] == 100
    assert sum(account.components.values()) == account.peak_bytes
    assert max(sum(point.values()) for _, point in account.timeline) == account.peak_bytes


def test_releases_of_unknown_blocks_and_no_events():
    assert account_of([], [Event(0, 5, -10)], []).peak_bytes == 0
    account = account_of([Known(1, 7, "weights")], [], [])
    assert account.peak_bytes == 7 and len(account.timeline) == 1


def test_the_profilers_events_are_torchs_allocations():
    weight = torch.randn(256, 256, requires_grad=True)
    x = torch.randn(64, 256)
    known = known_blocks({"weights": [weight, weight[:3]], "other": [x, weight]}, "cpu")
    assert sorted((b.component, b.size) for b in known) == [("other", 65536), ("weights", 262144)]
    kinds = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=kinds, profile_memory=True) as profiler:
        for phase in ("body forward", "body backward"):
            with torch.profiler.record_function(f"fastpref: {phase}"):
                pass
            if phase == "body forward":
                loss = (x @ weight).exp().sum()
            else:
                loss.backward()
        with torch.profiler.record_function("fastpref: gradients"):
            pass
    grads = {weight.grad.untyped_storage().data_ptr()}
    account = account_of(known, read_profiler(profiler, "cpu"), [grads])
    # exp keeps its result [64, 256]; the backward pass makes its gradient and weight's.
    assert account.components["gradients"] == 262144 and account.peak_phase == "body backward"
    states = 64 * 256 * 4
    assert states <= account.components["activations"] <= 3 * states + 64


@pytest.mark.parametrize("device", ["cuda", "meta"])
def test_blocks_of_other_devices_are_left_out(device):
    assert known_blocks({"weights": [torch.zeros(3)]}, device) == []
