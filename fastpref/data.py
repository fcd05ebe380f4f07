"""Preference data: reading it, tokenising it and batching it.

Three steps, each usable alone: `load_preference_data` turns a file, a hub name or rows into a
`datasets.Dataset`; `prepare_dataset` tokenises it, drops rows that cannot be trained on and says
how many; `PreferenceCollator` makes a padded batch. Tokenisation, end-of-sequence and truncation
follow TRL 1.16. Rows are numbered from 0 everywhere, lines of a file from 1.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from .data_files import (
    IDS,
    NUMBERS,
    TEXT,
    check_columns,
    check_number,
    check_token_ids,
    describe,
    is_messages,
    load_preference_data,
)

__all__ = [
    "DataReport",
    "PreferenceCollator",
    "extract_prompt",
    "load_preference_data",
    "prepare_dataset",
]

IDENTICAL, TOO_LONG, NOT_PREFIX, TRUNCATED, UNLABELLED = 1, 2, 4, 8, 16  # bits of flags
DROPPED = IDENTICAL | TOO_LONG | UNLABELLED
FLAG_NAMES = {
    "identical": IDENTICAL,
    "too_long": TOO_LONG,
    "unlabelled": UNLABELLED,
    "not_prefix": NOT_PREFIX,
    "truncated": TRUNCATED,
}


# ---- tokenising --------------------------------------------------------------------------------


@dataclass
class DataReport:
    """What `prepare_dataset` did to a data set. Counts are rows; None when streaming."""

    name: str
    rows: int | None = None
    kept: int | None = None
    identical: int = 0  # dropped: chosen and rejected are the same tokens within max_length
    too_long: int = 0  # dropped: the prompt alone fills max_length
    unlabelled: int = 0  # dropped: no answer has a token that another one precedes
    not_prefix: int = 0  # kept: the prompt's tokens are not a prefix of prompt + answer
    truncated: int = 0  # kept: at least one answer is cut by max_length
    max_length: int | None = None
    examples: dict[str, list[int]] = field(default_factory=dict)  # first row numbers of each kind

    def warnings(self) -> list[str]:
        """One sentence for each kind of problem that was found."""
        limit = f"max_length={self.max_length} tokens"
        cut = "" if self.max_length is None else f" once cut at {limit}"
        texts = {
            "identical": f"were dropped because chosen and rejected are identical{cut}",
            "too_long": f"were dropped because the prompt alone reaches {limit}",
            "unlabelled": "were dropped because no answer token follows another token",
            "not_prefix": "have a prompt whose tokens are not a prefix of prompt + answer: the "
            "answer starts where they diverge and the end of the prompt is left out",
            "truncated": f"have an answer that is cut at {limit}",
        }
        out = []
        for key, text in texts.items():
            if count := getattr(self, key):
                rows = ", ".join(map(str, self.examples[key]))
                rows += ", ..." if count > len(self.examples[key]) else ""
                out.append(f"{self.name} data: {count} of {self.rows} rows {text} (rows {rows})")
        return out


def prepare_dataset(
    dataset: Any,
    tokenizer: Any = None,
    *,
    max_length: int | None = 1024,
    truncation_mode: str = "keep_start",
    num_proc: int | None = None,
    name: str = "train",
    vocab_size: int | None = None,
) -> tuple[Any, DataReport]:
    """Tokenise preference data and drop the rows that cannot be trained on.

    The completion starts after the longest token prefix that the prompt shares with prompt + chosen
    and with prompt + rejected. EOS is appended to plain strings that do not end with it; messages
    rely on the chat template.

    Args:
        dataset: a `datasets.Dataset` or `IterableDataset` with columns prompt, chosen, rejected
            (strings or message lists), or chosen and rejected with the prompt inside, or
            prompt_ids, chosen_ids, rejected_ids. Optional: ref_chosen_logps and
            ref_rejected_logps (sequence sums), weight, margin, soft_label, tools,
            chat_template_kwargs.
        tokenizer: a transformers tokenizer; not needed for token ids.
        max_length: tokens kept of prompt + answer. With `keep_start`, rows whose prompt alone
            reaches it are dropped; None keeps everything.
        truncation_mode: "keep_start" or "keep_end".
        vocab_size: the model's; token ids that it does not have are an error.

    Returns:
        The data set with prompt_ids, chosen_ids, rejected_ids, row (its number in the input) and
        the optional number columns; and a `DataReport`.

    Raises:
        ValueError: a column is missing, a row is malformed (with its number), the tokenizer lacks
            a chat template or EOS that the data needs, or no row is left.
    """
    import datasets

    _check_truncation(max_length, truncation_mode)
    report = DataReport(name, max_length=max_length)
    streaming = isinstance(dataset, datasets.IterableDataset)
    if streaming:
        first = next(iter(dataset), None)
        if first is None:
            raise ValueError(f"{name} data has no rows")
        columns = list(first)
    else:
        columns = dataset.column_names
        if len(dataset) == 0:
            raise ValueError(f"{name} data has no rows")
    if "row" in columns and set(IDS) <= set(columns) <= {*IDS, *NUMBERS, "row"}:
        return dataset, report  # already prepared
    check_columns(columns, name)
    if not set(IDS) <= set(columns) and tokenizer is None:
        raise ValueError(f"{name} data is text; a tokenizer is needed")
    ids = datasets.Sequence(datasets.Value("int32"))
    features = {**dict.fromkeys(IDS, ids), "row": datasets.Value("int64")}
    features["flags"] = datasets.Value("int8")
    features.update({k: datasets.Value("float64") for k in NUMBERS if k in columns})
    encode = {
        "function": _encode_batch,
        "batched": True,
        "features": datasets.Features(features),
        "with_indices": True,
        "remove_columns": columns,
        "fn_kwargs": {
            "tokenizer": tokenizer,
            "max_length": max_length,
            "keep_start": truncation_mode == "keep_start",
            "name": name,
            "vocab_size": vocab_size,
        },
    }
    if streaming:
        encoded = dataset.map(**encode).filter(_is_kept)
        return encoded.remove_columns("flags"), report

    encoded = dataset.map(**encode, num_proc=num_proc, desc=f"Tokenising {name} data")
    flags = np.asarray(encoded.with_format("numpy")["flags"][:])
    dropped = (flags & DROPPED) > 0
    report.rows, report.kept = len(flags), int((~dropped).sum())
    for key, bit in FLAG_NAMES.items():
        hits = np.flatnonzero((flags & bit > 0) & ((bit & DROPPED > 0) | ~dropped))
        setattr(report, key, len(hits))
        report.examples[key] = hits[:5].tolist()
    if report.kept == 0:
        raise ValueError(
            f"{name} data: none of {report.rows} rows can be used: in {report.identical} chosen "
            f"and rejected are identical, in {report.too_long} the prompt alone reaches "
            f"max_length={max_length} tokens, in {report.unlabelled} no answer token follows "
            "another token"
        )
    if dropped.any():
        encoded = encoded.select(np.flatnonzero(~dropped))
    return encoded.remove_columns("flags"), report


def _is_kept(row: dict) -> bool:
    return row["flags"] & DROPPED == 0


def _check_truncation(max_length: int | None, mode: str) -> None:
    if mode not in ("keep_start", "keep_end"):
        raise ValueError(f"truncation_mode is {mode!r}; expected 'keep_start' or 'keep_end'")
    if max_length is not None and max_length < 2:
        raise ValueError(f"max_length is {max_length}; expected at least 2 or None")


def _encode_batch(
    batch: dict,
    rows: list[int],
    tokenizer: Any,
    max_length: int | None,
    keep_start: bool,
    name: str,
    vocab_size: int | None,
) -> dict[str, list]:
    out: dict[str, list] = {key: [] for key in (*IDS, "row", "flags")}
    out.update({key: [] for key in NUMBERS if key in batch})
    for i, index in enumerate(rows):
        row = {key: values[i] for key, values in batch.items()}
        where = f"{name} data: row {index}"
        ids, flags = _encode_row(row, tokenizer, where)
        for key, value in zip(IDS, ids, strict=True):
            check_token_ids(value, key, where, vocab_size)
        if not flags & IDENTICAL:
            flags |= _length_flags(ids, max_length, keep_start)
        for key, value in zip(IDS, ids, strict=True):
            out[key].append(value)
        for key in NUMBERS:
            if key in row:
                out[key].append(check_number(row[key], key, where))
        out["row"].append(index)
        out["flags"].append(flags)
    return out


def _encode_row(row: dict, tokenizer: Any, where: str) -> tuple[tuple[list, list, list], int]:
    if "chosen_ids" in row:
        return (row["prompt_ids"], row["chosen_ids"], row["rejected_ids"]), 0
    if row["chosen"] is not None and row["chosen"] == row["rejected"]:
        return ([], [], []), IDENTICAL
    if "prompt" not in row:
        row = {**row, **extract_prompt(row, where)}
    prompt, chosen, rejected = _tokenize_pair(row, tokenizer, where)
    split = min(_common_prefix(prompt, chosen), _common_prefix(prompt, rejected))
    flags = NOT_PREFIX if split < len(prompt) else 0
    return (prompt[:split], chosen[split:], rejected[split:]), flags


def _length_flags(ids: tuple[list, list, list], max_length: int | None, keep_start: bool) -> int:
    """What is wrong with a row as the collator will cut it."""
    prompt, *answers = ids
    flags = 0
    if max_length is not None:
        if keep_start and len(prompt) >= max_length:
            return TOO_LONG
        longest = max(len(prompt) + len(answer) for answer in answers)
        flags = TRUNCATED if longest > max_length else 0
    chosen, rejected = (
        _truncate(prompt + answer, len(prompt), max_length, keep_start) for answer in answers
    )
    if chosen == rejected:
        return flags | IDENTICAL
    labelled = any(len(kept) > max(start, 1) for kept, start in (chosen, rejected))
    return flags if labelled else flags | UNLABELLED


def _truncate(
    ids: list[int], start: int, max_length: int | None, keep_start: bool
) -> tuple[list[int], int]:
    """What is kept of a sequence, and where its answer starts in that."""
    if max_length is None or len(ids) <= max_length:
        return ids, start
    if keep_start:
        return ids[:max_length], min(start, max_length)
    return ids[-max_length:], max(0, start - (len(ids) - max_length))


def _tokenize_pair(row: dict, tokenizer: Any, where: str) -> list[list[int]]:
    for key in TEXT:
        if row[key] is None:
            raise ValueError(f"{where}: {key} is missing; expected a string or a message list")
    prompt, chosen, rejected = (row[key] for key in TEXT)
    if all(isinstance(value, str) for value in (prompt, chosen, rejected)):
        eos = tokenizer.eos_token
        if eos is None:
            raise ValueError("the tokenizer has no EOS token, which must end plain-text answers")
        answers = [a if a.endswith(eos) else a + eos for a in (chosen, rejected)]
        return [tokenizer(text=t)["input_ids"] for t in (prompt, *(prompt + a for a in answers))]
    for key in TEXT:
        if not is_messages(row[key]):
            raise ValueError(
                f"{where}: {key} is {describe(row[key])}; expected prompt, chosen and rejected to "
                "be all strings or all lists of messages with role and content"
            )
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(
            "the data is conversational but the tokenizer has no chat template; set "
            "tokenizer.chat_template or give prompt, chosen and rejected as strings"
        )
    options = {"tools": _decoded(row.get("tools")), **_template_options(row)}
    options.update(tokenize=True, return_dict=True)
    conversations = ((prompt, True), (prompt + chosen, False), (prompt + rejected, False))
    out = []
    for messages, generate in conversations:
        extra = {"add_generation_prompt": True, **options} if generate else options
        out.append(tokenizer.apply_chat_template(messages, **extra)["input_ids"])
    return out


def extract_prompt(row: Mapping, where: str = "data") -> dict[str, Any]:
    """Split chosen and rejected that both start with the prompt (strings or message lists).

    The prompt is their longest common prefix of characters or messages; a space right before the
    point where they part goes to the answers. Chosen and rejected must differ.
    """
    chosen, rejected = row["chosen"], row["rejected"]
    if type(chosen) is not type(rejected) or not isinstance(chosen, (str, list)):
        raise ValueError(
            f"{where}: chosen is {describe(chosen)} and rejected is {describe(rejected)}; "
            "expected two strings or two message lists"
        )
    shorter = min(len(chosen), len(rejected))
    if shorter == 0:
        raise ValueError(f"{where}: chosen or rejected is empty and there is no prompt")
    cut = next((i for i in range(shorter) if chosen[i] != rejected[i]), shorter - 1)
    if chosen[cut] != rejected[cut] and cut > 0 and chosen[cut - 1] == " ":
        cut -= 1
    return {"prompt": chosen[:cut], "chosen": chosen[cut:], "rejected": rejected[cut:]}


def _common_prefix(a: list[int], b: list[int]) -> int:
    pairs = zip(a, b, strict=False)
    return next((i for i, (x, y) in enumerate(pairs) if x != y), min(len(a), len(b)))


def _decoded(value: Any) -> Any:
    return json.loads(value) if isinstance(value, str) else value


def _template_options(row: dict) -> dict[str, Any]:
    options = _decoded(row.get("chat_template_kwargs")) or {}
    return {key: value for key, value in options.items() if value is not None}


# ---- batching ----------------------------------------------------------------------------------


@dataclass
class PreferenceCollator:
    """Make a right-padded batch [chosen; rejected] of P pairs from tokenised rows.

    Returns a dict of CPU tensors: `input_ids`, `attention_mask`, `completion_mask` and `labels`
    int64 [2P, T]; `token_indices` int64 [N], the flat positions where `labels` is not -100, so that
    no device has to be asked for them; and, where the rows have them, `ref_chosen_logps`,
    `ref_rejected_logps`, `weight`, `margin`, `soft_label` float32 [P] and `rows` int64 [P].
    `labels[:, t]` is the completion token at t + 1, already aligned with the hidden state at t. An
    answer whose tokens are all truncated has no label; neither has a completion token at 0.
    """

    pad_token_id: int
    max_length: int | None = None
    truncation_mode: str = "keep_start"
    pad_to_multiple_of: int | None = None

    def __post_init__(self) -> None:
        _check_truncation(self.max_length, self.truncation_mode)

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        sequences = []
        for key in ("chosen_ids", "rejected_ids"):
            for example in examples:
                prompt = list(example["prompt_ids"])
                whole = prompt + list(example[key])
                keep_start = self.truncation_mode == "keep_start"
                sequences.append(_truncate(whole, len(prompt), self.max_length, keep_start))
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
        batch = {key: torch.from_numpy(array) for key, array in arrays.items()}
        for key in NUMBERS:
            if key in examples[0]:
                values = [float(example[key]) for example in examples]
                batch[key] = torch.tensor(values, dtype=torch.float32)
        if "row" in examples[0]:
            batch["rows"] = torch.tensor([int(example["row"]) for example in examples])
        return batch
