"""Files that are whole or absent: atomic writes, synchronised to disk, and errors of a disk."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fastpref.progress import size_text


class StorageError(OSError):
    """A run's files could not be written; its message says what is safe and what to do."""


# What a full, failing or read-only disk answers. Other errors of the system are of another kind.
_DISK_ERRORS = {
    errno.ENOSPC: "no space left on the device",
    errno.EDQUOT: "the disk quota is used up",
    errno.EIO: "the device failed to write",
    errno.EROFS: "the file system is read-only",
    errno.EACCES: "permission denied",
    errno.EPERM: "permission denied",
    errno.EFBIG: "the file would be larger than is allowed",
}
# The same in the words of torch.save and safetensors, which keep no error number.
_DISK_WORDS = (
    ("no space left", "no space left on the device"),
    ("os error 28", "no space left on the device"),
    ("disk quota", "the disk quota is used up"),
    ("read-only file system", "the file system is read-only"),
    ("permission denied", "permission denied"),
    ("input/output error", "the device failed to write"),
    ("pytorchstreamwriter failed", "a file could not be written"),
    ("unexpected pos", "a file could not be written"),
    ("i/o error", "a file could not be written"),
    ("ioerror", "a file could not be written"),
    ("iostream error", "a file could not be written"),
)


def disk_problem(error: BaseException) -> str | None:
    """What is wrong with the disk, if that is why this error was raised; else None.

    An error is followed to its causes: torch.save hides a full disk behind an error of its own.
    """
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        if isinstance(current, OSError) and current.errno in _DISK_ERRORS:
            return _DISK_ERRORS[current.errno]
        current = current.__cause__ or current.__context__
    text = str(error).lower()
    return next((problem for words, problem in _DISK_WORDS if words in text), None)


def is_of_disk(error: BaseException) -> bool:
    """Whether the system says that a disk is full, failing or read-only."""
    return isinstance(error, OSError) and error.errno in (
        errno.ENOSPC,
        errno.EDQUOT,
        errno.EIO,
        errno.EROFS,
    )


@contextlib.contextmanager
def disk_errors(text: str) -> Iterator[None]:
    """Turn errors of the disk inside a `with` block into a StorageError that begins with a text."""
    try:
        yield
    except Exception as error:
        problem = None if isinstance(error, StorageError) else disk_problem(error)
        if problem is None:
            raise
        raise StorageError(f"{text}: {problem}") from error


def sync_file(path: Path) -> None:
    """Have the system write a file's contents to the device."""
    # Windows does not synchronise a file that is open for reading alone.
    descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_directory(path: Path) -> None:
    """Have the system write a directory's entries to the device, where it can."""
    if os.name == "nt":  # which cannot open a directory
        return
    sync_file(path)


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file that is either the whole new one or the whole old one, whatever happens."""
    beside = path.with_name(f".{path.name}.new")
    with _in_place_of(path, beside):
        with open(beside, "w", encoding="utf-8") as file:
            json.dump(value, file, indent=1)
            file.write("\n")
    sync_directory(path.parent)


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Have a file at `path` that is either the whole new one or the old one, whatever happens.

    Yields a path beside it, in a directory that is made. What the block writes there takes its
    place at the end; after an error or Ctrl-C it is removed. Each call has a name of its own, so
    that of two processes which write the same file the last one wins.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name[:40]}.{uuid.uuid4().hex[:8]}.new")
    with _in_place_of(path, beside):
        yield beside


@contextlib.contextmanager
def _in_place_of(path: Path, beside: Path) -> Iterator[None]:
    """Put the file that the block writes in the place of another, or remove it after an error."""
    try:
        yield
        sync_file(beside)
        os.replace(beside, path)
    except BaseException:
        with contextlib.suppress(OSError):
            beside.unlink()
        raise


def files_under(folder: Path) -> Iterator[Path]:
    """The files of a directory and of those below it, in the order of their names."""
    for path in sorted(folder.iterdir()):
        if path.is_dir() and not path.is_symlink():
            yield from files_under(path)
        else:
            yield path


def move_into(source: Path, target: Path) -> None:
    """Put every file of source in its place under target, over the one that is there.

    The files are on the device before the first is moved, and each move is atomic: a file is the
    old one or the new one at any moment. Both directories must be on one file system.
    """
    files = list(files_under(source))
    for path in files:
        sync_file(path)
    # Weights last: until they are there, an old model has its old weights.
    for path in sorted(files, key=lambda path: path.suffix in (".safetensors", ".bin")):
        place = target / path.relative_to(source)
        place.parent.mkdir(parents=True, exist_ok=True)
        os.replace(path, place)
    sync_directory(target)
    shutil.rmtree(source, ignore_errors=True)


def check_writable(folder: Path) -> None:
    """Make a directory and see that a file can be written there; StorageError if not."""
    probe = folder / f".fastpref-probe-{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with open(probe, "wb") as file:
            file.write(b"\0" * 4096)
            file.flush()
            os.fsync(file.fileno())
        probe.unlink()
    except OSError as error:
        with contextlib.suppress(OSError):
            probe.unlink()
        raise StorageError(
            f"output directory {folder} cannot be written: {disk_problem(error) or error}; "
            "nothing was changed"
        ) from error


def check_room(folder: Path, needed: int) -> None:
    """Raise StorageError unless the file system of a directory has so many bytes free."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise StorageError(
            f"output directory {folder} has {size_text(free)} free, but a checkpoint takes about "
            f"{size_text(needed)}; free some space, choose another directory, or save no "
            "checkpoints"
        )
