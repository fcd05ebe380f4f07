"""Data of single answers that are labelled desirable or not: from rows or from pairs."""

from __future__ import annotations

import itertools
import json
from typing import Any

from fastpref.data.columns import NUMBERS, PAIRS, UNPAIRED, origin
from fastpref.data.layouts import Layout, arrange_batch, find_layout, row_numbers, sample
from fastpref.data.tokenise import DataReport, tokenise

CHUNK = 1000  # rows within which another prompt is looked for
SEARCHED = 10_000  # rows of a stream within which there must be two prompts


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
        mismatch: add KL_completion_ids, an answer to another prompt: that of the row before, within
            blocks of so many rows the first of which gets the last's. A batch of a whole block then
            estimates KTO's KL term from its own answers. Where that row has the same prompt, the
            nearest row before it that has not is taken, of the block if there is one, or else of
            the thousand rows around it or of the first rows.

    Returns:
        The data set with prompt_ids, completion_ids, label, row (its number in the input), the
        columns named above; and a `DataReport`.

    Raises:
        ValueError: as `prepare_dataset`; a column of pairs that single answers cannot have; with
            mismatch, rows that all have the same prompt.
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
    if mismatch is not None and "KL_completion_ids" not in (dataset.column_names or ()):
        dataset = _mismatched(dataset, mismatch, name)
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

    from fastpref.data.free_form import FreeForm

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


def _mismatched(dataset: Any, block: int, name: str) -> Any:
    """The data with KL_completion_ids, an answer to another prompt."""
    chunk = block * max(1, CHUNK // block)
    options = {"block": block, "spare": _two_prompts(dataset, name)}
    return dataset.map(_mismatch, batched=True, batch_size=chunk, fn_kwargs=options)


def _two_prompts(dataset: Any, name: str) -> list[tuple[list[int], list[int]]]:
    """The first row and the first with another prompt: prompts and answers.

    Raises:
        ValueError: there is no other prompt, in a stream not among its first rows.
    """
    found: list[tuple[list[int], list[int]]] = []
    limit = None if hasattr(dataset, "__len__") else SEARCHED
    count = 0
    for row in itertools.islice(dataset, limit):
        count += 1
        if not found or row["prompt_ids"] != found[0][0]:
            found.append((row["prompt_ids"], row["completion_ids"]))
        if len(found) == 2:
            return found
    raise ValueError(
        f"{name} data: got one prompt in {'the first ' if count == limit else ''}{count} rows with "
        "loss_type 'kto', whose KL term needs answers to other prompts; expected at least 2 prompts"
    )


def _mismatch(batch: dict[str, list], block: int, spare: list) -> dict[str, list]:
    """For each row the answer of the row before in its block, the first one's being the last; where
    that is to the same prompt, of the next before it that is not, and so on through the chunk."""
    prompts, answers = batch["prompt_ids"], batch["completion_ids"]
    size, out = len(prompts), []
    for i, prompt in enumerate(prompts):
        start = i - i % block
        stop = min(start + block, size)
        near = itertools.chain(range(i - 1, start - 1, -1), range(stop - 1, i, -1))
        far = itertools.chain(range(start - 1, -1, -1), range(size - 1, stop - 1, -1))
        others = (answers[j] for j in itertools.chain(near, far) if prompts[j] != prompt)
        anywhere = next(answer for other, answer in spare if other != prompt)
        out.append(next(others, anywhere))
    return {"KL_completion_ids": out}
