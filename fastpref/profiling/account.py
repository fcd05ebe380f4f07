"""What the memory of a training step is for: each block of it belongs to a component.

known blocks (weights, reference, optimiser), from before the step
+ allocations and releases, in the order in which they happened
+ marks: a phase begins; the backward pass of a micro-batch has ended
     -> blocks, each with its component and its life
     -> the peak, its components, and memory over time

The events are of torch's allocator (`read_profiler`), or of a step that is only simulated
(`fastpref.planning`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

COMPONENTS = (
    "weights",
    "reference",
    "optimiser",
    "gradients",
    "activations",
    "head",
    "other",
)
PHASES = ("data", "reference", "body forward", "head", "body backward", "optimiser")
_OF_PHASE = {
    "reference": "reference",
    "body forward": "activations",
    "body backward": "activations",
    "head": "head",
    "optimiser": "optimiser",
}
MARK = "fastpref: "  # begins the names of marks among a profiler's events
GRADIENTS = "gradients"  # the mark at the end of a backward pass
_POINTS = 400  # of memory over time


class Known(NamedTuple):
    """A block that was there before the step."""

    address: int
    size: int  # bytes
    component: str


class Event(NamedTuple):
    """An allocation (size > 0), a release (size < 0) or a mark (size 0) with its text."""

    time: int  # ns
    address: int
    size: int  # bytes
    mark: str = ""


@dataclass
class Account:
    """The memory of one step.

    Attributes:
        peak_bytes: the most bytes of tensors at one time.
        peak_phase: the phase in which that was.
        components: the bytes of each of `COMPONENTS` at that time; their sum is peak_bytes.
        timeline: milliseconds since the first event, and the bytes of each component then. Each
            point is the highest of its part of the step.
    """

    peak_bytes: int
    peak_phase: str
    components: dict[str, int]
    timeline: list[tuple[float, dict[str, int]]] = field(default_factory=list)


@dataclass
class _Block:
    size: int
    component: str


def account_of(
    known: Iterable[Known], events: Iterable[Event], gradients: Iterable[set[int]]
) -> Account:
    """Assign every block of a step to a component, and find the peak.

    Args:
        known: the blocks from before the step.
        events: in the order of their times.
        gradients: for each mark `GRADIENTS`, the addresses of the gradients' storages then.
    """
    return _walk(*_moves(known, events, gradients))


_Move = tuple[int, str, "_Block", int]  # time, phase, block, 1 or -1


def _moves(
    known: Iterable[Known], events: Iterable[Event], gradients: Iterable[set[int]]
) -> tuple[list[_Block], list[_Move]]:
    """The blocks from before the step, and each block's birth and death."""
    live = {block.address: _Block(block.size, block.component) for block in known}
    begin, phase, moves = list(live.values()), "other", []
    addresses = iter(gradients)
    for event in events:
        if event.mark == GRADIENTS:
            for address in next(addresses, set()):
                if address in live and live[address].component not in ("weights", "reference"):
                    live[address].component = "gradients"
        elif event.mark:
            phase = event.mark
        elif event.size > 0:
            block = _Block(event.size, _OF_PHASE.get(phase, "other"))
            live[event.address] = block
            moves.append((event.time, phase, block, 1))
        elif (released := live.pop(event.address, None)) is not None:
            moves.append((event.time, phase, released, -1))
    return begin, moves


def part_peaks(
    known: Iterable[Known],
    events: Iterable[Event],
    gradients: Iterable[set[int]],
    parts: int = 4,
) -> dict[tuple[str, int], dict[str, int]]:
    """The components at the peak of each of so many equal parts of each phase.

    Args: those of `account_of`.
    """
    begin, moves = _moves(known, events, gradients)
    lengths = Counter(phase for _, phase, _, _ in moves)
    moves_done: Counter[str] = Counter()
    live: Counter[str] = Counter({name: 0 for name in COMPONENTS})
    for block in begin:
        live[block.component] += block.size
    total = sum(live.values())
    peaks: dict[tuple[str, int], tuple[int, dict[str, int]]] = {("other", 0): (total, dict(live))}
    for _, phase, block, sign in moves:
        key = phase, moves_done[phase] * parts // lengths[phase]
        moves_done[phase] += 1
        live[block.component] += sign * block.size
        total += sign * block.size
        if key not in peaks or total > peaks[key][0]:
            peaks[key] = total, dict(live)
    return {key: components for key, (_, components) in peaks.items()}


def _walk(begin: list[_Block], moves: list[_Move]) -> Account:
    live: Counter[str] = Counter({name: 0 for name in COMPONENTS})
    for block in begin:
        live[block.component] += block.size
    total = sum(live.values())
    account = Account(total, "other", dict(live), [(0.0, dict(live))])
    if not moves:
        return account
    first, length = moves[0][0], max(moves[-1][0] - moves[0][0], 1)
    last_index, highest = 0, -1
    for time, phase, block, sign in moves:
        live[block.component] += sign * block.size
        total += sign * block.size
        if total > account.peak_bytes:
            account.peak_bytes, account.peak_phase = total, phase
            account.components = dict(live)
        point_index = (time - first) * _POINTS // length
        if point_index > last_index or total > highest:
            point = (time - first) / 1e6, dict(live)
            if point_index > last_index:
                account.timeline.append(point)
            else:
                account.timeline[-1] = point
            last_index, highest = point_index, total
    return account


# ---- from torch's allocator ----


def storage_of(tensor: torch.Tensor) -> tuple[int, int]:
    """Address and bytes of a tensor's storage."""
    storage = tensor.untyped_storage()
    return storage.data_ptr(), storage.nbytes()


def known_blocks(
    groups: Mapping[str, Iterable[torch.Tensor]], device: torch.device | str
) -> list[Known]:
    """The blocks of these tensors on the device; one of several groups is of the first."""
    kind = torch.device(device).type
    blocks: dict[int, Known] = {}
    for component, tensors in groups.items():
        for tensor in tensors:
            if tensor.device.type != kind:
                continue
            address, size = storage_of(tensor)
            if size:
                blocks.setdefault(address, Known(address, size, component))
    return list(blocks.values())


def read_profiler(profiler: Any, device: torch.device | str) -> list[Event]:
    """Allocations, releases and marks of a `torch.profiler.profile` with profile_memory=True."""
    from torch._C._profiler import _EventType

    kind = torch.device(device).type
    stack = list(profiler.profiler.kineto_results.experimental_event_tree())
    events = []
    while stack:
        node = stack.pop()
        stack.extend(node.children)
        if node.tag == _EventType.Allocation:
            block = node.extra_fields
            if block.device.type == kind:
                events.append(Event(node.start_time_ns, block.ptr, block.alloc_size))
        elif node.tag == _EventType.TorchOp and node.name.startswith(MARK):
            events.append(Event(node.start_time_ns, 0, 0, node.name.removeprefix(MARK)))
    # A mark precedes what happens in the same nanosecond.
    return sorted(events, key=lambda event: (event.time, event.size != 0))
