"""The outputs of a command: tables, JSON, and files whose paths are checked before the work starts.

A profile takes minutes. So a path at which its report could not be written is an error before it.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import typer

from fastpref.cli.report import jsonable

_PAGE = b"<!doctype html"
_PICTURES = (".png", ".svg", ".pdf")


def table_console(width: int = 120) -> Any:
    """A console for tables.

    It is as wide as COLUMNS says, or else as the terminal.

    Args:
        width: in characters, where neither is known, as in a log file.
    """
    from fastpref.cli.progress import RunConsole

    # rich would look for the width in the os.environ of its import, which
    # `Dataset.map(num_proc=...)` replaces.
    columns = os.environ.get("COLUMNS", "")
    if columns.isdigit() and int(columns):
        width = int(columns)
    elif sys.stdout.isatty():
        width = shutil.get_terminal_size((width, 0)).columns
    return RunConsole(soft_wrap=True, width=width)


def print_json(value: Any) -> None:
    """Print one object. Figures that are not finite are null, since JSON has no NaN."""
    say(json.dumps(jsonable(value), allow_nan=False))


def say(text: str) -> None:
    """Print a line; it is lost if the reader of the output is gone, as with `| head`."""
    from fastpref.cli.progress import discard_output

    try:
        typer.echo(text)
    except BrokenPipeError:
        discard_output()


def say_paths(**paths: Path | None) -> None:
    """Say by its kind where each file is that was written; None: it was not asked for."""
    for kind, path in paths.items():
        if path is not None:
            say(f"{kind.capitalize()}: {path}")


def check_report(path: Path | None) -> None:
    """Check the place of a `--report`; None is fine.

    Raises:
        ValueError: a directory, or a file that is no HTML page, such as the data.
        StorageError: a directory that cannot be written.
    """
    if path is None:
        return
    path = check_place("--report", path)
    if path.is_file() and path.stat().st_size:
        with open(path, "rb") as file:
            if file.read(len(_PAGE)).lower() != _PAGE:
                raise ValueError(f"--report {path} is no HTML page, so it stays; pass another name")


def check_plot(path: Path | None) -> None:
    """Check the place of a `--plot`; None is fine. Raises as `check_report` does."""
    if path is not None and check_place("--plot", path).suffix.lower() not in _PICTURES:
        raise ValueError(f"--plot {path}: expected a name that ends in {', '.join(_PICTURES)}")


def write_plot(figure: Any, path: Path, dpi: int = 120) -> None:
    """Write the figure of a `--plot`.

    Raises:
        StorageError: a full, failing or read-only disk.
    """
    from fastpref.cli.report import save_figure
    from fastpref.storage import disk_errors

    path = path.expanduser()
    with disk_errors(f"--plot {path} could not be written"):
        save_figure(figure, path, dpi)


def check_place(option: str, path: Path) -> Path:
    """The path that an option names, in full; raises as `check_report` does."""
    from fastpref.storage import StorageError

    path = path.expanduser()
    if path.is_dir():
        raise ValueError(f"{option} {path} is a directory; expected a file")
    # The page is written beside its place and moved there, which would replace a device.
    if path.is_absolute() and path.parts[1:2] == ("dev",):
        raise ValueError(f"{option} {path} is a device; expected a file")
    folder = path.parent
    while not folder.exists():
        folder = folder.parent
    if not folder.is_dir():
        raise ValueError(f"{option} {path}: {folder} is not a directory")
    if not os.access(folder, os.W_OK):
        raise StorageError(f"{option} {path} could not be written: permission denied")
    return path
