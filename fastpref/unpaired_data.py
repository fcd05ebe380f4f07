"""Data of single answers that are labelled desirable or not: from rows or from pairs."""

from __future__ import annotations

from typing import Any

from .data import DataReport, extract_prompt, tokenise
from .data_files import NUMBERS, UNPAIRED


def prepare_unpaired_dataset(
    dataset: Any,
    tokenizer: Any = None,
    *,
    max_length: int | None = 1024,
    truncation_mode: str = "keep_start",
    num_proc: int | None = None,
    name: str = "train",
    vocab_size: int | None = None,
    mismatch: int | None = None,
) -> tuple[Any, DataReport]:
    """Tokenise labelled answers, as `prepare_dataset` does pairs.

    Args:
        dataset: a `datasets.Dataset` or `IterableDataset` with columns prompt, completion (strings
            or message lists) and label (true for a desirable answer), or prompt_ids, completion_ids
            and label. Or pairs, as `prepare_dataset` takes them: each becomes two rows, in TRL
            1.16's order, which is all chosen answers of a thousand rows and then their rejected
            ones. Rows are numbered after that. Optional: weight, tools, chat_template_kwargs.
        tokenizer, max_length, truncation_mode, num_proc, name, vocab_size: as `prepare_dataset`.
        mismatch: add KL_completion_ids, the answer of the row before, within blocks of so many rows
            the first of which gets the last's. A batch of a whole block then estimates KTO's KL
            term from its own answers.

    Returns:
        The data set with prompt_ids, completion_ids, label, row (its number in the input), the
        columns named above; and a `DataReport`.

    Raises:
        ValueError: as `prepare_dataset`; a column of pairs that single answers cannot have.
    """
    dataset, report = tokenise(
        unpair(dataset, name),
        tokenizer,
        UNPAIRED,
        max_length=max_length,
        truncation_mode=truncation_mode,
        num_proc=num_proc,
        name=name,
        vocab_size=vocab_size,
    )
    if mismatch is not None and report.rows == 1:
        raise ValueError(
            f"{name} data: got a single answer with loss_type 'kto', whose KL term needs answers "
            "to other prompts; expected at least 2"
        )
    if mismatch is not None and "KL_completion_ids" not in (dataset.column_names or ()):
        dataset = dataset.map(_mismatch, batched=True, batch_size=mismatch)
    return dataset, report


def unpair(dataset: Any, name: str = "train") -> Any:
    """Two rows with completion and label in place of each pair; other data as it is.

    Raises:
        ValueError: a column of pairs that single answers cannot have, such as margin.
    """
    columns = dataset.column_names or list(next(iter(dataset), {}))
    for column in (c for c in NUMBERS if c in columns and c not in UNPAIRED.numbers):
        raise ValueError(
            f"{name} data: column {column!r} is of pairs, and here are single answers; expected "
            "data without it"
        )
    ends = [end for end in ("", "_ids") if {f"chosen{end}", f"rejected{end}"} <= set(columns)]
    if not ends:
        return dataset
    options = {"end": ends[-1], "name": name}
    return dataset.map(_split_pairs, batched=True, fn_kwargs=options, remove_columns=columns)


def _split_pairs(batch: dict[str, list], end: str, name: str) -> dict[str, list]:
    chosen, rejected = f"chosen{end}", f"rejected{end}"
    size = len(batch[chosen])
    if not end and "prompt" not in batch:
        parts = [
            extract_prompt({"chosen": a, "rejected": b}, f"{name} data: row {i} of {size}")
            for i, (a, b) in enumerate(zip(batch[chosen], batch[rejected], strict=True))
        ]
        batch = {**batch, **{key: [part[key] for part in parts] for key in parts[0]}}
    out = {key: values * 2 for key, values in batch.items() if key not in (chosen, rejected)}
    out[f"completion{end}"] = batch[chosen] + batch[rejected]
    out["label"] = [True] * size + [False] * size
    return out


def _mismatch(batch: dict[str, list]) -> dict[str, list]:
    answers = batch["completion_ids"]
    return {"KL_completion_ids": answers[-1:] + answers[:-1]}
