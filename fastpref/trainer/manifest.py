"""Complete checkpoints: the list of its files that each gets last, and the search for the newest.

A checkpoint directory is complete if it has a manifest and every file that the manifest lists has
the size and the SHA-256 that stand there. The manifest is written after all of those files are on
the device, by a rename, so that a run that dies at any moment leaves a directory that is complete
or that is seen not to be. The manifest has a SHA-256 of itself.

The newest checkpoint is the one that was saved last. Its step is not always the highest: a run can
go on from an earlier checkpoint. So each manifest has a number that counts the saves.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fastpref.storage import files_under, sync_directory, sync_file, write_json

MANIFEST = "manifest.json"
_VERSION = 1
_NAME = re.compile(r"checkpoint-(\d+)")
_REMOVED = ".removed"  # where a checkpoint goes before it is deleted


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _own_sha256(value: dict[str, Any]) -> str:
    """The SHA-256 of a manifest without this entry."""
    rest = {key: entry for key, entry in value.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def write_manifest(folder: Path, step: int, run: dict[str, Any], number: int = 0) -> None:
    """Complete a checkpoint directory: synchronise its files and list them.

    Args:
        step: optimiser steps that the checkpoint was saved after.
        run: what the run is, as `fastpref.trainer.identity` describes it.
        number: `next_number` of the output directory.
    """
    files: dict[str, dict[str, Any]] = {}
    for path in files_under(folder):
        if path.name.startswith(".") or path == folder / MANIFEST:
            continue
        sync_file(path)
        name = path.relative_to(folder).as_posix()
        files[name] = {"size": path.stat().st_size, "sha256": _sha256(path)}
    sync_directory(folder)
    value = {
        "version": _VERSION,
        "step": step,
        "number": number,
        "run": run,
        "files": files,
    }
    value["sha256"] = _own_sha256(value)
    write_json(folder / MANIFEST, value)
    sync_directory(folder.parent)


def read_manifest(folder: Path) -> dict[str, Any]:
    """A checkpoint's manifest. ValueError, with the reason, if there is none that can be read."""
    path = folder / MANIFEST
    if not path.is_file():
        raise ValueError(f"it has no {MANIFEST}, so that it was not finished")
    try:
        value = json.loads(path.read_text("utf-8"))
        if value["version"] != _VERSION:
            raise ValueError(
                f"its {MANIFEST} has version {value['version']}, and this fastpref reads {_VERSION}"
            )
        if value["sha256"] != _own_sha256(value):
            raise ValueError(f"its {MANIFEST} is damaged: its checksum is another")
    except (KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"its {MANIFEST} is damaged ({type(error).__name__})") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"its {MANIFEST} is damaged ({type(error).__name__})") from error
    return value


def problem_with(folder: Path) -> str | None:
    """Why a checkpoint directory is not complete, or None. Reads every file of it."""
    if not folder.is_dir():
        return "it is not a directory"
    try:
        listed = read_manifest(folder)["files"]
        for name, entry in listed.items():
            path = folder / name
            if not path.is_file():
                return f"{name} is missing"
            size = path.stat().st_size
            if size != entry["size"]:
                return f"{name} has {size} bytes instead of {entry['size']}"
            if _sha256(path) != entry["sha256"]:
                return f"{name} is damaged: its checksum is another than when it was saved"
    except ValueError as error:
        return str(error)
    except OSError as error:
        return f"it cannot be read ({error.strerror or error})"
    return None


def checkpoints(output: Path) -> Iterator[tuple[int, Path]]:
    """The checkpoint directories of an output directory with their steps, the newest first."""
    directories = []
    if output.is_dir():
        for path in output.iterdir():
            name = _NAME.fullmatch(path.name)
            if name and path.is_dir():
                directories.append((int(name[1]), path))
    return iter(sorted(directories, reverse=True))


def _number(folder: Path, unreadable: float) -> float:
    try:
        return int(read_manifest(folder)["number"])
    except (ValueError, OSError):
        return unreadable


def _last_saved_first(output: Path, unreadable: float) -> list[Path]:
    """The checkpoint directories; unreadable: the number of one whose manifest cannot be read."""
    numbers = [(_number(path, unreadable), step, path) for step, path in checkpoints(output)]
    return [path for _, _, path in sorted(numbers, reverse=True)]


def next_number(output: Path) -> int:
    """The number of the checkpoint that an output directory gets next."""
    return 1 + int(max((_number(path, 0) for _, path in checkpoints(output)), default=0))


def newest_complete(output: Path) -> tuple[Path | None, list[str]]:
    """The newest complete checkpoint of an output directory, and why newer ones were passed over.

    Returns:
        Its directory, or None if there is none; and one sentence for each newer directory.
    """
    passed_over: list[str] = []
    for path in _last_saved_first(output, math.inf):  # what is damaged is named
        problem = problem_with(path)
        if problem is None:
            return path, passed_over
        passed_over.append(f"{path.name} was passed over: {problem}")
    return None, passed_over


def remove_checkpoint(folder: Path) -> None:
    """Delete a checkpoint directory, which is whole under its name or has lost its name.

    Of a link to a directory the link alone is deleted.
    """
    if folder.is_symlink() or not folder.is_dir():
        folder.unlink(missing_ok=True)
        return
    removed = folder.parent / _REMOVED
    shutil.rmtree(removed, ignore_errors=True)
    removed.mkdir(exist_ok=True)
    os.rename(folder, removed / folder.name)
    shutil.rmtree(removed, ignore_errors=True)


def clear_removed(output: Path) -> None:
    """Delete what a run that died has left of the checkpoints that it was deleting."""
    shutil.rmtree(output / _REMOVED, ignore_errors=True)


def rotate(output: Path, limit: int | None, protected: Path | None = None) -> None:
    """Delete the oldest checkpoints beyond a limit.

    Directories without a manifest are left alone: no run of this package leaves one.

    Args:
        limit: the most that stay, at least 1; None keeps all.
        protected: a checkpoint that stays in any case, the best one.
    """
    if limit is None or limit < 1:
        return
    complete = [p for p in _last_saved_first(output, -1) if (p / MANIFEST).is_file()]
    for path in complete[limit:]:
        if path != protected:
            remove_checkpoint(path)


def check_state(file: Path) -> None:
    """Raise ValueError, with the file's name, for a trainer state that is not a JSON object."""
    if not file.is_file():
        return
    try:
        state = json.loads(file.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"cannot continue from {file.parent}: {file.name}: {error}") from error
    if not isinstance(state, dict):
        raise ValueError(f"cannot continue from {file.parent}: {file.name} is not a JSON object")
