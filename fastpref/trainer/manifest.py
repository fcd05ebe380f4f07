"""Complete checkpoints: the list of its files that each gets last, and the search for the newest.

A checkpoint directory is complete if it has a manifest and every file that the manifest lists has
the size and the SHA-256 that stand there. The manifest is written after all of those files are on
the device, by a rename, so that a run that dies at any moment leaves a directory that is complete
or that is seen not to be.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fastpref.trainer.storage import files_under, sync_directory, sync_file, write_json

MANIFEST = "manifest.json"
_VERSION = 1
_NAME = re.compile(r"checkpoint-(\d+)")


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def write_manifest(folder: Path, step: int, run: dict[str, Any]) -> None:
    """Complete a checkpoint directory: synchronise its files and list them.

    Args:
        step: optimiser steps that the checkpoint was saved after.
        run: what the run is, as `fastpref.trainer.identity` describes it.
    """
    files: dict[str, dict[str, Any]] = {}
    for path in files_under(folder):
        if path.name.startswith(".") or path == folder / MANIFEST:
            continue
        sync_file(path)
        name = path.relative_to(folder).as_posix()
        files[name] = {"size": path.stat().st_size, "sha256": _sha256(path)}
    sync_directory(folder)
    value = {"version": _VERSION, "step": step, "run": run, "files": files}
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
        int(value["step"]), dict(value["run"])
        for entry in value["files"].values():
            int(entry["size"]), str(entry["sha256"])
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError, UnicodeDecodeError) as error:
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
    found = []
    if output.is_dir():
        for path in output.iterdir():
            name = _NAME.fullmatch(path.name)
            if name and path.is_dir():
                found.append((int(name[1]), path))
    return iter(sorted(found, reverse=True))


def newest_complete(output: Path) -> tuple[Path | None, list[str]]:
    """The newest complete checkpoint of an output directory, and why newer ones were passed over.

    Returns:
        Its directory, or None if there is none; and one sentence for each newer directory.
    """
    passed_over: list[str] = []
    for _, path in checkpoints(output):
        problem = problem_with(path)
        if problem is None:
            return path, passed_over
        passed_over.append(f"{path.name} was passed over: {problem}")
    return None, passed_over


def remove_checkpoint(folder: Path) -> None:
    """Delete a checkpoint directory; its manifest first, so that half of it is never taken."""
    (folder / MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def rotate(output: Path, limit: int | None, protected: Path | None = None) -> None:
    """Delete the oldest checkpoints beyond a limit, and all that are not complete.

    Args:
        limit: the most that stay, at least 1; None keeps all that are complete.
        protected: a checkpoint that stays in any case, the best one.
    """
    kept = 0
    for _, path in checkpoints(output):
        whole = (path / MANIFEST).is_file()
        if whole and (limit is None or limit < 1 or kept < limit):
            kept += 1
        elif path != protected:
            remove_checkpoint(path)
