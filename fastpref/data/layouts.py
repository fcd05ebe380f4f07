"""Layouts of preference data: where the prompt is, and rows as prompt and answers.

Used through `fastpref.data`. `find_layout` reads a data set's columns and first rows; `arrange`
turns a row into prompt and answers. Recognised besides prompt, chosen and rejected:

    question | instruction (+ input) | query | input   the prompt under another name
    system | system_prompt                             the prompt's system message
    prompt as text, answers as conversations           the prompt is the user's message, or inside
    the prompt at the start of the answers as well     it is removed from the answers
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from fastpref.data.columns import (
    PAIRS,
    REFERENCE,
    TEMPLATE_COLUMNS,
    Columns,
    describe,
    is_messages,
    same,
)
from fastpref.data.merged_dicts import has_struct, merged_columns, without_nulls

PROMPTS = ("question", "instruction", "query", "input")
SYSTEMS = ("system", "system_prompt")
SAMPLE = 64  # rows that determine the layout


@dataclass(frozen=True)
class Layout:
    """Where a data set has its prompt.

    Attributes:
        prompt: the column of the prompt; None if it is only inside the answers.
        context: a column whose text is appended to the prompt on a new line.
        system: the column of the system message.
        inside: whether each answer starts with the prompt's text.
        merged: columns of messages whose dicts Arrow merged, with null for missing keys.
        streamed: whether the features are unknown, so that `merged` is determined per batch.
        unread: columns that are not read.
    """

    prompt: str | None = "prompt"
    context: str | None = None
    system: str | None = None
    inside: bool = False
    merged: frozenset[str] = frozenset()
    streamed: bool = False
    unread: tuple[str, ...] = ()


def sample(dataset: Any) -> list[dict[str, Any]]:
    """The first rows of a data set or stream, with None for the columns that a row lacks."""
    rows = list(islice(iter(dataset), SAMPLE))
    columns = dict.fromkeys(key for row in rows for key in row)
    return [{key: row.get(key) for key in columns} for row in rows]


def find_layout(
    dataset: Any, rows: list[dict[str, Any]], name: str, columns: Columns = PAIRS
) -> Layout:
    """The layout of a data set.

    Args:
        dataset: a data set or stream.
        rows: its first rows, from `sample`.
        name: what errors call the data, such as "train".
        columns: the kind of data.

    Raises:
        ValueError: a missing column, or several columns that could be the prompt.
    """
    column_names = list(dataset.column_names or rows[0])
    check_columns(column_names, name, columns)
    read = {*columns.numbers, *columns.labels, "row"}
    if set(columns.ids) <= set(column_names):
        return Layout(unread=tuple(c for c in column_names if c not in {*read, *columns.ids}))
    prompt, context = _prompt_columns(column_names, name)
    if prompt != "prompt" and _holds_prompt(rows, columns):
        prompt = context = None  # the column is not a prompt but, say, a note on the row
    systems = [c for c in SYSTEMS if c in column_names]
    if len(systems) > 1:
        raise ValueError(f"{name} data has the columns {systems}; expected one system prompt")
    system = systems[0] if systems else None
    if system and prompt is None and all(isinstance(r[columns.answers[0]], str) for r in rows):
        raise ValueError(
            f"{name} data has the column {system!r} but no prompt; found columns "
            f"{sorted(column_names)}; rename the one with the prompt to 'prompt'"
        )
    read |= {c for c in (prompt, context, system) if c is not None}
    read |= {*columns.answers, *TEMPLATE_COLUMNS}
    features = getattr(dataset, "features", None)
    text = [c for c in column_names if c in {prompt, system, *columns.answers, *TEMPLATE_COLUMNS}]
    return Layout(
        prompt,
        context,
        system,
        prompt is not None and _text_inside(rows, prompt, columns),
        frozenset(c for c in text if features is not None and has_struct(features.get(c))),
        streamed=features is None,
        unread=tuple(c for c in column_names if c not in read),
    )


def _prompt_columns(column_names: list[str], name: str) -> tuple[str | None, str | None]:
    """The column of the prompt and that of its context, or None for each."""
    if "prompt" in column_names:
        return "prompt", None
    candidates = [c for c in PROMPTS if c in column_names]
    if candidates == ["instruction", "input"]:
        return "instruction", "input"
    if len(candidates) > 1:
        raise ValueError(
            f"{name} data: any of the columns {candidates} could be the prompt; rename that one to "
            "'prompt' and remove or rename the others"
        )
    return (candidates[0] if candidates else None), None


def _holds_prompt(rows: list[dict[str, Any]], columns: Columns) -> bool:
    """Whether the answers of pairs are conversations that include the prompt's messages."""
    values = [row[key] for row in rows for key in columns.answers] if columns is PAIRS else []
    return bool(values) and all(
        is_messages(v) and len(v) > 1 and v[0]["role"] in ("user", "system") for v in values
    )


def check_columns(column_names: list[str], name: str, columns: Columns = PAIRS) -> None:
    """Raise ValueError unless a data set has the columns of this kind of data."""
    hint = f"found columns {sorted(column_names)}; {columns.expected}"
    if {"image", "images"} & set(column_names):
        raise ValueError(f"{name} data has images, which are not supported; {hint}")
    required = columns.ids if set(columns.ids) & set(column_names) else columns.answers
    if columns is not PAIRS and required is columns.answers and not {*PROMPTS} & set(column_names):
        required = ("prompt", *required)  # only a pair's prompt may be inside its answers
    for column in (*required, *columns.labels):
        if column not in column_names:
            raise ValueError(f"{name} data: column {column!r} is missing; {hint}")
    reference = [column for column in REFERENCE if column in column_names]
    if len(reference) == 1:
        raise ValueError(f"{name} data has {reference[0]} but not the other of {REFERENCE}")


def _text_inside(rows: list[dict[str, Any]], prompt: str, columns: Columns) -> bool:
    """Whether all answers start with the prompt's text, in every row that has a prompt."""
    has_prompt = False
    for row in rows:
        text, answers = row[prompt], [row[key] for key in columns.answers]
        if not (isinstance(text, str) and text.strip()):
            continue
        if not all(isinstance(a, str) and a.startswith(text) for a in answers):
            return False
        has_prompt = True
    return has_prompt


def arrange_batch(
    batch: Mapping[str, list],
    layout: Layout,
    columns: Columns,
    data: str,
    rows: Sequence[int] | None = None,
) -> list[tuple[dict[str, Any], bool]]:
    """Each row of a batch after `arrange`, with whether it had nested nulls of Arrow's.

    Args:
        batch: lists of values by column.
        data: what errors call the data.
        rows: the rows' numbers, for errors; by default from 0.
    """
    merged = layout.merged
    if layout.streamed:
        merged = merged_columns(batch, (layout.prompt, *columns.answers, *TEMPLATE_COLUMNS))
    size = len(batch[columns.answers[0]])
    out = []
    for i, index in enumerate(range(size) if rows is None else rows):
        row, had_nulls = without_nulls({key: values[i] for key, values in batch.items()}, merged)
        out.append((arrange(row, layout, columns, f"{data}: row {index}"), had_nulls))
    return out


def row_numbers(batch: Mapping[str, list], rows: list[int]) -> list[int]:
    """The rows' numbers in errors: the column `row` if it holds integers, else `rows`."""
    numbers = batch.get("row")
    return numbers if numbers and all(type(number) is int for number in numbers) else rows


def has_no_prompt(row: Mapping[str, Any], layout: Layout) -> bool:
    """Whether a row's prompt is empty, or only a few letters that its two answers share."""
    prompt = row["prompt"]
    if isinstance(prompt, str):
        words = prompt.split()
        return not words or (layout.prompt is None and len(words) == 1 and len(words[0]) < 8)
    return is_messages(prompt) and not any(m.get("content") or m.get("tool_calls") for m in prompt)


def arrange(row: Mapping[str, Any], layout: Layout, columns: Columns, where: str) -> dict[str, Any]:
    """The row with prompt and answers separated, as text or as messages.

    Args:
        where: the start of error messages.

    Raises:
        ValueError: a missing answer or prompt, or prompt and answers that do not fit together.
    """
    answers = {key: _conversation(row.get(key), key, where) for key in columns.answers}
    for key, value in answers.items():
        if value is None:
            raise ValueError(f"{where}: {key} is missing; expected a string or a message list")
    if layout.prompt is None:
        parts = extract_prompt(answers, where)
        prompt, answers = parts["prompt"], {key: parts[key] for key in answers}
    else:
        prompt = _conversation(row.get(layout.prompt), layout.prompt, where)
        if prompt is None:
            raise ValueError(
                f"{where}: {layout.prompt} is missing; expected a string or a message list"
            )
    if layout.inside and prompt and all(a.startswith(prompt) for a in answers.values()):
        answers = {key: a[len(prompt) :] for key, a in answers.items()}
    if layout.context is not None and row.get(layout.context):
        prompt = f"{prompt}\n{row[layout.context]}"
    if isinstance(prompt, str) and all(is_messages(a) and a for a in answers.values()):
        prompt, answers = _text_before_messages(prompt, layout, answers, where)
    elif is_messages(prompt) and all(isinstance(a, str) for a in answers.values()):
        answers = {key: [_message("assistant", a)] for key, a in answers.items()}
    if layout.system is not None:
        prompt, answers = _with_system(row.get(layout.system), prompt, answers, where)
    if is_messages(prompt) and all(is_messages(a) for a in answers.values()):
        prompt, answers = _without_repeats(prompt, answers)
    return {**row, **answers, "prompt": prompt}


def _message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def _conversation(value: Any, key: str, where: str) -> Any:
    """A single message as a list of one; any other value unchanged."""
    if isinstance(value, Mapping) and "role" in value:
        return [value]
    first = value[0] if isinstance(value, list) and value else value
    if isinstance(first, Mapping) and {"from", "value"} <= set(first):
        raise ValueError(
            f"{where}: {key} has messages with 'from' and 'value'; expected 'role' (user, "
            "assistant, system or tool) and 'content'"
        )
    return value


def _text_before_messages(
    prompt: str, layout: Layout, answers: dict[str, list], where: str
) -> tuple[list, dict[str, list]]:
    """Prompt and answers as messages, for a prompt of text and answers that are conversations.

    The prompt becomes the user's message before the answers, unless they include the user's.
    """
    if all(a[0]["role"] not in ("user", "system") for a in answers.values()):
        return [_message("user", prompt)], answers
    first, *others = answers.values()
    if others:
        shared = extract_prompt(answers, where)
        inside = shared["prompt"]
    else:
        inside = first[:-1]
    texts = [m.get("content") for m in inside if m["role"] == "user"]
    if prompt.strip() and prompt.strip() not in (t.strip() for t in texts if isinstance(t, str)):
        raise ValueError(
            f"{where}: {layout.prompt} is text that is none of the user's messages at the start of "
            f"{' and '.join(answers)}; expected it there, or answers that start with the "
            f"assistant's message, or data without {layout.prompt}"
        )
    return inside, {key: a[len(inside) :] for key, a in answers.items()}


def _with_system(
    system: Any, prompt: Any, answers: dict[str, Any], where: str
) -> tuple[list, dict[str, Any]]:
    """Prompt and answers as messages, with the system message in front if there is one."""
    if system is not None and not isinstance(system, str):
        raise ValueError(f"{where}: the system prompt is {describe(system)}; expected a string")
    if isinstance(prompt, str):
        prompt = [_message("user", prompt)]
    if not is_messages(prompt):
        raise ValueError(
            f"{where}: the prompt is {describe(prompt)}; expected a string or a list of messages "
            "with role and content"
        )
    answers = {
        key: [_message("assistant", a)] if isinstance(a, str) else a for key, a in answers.items()
    }
    if system and not (prompt and prompt[0]["role"] == "system"):
        prompt = [_message("system", system), *prompt]
    return prompt, answers


def _without_repeats(
    prompt: list, answers: dict[str, list[Any]]
) -> tuple[list, dict[str, list[Any]]]:
    """Prompt and answers of a row whose answers repeat the prompt's messages at their start.

    The repetition may lack the prompt's first messages, or have others in front, such as a system
    message.
    """
    first, *others = answers.values()
    if not all(a and a[0]["role"] in ("user", "system") for a in answers.values()):
        return prompt, answers
    limit = min(len(answer) - 1 for answer in answers.values())
    shared = next((i for i in range(limit) if not all(same(first[i], a[i]) for a in others)), limit)
    for end in range(shared, 0, -1):
        size = min(end, len(prompt))
        repetition = first[end - size : end]
        if size and same(repetition, prompt[-size:]):
            unrepeated = prompt[: len(prompt) - end] if len(prompt) > end else []
            return unrepeated + first[:end], {key: a[end:] for key, a in answers.items()}
    return prompt, answers


def extract_prompt(row: Mapping, where: str = "data") -> dict[str, Any]:
    """Split chosen and rejected, two strings or two message lists, that start with the prompt.

    The prompt is their longest common prefix of characters or messages. A space at its end goes to
    the answers.

    Args:
        row: has chosen and rejected.
        where: the start of error messages.

    Returns:
        A dict with prompt, chosen and rejected.

    Raises:
        ValueError: chosen and rejected are of different types, or one is empty.
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
    alike = operator.eq if isinstance(chosen, str) else same
    cut = next((i for i in range(shorter) if not alike(chosen[i], rejected[i])), shorter - 1)
    if chosen[cut] != rejected[cut] and cut > 0 and chosen[cut - 1] == " ":
        cut -= 1
    return {"prompt": chosen[:cut], "chosen": chosen[cut:], "rejected": rejected[cut:]}
