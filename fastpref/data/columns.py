"""The columns of preference data, and checks of single values."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

IDS = ("prompt_ids", "chosen_ids", "rejected_ids")
TEXT = ("prompt", "chosen", "rejected")
REFERENCE = ("ref_chosen_logps", "ref_rejected_logps")
# Number columns of pairs -> the names of these inputs in a preference loss.
PER_PAIR = {"weight": "weight", "margin": "margin", "soft_label": "soft_labels"}
NUMBERS = (*REFERENCE, *PER_PAIR)
# Reference log-probs of single answers, and of the mismatched answers of KTO's KL estimate.
UNPAIRED_REFERENCE = ("ref_logps", "ref_KL_logps")
UNPAIRED_NUMBERS = (*UNPAIRED_REFERENCE, "weight")
ROUNDING = 1e-3  # how far above 0 rounding may put a sum of log-probs
# Arguments of a chat template besides the messages, as JSON text or as the object.
TEMPLATE_COLUMNS = ("tools", "chat_template_kwargs")


@dataclass(frozen=True)
class Columns:
    """The columns of one kind of preference data: `PAIRS` or `UNPAIRED`.

    Attributes:
        answers: columns of the answers' text or messages.
        numbers: optional columns with one number a row.
        expected: the end of an error message: which columns are expected.
        labels: columns of booleans.
        extra: columns that only prepared data has.
    """

    answers: tuple[str, ...]
    numbers: tuple[str, ...]
    expected: str
    labels: tuple[str, ...] = ()
    extra: tuple[str, ...] = ()

    @property
    def ids(self) -> tuple[str, ...]:
        """The columns of token ids."""
        return ("prompt_ids", *(f"{answer}_ids" for answer in self.answers))

    @property
    def prepared(self) -> set[str]:
        """All columns that prepared data may have."""
        return {*self.ids, *self.numbers, *self.labels, *self.extra, "row"}


PAIRS = Columns(
    ("chosen", "rejected"),
    NUMBERS,
    "expected prompt, chosen and rejected (strings or message lists), chosen and rejected with the "
    "prompt inside, or prompt_ids, chosen_ids and rejected_ids",
)


UNPAIRED = Columns(
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
    """Raise ValueError unless value is a list of ids in [0, vocab_size); None: that int32 holds."""
    integers = isinstance(value, list) and all(
        isinstance(token, int) and not isinstance(token, bool) for token in value
    )
    if not integers:
        raise ValueError(f"{where}: {key} is {describe(value)}; expected a list of token ids")
    if not value:
        return
    low, high = min(value), max(value)
    limit = 2**31 if vocab_size is None else vocab_size
    if low < 0 or high >= limit:
        expected = f"from 0 to {limit - 1}"
        raise ValueError(
            f"{where}: {key} has the token id {low if low < 0 else high}; expected ids {expected}"
            + (", which the model has" if vocab_size is not None else "")
        )


def check_number(value: Any, key: str, where: str) -> float:
    """The value as a float.

    ValueError unless it is finite, in [0, 1] for a soft label, not negative for a weight and, but
    for rounding, not positive for a log-probability.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"{where}: {key} is {value!r}; expected a finite number")
    if key == "soft_label" and not 0 <= value <= 1:
        raise ValueError(f"{where}: {key} is {value!r}; expected a probability in [0, 1]")
    if key == "weight" and value < 0:
        raise ValueError(f"{where}: weight is {value!r}; expected a number that is not negative")
    if key in (*REFERENCE, *UNPAIRED_REFERENCE) and value > ROUNDING:
        raise ValueError(
            f"{where}: {key} is {value!r}; expected the sum of an answer's log-probabilities in "
            "nats, which is not positive"
        )
    return float(value)


def check_label(value: Any, key: str, where: str) -> bool:
    """The value as a bool. ValueError unless it is a bool, 0 or 1."""
    if value not in (0, 1) or isinstance(value, float):
        raise ValueError(f"{where}: {key} is {value!r}; expected true or false")
    return bool(value)


def same(a: Any, b: Any) -> bool:
    """Whether a chat template renders two values alike.

    Stricter than ==: 1 differs from True, and the order of a dict's keys matters.
    """
    return a == b and (isinstance(a, str) or repr(a) == repr(b))


def describe(value: Any) -> str:
    """The kind of a value, for an error message."""
    if value is None:
        return "missing"
    return "a message list" if value and is_messages(value) else f"a {type(value).__name__}"


def check_column_name(key: Any, name: str) -> None:
    """Raise ValueError, which calls the data `name`, for a column name that Arrow cannot store."""
    if not isinstance(key, str):
        raise ValueError(f"{name}: the column name {key!r} is no string")
    shown = repr(key if len(key) < 60 else f"{key[:60]}...")
    check_encodable(key, f"{name}: the column name {shown}")
    if "\0" in key:
        raise ValueError(f"{name}: the column name {shown} has a null character")


def check_encodable(text: str, where: str) -> None:
    """Raise ValueError if the text has a lone surrogate, which tokenizers do not accept."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{where} has the lone surrogate U+{ord(text[error.start]):04X}, half of a character; "
            "expected text that UTF-8 can hold"
        ) from None


def origin(dataset: Any, name: str) -> str:
    """The name of a data set in errors: that of its file or hub data set, and `name`."""
    source = getattr(getattr(dataset, "info", None), "dataset_name", None)
    return f"{source}: {name} data" if source else f"{name} data"
