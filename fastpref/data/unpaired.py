"""`prepare_unpaired_dataset`: data of single answers labelled desirable or undesirable."""

from __future__ import annotations

import itertools
import json
from typing import Any

from fastpref.data.columns import NUMBERS, PAIRS, UNPAIRED, check_token_ids, origin
from fastpref.data.layouts import Layout, arrange_batch, find_layout, row_numbers, sample
from fastpref.data.tokenise import DataReport, tokenise

CHUNK = 1000  # rows among which an answer to another prompt is searched
SEARCHED = 10_000  # rows of a stream among which there must be two prompts


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
    same_prompt: bool = False,
) -> tuple[Any, DataReport]:
    """Tokenise labelled answers, as `prepare_dataset` does pairs.

    Args:
        dataset: a `datasets.Dataset` or `IterableDataset` with columns prompt, completion (strings
            or message lists) and label (true for a desirable answer), or prompt_ids, completion_ids
            and label. Or pairs, as `prepare_dataset` takes them: each becomes two rows. Their order
            is TRL 1.16's: all chosen answers of a thousand pairs, then their rejected ones. The
            rows are numbered in that order. Optional: weight, tools, chat_template_kwargs.
        tokenizer, max_length, truncation_mode, num_proc, name, vocab_size: as `prepare_dataset`.
        mismatch: number of rows in a block; adds the column KL_completion_ids, an answer to another
            prompt. It is the answer of the row before, cyclically within the block, so that a batch
            of one block estimates KTO's KL term from its own answers. If that row has the same
            prompt, the nearest earlier row with another prompt is used: of the block, else of the
            thousand rows around it, else of the first rows.
        same_prompt: whether rows that all have the same prompt are allowed with mismatch; each then
            gets the answer of the row before, to its own prompt, as in TRL.

    Returns:
        The data set with prompt_ids, completion_ids, label, row (the row's number in the input) and
        the columns named above; and a `DataReport`.

    Raises:
        ValueError: as `prepare_dataset`; a column that only pairs can have; with mismatch, rows
            that all have the same prompt, unless same_prompt is true.
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
        dataset = _mismatched(dataset, mismatch, name, same_prompt)
    return dataset, report


def unpair(dataset: Any, name: str = "train") -> Any:
    """Turn each pair into two rows with completion and label; other data is returned unchanged.

    Raises:
        ValueError: a column that only pairs can have, such as margin.
    """
    first = sample(dataset)
    column_names = dataset.column_names or list(first[0] if first else ())
    for column in (c for c in NUMBERS if c in column_names and c not in UNPAIRED.numbers):
        raise ValueError(
            f"{origin(dataset, name)}: column {column!r} is of pairs, and here are single "
            "answers; expected data without it"
        )
    ends = [end for end in ("", "_ids") if {f"chosen{end}", f"rejected{end}"} <= set(column_names)]
    if not ends:
        return dataset
    from datasets import Features, IterableDataset, Sequence, Value

    from fastpref.data.free_form import FreeForm

    features = dataset.features
    if ends[-1] == "_ids":
        options: dict[str, Any] = {"function": _split_ids, "with_indices": True}
        options["fn_kwargs"] = {"data": origin(dataset, name)}
        unchanged = [c for c in column_names if c not in ("chosen_ids", "rejected_ids")]
        new_features = {"completion_ids": Sequence(Value("int32"))}
    else:
        named = origin(dataset, name).removesuffix(" data")
        layout = find_layout(dataset, first, named, PAIRS)
        options = {"function": _split_texts, "with_indices": True}
        used = {layout.prompt, layout.context, layout.system, *PAIRS.answers}
        unchanged = [c for c in column_names if c not in used]
        stored = not isinstance(dataset, IterableDataset)  # a stream's values are not encoded
        options["fn_kwargs"] = {
            "layout": layout, "used": used, "data": origin(dataset, name), "stored": stored
        }  # fmt: skip
        new_features = {"prompt": FreeForm(), "completion": FreeForm()}
    if features is not None:
        new_features = {key: features[key] for key in unchanged} | new_features
        options["features"] = Features({**new_features, "label": Value("bool")})
    return dataset.map(**options, batched=True, remove_columns=column_names)


def _split_ids(batch: dict[str, list], rows: list[int], data: str) -> dict[str, list]:
    for key in ("chosen_ids", "rejected_ids"):
        for row, ids in zip(row_numbers(batch, rows), batch[key], strict=True):
            check_token_ids(ids, key, f"{data}: row {row}", None)
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
    """Prompt, completion and label of a batch of pairs; the first two as JSON if stored."""
    rows = row_numbers(batch, rows)
    pairs = [row for row, _ in arrange_batch(batch, layout, PAIRS, data, rows)]
    out = {key: values * 2 for key, values in batch.items() if key not in used}
    encode = json.dumps if stored else lambda value: value
    out["prompt"] = [encode(row["prompt"]) for row in pairs] * 2
    out["completion"] = [encode(row[key]) for key in PAIRS.answers for row in pairs]
    return {**out, "label": [True] * len(pairs) + [False] * len(pairs)}


def _mismatched(dataset: Any, block: int, name: str, same_prompt: bool) -> Any:
    """The data set with the column KL_completion_ids, an answer to another prompt."""
    chunk = block * max(1, CHUNK // block)
    options = {"block": block, "spare": _two_prompts(dataset, name, same_prompt)}
    return dataset.map(_mismatch, batched=True, batch_size=chunk, fn_kwargs=options)


def _two_prompts(dataset: Any, name: str, same_prompt: bool) -> list[tuple[list[int], list[int]]]:
    """Prompt and answer of the first row, and of the first row with another prompt.

    Raises:
        ValueError: all rows, or the first ones of a stream, have the same prompt; with same_prompt
            the result then is that of the first row.
    """
    examples: list[tuple[list[int], list[int]]] = []
    limit = None if hasattr(dataset, "__len__") else SEARCHED
    count = 0
    for row in itertools.islice(dataset, limit):
        count += 1
        if not examples or row["prompt_ids"] != examples[0][0]:
            examples.append((row["prompt_ids"], row["completion_ids"]))
        if len(examples) == 2:
            return examples
    if same_prompt:
        return examples
    raise ValueError(
        f"{name} data: got one prompt in {'the first ' if count == limit else ''}{count} rows with "
        "loss_type 'kto', whose KL term needs answers to other prompts; expected at least 2 prompts"
    )


def _mismatch(batch: dict[str, list], block: int, spare: list) -> dict[str, list]:
    """KL_completion_ids of a chunk of rows; see `prepare_unpaired_dataset`.

    Candidates in order: the rows before in the block, the rest of the block from its end, the rows
    of the chunk in front of the block, those behind it, and `spare` from `_two_prompts`.
    """
    prompts, answers = batch["prompt_ids"], batch["completion_ids"]
    size, out = len(prompts), []
    for i, prompt in enumerate(prompts):
        start = i - i % block
        stop = min(start + block, size)
        near = itertools.chain(range(i - 1, start - 1, -1), range(stop - 1, i, -1))
        far = itertools.chain(range(start - 1, -1, -1), range(size - 1, stop - 1, -1))
        others = (answers[j] for j in itertools.chain(near, far) if prompts[j] != prompt)
        before = answers[i - 1 if i > start else stop - 1]
        anywhere = next((answer for other, answer in spare if other != prompt), before)
        out.append(next(others, anywhere))
    return {"KL_completion_ids": out}
