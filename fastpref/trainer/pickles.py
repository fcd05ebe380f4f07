"""Files of torch.save that contain code: torch refuses them, and the error here names the file."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from zipfile import BadZipFile


@contextmanager
def readable(folder: str | Path | None, names: str) -> Iterator[None]:
    """Raise ValueError, with the files' names, for what torch refuses to load, such as code."""
    try:
        yield
    except (UnpicklingError, EOFError, BadZipFile) as error:
        reason = "it holds objects other than tensors and numbers"
        if not isinstance(error, UnpicklingError):
            reason = str(error).strip().splitlines()[0] if str(error).strip() else "it is cut"
        raise ValueError(f"{folder}: {names} cannot be loaded: {reason}") from error


@contextmanager
def readable_weights(folder: str | Path | None) -> Iterator[None]:
    """The same for a model's or an adapter's weights, whose files are found in the folder."""
    files = sorted(path.name for path in Path(folder or "").glob("*model*.bin"))
    with readable(folder, " or ".join(files) or "the weights"):
        yield
