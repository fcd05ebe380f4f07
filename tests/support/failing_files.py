"""A disk that fails at a chosen write, rename or fsync: failing_files.c, compiled and preloaded."""

from __future__ import annotations

import ctypes
import functools
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

SOURCE = Path(__file__).with_suffix(".c")
_FOLDER = tempfile.TemporaryDirectory(prefix="fastpref-")  # which ends with this process


@functools.cache
def library() -> tuple[Path | None, str]:
    """The compiled library, or None and why there is none."""
    compiler = shutil.which(os.environ.get("CC", "cc")) or shutil.which("gcc")
    if not sys.platform.startswith("linux") or compiler is None:
        return None, "no C compiler, or a system without LD_PRELOAD"
    path = Path(_FOLDER.name) / "failing_files.so"
    command = [compiler, "-O1", "-shared", "-fPIC", "-o", str(path), str(SOURCE), "-ldl"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        return None, f"{compiler}: {done.stderr.strip()[-300:]}"
    return path, ""


def _loaded() -> ctypes.CDLL:
    loaded = ctypes.CDLL(None)
    loaded.failing_files_calls.restype = ctypes.c_long
    loaded.failing_files_failed.restype = ctypes.c_char_p
    return loaded


def arm(folder: Path, first: int, error: int, stays: bool) -> None:
    """Count the calls that change files below a directory, from 1.

    Args:
        first: the call that fails; 0 for none.
        error: its error number.
        stays: whether every later call fails, too.
    """
    directory = os.fsencode(os.path.realpath(folder))
    _loaded().failing_files_arm(directory, ctypes.c_long(first), error, int(stays))


def calls() -> int:
    """How many calls there were since `arm`."""
    return int(_loaded().failing_files_calls())


def failed() -> str:
    """The first call that failed and its file, or ""."""
    return os.fsdecode(_loaded().failing_files_failed())
