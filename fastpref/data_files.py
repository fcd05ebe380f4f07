"""Reading preference data from files, the hub and rows, and checking columns and values.

Used through `fastpref.data`.

Lines of a file are numbered from 1, rows from 0.
"""

from __future__ import annotations

import csv
import gzip
import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
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


def load_preference_data(source: Any, *, split: str = "train", streaming: bool = False) -> Any:
    """Read preference data from wherever it is.

    Args:
        source: a path ending in .jsonl, .json, .csv (each also with .gz) or .parquet, a directory
            written by `Dataset.save_to_disk`, the name of a data set on the hub, a
            `datasets.Dataset` or `IterableDataset` (returned as is), or an iterable of dicts.
        split: which split of a hub data set, such as "train" or "train[:100]".
        streaming: stream a hub data set instead of downloading it.

    Returns:
        A `datasets.Dataset`, or an `IterableDataset` when streaming.

    Raises:
        ValueError: the file is missing or empty, a line is not JSON, a column is missing.
    """
    import datasets

    if isinstance(source, (datasets.Dataset, datasets.IterableDataset)):
        return source
    if isinstance(source, (datasets.DatasetDict, datasets.IterableDatasetDict)):
        raise ValueError(f"data is a set of splits {sorted(source)}; pass one of them")
    if isinstance(source, (str, os.PathLike)):
        return _load_path(str(source), split, streaming)
    if isinstance(source, Iterable) and not isinstance(source, Mapping):
        return _from_rows(list(source), "data")
    raise ValueError(
        f"data is a {type(source).__name__}; expected a path, a hub name, a datasets.Dataset or "
        "a list of dicts"
    )


def _load_path(source: str, split: str, streaming: bool) -> Any:
    import datasets

    path = Path(source).expanduser()
    if path.is_dir():
        try:
            loaded = datasets.load_from_disk(str(path))
        except FileNotFoundError:
            raise ValueError(f"{source} is a directory without a saved data set") from None
        return loaded[split] if isinstance(loaded, datasets.DatasetDict) else loaded
    kinds = [s for s in path.suffixes if s in READERS]
    if not path.exists():
        if not kinds and re.fullmatch(r"[\w.-]+(/[\w.-]+)?", source):
            return _load_hub(source, split, streaming)
        raise ValueError(f"data file {source} does not exist")
    if not kinds:
        raise ValueError(f"{source} has no known ending; expected one of {sorted(READERS)}")
    if path.stat().st_size == 0:
        raise ValueError(f"data file {source} is empty")
    if kinds[-1] == ".parquet":
        return _named(_load_parquet(path), path)
    try:
        rows = list(READERS[kinds[-1]](path))
    except UnicodeDecodeError as error:
        raise ValueError(f"{source} is not UTF-8 text: {error}") from None
    except (gzip.BadGzipFile, EOFError) as error:
        raise ValueError(f"{source} is not a complete gzip file: {error}") from None
    return _named(_from_rows(rows, source), path)


def _named(dataset: Any, path: Path) -> Any:
    dataset.info.dataset_name = path.name
    return dataset


def _load_hub(name: str, split: str, streaming: bool) -> Any:
    import datasets

    try:
        return datasets.load_dataset(name, split=split, streaming=streaming)
    except Exception as error:
        raise ValueError(
            f"{name!r} is neither a file here nor a data set that could be loaded from the hub "
            f"(split {split!r}): {error}"
        ) from error


def _load_parquet(path: Path) -> Any:
    import pyarrow
    import pyarrow.parquet
    from datasets import Dataset
    from datasets.table import InMemoryTable

    try:
        table = pyarrow.parquet.read_table(path)
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"{path} is not a Parquet file: {error}") from None
    if table.num_rows == 0:
        raise ValueError(f"data file {path} has no rows")
    return Dataset(InMemoryTable(table))


def _open(path: Path) -> Any:
    opener = gzip.open if path.suffix == ".gz" else open
    return opener(path, "rt", encoding="utf-8-sig", newline="")


def _read_jsonl(path: Path) -> Iterator[dict]:
    with _open(path) as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}: line {number} is not JSON ({error.msg})") from None
            if not isinstance(row, dict):
                raise ValueError(
                    f"{path}: line {number} is a JSON {type(row).__name__}; expected an object"
                )
            yield row


def _read_json(path: Path) -> Iterable[dict]:
    with _open(path) as file:
        text = file.read()
    if not text.lstrip().startswith("["):  # many a .json file holds one object a line
        return _read_jsonl(path)
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: line {error.lineno} is not JSON ({error.msg})") from None


def _read_csv(path: Path) -> Iterator[dict]:
    csv.field_size_limit(2**31 - 1)  # the default, 128 KiB, is less than one long answer
    with _open(path) as file:
        reader = csv.DictReader(file)
        for row in reader:
            if None in row or None in row.values():
                raise ValueError(
                    f"{path}: line {reader.line_num} does not have the header's "
                    f"{len(reader.fieldnames or ())} fields"
                )
            yield {key: _csv_cell(key, value) for key, value in row.items()}


def _csv_cell(key: str, value: str) -> Any:
    if key in NUMBERS:
        try:
            return float(value)
        except ValueError:
            return value  # reported with its row number when the row is tokenised
    if key in UNPAIRED.labels:
        return {"true": True, "1": True, "false": False, "0": False}.get(value.lower(), value)
    known = (*TEXT, *IDS, *UNPAIRED.answers, *UNPAIRED.ids)
    if key in known and value.startswith("["):
        try:
            decoded = json.loads(value)
        except json.JSONDecodeError:
            return value  # an ordinary string that starts with a bracket
        if key.endswith("_ids") or is_messages(decoded):
            return decoded
    return value


READERS: dict[str, Any] = {".jsonl": _read_jsonl, ".json": _read_json, ".csv": _read_csv}
READERS[".parquet"] = None  # read as columns, not row by row


def _from_rows(rows: list, name: str) -> Any:
    from .data_json import dataset_of

    if not rows:
        raise ValueError(f"{name} has no rows")
    for index, row in enumerate(rows):
        if not isinstance(row, Mapping):
            raise ValueError(f"{name}: row {index} is a {type(row).__name__}; expected a dict")
    columns: dict[str, list] = {key: [] for row in rows for key in row}
    for key, values in columns.items():
        values.extend(row.get(key) for row in rows)
        if key in (*TEXT, *UNPAIRED.answers):
            kinds = [type(value) for value in values]
            odd = next((i for i, kind in enumerate(kinds) if kind is not kinds[0]), None)
            if odd is not None:
                raise ValueError(
                    f"{name}: row {odd}: {key} is a {kinds[odd].__name__} but in row 0 it is a "
                    f"{kinds[0].__name__}; all rows must have the same form"
                )
    return dataset_of(columns, name)


# ---- checks ------------------------------------------------------------------------------------


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
