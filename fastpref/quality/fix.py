"""`write_fixed`: the data without the rows that should not be trained on, in a file of its own."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fastpref.data.files import load_preference_data
from fastpref.quality.findings import Finding
from fastpref.storage import disk_errors, whole_file


def fixed_path(path: str | os.PathLike[str]) -> Path:
    """The path beside a file at which `write_fixed` writes: pairs.jsonl.gz to pairs.clean.jsonl."""
    path = Path(path)
    name = path.name
    while (stem := Path(name).stem) != name:
        name = stem
    return path.with_name(f"{name}.clean.jsonl")


def write_fixed(
    data: Any, findings: Iterable[Finding], path: str | os.PathLike[str], *, name: str = "train"
) -> tuple[Path, int]:
    """Write the rows that no finding drops, as JSON Lines.

    Args:
        data: as `check_data` got it.
        findings: what `check_data` found.
        path: where to write; there must be no file yet.
        name: the data that is written, "train" or "eval".

    Returns:
        The path and the number of rows that were left out.

    Raises:
        ValueError: a file that stands there already, or data of which nothing would be left.
        StorageError: a full, failing or read-only disk.
    """
    path = Path(path)
    if path.exists():
        raise ValueError(f"{path} exists already; move it away or name another file")
    dropped = {row for f in findings if f.drops and f.data == name for row in f.rows}
    dataset = load_preference_data(data)
    if len(dropped) >= len(dataset):
        raise ValueError("no row would be left; nothing was written")
    with disk_errors(f"{path} could not be written"), whole_file(path) as beside:
        with open(beside, "w", encoding="utf-8") as file:
            for number, row in enumerate(dataset):
                if number not in dropped:
                    file.write(json.dumps(row, ensure_ascii=False, default=str) + "\n")
    return path, len(dropped)
