"""Padded batches of tokenised preference data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from fastpref.data.columns import NUMBERS, UNPAIRED_NUMBERS


def check_truncation(max_length: int | None, mode: str) -> None:
    """Raise ValueError for a max_length below 2 or an unknown truncation_mode."""
    if mode not in ("keep_start", "keep_end"):
        raise ValueError(f"truncation_mode is {mode!r}; expected 'keep_start' or 'keep_end'")
    if max_length is not None and max_length < 2:
        raise ValueError(f"max_length is {max_length}; expected at least 2 or None")


def truncate(
    ids: list[int], start: int, max_length: int | None, keep_start: bool
) -> tuple[list[int], int]:
    """The tokens that truncation leaves, and the position at which the answer starts in them."""
    if max_length is None or len(ids) <= max_length:
        return ids, start
    if keep_start:
        return ids[:max_length], min(start, max_length)
    return ids[-max_length:], max(0, start - (len(ids) - max_length))


@dataclass
class _Collator:
    pad_token_id: int
    max_length: int | None = None
    truncation_mode: str = "keep_start"
    pad_to_multiple_of: int | None = None

    def __post_init__(self) -> None:
        check_truncation(self.max_length, self.truncation_mode)

    def _cut(self, examples: list[dict[str, Any]], key: str) -> list[tuple[list[int], int]]:
        """For each example what `truncate` leaves of prompt + answer."""
        cut = []
        for example in examples:
            prompt = list(example["prompt_ids"])
            whole = prompt + list(example[key])
            keep_start = self.truncation_mode == "keep_start"
            cut.append(truncate(whole, len(prompt), self.max_length, keep_start))
        return cut

    def _padded(self, examples: list[dict[str, Any]], *keys: str) -> dict[str, torch.Tensor]:
        """The padded sequences prompt + answer: all examples' for the first key, then the next."""
        sequences = [cut for key in keys for cut in self._cut(examples, key)]
        width = max(1, *(len(ids) for ids, _ in sequences))
        if self.pad_to_multiple_of:
            width += -width % self.pad_to_multiple_of
        shape = (len(sequences), width)
        input_ids = np.full(shape, self.pad_token_id, dtype=np.int64)
        attention, completion = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
        labels = np.full(shape, -100, dtype=np.int64)
        for i, (ids, start) in enumerate(sequences):
            input_ids[i, : len(ids)] = ids
            attention[i, : len(ids)] = 1
            completion[i, start : len(ids)] = 1
            first = max(start, 1)
            labels[i, first - 1 : max(len(ids) - 1, 0)] = ids[first:]
        arrays = {
            "input_ids": input_ids,
            "attention_mask": attention,
            "completion_mask": completion,
            "labels": labels,
            "token_indices": np.flatnonzero(labels != -100).astype(np.int64),
        }
        return {key: torch.from_numpy(array) for key, array in arrays.items()}


def _number_columns(examples: list[dict[str, Any]], keys: Sequence[str]) -> dict[str, torch.Tensor]:
    """The number columns that the examples have, float32 [P], and their `rows`, int64 [P]."""
    batch = {}
    for key in keys:
        if key in examples[0]:
            values = [float(example[key]) for example in examples]
            batch[key] = torch.tensor(values, dtype=torch.float32)
    if "row" in examples[0]:
        batch["rows"] = torch.tensor([int(example["row"]) for example in examples])
    return batch


@dataclass
class PreferenceCollator(_Collator):
    """Makes right-padded batches [chosen; rejected] of P pairs from tokenised rows.

    A batch is a dict of CPU tensors:

    - `input_ids`, `attention_mask`, `completion_mask`: int64 [2P, T].
    - `labels`: int64 [2P, T]. `labels[:, t]` is the completion token at t + 1, so labels are
      aligned with the hidden states; -100 elsewhere. A completion token at position 0, and an
      answer whose tokens are all truncated, have no label.
    - `token_indices`: int64 [N], the flat positions where `labels` is not -100. Computing them here
      saves a synchronisation of the GPU.
    - `ref_chosen_logps`, `ref_rejected_logps`, `weight`, `margin`, `soft_label`: float32 [P], if
      the rows have them.
    - `rows`: int64 [P], the rows' numbers in the input, if the rows have them.

    Args:
        pad_token_id: the token that pads `input_ids`.
        max_length: maximum number of tokens of prompt + answer; None for no maximum.
        truncation_mode: "keep_start" or "keep_end".
        pad_to_multiple_of: T is a multiple of this.
    """

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        batch = self._padded(examples, "chosen_ids", "rejected_ids")
        return {**batch, **_number_columns(examples, NUMBERS)}


@dataclass
class UnpairedCollator(_Collator):
    """Makes right-padded batches of B labelled answers from tokenised rows.

    A batch is a dict of CPU tensors:

    - `input_ids`, `attention_mask`, `completion_mask`, `labels`, `token_indices`: as those of
      `PreferenceCollator`, for B sequences.
    - the same five with the prefix `KL_`: the prompts with answers to other prompts, if the rows
      have `KL_completion_ids`.
    - `label`: bool [B], whether the answer is desirable.
    - `ref_logps`, `ref_KL_logps`, `weight`: float32 [B], if the rows have them.
    - `rows`: int64 [B], the rows' numbers in the input, if the rows have them.

    Args: those of `PreferenceCollator`.
    """

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        batch = self._padded(examples, "completion_ids")
        if "KL_completion_ids" in examples[0]:
            other = self._padded(examples, "KL_completion_ids")
            batch.update({f"KL_{key}": value for key, value in other.items()})
        batch["label"] = torch.tensor([bool(example["label"]) for example in examples])
        return {**batch, **_number_columns(examples, UNPAIRED_NUMBERS)}
