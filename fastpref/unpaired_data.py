"""Data of single answers that are labelled desirable or not: from rows or from pairs."""

from __future__ import annotations

import json
from typing import Any

from .data import DataReport, tokenise
from .data_files import NUMBERS, PAIRS, UNPAIRED, origin
from .data_layouts import Layout, arrange_batch, find_layout, row_numbers, sample


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
    first = sample(dataset)
    columns = dataset.column_names or list(first[0] if first else ())
    for column in (c for c in NUMBERS if c in columns and c not in UNPAIRED.numbers):
        raise ValueError(
            f"{name} data: column {column!r} is of pairs, and here are single answers; expected "
            "data without it"
        )
    ends = [end for end in ("", "_ids") if {f"chosen{end}", f"rejected{end}"} <= set(columns)]
    if not ends:
        return dataset
    from datasets import Features, IterableDataset, Sequence, Value

    from .data_json import FreeForm

    given = dataset.features
    if ends[-1] == "_ids":
        options: dict[str, Any] = {"function": _split_ids}
        left = [c for c in columns if c not in ("chosen_ids", "rejected_ids")]
        made = {"completion_ids": Sequence(Value("int32"))}
    else:
        layout = find_layout(dataset, first, name, PAIRS)
        options = {"function": _split_texts, "with_indices": True}
        used = {layout.prompt, layout.context, layout.system, *PAIRS.answers}
        left = [c for c in columns if c not in used]
        stored = not isinstance(dataset, IterableDataset)  # its `map` writes values as they come
        options["fn_kwargs"] = {
            "layout": layout, "used": used, "data": origin(dataset, name), "stored": stored
        }  # fmt: skip
        made = {"prompt": FreeForm(), "completion": FreeForm()}
    if given is not None:
        kept = {key: given[key] for key in left}
        options["features"] = Features({**kept, **made, "label": Value("bool")})
    return dataset.map(**options, batched=True, remove_columns=columns)


def _split_ids(batch: dict[str, list]) -> dict[str, list]:
    out = {k: v * 2 for k, v in batch.items() if k not in ("chosen_ids", "rejected_ids")}
    size = len(batch["chosen_ids"])
    out["completion_ids"] = batch["chosen_ids"] + batch["rejected_ids"]
    return {**out, "label": [True] * size + [False] * size}


def _split_texts(
    batch: dict[str, list],
    rows: list[int],
    layout: Layout,
    used: set[str | None],
    data: str,
    stored: bool,
) -> dict[str, list]:
    """Prompt, completion and label of a batch of pairs; as JSON where they are stored."""
    rows = row_numbers(batch, rows)
    pairs = [row for row, _ in arrange_batch(batch, layout, PAIRS, data, rows)]
    out = {key: values * 2 for key, values in batch.items() if key not in used}
    as_is = json.dumps if stored else lambda value: value
    out["prompt"] = [as_is(row["prompt"]) for row in pairs] * 2
    out["completion"] = [as_is(row[key]) for key in PAIRS.answers for row in pairs]
    return {**out, "label": [True] * len(pairs) + [False] * len(pairs)}


def _mismatch(batch: dict[str, list]) -> dict[str, list]:
    answers = batch["completion_ids"]
    return {"KL_completion_ids": answers[-1:] + answers[:-1]}
