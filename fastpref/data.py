"""Preference data: reading it, tokenising it and batching it.

Three steps, each usable alone: `load_preference_data` turns a file, a hub name or rows into a
`datasets.Dataset`; `prepare_dataset` tokenises it, drops rows that cannot be trained on and says
how many; `PreferenceCollator` makes a padded batch. Tokenisation, end-of-sequence and truncation
follow TRL 1.16. Rows are numbered from 0 everywhere, lines of a file from 1.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .collate import PreferenceCollator, check_truncation, truncate
from .data_files import (
    PAIRS,
    Form,
    check_columns,
    check_label,
    check_number,
    check_token_ids,
    describe,
    is_messages,
    load_preference_data,
)
from .progress import count, counting

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
    return tokenise(
        dataset,
        tokenizer,
        PAIRS,
        max_length=max_length,
        truncation_mode=truncation_mode,
        num_proc=num_proc,
        name=name,
        vocab_size=vocab_size,
    )


def tokenise(
    dataset: Any,
    tokenizer: Any,
    form: Form,
    *,
    max_length: int | None,
    truncation_mode: str,
    num_proc: int | None,
    name: str,
    vocab_size: int | None,
) -> tuple[Any, DataReport]:
    """`prepare_dataset` for data of any form."""
    import datasets

    check_truncation(max_length, truncation_mode)
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
    if "row" in columns and set(form.ids) <= set(columns) <= form.prepared:
        return dataset, report
    check_columns(columns, name, form)
    if not set(form.ids) <= set(columns) and tokenizer is None:
        raise ValueError(f"{name} data is text; a tokenizer is needed")
    ids = datasets.Sequence(datasets.Value("int32"))
    features = {**dict.fromkeys(form.ids, ids), "row": datasets.Value("int64")}
    features["flags"] = datasets.Value("int8")
    features.update({k: datasets.Value("float64") for k in form.numbers if k in columns})
    features.update({k: datasets.Value("bool") for k in form.labels})
    encode = {
        "function": _encode_batch,
        "batched": True,
        "features": datasets.Features(features),
        "with_indices": True,
        "remove_columns": columns,
        "fn_kwargs": {
            "tokenizer": tokenizer,
            "form": form,
            "max_length": max_length,
            "keep_start": truncation_mode == "keep_start",
            "name": name,
            "vocab_size": vocab_size,
        },
    }
    if streaming:
        encoded = dataset.map(**encode).filter(_is_kept)
        return encoded.remove_columns("flags"), report

    with _showing(f"Tokenising {name} data", len(dataset), num_proc) as desc:
        encoded = dataset.map(**encode, num_proc=num_proc, desc=desc)
    flags = np.asarray(encoded.with_format("numpy")["flags"][:])
    dropped = (flags & DROPPED) > 0
    report.rows, report.kept = len(flags), int((~dropped).sum())
    for key, bit in FLAG_NAMES.items():
        hits = np.flatnonzero((flags & bit > 0) & ((bit & DROPPED > 0) | ~dropped))
        setattr(report, key, len(hits))
        report.examples[key] = hits[:5].tolist()
    if report.kept == 0:
        same = f"in {report.identical} chosen and rejected are identical, "
        raise ValueError(
            f"{name} data: none of {report.rows} rows can be used: "
            f"{same if form is PAIRS else ''}in {report.too_long} the prompt alone reaches "
            f"max_length={max_length} tokens, in {report.unlabelled} no answer token follows "
            "another token"
        )
    if dropped.any():
        encoded = encoded.select(np.flatnonzero(~dropped))
    return encoded.remove_columns("flags"), report


@contextlib.contextmanager
def _showing(what: str, rows: int, num_proc: int | None) -> Iterator[str]:
    """Progress of a `Dataset.map`: lines in a log file or, on a terminal, the bar of datasets."""
    import datasets

    hidden = datasets.are_progress_bars_disabled()
    with counting(what, "rows", rows, disabled=hidden, shared=(num_proc or 1) > 1) as lines:
        if lines is not None and not hidden:
            datasets.disable_progress_bars()
        try:
            yield what
        finally:
            if lines is not None and not hidden:
                datasets.enable_progress_bars()


def _is_kept(row: dict) -> bool:
    return row["flags"] & DROPPED == 0


def _encode_batch(
    batch: dict,
    rows: list[int],
    tokenizer: Any,
    form: Form,
    max_length: int | None,
    keep_start: bool,
    name: str,
    vocab_size: int | None,
) -> dict[str, list]:
    out: dict[str, list] = {key: [] for key in (*form.ids, "row", "flags")}
    out.update({key: [] for key in (*form.numbers, *form.labels) if key in batch})
    for i, index in enumerate(rows):
        row = {key: values[i] for key, values in batch.items()}
        where = f"{name} data: row {index}"
        ids, flags = _encode_row(row, tokenizer, form, where)
        for key, value in zip(form.ids, ids, strict=True):
            check_token_ids(value, key, where, vocab_size)
        if not flags & IDENTICAL:
            flags |= _length_flags(ids, max_length, keep_start)
        for key, value in zip(form.ids, ids, strict=True):
            out[key].append(value)
        for key in form.numbers:
            if key in row:
                out[key].append(check_number(row[key], key, where))
        for key in form.labels:
            out[key].append(check_label(row[key], key, where))
        out["row"].append(index)
        out["flags"].append(flags)
        count()
    return out


def _encode_row(row: dict, tokenizer: Any, form: Form, where: str) -> tuple[list[list], int]:
    if form.ids[1] in row:
        return [row[key] for key in form.ids], 0
    first, *others = (row[key] for key in form.answers)
    if first is not None and first in others:
        return [[] for _ in form.ids], IDENTICAL
    if "prompt" not in row:
        row = {**row, **extract_prompt(row, where)}
    prompt, *answers = _tokenize(row, tokenizer, ("prompt", *form.answers), where)
    split = min(_common_prefix(prompt, answer) for answer in answers)
    flags = NOT_PREFIX if split < len(prompt) else 0
    return [prompt[:split], *(answer[split:] for answer in answers)], flags


def _length_flags(ids: list[list], max_length: int | None, keep_start: bool) -> int:
    """What is wrong with a row as the collator will cut it."""
    prompt, *answers = ids
    flags = 0
    if max_length is not None:
        if keep_start and len(prompt) >= max_length:
            return TOO_LONG
        longest = max(len(prompt) + len(answer) for answer in answers)
        flags = TRUNCATED if longest > max_length else 0
    kept = [truncate(prompt + answer, len(prompt), max_length, keep_start) for answer in answers]
    if kept[0] in kept[1:]:
        return flags | IDENTICAL
    labelled = any(len(ids) > max(start, 1) for ids, start in kept)
    return flags if labelled else flags | UNLABELLED


def _tokenize(row: dict, tokenizer: Any, keys: tuple[str, ...], where: str) -> list[list[int]]:
    """The tokens of the prompt, and of the prompt with each answer."""
    for key in keys:
        if row[key] is None:
            raise ValueError(f"{where}: {key} is missing; expected a string or a message list")
    prompt, *answers = (row[key] for key in keys)
    if all(isinstance(value, str) for value in (prompt, *answers)):
        eos = tokenizer.eos_token
        if eos is None:
            raise ValueError("the tokenizer has no EOS token, which must end plain-text answers")
        answers = [a if a.endswith(eos) else a + eos for a in answers]
        return [tokenizer(text=t)["input_ids"] for t in (prompt, *(prompt + a for a in answers))]
    for key in keys:
        if not is_messages(row[key]):
            raise ValueError(
                f"{where}: {key} is {describe(row[key])}; expected {', '.join(keys[:-1])} and "
                f"{keys[-1]} to be all strings or all lists of messages with role and content"
            )
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(
            "the data is conversational but the tokenizer has no chat template; set "
            f"tokenizer.chat_template or give {', '.join(keys[:-1])} and {keys[-1]} as strings"
        )
    options = {"tools": _decoded(row.get("tools")), **_template_options(row)}
    options.update(tokenize=True, return_dict=True)
    conversations = [(prompt, True), *((prompt + answer, False) for answer in answers)]
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
