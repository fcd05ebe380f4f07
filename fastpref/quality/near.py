"""`Sketches`: which texts of many are nearly the same, from a few numbers of each.

A sketch holds the smallest hashes of the text's runs of 16 bytes (a bottom-k sketch; Broder, "On
the resemblance and containment of documents", 1997). Two texts whose runs overlap by a share J have
sketches that overlap by about J.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

import numpy as np

SIZE = 64  # hashes in a sketch
KEYS = 4  # of them, the smallest, by which texts that may be alike are found
ALIKE = 0.75  # share of equal hashes from which on texts count as nearly the same
_CROWD = 200  # texts that share a key, beyond which only the last are compared
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)


def sketch(text: str) -> np.ndarray:
    """The smallest distinct hashes of a text's runs of 16 bytes, in ascending order."""
    values = np.frombuffer(text.encode(errors="replace").ljust(16), dtype=np.uint8)
    out = values.astype(np.uint64) + np.uint64(1)
    factor = _MULTIPLIER
    with np.errstate(over="ignore"):
        for step in (1, 2, 4, 8):  # runs of 2, 4, 8 and 16 bytes
            out = out[:-step] * factor + out[step:]
            factor = factor * factor
        out ^= out >> np.uint64(29)
        out *= _MULTIPLIER
        out ^= out >> np.uint64(32)
    if out.size > 4 * SIZE:
        out = np.partition(out, 4 * SIZE - 1)[: 4 * SIZE]  # some of them are equal
    return np.unique(out)[:SIZE]


class Sketches:
    """The sketches of many texts, each with the number of its row."""

    def __init__(self) -> None:
        self.numbers: list[int] = []
        self.sketches: list[np.ndarray] = []

    def add(self, number: int, text: str) -> None:
        """Add a row's text."""
        self.numbers.append(number)
        self.sketches.append(sketch(text))

    def near(self, excluded: set[int]) -> list[int]:
        """The rows, but for the excluded ones, that are nearly the same as an earlier row."""
        index: defaultdict[int, list[int]] = defaultdict(list)
        out = []
        for i, number in enumerate(self.numbers):
            keys = self.sketches[i][:KEYS].tolist()
            if number not in excluded:
                if self._has_alike(self.sketches[i], _candidates(index, keys)):
                    out.append(number)
                for key in keys:
                    index[key].append(i)
        return out

    def near_others(self, others: Sketches, excluded: set[int]) -> list[int]:
        """The rows, but for the excluded ones, that are nearly the same as a row of `others`."""
        index: defaultdict[int, list[int]] = defaultdict(list)
        for i, values in enumerate(others.sketches):
            for key in values[:KEYS].tolist():
                index[key].append(i)
        return [
            number
            for number, values in zip(self.numbers, self.sketches, strict=True)
            if number not in excluded
            and others._has_alike(values, _candidates(index, values[:KEYS].tolist()))
        ]

    def _has_alike(self, values: np.ndarray, candidates: Iterator[int]) -> bool:
        for i in candidates:
            other = self.sketches[i]
            shared = np.intersect1d(values, other, assume_unique=True).size
            if shared < ALIKE * max(values.size, other.size):
                continue  # the union is at least as large, so that its share is below ALIKE
            union = np.union1d(values, other)[:SIZE]
            both = np.isin(union, values) & np.isin(union, other)
            if both.mean() >= ALIKE:
                return True
        return False


def _candidates(index: dict[int, list[int]], keys: list[int]) -> Iterator[int]:
    seen: set[int] = set()
    for key in keys:
        for i in index.get(key, ())[-_CROWD:]:
            if i not in seen:
                seen.add(i)
                yield i
