"""`prepare_dataset`: from a data set of text to one of token ids, and a report on its rows.

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
    Columns,
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
    """The result of `prepare_dataset` in numbers of rows. Of a stream no row is counted.

    Attributes:
        name: what the data is for, such as "train".
        rows: rows of the input; None for a stream.
        kept: rows of the result; None for a stream.
        identical: dropped, since chosen and rejected have the same tokens within max_length.
        too_long: dropped, since the prompt alone has max_length tokens.
        unlabelled: dropped, since no answer has a token that follows another token.
        not_prefix: kept, although the prompt's tokens are not a prefix of prompt + answer.
        truncated: kept, with at least one answer cut at max_length.
        nulls: kept, without the nulls inside tool calls, tools or content parts.
        unread: columns that are not read.
        implicit: whether the prompts are inside the answers and not in a column.
        max_length: as passed to `prepare_dataset`.
        examples: the numbers of the first five rows of each kind above.
    """

    name: str
    rows: int | None = None
    kept: int | None = None
    identical: int = 0
    too_long: int = 0
    unlabelled: int = 0
    not_prefix: int = 0
    truncated: int = 0
    nulls: int = 0
    unread: tuple[str, ...] = ()
    implicit: bool = False
    max_length: int | None = None
    examples: dict[str, list[int]] = field(default_factory=dict)

    def warnings(self) -> list[str]:
        """One sentence for each kind of row above, and for unread columns."""
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
            sentence = f"{self.name} data: nothing reads the columns {names}"
            out.append(sentence + (inside if self.implicit else ""))
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

    Prompt and answers are split at the end of the longest token prefix that the prompt shares with
    prompt + chosen and with prompt + rejected. EOS is appended to strings that do not end with it;
    the end of messages is the chat template's.

    Args:
        dataset: a `datasets.Dataset` or `IterableDataset` with columns prompt, chosen, rejected
            (strings or message lists), or chosen and rejected with the prompt inside, or
            prompt_ids, chosen_ids, rejected_ids. Optional: ref_chosen_logps and
            ref_rejected_logps (sequence sums in nats), weight, margin, soft_label, tools,
            chat_template_kwargs.
        tokenizer: a transformers tokenizer; not needed for token ids.
        max_length: maximum number of tokens of prompt + answer; None for no maximum. With
            `keep_start`, rows whose prompt alone reaches it are dropped.
        truncation_mode: "keep_start" or "keep_end".
        num_proc: number of processes; not for a stream.
        name: what errors and the report call the data.
        vocab_size: the model's; larger token ids are an error. None: not checked.

    Returns:
        The data set with prompt_ids, chosen_ids, rejected_ids, row (the row's number in the input)
        and the optional number columns; and a `DataReport`.

    Raises:
        ValueError: a missing column, a malformed row (with its number), a tokenizer without the
            chat template or the EOS that the data needs, or no row left.
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
    columns: Columns,
    *,
    max_length: int | None,
    truncation_mode: str,
    num_proc: int | None,
    name: str,
    vocab_size: int | None,
) -> tuple[Any, DataReport]:
    """`prepare_dataset` for pairs or single answers, as `columns` says."""
    import datasets

    check_truncation(max_length, truncation_mode)
    report = DataReport(name, max_length=max_length)
    streaming = isinstance(dataset, datasets.IterableDataset)
    first = sample(dataset)
    named = origin(dataset, name).removesuffix(" data")  # with the file's name, for errors
    if not first:
        raise ValueError(f"{named} data has no rows")
    column_names = list(dataset.column_names or first[0])
    if "row" in column_names and set(columns.ids) <= set(column_names) <= columns.prepared:
        return dataset, report
    layout = find_layout(dataset, first, named, columns)
    report.unread, report.implicit = layout.unread, layout.prompt is None
    is_text = not set(columns.ids) <= set(column_names)
    if is_text and tokenizer is None:
        raise ValueError(f"{named} data is text; a tokenizer is needed")
    ids = datasets.Sequence(datasets.Value("int32"))
    features = {**dict.fromkeys(columns.ids, ids), "row": datasets.Value("int64")}
    features["flags"] = datasets.Value("int16")
    features.update({k: datasets.Value("float64") for k in columns.numbers if k in column_names})
    features.update({k: datasets.Value("bool") for k in columns.labels})
    encode = {
        "function": _encode_batch,
        "batched": True,
        "features": datasets.Features(features),
        "with_indices": True,
        "remove_columns": column_names,
        "fn_kwargs": {
            "tokenizer": tokenizer,
            "columns": columns,
            "layout": layout,
            "max_length": max_length,
            "keep_start": truncation_mode == "keep_start",
            "data": f"{named} data",
            "vocab_size": vocab_size,
        },
    }
    if is_text:
        _check_layout(layout, tokenizer, named)
        _check_first(first, layout, columns, f"{named} data", named, streaming)
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
    _check_prompts(int((flags & NO_PROMPT > 0).sum()), len(flags), layout, named)
    if report.kept == 0:
        identical = f"in {report.identical} chosen and rejected are identical, "
        raise ValueError(
            f"{named} data: none of {report.rows} rows can be used: "
            f"{identical if columns is PAIRS else ''}in {report.too_long} the prompt alone reaches "
            f"max_length={max_length} tokens, in {report.unlabelled} no answer token follows "
            "another token"
        )
    if dropped.any():
        encoded = encoded.select(np.flatnonzero(~dropped))
    return encoded.remove_columns("flags"), report


def _check_layout(layout: Layout, tokenizer: Any, name: str) -> None:
    """Raise ValueError if there is a system column but no chat template."""
    if layout.system and not getattr(tokenizer, "chat_template", None):
        raise ValueError(
            f"{name} data has the system column {layout.system!r}, which makes its rows "
            "conversations, but the tokenizer has no chat template; set tokenizer.chat_template or "
            "put the system prompt into the prompt's text and remove the column"
        )


def _check_first(
    rows: list[dict], layout: Layout, columns: Columns, data: str, name: str, streaming: bool
) -> None:
    """Raise ValueError if all of the first rows lack a prompt.

    In data that is not a stream only prompts without a message count here: no chat template accepts
    them, and the other empty prompts are counted while all rows are tokenised.
    """
    batch = {key: [row[key] for row in rows] for key in rows[0]}
    numbers = row_numbers(batch, list(range(len(rows))))
    arranged = [row for row, _ in arrange_batch(batch, layout, columns, data, numbers)]
    if streaming or all(row["prompt"] == [] for row in arranged):
        _check_prompts(sum(has_no_prompt(r, layout) for r in arranged), len(rows), layout, name)


def _check_prompts(empty: int, rows: int, layout: Layout, name: str) -> None:
    """Raise ValueError if all rows have an empty prompt; an unread column may hold it."""
    if empty < rows:
        return
    reason = f"the column {layout.prompt!r} is empty in all of them"
    if layout.prompt is None:
        reason = (
            "there is no column 'prompt', and chosen and rejected do not start with the same text"
        )
    unread = f"; not read: {', '.join(map(repr, layout.unread))}" if layout.unread else ""
    raise ValueError(
        f"{name} data: all of {rows} rows have an empty prompt, since {reason}{unread}; rename the "
        "column with the prompt to 'prompt'"
    )


@contextlib.contextmanager
def _showing(what: str, rows: int, num_proc: int | None) -> Iterator[str]:
    """Progress of a `Dataset.map`: lines in a log file, or the bar of datasets on a terminal.

    Yields the text for the bar.
    """
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
    columns: Columns,
    layout: Layout,
    max_length: int | None,
    keep_start: bool,
    data: str,
    vocab_size: int | None,
) -> dict[str, list]:
    """The columns of a tokenised batch, with `flags` that tell what was found in each row."""
    numbers = [key for key in columns.numbers if key in batch]
    out_names = (*columns.ids, *numbers, *columns.labels, "row", "flags")
    out: dict[str, list] = {key: [] for key in out_names}
    rows = row_numbers(batch, rows)
    if columns.ids[1] in batch:
        encoded = [([batch[key][i] for key in columns.ids], 0) for i in range(len(rows))]
    else:
        tokens = RowTokenizer(tokenizer, columns.answers)
        arranged = arrange_batch(batch, layout, columns, data, rows)
        encoded = [
            _encode_row(row, tokens, layout, had_nulls, f"{data}: row {index}")
            for index, (row, had_nulls) in zip(rows, arranged, strict=True)
        ]
    for i, (index, (ids, flags)) in enumerate(zip(rows, encoded, strict=True)):
        where = f"{data}: row {index}"
        for key, value in zip(columns.ids, ids, strict=True):
            check_token_ids(value, key, where, vocab_size)
            out[key].append(value)
        if not flags & IDENTICAL:
            flags |= _length_flags(ids, max_length, keep_start)
        for key in numbers:
            out[key].append(check_number(batch[key][i], key, where))
        for key in columns.labels:
            out[key].append(check_label(batch[key][i], key, where))
        out["row"].append(index)
        out["flags"].append(flags)
        count()
    return out


def _encode_row(
    row: dict, tokens: RowTokenizer, layout: Layout, had_nulls: bool, where: str
) -> tuple[list[list[int]], int]:
    """The token ids of the prompt and of each answer, and the row's flags."""
    flags = (NULLS if had_nulls else 0) | (NO_PROMPT if has_no_prompt(row, layout) else 0)
    first, *others = (row[key] for key in tokens.answers)
    if any(same(first, other) for other in others):
        return [[] for _ in ("prompt", *tokens.answers)], flags | IDENTICAL
    prompt, *answers = tokens(row, where)
    split = min(common_prefix(prompt, answer) for answer in answers)
    if split < len(prompt):
        flags |= NOT_PREFIX
    return [prompt[:split], *(answer[split:] for answer in answers)], flags


def _length_flags(ids: list[list], max_length: int | None, keep_start: bool) -> int:
    """The flags of a row that depend on truncation."""
    prompt, *answers = ids
    flags = 0
    if max_length is not None:
        if keep_start and len(prompt) >= max_length:
            return TOO_LONG
        longest = max(len(prompt) + len(answer) for answer in answers)
        flags = TRUNCATED if longest > max_length else 0
    cut = [truncate(prompt + answer, len(prompt), max_length, keep_start) for answer in answers]
    if cut[0] in cut[1:]:
        return flags | IDENTICAL
    labelled = any(len(ids) > max(start, 1) for ids, start in cut)
    return flags if labelled else flags | UNLABELLED


def common_prefix(a: list[int], b: list[int]) -> int:
    """How many tokens two sequences have in common at their start."""
    pairs = zip(a, b, strict=False)
    return next((i for i, (x, y) in enumerate(pairs) if x != y), min(len(a), len(b)))
