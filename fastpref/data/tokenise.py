"""`prepare_dataset`: a data set of text becomes one of token ids, and what was found on the way.

Tokenisation, end-of-sequence and truncation follow TRL 1.16. Rows are numbered from 0.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fastpref.data.collate import check_truncation, truncate
from fastpref.data.columns import (
    PAIRS,
    Form,
    check_label,
    check_number,
    check_token_ids,
    origin,
    same,
)
from fastpref.data.layouts import (
    Layout,
    arrange_batch,
    find_layout,
    has_no_prompt,
    row_numbers,
    sample,
)
from fastpref.data.row_tokens import RowTokenizer
from fastpref.progress import count, counting

IDENTICAL, TOO_LONG, NOT_PREFIX, TRUNCATED, UNLABELLED = 1, 2, 4, 8, 16  # bits of flags
NULLS, NO_PROMPT = 32, 64
DROPPED = IDENTICAL | TOO_LONG | UNLABELLED
FLAG_NAMES = {
    "identical": IDENTICAL,
    "too_long": TOO_LONG,
    "unlabelled": UNLABELLED,
    "not_prefix": NOT_PREFIX,
    "truncated": TRUNCATED,
    "nulls": NULLS,
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
    nulls: int = 0  # kept: nulls inside tool calls, tools or content parts are left out
    unread: tuple[str, ...] = ()  # columns that nothing reads
    implicit: bool = False  # there is no column of prompts: they are inside the answers
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
            "nulls": "have nulls inside tool calls, tools or content parts, which Arrow puts where "
            "rows have different keys: they are left out; give the rows as a list or a JSON file "
            "to keep nulls of their own",
        }
        out = []
        if self.unread:
            names = ", ".join(map(repr, self.unread))
            inside = "; the prompt is the text that chosen and rejected start with"
            said = f"{self.name} data: nothing reads the columns {names}"
            out.append(said + (inside if self.implicit else ""))
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
    first = sample(dataset)
    if not first:
        raise ValueError(f"{name} data has no rows")
    columns = list(dataset.column_names or first[0])
    if "row" in columns and set(form.ids) <= set(columns) <= form.prepared:
        return dataset, report
    layout = find_layout(dataset, first, name, form)
    report.unread, report.implicit = layout.unread, layout.prompt is None
    is_text = not set(form.ids) <= set(columns)
    if is_text and tokenizer is None:
        raise ValueError(f"{name} data is text; a tokenizer is needed")
    ids = datasets.Sequence(datasets.Value("int32"))
    features = {**dict.fromkeys(form.ids, ids), "row": datasets.Value("int64")}
    features["flags"] = datasets.Value("int16")
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
            "layout": layout,
            "max_length": max_length,
            "keep_start": truncation_mode == "keep_start",
            "data": origin(dataset, name),
            "vocab_size": vocab_size,
        },
    }
    if is_text:
        _check_layout(layout, tokenizer, name)
        _check_first(first, layout, form, origin(dataset, name), name, streaming)
    if streaming:
        encoded = dataset.map(**encode).filter(_is_kept)
        return encoded.remove_columns("flags"), report

    with _showing(f"Tokenising {name} data", len(dataset), num_proc) as desc:
        encoded = dataset.map(**encode, num_proc=num_proc, desc=desc)
    table = encoded.with_format("numpy")
    flags, numbers = np.asarray(table["flags"][:]), np.asarray(table["row"][:])
    dropped = (flags & DROPPED) > 0
    report.rows, report.kept = len(flags), int((~dropped).sum())
    for key, bit in FLAG_NAMES.items():
        hits = np.flatnonzero((flags & bit > 0) & ((bit & DROPPED > 0) | ~dropped))
        setattr(report, key, len(hits))
        report.examples[key] = numbers[hits[:5]].tolist()
    _check_prompts(int((flags & NO_PROMPT > 0).sum()), len(flags), layout, name)
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


def _check_layout(layout: Layout, tokenizer: Any, name: str) -> None:
    """Raise a ValueError if a column makes conversations and there is no template for them."""
    if layout.system and not getattr(tokenizer, "chat_template", None):
        raise ValueError(
            f"{name} data has the system column {layout.system!r}, which makes its rows "
            "conversations, but the tokenizer has no chat template; set tokenizer.chat_template or "
            "put the system prompt into the prompt's text and remove the column"
        )


def _check_first(
    rows: list[dict], layout: Layout, form: Form, data: str, name: str, streaming: bool
) -> None:
    """Raise a ValueError if the first rows of a stream have no prompt, or if those of any data have
    conversations of no message for prompts, which no template takes. All other rows are looked at
    as they are tokenised."""
    batch = {key: [row[key] for row in rows] for key in rows[0]}
    numbers = row_numbers(batch, list(range(len(rows))))
    arranged = [row for row, _ in arrange_batch(batch, layout, form, data, numbers)]
    if streaming or all(row["prompt"] == [] for row in arranged):
        _check_prompts(sum(has_no_prompt(r, layout) for r in arranged), len(rows), layout, name)


def _check_prompts(empty: int, rows: int, layout: Layout, name: str) -> None:
    """Raise a ValueError if no row has a prompt: it may be in a column that nobody reads."""
    if empty < rows:
        return
    why = f"the column {layout.prompt!r} is empty in all of them"
    if layout.prompt is None:
        why = "there is no column 'prompt', and chosen and rejected do not start with the same text"
    unread = f"; not read: {', '.join(map(repr, layout.unread))}" if layout.unread else ""
    raise ValueError(
        f"{name} data: all of {rows} rows have an empty prompt, since {why}{unread}; rename the "
        "column with the prompt to 'prompt'"
    )


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
    layout: Layout,
    max_length: int | None,
    keep_start: bool,
    data: str,
    vocab_size: int | None,
) -> dict[str, list]:
    numbers = [key for key in form.numbers if key in batch]
    out: dict[str, list] = {key: [] for key in (*form.ids, *numbers, *form.labels, "row", "flags")}
    rows = row_numbers(batch, rows)
    if form.ids[1] in batch:
        encoded = [([batch[key][i] for key in form.ids], 0) for i in range(len(rows))]
    else:
        tokens = RowTokenizer(tokenizer, form.answers)
        arranged = arrange_batch(batch, layout, form, data, rows)
        encoded = [
            _encode_row(row, tokens, layout, found, f"{data}: row {index}")
            for index, (row, found) in zip(rows, arranged, strict=True)
        ]
    for i, (index, (ids, flags)) in enumerate(zip(rows, encoded, strict=True)):
        where = f"{data}: row {index}"
        for key, value in zip(form.ids, ids, strict=True):
            check_token_ids(value, key, where, vocab_size)
            out[key].append(value)
        if not flags & IDENTICAL:
            flags |= _length_flags(ids, max_length, keep_start)
        for key in numbers:
            out[key].append(check_number(batch[key][i], key, where))
        for key in form.labels:
            out[key].append(check_label(batch[key][i], key, where))
        out["row"].append(index)
        out["flags"].append(flags)
        count()
    return out


def _encode_row(
    row: dict, tokens: RowTokenizer, layout: Layout, found_nulls: bool, where: str
) -> tuple[list[list[int]], int]:
    flags = (NULLS if found_nulls else 0) | (NO_PROMPT if has_no_prompt(row, layout) else 0)
    first, *others = (row[key] for key in tokens.answers)
    if any(same(first, other) for other in others):
        return [[] for _ in ("prompt", *tokens.answers)], flags | IDENTICAL
    prompt, *answers = tokens(row, where)
    split = min(_common_prefix(prompt, answer) for answer in answers)
    if split < len(prompt):
        flags |= NOT_PREFIX
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


def _common_prefix(a: list[int], b: list[int]) -> int:
    pairs = zip(a, b, strict=False)
    return next((i for i, (x, y) in enumerate(pairs) if x != y), min(len(a), len(b)))
