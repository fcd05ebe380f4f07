"""Which pairs are computed together: parts of a batch, and balanced batches of processes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch.utils.data import Sampler

PARTS = "parts"  # the key of a batch's parts
SHARES = "shares"  # and of the fraction of the batch's pairs in each of them


def balanced(
    sizes: Sequence[int], bins: int, capacity: int | None = None
) -> tuple[list[list[int]], int]:
    """Divide items among bins so that the largest sum of sizes is small.

    The items go from the largest to the smallest, each to the lightest bin, the first of equals.

    Args:
        capacity: the most items of a bin; the bins must have room for all.

    Returns:
        The items of each bin in increasing order, and the largest sum.
    """
    members: list[list[int]] = [[] for _ in range(bins)]
    sums = [0] * bins
    for i in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        free = [b for b in range(bins) if capacity is None or len(members[b]) < capacity]
        lightest = min(free, key=lambda b: (sums[b], b))
        members[lightest].append(i)
        sums[lightest] += sizes[i]
    return [sorted(m) for m in members], max(sums)


def divide(sizes: Sequence[int], most: int) -> list[list[int]]:
    """The fewest groups of at most `most` that `balanced` makes; a larger item is a group alone."""
    alone = [[i] for i, size in enumerate(sizes) if size >= most]
    smaller = [i for i, size in enumerate(sizes) if size < most]
    bins = max(1, -(-sum(sizes[i] for i in smaller) // most))
    while smaller:
        groups, largest = balanced([sizes[i] for i in smaller], bins)
        if largest <= most:
            alone += [[smaller[i] for i in group] for group in groups if group]
            break
        bins += 1
    return sorted(alone)


@dataclass
class PartsCollator:
    """Another collator's batches, in parts where a batch would have too many tokens.

    A batch in parts is a dict of `parts`, the other collator's batches, and `shares`, the fraction
    of the pairs that each part has.

    Args:
        collator: the other collator.
        size: maps an example to its number of tokens.
        most: the most tokens of a part; a larger pair is a part alone.
    """

    collator: Callable[[list[dict[str, Any]]], dict[str, Any]]
    size: Callable[[dict[str, Any]], int]
    most: int

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        groups = divide([self.size(example) for example in examples], self.most)
        if len(groups) == 1:
            return self.collator(examples)
        parts = [self.collator([examples[i] for i in group]) for group in groups]
        return {PARTS: parts, SHARES: [len(group) / len(examples) for group in groups]}


class BalancedSampler(Sampler):
    """Another sampler's rows, exchanged between processes so that they have equally many tokens.

    The rows of a micro-batch of all processes stay together, and every process gets `batch_size`
    of them. Sums over all processes are therefore the same as with the other sampler.

    Args:
        sampler: the other sampler.
        sizes: the rows' numbers of tokens.
        batch_size: rows per batch and process.
        processes: the number of processes, which take one batch each in turn.
    """

    def __init__(
        self, sampler: Iterable[int], sizes: Sequence[int], batch_size: int, processes: int
    ) -> None:
        self.sampler, self.sizes = sampler, sizes
        self.batch_size, self.processes = batch_size, processes

    def __len__(self) -> int:
        return len(self.sizes)

    def __iter__(self) -> Iterator[int]:
        rows: list[int] = []
        for row in self.sampler:
            rows.append(row)
            if len(rows) == self.batch_size * self.processes:
                yield from self._exchanged(rows)
                rows = []
        yield from rows  # too few for all processes: as they are

    def _exchanged(self, rows: list[int]) -> Iterator[int]:
        groups, _ = balanced([self.sizes[row] for row in rows], self.processes, self.batch_size)
        for group in groups:
            yield from (rows[i] for i in group)

    def set_epoch(self, epoch: int) -> None:
        """Set the number of the next epoch."""
        sampler: Any = self.sampler
        if hasattr(sampler, "set_epoch"):
            sampler.set_epoch(epoch)
