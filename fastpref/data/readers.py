"""Readers of JSON Lines, JSON, CSV and Parquet files, whose errors name the line or the row.

Lines of a file are numbered from 1 and rows from 0. Nothing is written beside the user's files.
"""

from __future__ import annotations

import csv
import gzip
import json
import zlib
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from fastpref.data.columns import IDS, NUMBERS, TEXT, UNPAIRED, check_column_name, is_messages

_BOM = b"\xef\xbb\xbf"
_GZIP_ERRORS = (gzip.BadGzipFile, EOFError, zlib.error)
# What pyarrow raises for damaged files, apart from its own exceptions.
_DAMAGED = (OSError, ValueError, KeyError, OverflowError, MemoryError)


# The first bytes of files that are named as text of UTF-8, what they are and what is expected.
_OTHERS = (
    (b"PAR1", "is a Parquet file; expected a name that ends in .parquet"),
    (b"\x1f\x8b", "is compressed with gzip; expected a name that ends in .gz"),
    (b"PK\x03\x04", "is a ZIP archive or a spreadsheet; expected text"),
    (b"\xff\xfe", "line 1 is UTF-16 text; expected UTF-8"),
    (b"\xfe\xff", "line 1 is UTF-16 text; expected UTF-8"),
)


def _check_start(raw: bytes, path: Path) -> None:
    """Raise ValueError if the first line of a file tells that it holds no text of UTF-8."""
    for magic, problem in _OTHERS:
        if raw.startswith(magic):
            raise ValueError(f"{path}: {problem}" if "line" in problem else f"{path} {problem}")


def lines(path: Path) -> Iterator[tuple[int, str]]:
    """The lines of a text file with their numbers, one in memory at a time.

    Raises:
        ValueError: a line that is not UTF-8, or a damaged gzip file; the message names the line.
    """
    number = 0
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb") as file:
            for raw in file:
                number += 1
                if number == 1:
                    _check_start(raw, path)
                    raw = raw.removeprefix(_BOM)
                yield number, raw.decode("utf-8")
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise ValueError(
            f"{path}: line {number} is not UTF-8 text: byte 0x{byte:02x} at its position "
            f"{error.start}"
        ) from None
    except _GZIP_ERRORS as error:
        raise ValueError(
            f"{path} is not a complete gzip file: it is damaged after line {number} ({error})"
        ) from None


def decode_json(text: str, where: Callable[[int], str]) -> Any:
    """A JSON text as an object.

    Args:
        where: what the text is, in errors, from the number of the line in it, from 1.

    Raises:
        ValueError: it is not JSON, is nested too deeply, or has a number or text that cannot be
            stored.
    """
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where(error.lineno)} is not JSON ({error.msg})") from None
    except RecursionError:
        raise ValueError(f"{where(1)} is nested too deeply") from None
    except ValueError as error:  # an integer of thousands of digits
        raise ValueError(f"{where(1)} has a number that cannot be read ({error})") from None


def read_jsonl(path: Path) -> Iterator[dict]:
    """The objects of a file that holds one a line."""
    for number, line in lines(path):
        if not line.strip():
            continue
        where = f"{path}: line {number}"
        row = decode_json(line, partial(_same_line, where))
        if not isinstance(row, dict):
            raise ValueError(f"{where} is a JSON {type(row).__name__}; expected an object")
        yield row


def _same_line(where: str, line: int) -> str:
    return where


def read_json(path: Path) -> Iterable[dict]:
    """The objects of a JSON array, or of one a line, which a .json file may hold as well."""
    text = "".join(line for _, line in lines(path))
    if not text.lstrip().startswith("["):
        return read_jsonl(path)
    return decode_json(text, lambda line: f"{path}: line {line}")


def read_csv(path: Path) -> Iterator[dict]:
    """The rows of a CSV file as dicts, by its header."""
    csv.field_size_limit(2**31 - 1)  # a long answer exceeds the default of 128 KiB
    reader = csv.reader(_csv_lines(path), strict=True)
    header = _next_record(reader, path)
    if header is None:
        return
    _check_names(header, f"{path}: the header")
    while (fields := _next_record(reader, path)) is not None:
        if len(fields) != len(header):
            raise ValueError(
                f"{path}: line {reader.line_num} has {len(fields)} fields instead of the "
                f"header's {len(header)}"
            )
        pairs = zip(header, fields, strict=True)
        yield {key: _csv_cell(key, value) for key, value in pairs}


def _csv_lines(path: Path) -> Iterator[str]:
    for number, line in lines(path):
        if number == 1 and line.lstrip().startswith(('{"', "[{")):
            raise ValueError(f"{path}: line 1 is JSON; expected CSV, or a name that ends in .jsonl")
        yield line


def _check_names(names: list[str], what: str) -> None:
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise ValueError(f"{what} has the column {repeated[0]!r} more than once")


def _next_record(reader: Any, path: Path) -> list[str] | None:
    """The next record that is not an empty line, or None at the end."""
    while True:
        start = reader.line_num + 1
        try:
            fields = next(reader)
        except StopIteration:
            return None
        except csv.Error as error:
            problem = f"is not CSV ({error})"
            if "unexpected end of data" in str(error):
                problem = "has a quote that is never closed"
            raise ValueError(f"{path}: the record that starts in line {start} {problem}") from None
        if fields:
            return fields


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
        except (ValueError, RecursionError):
            return value  # an ordinary string that starts with a bracket
        if key.endswith("_ids") or is_messages(decoded):
            return decoded
    return value


def read_parquet(path: Path) -> Any:
    """A Parquet file as a `datasets.Dataset`."""
    import pyarrow
    import pyarrow.parquet
    from datasets import Dataset
    from datasets.table import InMemoryTable

    try:
        file = pyarrow.parquet.ParquetFile(path)
    except (pyarrow.ArrowException, *_DAMAGED) as error:
        raise ValueError(f"{path} is not a Parquet file: {_first_line(error)}") from None
    with file:
        try:
            table = file.read()
        except (pyarrow.ArrowException, *_DAMAGED) as error:
            rows = _damaged_rows(file)
            raise ValueError(f"{path}: {rows} cannot be read: {_first_line(error)}") from None
    if table.num_rows == 0:
        raise ValueError(f"data file {path} has no rows")
    _check_names(table.column_names, f"{path}:")
    for name, column in zip(table.column_names, table.columns, strict=True):
        check_column_name(name, str(path))
        _check_column(column, path, name)
    try:
        return Dataset(InMemoryTable(table))
    except (pyarrow.ArrowException, *_DAMAGED, TypeError, AttributeError) as error:
        # A type of a column, such as a map, that datasets lacks, or metadata that is damaged.
        raise ValueError(
            f"{path}: its columns and metadata cannot be read as a data set: {_first_line(error)}"
        ) from None


def _damaged_rows(file: Any) -> str:
    """The rows of a Parquet file's first row group that cannot be read."""
    import pyarrow

    start = 0
    for group in range(file.num_row_groups):
        stop = start + file.metadata.row_group(group).num_rows
        try:
            file.read_row_group(group)
        except (pyarrow.ArrowException, *_DAMAGED):
            return f"row group {group}, rows {start} to {stop - 1},"
        start = stop
    return "its contents"


def _is_text(column: Any) -> bool:
    import pyarrow

    return pyarrow.types.is_string(column.type) or pyarrow.types.is_large_string(column.type)


def _check_column(column: Any, path: Path, name: str) -> None:
    """Raise ValueError for a damaged column; with the row where that is text that is not UTF-8."""
    import pyarrow

    start = 0
    for chunk in column.chunks:
        try:
            chunk.validate(full=True)
        except (pyarrow.ArrowException, *_DAMAGED) as error:
            if _is_text(column):
                _check_utf8(chunk, f"{path}: ", name, start)
            raise ValueError(f"{path}: column {name!r} is damaged: {_first_line(error)}") from None
        start += len(chunk)


def _check_utf8(chunk: Any, where: str, name: str, start: int) -> None:
    """Raise ValueError, with the row, if text that begins at row `start` is not UTF-8."""
    import pyarrow

    for row, value in enumerate(chunk.cast(pyarrow.large_binary()).to_pylist(), start):
        try:
            (value or b"").decode("utf-8")
        except UnicodeDecodeError:
            raise ValueError(f"{where}row {row}: {name} is not UTF-8 text") from None


def read_saved(path: Path) -> Any:
    """What `Dataset.save_to_disk` wrote: a `datasets.Dataset` or `datasets.DatasetDict`."""
    import datasets
    import pyarrow

    try:
        loaded = datasets.load_from_disk(str(path))
    except FileNotFoundError as error:
        if any((path / name).is_file() for name in ("state.json", "dataset_dict.json")):
            raise ValueError(f"{path} is a saved data set that lacks a file: {error}") from None
        raise ValueError(f"{path} is a directory without a saved data set") from None
    except (pyarrow.ArrowException, OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is a saved data set that cannot be read: {_first_line(error)}"
        ) from None
    parts = loaded.values() if isinstance(loaded, datasets.DatasetDict) else [loaded]
    for part in parts:
        table = part.data.table
        for name, column in zip(table.column_names, table.columns, strict=True):
            if _is_text(column):
                _check_column(column, path, name)
    return loaded


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
