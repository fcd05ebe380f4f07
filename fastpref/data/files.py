"""`load_preference_data`: preference data from files, from the hub, or from rows.

In errors, lines of a file are numbered from 1 and rows from 0.
"""

from __future__ import annotations

import csv
import gzip
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from fastpref.data.columns import IDS, NUMBERS, TEXT, UNPAIRED, is_messages


def load_preference_data(source: Any, *, split: str = "train", streaming: bool = False) -> Any:
    """Load preference data.

    Args:
        source: a path ending in .jsonl, .json, .csv (each also with .gz) or .parquet, a directory
            written by `Dataset.save_to_disk`, the name of a data set on the hub, a
            `datasets.Dataset` or `IterableDataset` (returned as is), or an iterable of dicts.
        split: the split of a hub data set, such as "train" or "train[:100]".
        streaming: whether to stream a hub data set instead of downloading it.

    Returns:
        A `datasets.Dataset`, or an `IterableDataset` with streaming=True.

    Raises:
        ValueError: a missing or empty file, a line that is not JSON, rows of different types, a hub
            data set that cannot be loaded.
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
    """The data set with its file's name, which errors use."""
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
    if not text.lstrip().startswith("["):  # a .json file may hold one object per line
        return _read_jsonl(path)
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: line {error.lineno} is not JSON ({error.msg})") from None


def _read_csv(path: Path) -> Iterator[dict]:
    csv.field_size_limit(2**31 - 1)  # a long answer exceeds the default of 128 KiB
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
            return value  # `prepare_dataset` reports it with the row's number
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
READERS[".parquet"] = None  # read by `_load_parquet`, as columns


def _from_rows(rows: list, name: str) -> Any:
    from fastpref.data.free_form import dataset_of

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
