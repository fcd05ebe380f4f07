"""Rows as a `datasets.Dataset` that keeps free-form dicts unchanged.

Arrow gives all dicts of a column the same keys, with null for missing ones, and each key one type.
That changes the content of tool calls, tools and content parts. So a column that Arrow would change
is stored as JSON text and decoded when it is read.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import pyarrow
from datasets import Dataset, Features
from datasets.features.features import generate_from_arrow_type, register_feature

from fastpref.data.columns import (
    PAIRS,
    TEMPLATE_COLUMNS,
    UNPAIRED,
    check_column_name,
    check_encodable,
    describe,
)


@dataclass
class FreeForm:
    """The `datasets` feature of a column that is stored as JSON text and read as Python objects.

    Numbers are exact; `datasets.Json` stores 10 decimal places and 64-bit integers.
    """

    id: str | None = field(default=None, repr=False)
    pa_type: ClassVar[Any] = pyarrow.large_string()
    _type: str = field(default="FastprefFreeForm", init=False, repr=False)

    def __call__(self) -> Any:
        return self.pa_type

    def encode_example(self, value: Any) -> str:
        return json.dumps(value)

    def decode_example(self, value: str, token_per_repo_id: Any = None) -> Any:
        return json.loads(value)


with warnings.catch_warnings():  # datasets warns that registering a feature is experimental
    warnings.simplefilter("ignore", UserWarning)
    register_feature(FreeForm, "FastprefFreeForm")


def dataset_of(columns: Mapping[str, list], name: str) -> Dataset:
    """A data set from its columns' values, one value per row.

    Raises:
        ValueError: a value that cannot be stored; the message names its column and row.
    """
    data, features = {}, {}
    for key, values in columns.items():
        check_column_name(key, name)
        if key in TEMPLATE_COLUMNS:  # always JSON text; a string is JSON already
            values = [
                v if v is None or isinstance(v, str) else _json(v, key, row, name)
                for row, v in enumerate(values)
            ]
        data[key], features[key] = values, _feature(key, values, name)
    return Dataset.from_dict(data, features=Features(features))


def _feature(key: str, values: list, name: str) -> Any:
    """The feature that keeps the values of a column unchanged.

    `FreeForm` if Arrow would change them; Arrow's if it would not, or if they are not JSON.
    """
    array = None
    try:
        array = pyarrow.array(values)
    except UnicodeEncodeError:
        for row, value in enumerate(values):
            if isinstance(value, str):
                check_encodable(value, f"{name}: row {row}: {key}")
    except RecursionError:  # `_json` says in which row
        pass
    except (pyarrow.ArrowInvalid, pyarrow.ArrowTypeError, OverflowError):
        if key in (*PAIRS.ids, *UNPAIRED.ids):
            row = _first_odd(values)
            raise ValueError(
                f"{name}: row {row}: {key} is {describe(values[row])}, which is no list of token "
                "ids as in the rows before it"
            ) from None
    nested = any(isinstance(value, (list, dict)) for value in values)
    if array is not None and (not nested or key in (*PAIRS.ids, *UNPAIRED.ids)):
        return generate_from_arrow_type(array.type)
    try:
        texts = [_json(value, key, row, name) for row, value in enumerate(values)]
    except ValueError:  # dates and bytes, which Arrow has and JSON lacks
        if array is None:
            raise
        return generate_from_arrow_type(array.type)
    # Arrow's nulls are told apart; the name of a field of its structs ends at a null character.
    if array is None or any("null" in text or "\\u0000" in text for text in texts):
        return FreeForm()
    changed = any(
        json.dumps(value) != text for value, text in zip(array.to_pylist(), texts, strict=True)
    )
    return FreeForm() if changed else generate_from_arrow_type(array.type)


def _first_odd(values: list) -> int:
    """The first row whose value Arrow cannot store in one column with those before it."""
    low, high = 1, len(values)  # of the shortest start of the column that cannot be stored
    while low < high:
        middle = (low + high) // 2
        try:
            pyarrow.array(values[:middle])
        except (pyarrow.ArrowInvalid, pyarrow.ArrowTypeError, OverflowError):
            high = middle
        else:
            low = middle + 1
    return high - 1


def _json(value: Any, key: str, row: int, name: str) -> str:
    try:
        return json.dumps(value)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{name}: row {row}: {key} is not JSON: {error}") from None
