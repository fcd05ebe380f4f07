"""`Heap`: the memory that glibc's malloc takes from Linux for given births and deaths of tensors.

births and deaths of a step's storages (simulate.py)
     -> two steps of them; AdamW's states are born at the end of the first
     -> each block takes the smallest hole that it fits in, or the heap's end
     -> the heap's largest size

`PreferenceTrainer` has malloc keep freed memory (fastpref/body/memory.py). So every block is a part
of one heap, which grows and does not shrink. What a training holds beyond its tensors are holes.

torch asks for blocks at multiples of 64 bytes. malloc finds such a block by a search for `_SLACK`
more bytes, and frees what is beyond the block at once. So a hole of a block's own size is too small
for another such block.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence

from fastpref.profiling.account import Event, Known

_ALIGNMENT, _HEADER = 64, 16
_SLACK = _ALIGNMENT + 32
_SMALLEST = 1024  # bytes of a block that is followed; malloc keeps lists of smaller ones


class Heap:
    """A heap without blocks.

    Attributes:
        top: bytes from its beginning to the end of its last block.
        highest: the largest top so far, which is the memory that Linux has given.
    """

    def __init__(self) -> None:
        self.top = 0
        self.highest = 0
        self._holes: list[tuple[int, int]] = []  # size and address, by size
        self._by_begin: dict[int, int] = {}  # the holes' sizes
        self._by_end: dict[int, int] = {}

    def take(self, size: int) -> tuple[int, int]:
        """A block's address, and the bytes that it takes."""
        size = -(-(size + _HEADER) // _ALIGNMENT) * _ALIGNMENT
        at = bisect_left(self._holes, (size + _SLACK, 0))
        if at == len(self._holes):
            address = self.top
            self.top += size
            self.highest = max(self.highest, self.top)
            return address, size
        hole, address = self._holes[at]
        self._forget(address, hole)
        self._remember(address + size, hole - size)
        return address, size

    def give(self, address: int, size: int) -> None:
        """A block's death: its bytes join the holes beside it."""
        end = address + size
        if end in self._by_begin:
            after = self._by_begin[end]
            self._forget(end, after)
            size += after
        if address in self._by_end:
            before = self._by_end[address]
            self._forget(address - before, before)
            address, size = address - before, size + before
        if address + size == self.top:
            self.top = address
        else:
            self._remember(address, size)

    def _remember(self, address: int, size: int) -> None:
        insort(self._holes, (size, address))
        self._by_begin[address] = self._by_end[address + size] = size

    def _forget(self, address: int, size: int) -> None:
        del self._holes[bisect_left(self._holes, (size, address))]
        del self._by_begin[address], self._by_end[address + size]


def heap_of_steps(known: Sequence[Known], events: Sequence[Event], steps: int = 2) -> int:
    """The largest size of the heap while so many equal steps run.

    Args:
        known: blocks from before the step. The optimiser's are born in the first step, and the
            others are outside of the heap.
        events: births and deaths of a step. What lives at its end are gradients, which die then.
    """
    heap = Heap()
    for step in range(steps):
        live: dict[int, tuple[int, int]] = {}
        for event in events:
            if event.size >= _SMALLEST:
                live[event.address] = heap.take(event.size)
            elif event.size < 0 and event.address in live:
                heap.give(*live.pop(event.address))
        if step == 0:
            for block in known:
                if block.component == "optimiser":  # its two states of a weight
                    heap.take(block.size // 2)
                    heap.take(block.size // 2)
        for address in list(live):
            heap.give(*live.pop(address))
    return heap.highest
