"""The tokens of preference pairs, as training would cut them."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from fastpref.data.files import load_preference_data
from fastpref.data.tokenise import prepare_dataset
from fastpref.progress import silenced


class Lengths(NamedTuple):
    """Tokens of each pair that is trained on: [pairs] int64 each, and the pair's row in the data.

    prompt, chosen and rejected are the tokens that are left of them within max_length.
    """

    prompt: Any
    chosen: Any
    rejected: Any
    row: Any

    @property
    def longest(self) -> Any:
        """Tokens of each pair's longer sequence, [pairs]."""
        return self.prompt + np.maximum(self.chosen, self.rejected)

    @property
    def labelled(self) -> Any:
        """Tokens of both answers, [pairs]: what the output head is computed for."""
        return self.chosen + self.rejected

    def picked(self, index: Any) -> Lengths:
        """Those of some pairs."""
        return Lengths(*(values[index] for values in self))


def token_lengths(data: Any, tokenizer: Any, max_length: int, most: int | None = None) -> Lengths:
    """The lengths of `most` evenly spread pairs of the data; None: of all.

    Raises:
        ValueError: data that `load_preference_data` or `prepare_dataset` refuses.
    """
    dataset = load_preference_data(data)
    rows = np.arange(len(dataset))
    if most is not None and most < len(dataset):
        rows = np.linspace(0, len(dataset) - 1, most).astype(int)
        dataset = dataset.select(rows)
    with silenced(True):
        prepared, _ = prepare_dataset(dataset, tokenizer, max_length=max_length)
    sizes = {
        name: np.array([len(ids) for ids in prepared[f"{name}_ids"]], dtype=np.int64)
        for name in ("prompt", "chosen", "rejected")
    }
    # Tokens at the end of a sequence are cut: of the answers, since longer prompts are dropped.
    prompt = np.minimum(sizes["prompt"], max_length)
    chosen, rejected = (
        np.minimum(sizes[name], max_length - prompt) for name in ("chosen", "rejected")
    )
    return Lengths(prompt, chosen, rejected, rows[np.array(prepared["row"])])
