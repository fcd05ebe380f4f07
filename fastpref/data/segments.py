"""Rows of segments: a pair's common prefix computed once, and several answers in one row.

A padded batch has a row for each answer, so that a pair's prompt is computed twice. Here a row is
divided into *segments*, runs of consecutive tokens:

- A segment sees its own tokens causally, and all tokens of at most one earlier segment, its prefix.
- Positions start at 0, or after the prefix. A model thus computes for every token what it computes
  in a row of that answer alone.
- *Prefix sharing*: a pair has the segments prefix, rest of the chosen answer, rest of the rejected
  one. The prefix is the longest that both sequences have: the prompt, and equal first words.
- *Packing*: one row has the segments of all pairs of a batch, and no padding. A batch of single
  answers has a segment for each; the mismatched answers of KTO's KL term have a row of their own.

Both fill a `RowPlan`, which the attention reads (`fastpref.attention`). The loss reads flat tokens:
`hidden_indices` says at which position of the rows a labelled token is predicted. The last position
of a prefix predicts two labelled tokens, the first ones of both answers, and is then named twice.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastpref.data.collate import _Collator, _number_columns
from fastpref.data.columns import NUMBERS, UNPAIRED_NUMBERS

PLAN = "segments"  # the key of the `RowPlan` in a batch


class Segment(NamedTuple):
    """A run of consecutive tokens of a row.

    Attributes:
        start, stop: its positions in the row.
        prefix: the index in the row of the segment that it sees besides itself, or None.
    """

    start: int
    stop: int
    prefix: int | None = None

    @property
    def length(self) -> int:
        return self.stop - self.start


class RowPlan:
    """The segments of a batch's rows.

    A plain class on purpose: the wrappers of distributed training copy dataclasses and tuples.

    Args:
        rows: the segments of each row, adjacent to each other from position 0 on. A prefix has no
            prefix itself. The rest of a row is padding.
        width: the length of the rows.

    Attributes:
        shape: the number and the length of the rows, [R, T].
        cache: what an attention has derived from the plan, such as masks; every layer uses it.
    """

    def __init__(self, rows: Sequence[Sequence[Segment]], width: int) -> None:
        self.rows = tuple(tuple(row) for row in rows)
        self.shape = len(self.rows), width
        self.cache: dict[Any, Any] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "cache": {}}

    def tensors(self, device: torch.device | str) -> tuple[Tensor, Tensor, Tensor]:
        """What each token belongs to, int64 [R, T] each.

        Returns:
            - trees: the segment without a prefix to which a token leads; -1 is padding.
            - branches: 0 in a segment without a prefix, else the segment's number.
            - positions: the token's position in its answer; 0 is padding.
        """
        key = "tensors", str(device)
        if key not in self.cache:
            self.cache[key] = tuple(torch.from_numpy(a).to(device) for a in self._arrays())
        return self.cache[key]

    def _arrays(self) -> np.ndarray:
        trees, branches, positions = arrays = np.zeros((3, *self.shape), np.int64)
        trees.fill(-1)
        for r, row in enumerate(self.rows):
            for i, (start, stop, prefix) in enumerate(row):
                trees[r, start:stop] = i if prefix is None else prefix
                branches[r, start:stop] = 0 if prefix is None else i
                before = 0 if prefix is None else row[prefix].length
                positions[r, start:stop] = np.arange(before, before + stop - start)
        return arrays

    def visible(self, window: int | None, device: torch.device | str) -> Tensor:
        """Whether a query sees a key, bool [R, 1, T, T]; padding sees the padding before it.

        Args:
            window: a query sees only keys whose position is less than this below its own.
        """
        key = "visible", window, str(device)
        if key not in self.cache:
            trees, branches, positions = self.tensors(device)
            index = torch.arange(self.shape[1], device=device)
            same_branch = branches[:, :, None] == branches[:, None, :]
            sees = (trees[:, :, None] == trees[:, None, :]) & (
                same_branch | (branches == 0)[:, None, :]
            )
            sees &= index[:, None] >= index
            if window is not None:
                near = positions[:, :, None] - positions[:, None, :] < window
                sees &= near | (trees < 0)[:, :, None]
            self.cache[key] = sees[:, None]
        return self.cache[key]


class _Sequence(NamedTuple):
    """An answer after its prompt."""

    ids: np.ndarray
    start: int  # the position at which the answer starts

    def labelled(self, first: int) -> np.ndarray:
        """The positions from which the tokens from position `first` on are predicted."""
        return np.arange(max(first, 1) - 1, max(len(self.ids) - 1, 0))


def common_prefix(a: np.ndarray, b: np.ndarray) -> int:
    """The number of equal tokens at the start of both sequences."""
    size = min(len(a), len(b))
    different = np.flatnonzero(a[:size] != b[:size])
    return int(different[0]) if len(different) else size


class _Rows:
    """Places sequences in rows."""

    def __init__(self) -> None:
        self.rows: list[list[Segment]] = []
        self.ids: list[list[np.ndarray]] = []

    def new_row(self) -> None:
        self.rows.append([])
        self.ids.append([])

    def add(self, ids: np.ndarray, prefix: int | None) -> tuple[int, int]:
        """Append a segment to the last row; returns its index and its start."""
        row = self.rows[-1]
        start = row[-1].stop if row else 0
        if len(ids):
            row.append(Segment(start, start + len(ids), prefix))
            self.ids[-1].append(ids)
        return len(row) - 1, start

    def add_answers(self, answers: Sequence[_Sequence], sharing: bool) -> list[np.ndarray]:
        """Append a pair, or one answer without sharing.

        Returns, for each answer, the places of its tokens in the last row.
        """
        shared = common_prefix(*(sequence.ids for sequence in answers)) if sharing else 0
        prefix, first = self.add(answers[0].ids[:shared], None)
        before = np.arange(first, first + shared)
        places = []
        for ids, _ in answers:
            _, start = self.add(ids[shared:], prefix if shared else None)
            places.append(np.concatenate([before, np.arange(start, start + len(ids) - shared)]))
        return places


@dataclass
class _SegmentCollator(_Collator):
    """What the collators of rows of segments have in common."""

    sharing: bool = True
    packing: bool = False
    nll_on_prompt: bool = False

    def _sequences(self, examples: list[dict[str, Any]], key: str) -> list[_Sequence]:
        cut = self._cut(examples, key)
        return [_Sequence(np.asarray(ids, np.int64), start) for ids, start in cut]

    def _batch(self, sides: list[list[_Sequence]]) -> dict[str, Any]:
        """The rows of the sequences, and the plan.

        sides: the first answers of all examples, and then the second ones if there are two.
        """
        rows, places = _Rows(), []
        for answers in zip(*sides, strict=True):
            if not self.packing or not rows.rows:
                rows.new_row()
            row = len(rows.rows) - 1
            places.append([(row, at) for at in rows.add_answers(answers, self.sharing)])
        width = max(1, *(row[-1].stop if row else 0 for row in rows.rows))
        if self.pad_to_multiple_of:
            width += -width % self.pad_to_multiple_of
        plan = RowPlan(rows.rows, width)
        sequences = [sequence for side in sides for sequence in side]
        ordered = [answers[side] for side in range(len(sides)) for answers in places]
        return {
            **self._row_tensors(rows, plan),
            **self._flat_tokens(sequences, ordered, width),
            PLAN: plan,
        }

    def _row_tensors(self, rows: _Rows, plan: RowPlan) -> dict[str, Tensor]:
        input_ids = np.full(plan.shape, self.pad_token_id, dtype=np.int64)
        mask = np.zeros(plan.shape, np.int64)
        for r, parts in enumerate(rows.ids):
            ids = np.concatenate([np.zeros(0, np.int64), *parts])
            input_ids[r, : len(ids)], mask[r, : len(ids)] = ids, 1
        return {
            "input_ids": torch.from_numpy(input_ids),
            "attention_mask": torch.from_numpy(mask),
            "position_ids": plan.tensors("cpu")[2],
        }

    def _flat_tokens(
        self, sequences: list[_Sequence], places: list[tuple[int, np.ndarray]], width: int
    ) -> dict[str, Tensor]:
        """The labelled tokens of the sequences, whose tokens are at these places of their rows."""
        flat: dict[str, list[np.ndarray]] = {
            key: [] for key in ("hidden_indices", "labels", "sequence_ids", "nll_labels")
        }
        for s, (sequence, (row, at)) in enumerate(zip(sequences, places, strict=True)):
            is_chosen = s < len(sequences) // 2
            on_prompt = self.nll_on_prompt and is_chosen
            positions = sequence.labelled(0 if on_prompt else sequence.start)
            tokens = sequence.ids[positions + 1]
            flat["hidden_indices"].append(row * width + at[positions])
            flat["labels"].append(np.where(positions + 1 >= sequence.start, tokens, -100))
            flat["sequence_ids"].append(np.full(len(tokens), s))
            flat["nll_labels"].append(tokens if is_chosen else np.full(len(tokens), -100))
        if not self.nll_on_prompt:
            del flat["nll_labels"]
        tensors = {key: torch.from_numpy(np.concatenate(v)) for key, v in flat.items()}
        lengths = [len(ids) for ids, _ in sequences]
        answers = [max(len(ids) - start, 1) for ids, start in sequences]
        return {
            **tensors,
            "token_indices": (tensors["labels"] != -100).nonzero()[:, 0],
            "lengths": torch.tensor(answers),
            "sequence_tokens": torch.tensor(lengths),
        }


@dataclass
class SegmentCollator(_SegmentCollator):
    """Makes batches of rows of segments from tokenised rows of P pairs.

    A batch is a dict of CPU tensors, but for the plan. R is 1 with packing and else P; N is the
    number of labelled tokens, in the order of `PreferenceCollator`.

    - `input_ids`, `attention_mask`, `position_ids`: int64 [R, T].
    - `segments`: the `RowPlan`.
    - `hidden_indices`: int64 [N], the positions in the flattened rows from which the labelled
      tokens are predicted. One position may occur twice.
    - `labels`, `sequence_ids`: int64 [N], the labelled tokens and their sequences in [0, 2P).
    - `token_indices`: int64, the positions where `labels` is not -100: all N of them.
    - `nll_labels`: int64 [N] with nll_on_prompt. The prompts' tokens of the chosen sequences are
      then among the N; their labels are -100, and token_indices leave them out.
    - `lengths`, `sequence_tokens`: int64 [2P], the tokens of each answer (at least 1), and with
      those of the prompt.
    - the number columns and `rows` of `PreferenceCollator`.

    Args:
        sharing: whether a pair's common prefix is computed once.
        packing: whether all pairs are in one row.
        nll_on_prompt: whether the loss counts the NLL of the chosen sequences' prompts.
    """

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        sides = [self._sequences(examples, key) for key in ("chosen_ids", "rejected_ids")]
        return {**self._batch(sides), **_number_columns(examples, NUMBERS)}

    def tokens(self, example: dict[str, Any]) -> int:
        """The number of tokens that a pair has in the rows."""
        shared, both = self.common(example)
        return both - shared if self.sharing else both

    def common(self, example: dict[str, Any]) -> tuple[int, int]:
        """The tokens of a pair's common prefix, and of both its sequences."""
        chosen, rejected = (
            np.asarray(self._cut([example], key)[0][0], np.int64)
            for key in ("chosen_ids", "rejected_ids")
        )
        return common_prefix(chosen, rejected), len(chosen) + len(rejected)

    def compared(self, example: dict[str, Any]) -> int:
        """How much a comparison of this pair with separate rows shows, in tokens."""
        shared, both = self.common(example)
        return min(shared, 128) + min(both - 2 * shared, 128)


@dataclass
class UnpairedSegmentCollator(_SegmentCollator):
    """Makes batches of one row each from tokenised rows of B labelled answers.

    A batch has the keys of `SegmentCollator` for B sequences; the same keys with the prefix `KL_`
    for the row of the mismatched answers, if the examples have them; and `label`, the number
    columns and `rows` of `UnpairedCollator`.
    """

    sharing: bool = False
    packing: bool = True

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        batch = self._batch([self._sequences(examples, "completion_ids")])
        if "KL_completion_ids" in examples[0]:
            other = self._batch([self._sequences(examples, "KL_completion_ids")])
            batch |= {f"KL_{key}": value for key, value in other.items()}
        batch["label"] = torch.tensor([bool(example["label"]) for example in examples])
        return {**batch, **_number_columns(examples, UNPAIRED_NUMBERS)}

    def tokens(self, example: dict[str, Any]) -> int:
        """The number of tokens that an example adds to the longer one of both rows."""
        keys = [key for key in ("completion_ids", "KL_completion_ids") if key in example]
        return max(len(self._cut([example], key)[0][0]) for key in keys)

    compared = tokens


def shared_fraction(rows: Iterable[dict[str, Any]], collator: SegmentCollator) -> float:
    """The fraction of all tokens, without padding, that prefix sharing leaves out.

    Args:
        rows: tokenised pairs.
        collator: truncates them.
    """
    counts = [collator.common(row) for row in rows]
    return sum(shared for shared, _ in counts) / max(sum(both for _, both in counts), 1)
