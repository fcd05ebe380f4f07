"""Rows as a `datasets.Dataset` without what Arrow does to free-form dicts.

Arrow gives all dicts of a column the same keys, filled with null, and the same type of value. Of
tool calls, tools and content parts that would make something else than the rows say. So a column
that Arrow would change is stored as JSON, one text a row, and read back as it was.
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

from fastpref.data.columns import PAIRS, TEMPLATE_COLUMNS, UNPAIRED, check_encodable


@dataclass
class FreeForm:
    """The `datasets` feature of a column of JSON texts that are read as Python objects.

    `datasets.Json` stores 10 decimal places and 64-bit integers; this one keeps every number.
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


with warnings.catch_warnings():  # that registering is experimental
    warnings.simplefilter("ignore", UserWarning)
    register_feature(FreeForm, "FastprefFreeForm")


def dataset_of(columns: Mapping[str, list], name: str) -> Dataset:
    """The data set of these columns, each with one value a row.

    Raises:
        ValueError: a value cannot be stored; the message says of which column and row.
    """
    data, features = {}, {}
    for key, values in columns.items():
        if key in TEMPLATE_COLUMNS:  # as JSON in any case; a text is JSON already
            values = [
                v if v is None or isinstance(v, str) else _json(v, key, row, name)
                for row, v in enumerate(values)
            ]
        data[key], features[key] = values, _feature(key, values, name)
    return Dataset.from_dict(data, features=Features(features))


def _feature(key: str, values: list, name: str) -> Any:
    """The feature that keeps the values of a column as they are; Arrow's own if not JSON."""
    array = None
    try:
        array = pyarrow.array(values)
    except UnicodeEncodeError:
        for row, value in enumerate(values):
            if isinstance(value, str):
                check_encodable(value, f"{name}: row {row}: {key}")
    except (pyarrow.ArrowInvalid, pyarrow.ArrowTypeError, OverflowError) as error:
        if key in (*PAIRS.ids, *UNPAIRED.ids):
            raise ValueError(f"{name}: {key} holds values of different types: {error}") from None
    nested = any(isinstance(value, (list, dict)) for value in values)
    if array is not None and (not nested or key in (*PAIRS.ids, *UNPAIRED.ids)):
        return generate_from_arrow_type(array.type)
    try:
        texts = [_json(value, key, row, name) for row, value in enumerate(values)]
    except ValueError:  # Arrow has dates and bytes, too
        if array is None:
            raise
        return generate_from_arrow_type(array.type)
    if array is None or any("null" in text for text in texts):  # nulls of the rows' own stay
        return FreeForm()
    changed = any(
        json.dumps(value) != text for value, text in zip(array.to_pylist(), texts, strict=True)
    )
    return FreeForm() if changed else generate_from_arrow_type(array.type)


def _json(value: Any, key: str, row: int, name: str) -> str:
    try:
        return json.dumps(value)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{name}: row {row}: {key} is not JSON: {error}") from None
