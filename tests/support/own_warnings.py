"""Which warnings fail a test: those that this repository causes, not those of other libraries.

The filters let every warning through (pyproject.toml), and `showwarning` raises ours, as the filter
"error" would, where they are issued. The others are in pytest's summary; `-W error` makes them fail
as well.
"""

from __future__ import annotations

import contextlib
import importlib.util
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
OURS = tuple(
    str(ROOT / name)
    for name in ("fastpref", "kernels", "tests", "benchmarks", "examples", "scripts", "csrc")
)
DEPRECATIONS = (DeprecationWarning, PendingDeprecationWarning, FutureWarning)
# What lies between a call and the function that is called, and is nobody's doing.
BETWEEN = (
    "functools.py",
    "contextlib.py",
    "/torch/nn/modules/module.py",
    "/torch/utils/_contextlib.py",
)
WRAPPERS = {"wrapper", "wrapped", "wrapped_func", "wrapped_fn", "inner", "decorated", "decorator"}


def is_ours(filename: str) -> bool:
    """Whether a file is of this repository, or of the package as it is installed."""
    found = importlib.util.find_spec("fastpref")
    installed = list((found and found.submodule_search_locations) or ())
    return any(Path(filename).is_relative_to(folder) for folder in (*OURS, *installed))


def _library(file: str) -> str:
    """The package or module under site-packages that a file is of, or the file's folder."""
    head, found, tail = file.rpartition("site-packages/")
    return tail.split("/")[0] if found else file.rpartition("/")[0]


def _passes_on(frame: FrameType, library: str) -> bool:
    """Whether a frame only leads to the function that warns: a constructor or a wrapper of the same
    library, or what is nobody's."""
    name, file = frame.f_code.co_name, frame.f_code.co_filename
    dunder = name.startswith("__") and name.endswith("__")
    leads = (dunder or name in WRAPPERS) and _library(file) == library
    return leads or file == "<string>" or file.endswith(BETWEEN)


def causes(category: type[Warning], filename: str, lineno: int, frame: FrameType | None) -> bool:
    """Whether a warning that is issued in `frame`, and blamed on a line of a file, is our doing.

    A warning is ours if that file is ours. A deprecation is ours, too, if it is blamed on a library
    only because it does not look far enough: on the deprecated function itself, which our code
    calls, or on what lies between the two.
    """
    if is_ours(filename) or issubclass(category, pytest.PytestWarning):
        return True
    if not issubclass(category, DEPRECATIONS):
        return False
    blamed = frame
    while blamed is not None and (blamed.f_code.co_filename, blamed.f_lineno) != (filename, lineno):
        blamed = blamed.f_back
    if blamed is not None and blamed is frame:  # the function that is deprecated blames itself
        blamed = blamed.f_back
    library = "" if frame is None else _library(frame.f_code.co_filename)
    while blamed is not None and _passes_on(blamed, library):
        blamed = blamed.f_back
    return blamed is not None and is_ours(blamed.f_code.co_filename)


def _show(
    message: Any, category: Any, filename: str, lineno: int, file: Any = None, line: Any = None
) -> None:
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename == warnings.__file__:
        frame = frame.f_back
    if causes(category, filename, lineno, frame):
        raise message
    _shown(warnings.WarningMessage(message, category, filename, lineno, file, line))


def _shown(message: warnings.WarningMessage) -> None:
    """What `warnings` does where nobody replaced its `showwarning`: pytest keeps a list."""
    warnings._showwarnmsg_impl(message)  # type: ignore[attr-defined]


@contextlib.contextmanager
def failing() -> Iterator[None]:
    """Within it our warnings raise."""
    before = warnings.showwarning
    warnings.showwarning = _show
    try:
        yield
    finally:
        warnings.showwarning = before
