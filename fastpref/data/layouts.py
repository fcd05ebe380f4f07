"""Layouts of preference data: which columns hold the prompt, and rows in the one form that is read.

Used through `fastpref.data`. `find_layout` looks at a data set's columns and first rows, `arrange`
turns one row of it into prompt and answers. What is recognised beside prompt, chosen and rejected:

    question | instruction (+ input) | query | input   the prompt under another name
    system | system_prompt                             the prompt's system message
    prompt as text, answers as conversations           the user's message, or inside the answers
    the prompt at the start of the answers as well     left out of the answers
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
    Form,
    describe,
    is_messages,
    same,
)

PROMPTS = ("question", "instruction", "query", "input")
SYSTEMS = ("system", "system_prompt")
SAMPLE = 64  # rows that are looked at before a data set is read


@dataclass(frozen=True)
class Layout:
    """Where a data set has its prompt.

    prompt, context, system: the columns of the prompt, of what is added to it on a line of its own,
    and of its system message. inside: each answer starts with the prompt's text. merged: columns
    whose messages went through Arrow, which puts null where rows have different keys. unread:
    columns that nothing reads. streamed: the rows' origin is not known, so each batch is looked at.
    """

    prompt: str | None = "prompt"
    context: str | None = None
    system: str | None = None
    inside: bool = False
    merged: frozenset[str] = frozenset()
    streamed: bool = False
    unread: tuple[str, ...] = ()


def sample(dataset: Any) -> list[dict[str, Any]]:
    """The first rows of a data set or stream, each with the columns that any of them has."""
    rows = list(islice(iter(dataset), SAMPLE))
    columns = dict.fromkeys(key for row in rows for key in row)
    return [{key: row.get(key) for key in columns} for row in rows]


def find_layout(dataset: Any, rows: list[dict[str, Any]], name: str, form: Form = PAIRS) -> Layout:
    """The layout of a data set, of which `rows` are the first.

    Raises:
        ValueError: columns that the data needs are missing, or several could be the prompt.
    """
    columns = list(dataset.column_names or rows[0])
    check_columns(columns, name, form)
    read = {*form.numbers, *form.labels, "row"}
    if set(form.ids) <= set(columns):
        return Layout(unread=tuple(c for c in columns if c not in {*read, *form.ids}))
    prompt, context = _prompt_columns(columns, name)
    if prompt != "prompt" and _holds_prompt(rows, form):
        prompt = context = None  # the column is something else, such as a note on the row
    systems = [c for c in SYSTEMS if c in columns]
    if len(systems) > 1:
        raise ValueError(f"{name} data has the columns {systems}; expected one system prompt")
    system = systems[0] if systems else None
    if system and prompt is None and all(isinstance(r[form.answers[0]], str) for r in rows):
        raise ValueError(
            f"{name} data has the column {system!r} but no prompt; found columns "
            f"{sorted(columns)}; rename the one with the prompt to 'prompt'"
        )
    read |= {c for c in (prompt, context, system) if c is not None}
    read |= {*form.answers, *TEMPLATE_COLUMNS}
    known = getattr(dataset, "features", None)
    text = [c for c in columns if c in {prompt, system, *form.answers, *TEMPLATE_COLUMNS}]
    return Layout(
        prompt,
        context,
        system,
        prompt is not None and _text_inside(rows, prompt, form),
        frozenset(c for c in text if known is not None and _has_struct(known.get(c))),
        streamed=known is None,
        unread=tuple(c for c in columns if c not in read),
    )


def _prompt_columns(columns: list[str], name: str) -> tuple[str | None, str | None]:
    """The columns of the prompt and of its context."""
    if "prompt" in columns:
        return "prompt", None
    found = [c for c in PROMPTS if c in columns]
    if found == ["instruction", "input"]:
        return "instruction", "input"
    if len(found) > 1:
        raise ValueError(
            f"{name} data: any of the columns {found} could be the prompt; rename that one to "
            "'prompt' and remove or rename the others"
        )
    return (found[0] if found else None), None


def _holds_prompt(rows: list[dict[str, Any]], form: Form) -> bool:
    """Whether the answers of pairs are conversations that start before the answer."""
    values = [row[key] for row in rows for key in form.answers] if form is PAIRS else []
    return bool(values) and all(
        is_messages(v) and len(v) > 1 and v[0]["role"] in ("user", "system") for v in values
    )


def check_columns(columns: list[str], name: str, form: Form = PAIRS) -> None:
    """Raise a ValueError unless a data set has the columns of one of the forms that are read."""
    found = f"found columns {sorted(columns)}; {form.expected}"
    if {"image", "images"} & set(columns):
        raise ValueError(f"{name} data has images, which are not supported; {found}")
    wanted = form.ids if set(form.ids) & set(columns) else form.answers
    if form is not PAIRS and wanted is form.answers and not {*PROMPTS} & set(columns):
        wanted = ("prompt", *wanted)  # a pair's may be inside its answers
    for column in (*wanted, *form.labels):
        if column not in columns:
            raise ValueError(f"{name} data: column {column!r} is missing; {found}")
    given = [column for column in REFERENCE if column in columns]
    if len(given) == 1:
        raise ValueError(f"{name} data has {given[0]} but not the other of {REFERENCE}")


def _text_inside(rows: list[dict[str, Any]], prompt: str, form: Form) -> bool:
    """Whether the prompt is the start of all answers, too, in every row that has one."""
    found = False
    for row in rows:
        text, answers = row[prompt], [row[key] for key in form.answers]
        if not (isinstance(text, str) and text.strip()):
            continue
        if not all(isinstance(a, str) and a.startswith(text) for a in answers):
            return False
        found = True
    return found


def _has_struct(feature: Any) -> bool:
    """Whether a column's values are dicts whose keys Arrow has merged."""
    if isinstance(feature, (dict, list)):
        return True
    inner = getattr(feature, "feature", None)  # of a List
    return inner is not None and _has_struct(inner)


def arrange_batch(
    batch: Mapping[str, list],
    layout: Layout,
    form: Form,
    data: str,
    rows: Sequence[int] | None = None,
) -> list[tuple[dict[str, Any], bool]]:
    """Each row of a batch as `arrange` makes it; and whether nulls of Arrow's were left out of it.

    rows: their numbers, for errors; by default from 0.
    """
    merged = merged_columns(batch, layout, form)
    size = len(batch[form.answers[0]])
    out = []
    for i, index in enumerate(range(size) if rows is None else rows):
        row, found = without_nulls({key: values[i] for key, values in batch.items()}, merged)
        out.append((arrange(row, layout, form, f"{data}: row {index}"), found))
    return out


def row_numbers(batch: Mapping[str, list], rows: list[int]) -> list[int]:
    """The numbers that a batch's rows have in errors: a column of them, or their places."""
    given = batch.get("row")
    return given if given and all(type(number) is int for number in given) else rows


def has_no_prompt(row: Mapping[str, Any], layout: Layout) -> bool:
    """Whether a row's prompt says nothing: it is empty, or a few letters that two answers share."""
    prompt = row["prompt"]
    if isinstance(prompt, str):
        words = prompt.split()
        return not words or (layout.prompt is None and len(words) == 1 and len(words[0]) < 8)
    return is_messages(prompt) and not any(m.get("content") or m.get("tool_calls") for m in prompt)


def arrange(row: Mapping[str, Any], layout: Layout, form: Form, where: str) -> dict[str, Any]:
    """The row with its prompt and its answers apart, both as text or both as messages.

    Raises:
        ValueError: prompt and answers do not fit together; the message starts with where.
    """
    answers = {key: _conversation(row.get(key), key, where) for key in form.answers}
    for key, value in answers.items():
        if value is None:
            raise ValueError(f"{where}: {key} is missing; expected a string or a message list")
    if layout.prompt is None:
        parts = extract_prompt(answers, where)
        prompt, answers = parts["prompt"], {key: parts[key] for key in answers}
    else:
        prompt = _conversation(row.get(layout.prompt), layout.prompt, where)
        if prompt is None:
            what = f"{layout.prompt} is missing; expected a string or a message list"
            raise ValueError(f"{where}: {what}")
    if layout.inside and prompt and all(a.startswith(prompt) for a in answers.values()):
        answers = {key: a[len(prompt) :] for key, a in answers.items()}
    if layout.context is not None and row.get(layout.context):
        prompt = f"{prompt}\n{row[layout.context]}"
    if isinstance(prompt, str) and all(is_messages(a) and a for a in answers.values()):
        prompt, answers = _around(prompt, layout, answers, where)
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
    """A single message as a list; anything else as it is."""
    if isinstance(value, Mapping) and "role" in value:
        return [value]
    first = value[0] if isinstance(value, list) and value else value
    if isinstance(first, Mapping) and {"from", "value"} <= set(first):
        raise ValueError(
            f"{where}: {key} has messages with 'from' and 'value'; expected 'role' (user, "
            "assistant, system or tool) and 'content'"
        )
    return value


def _around(
    prompt: str, layout: Layout, answers: dict[str, list], where: str
) -> tuple[list, dict[str, list]]:
    """A prompt of text for answers that are conversations: before them, or inside them."""
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
    """The conversation that starts with the system message, if there is one."""
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
    """Prompt and answers of a row whose answers start with the prompt's messages again.

    They may leave out its first messages, or have others before it, such as a system message.
    """
    first, *others = answers.values()
    if not all(a and a[0]["role"] in ("user", "system") for a in answers.values()):
        return prompt, answers
    limit = min(len(answer) - 1 for answer in answers.values())
    shared = next((i for i in range(limit) if not all(same(first[i], a[i]) for a in others)), limit)
    for end in range(shared, 0, -1):
        size = min(end, len(prompt))
        again = first[end - size : end]
        if size and same(again, prompt[-size:]):
            before = prompt[: len(prompt) - end] if len(prompt) > end else []
            return before + first[:end], {key: a[end:] for key, a in answers.items()}
    return prompt, answers


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
    alike = operator.eq if isinstance(chosen, str) else same
    cut = next((i for i in range(shorter) if not alike(chosen[i], rejected[i])), shorter - 1)
    if chosen[cut] != rejected[cut] and cut > 0 and chosen[cut - 1] == " ":
        cut -= 1
    return {"prompt": chosen[:cut], "chosen": chosen[cut:], "rejected": rejected[cut:]}


# ---- messages that went through Arrow ----


def without_nulls(row: Mapping[str, Any], columns: frozenset[str]) -> tuple[dict[str, Any], bool]:
    """The row without the nulls that Arrow puts into dicts; and whether a nested one had any.

    A message's own content stays, since null is a common value of it.
    """
    out, found = dict(row), False
    for key in columns:
        value, nested = _without_nulls(out.get(key), depth=0)
        out[key], found = value, found or nested
    return out, found


def _without_nulls(value: Any, depth: int) -> tuple[Any, bool]:
    if isinstance(value, list):
        parts = [_without_nulls(v, depth) for v in value]
        return [v for v, _ in parts], any(found for _, found in parts)
    if not isinstance(value, dict):
        return value, False
    kept = {k: v for k, v in value.items() if v is not None or (k == "content" and "role" in value)}
    inner = {k: _without_nulls(v, depth + 1) for k, v in kept.items()}
    found = depth > 0 and len(kept) < len(value)
    return {k: v for k, (v, _) in inner.items()}, found or any(f for _, f in inner.values())


def merged_columns(batch: Mapping[str, list], layout: Layout, form: Form) -> frozenset[str]:
    """The columns of a batch whose messages Arrow has merged.

    Of a stream whose features are not known, those whose dicts all have the same keys in the same
    place, as Arrow leaves them: where rows were never merged, other calls have other arguments.
    """
    if not layout.streamed:
        return layout.merged
    found = []
    for key in (layout.prompt, *form.answers, *TEMPLATE_COLUMNS):
        if key is not None and _have_same_keys(batch.get(key, [])):
            found.append(key)
    return frozenset(found)


def _have_same_keys(values: list) -> bool:
    """Whether the dicts among the values, in lists, and inside each other have the same keys."""
    dicts = [v for v in values if isinstance(v, dict)]
    if any(list(d) != list(dicts[0]) for d in dicts):
        return False
    inside = [[item for v in values if isinstance(v, list) for item in v]]
    inside += [[d[key] for d in dicts] for key in (dicts[0] if dicts else ())]
    return all(_have_same_keys(part) for part in inside if part)
