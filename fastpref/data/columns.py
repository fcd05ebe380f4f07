"""The columns of preference data, and checks of single values."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

IDS = ("prompt_ids", "chosen_ids", "rejected_ids")


TEXT = ("prompt", "chosen", "rejected")


REFERENCE = ("ref_chosen_logps", "ref_rejected_logps")


# Columns of a number for each pair, with their names as inputs of a preference loss.
PER_PAIR = {"weight": "weight", "margin": "margin", "soft_label": "soft_labels"}


NUMBERS = (*REFERENCE, *PER_PAIR)


# The same of single answers: of their own log-probs and of mismatched answers', for KTO's KL.
UNPAIRED_REFERENCE = ("ref_logps", "ref_KL_logps")


UNPAIRED_NUMBERS = (*UNPAIRED_REFERENCE, "weight")


# What a chat template takes beside the messages; JSON text, or the object itself.
TEMPLATE_COLUMNS = ("tools", "chat_template_kwargs")


@dataclass(frozen=True)
class Form:
    """The columns of one kind of preference data.

    answers: the texts beside the prompt. numbers: optional columns of one number a row. labels:
    columns that say yes or no. extra: columns that only prepared data has.
    """

    answers: tuple[str, ...]
    numbers: tuple[str, ...]
    expected: str
    labels: tuple[str, ...] = ()
    extra: tuple[str, ...] = ()

    @property
    def ids(self) -> tuple[str, ...]:
        return ("prompt_ids", *(f"{answer}_ids" for answer in self.answers))

    @property
    def prepared(self) -> set[str]:
        return {*self.ids, *self.numbers, *self.labels, *self.extra, "row"}


PAIRS = Form(
    ("chosen", "rejected"),
    NUMBERS,
    "expected prompt, chosen and rejected (strings or message lists), chosen and rejected with the "
    "prompt inside, or prompt_ids, chosen_ids and rejected_ids",
)


UNPAIRED = Form(
    ("completion",),
    ("weight",),
    "expected prompt, completion (strings or message lists) and label (true or false), or "
    "prompt_ids, completion_ids and label, or pairs, which become two rows each",
    ("label",),
    (*UNPAIRED_REFERENCE, "KL_completion_ids"),
)


def is_messages(value: Any) -> bool:
    """Whether value is a list of chat messages."""
    return isinstance(value, list) and all(isinstance(m, Mapping) and "role" in m for m in value)


def check_token_ids(value: Any, key: str, where: str, vocab_size: int | None) -> None:
    """Raise a ValueError unless value is a list of token ids that the vocabulary has."""
    if not isinstance(value, list) or not all(isinstance(token, int) for token in value):
        raise ValueError(f"{where}: {key} is {describe(value)}; expected a list of token ids")
    if not value:
        return
    low, high = min(value), max(value)
    if low < 0 or (vocab_size is not None and high >= vocab_size):
        expected = "from 0 on" if vocab_size is None else f"from 0 to {vocab_size - 1}"
        raise ValueError(
            f"{where}: {key} has the token id {low if low < 0 else high}; expected ids {expected}"
            + (", which the model has" if vocab_size is not None else "")
        )


def check_number(value: Any, key: str, where: str) -> float:
    """The value as a float; a ValueError unless it is finite, and a soft label in [0, 1]."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"{where}: {key} is {value!r}; expected a finite number")
    if key == "soft_label" and not 0 <= value <= 1:
        raise ValueError(f"{where}: {key} is {value!r}; expected a probability in [0, 1]")
    return float(value)


def check_label(value: Any, key: str, where: str) -> bool:
    """The value as a bool; a ValueError unless it is one, or 0 or 1."""
    if value not in (0, 1) or isinstance(value, float):
        raise ValueError(f"{where}: {key} is {value!r}; expected true or false")
    return bool(value)


def same(a: Any, b: Any) -> bool:
    """Whether a chat template shows two values alike: 1 is not true, and keys have an order."""
    return a == b and (isinstance(a, str) or repr(a) == repr(b))


def describe(value: Any) -> str:
    """The kind of a value, for an error message."""
    if value is None:
        return "missing"
    return "a message list" if value and is_messages(value) else f"a {type(value).__name__}"


def check_encodable(text: str, where: str) -> None:
    """Raise a ValueError if the text has a lone surrogate, which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{where} has the lone surrogate U+{ord(text[error.start]):04X}, half of a character; "
            "expected text that UTF-8 can hold"
        ) from None


def origin(dataset: Any, name: str) -> str:
    """What errors call a data set: its file's or its hub name, and what it is for."""
    source = getattr(getattr(dataset, "info", None), "dataset_name", None)
    return f"{source}: {name} data" if source else f"{name} data"
