"""`load_preference_data`: preference data from files, from the hub, or from rows.

In errors, lines of a file are numbered from 1 and rows from 0.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import NoneType
from typing import Any

from fastpref.data.columns import TEXT, UNPAIRED, check_encodable
from fastpref.data.readers import read_csv, read_json, read_jsonl, read_parquet, read_saved


def load_preference_data(source: Any, *, split: str = "train", streaming: bool = False) -> Any:
    """Load preference data.

    Args:
        source: a path ending in .jsonl, .json, .csv (each also with .gz) or .parquet, a directory
            written by `Dataset.save_to_disk`, the name of a data set on the hub, a
            `datasets.Dataset` or `IterableDataset`, or an iterable of dicts.
        split: the split of a hub data set, such as "train" or "train[:100]".
        streaming: whether to stream a hub data set instead of downloading it.

    Returns:
        A `datasets.Dataset`, or an `IterableDataset` with streaming=True.

    Raises:
        ValueError: a missing or empty file, a line that is not JSON, rows of different types, a hub
            data set that cannot be loaded.
    """
    import datasets

    if isinstance(source, datasets.Dataset):
        return _apart(_as_objects(source))
    if isinstance(source, datasets.IterableDataset):
        return _as_objects(source)
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


def _as_objects(data: Any) -> Any:
    """The data set with rows of Python objects, not of arrays."""
    formatting = getattr(data, "_formatting", None)  # of a stream
    plain = data.format["type"] is None if hasattr(data, "format") else formatting is None
    return data if plain else data.with_format(None)


def _load_path(source: str, split: str, streaming: bool) -> Any:
    import datasets

    path = Path(source).expanduser()
    if path.is_dir():
        loaded = read_saved(path)
        if isinstance(loaded, datasets.DatasetDict):
            if split not in loaded:
                raise ValueError(
                    f"{source} holds the splits {sorted(loaded)} and no {split!r}; name the "
                    "directory of one of them"
                )
            loaded = loaded[split]
        return _apart(_as_objects(loaded))
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
        return _named(read_parquet(path), path)
    return _named(_from_rows(list(READERS[kinds[-1]](path)), source), path)


def _apart(dataset: Any) -> Any:
    """The data set, whose caches are not written beside the user's files.

    `datasets` writes its caches to the directory of the data; that of the user may be read-only.
    """
    import datasets
    from datasets.table import InMemoryTable

    cache = os.path.abspath(datasets.config.HF_DATASETS_CACHE)
    files = [os.path.abspath(file["filename"]) for file in dataset.cache_files]
    if all(os.path.commonpath([cache, file]) == cache for file in files):
        return dataset
    # The memory that the table's buffers map stays mapped.
    indices = dataset._indices
    return datasets.Dataset(
        InMemoryTable(dataset.data.table),
        info=dataset.info,
        split=dataset.split,
        indices_table=None if indices is None else InMemoryTable(indices.table),
        fingerprint=dataset._fingerprint,
    )


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


READERS: dict[str, Any] = {".jsonl": read_jsonl, ".json": read_json, ".csv": read_csv}
READERS[".parquet"] = None  # read by `read_parquet`, as columns


def _from_rows(rows: list, name: str) -> Any:
    from fastpref.data.free_form import dataset_of

    if not rows:
        raise ValueError(f"{name} has no rows")
    for index, row in enumerate(rows):
        if not isinstance(row, Mapping):
            raise ValueError(f"{name}: row {index} is a {type(row).__name__}; expected a dict")
    columns: dict[str, list] = {key: [] for row in rows for key in row}
    for key, values in columns.items():
        if isinstance(key, str):
            check_encodable(key, f"{name}: the column name {key!r}")
        values.extend(row.get(key) for row in rows)
        if key in (*TEXT, *UNPAIRED.answers):
            _check_form(key, values, name)
    return dataset_of(columns, name)


def _check_form(key: str, values: list, name: str) -> None:
    """Raise ValueError unless the values of a column are all text or all lists.

    A column that no row has is reported with the columns that were found.
    """
    kinds = [type(value) for value in values]
    present = next((kind for kind in kinds if kind is not NoneType), None)
    if present is None:
        return
    for row, kind in enumerate(kinds):
        if kind is NoneType:
            raise ValueError(f"{name}: row {row}: {key} is missing; all rows must have it")
        if kind is not present:
            raise ValueError(
                f"{name}: row {row}: {key} is a {kind.__name__} but in row 0 it is a "
                f"{present.__name__}; all rows must have the same form"
            )
