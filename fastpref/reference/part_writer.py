"""When the sequences that a run computes are written to its reference store."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np

FLUSH_SECONDS = 60.0  # at most so much work is lost when a run is killed
FLUSH_TOKENS = 4_000_000  # 16 MB


class PartWriter:
    """Collects sequences and writes a part every `FLUSH_SECONDS`, and at the end of a `with` block.

    A block that ends with an error writes as well: what is computed is kept.

    Args:
        write: `ReferenceStore.write` of the store.
    """

    def __init__(self, write: Callable[[list, list, list], None]) -> None:
        self._write = write
        self._clear()

    def _clear(self) -> None:
        self._keys: list[np.ndarray] = []
        self._counts: list[np.ndarray] = []
        self._values: list[np.ndarray] = []
        self._tokens, self._began = 0, time.monotonic()

    def __enter__(self) -> PartWriter:
        return self

    def __exit__(self, *error: Any) -> None:
        self.flush()

    def add(self, keys: np.ndarray, counts: np.ndarray, values: np.ndarray) -> None:
        """Add sequences: keys [S], labelled tokens [S], and their log-probs one after the other."""
        self._keys.append(keys)
        self._counts.append(counts)
        self._values.append(values)
        self._tokens += len(values)
        due = time.monotonic() - self._began >= FLUSH_SECONDS
        if due or self._tokens >= FLUSH_TOKENS:
            self.flush()

    def flush(self) -> None:
        """Write what was added."""
        if self._keys:
            self._write(self._keys, self._counts, self._values)
        self._clear()
