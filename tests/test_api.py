"""The public names and their signatures are those of tests/golden/api.txt.

A change of them is a decision: `python tests/test_api.py` writes the file anew, and the difference
is in the commit.
"""

from __future__ import annotations

import dataclasses
import enum
import importlib
import inspect
import re
from pathlib import Path
from typing import Any

import pytest

GOLDEN = Path(__file__).with_name("golden") / "api.txt"
FACES = (
    "fastpref",
    "fastpref.bench",
    "fastpref.data",
    "fastpref.fused",
    "fastpref.heads",
    "fastpref.integrations",
    "fastpref.integrations.cce",
    "fastpref.integrations.liger",
    "fastpref.logps",
    "fastpref.losses",
    "fastpref.planning",
    "fastpref.profiling",
    "fastpref.quality",
    "fastpref.reference",
    "fastpref.trainer",
)


def public_names(module: Any) -> list[str]:
    return sorted({*module.__all__, *getattr(module, "_LAZY", ())})


def signature(value: Any) -> str:
    """What a caller may write: the arguments, or the fields that are our own."""
    if isinstance(value, (tuple, frozenset, set)):
        return " = " + ", ".join(sorted(map(str, value)))
    if dataclasses.is_dataclass(value) and "transformers" in str(value.__mro__):
        own = [c for c in value.__mro__ if c.__module__.startswith("fastpref.")]
        names = {name for c in own for name in c.__dict__.get("__annotations__", {})}
        return "(" + ", ".join(sorted(n for n in names if not n.startswith("_"))) + ")"
    if isinstance(value, type) and issubclass(value, Exception):
        return f"({value.__base__.__name__})"
    if isinstance(value, type) and issubclass(value, enum.Enum):
        return " = " + ", ".join(value.__members__)
    text = str(inspect.signature(value)).replace("'", "")
    return re.sub(r"ForwardRef\((.*?)\)", r"\1", text)  # of a NamedTuple's fields


def lines() -> list[str]:
    out = []
    for name in FACES:
        module = importlib.import_module(name)
        values = [(n, getattr(module, n)) for n in public_names(module)]
        out += [f"{name}.{n}{signature(value)}" for n, value in values]
    return out


def test_the_public_names_are_those_that_were_agreed_on():
    pytest.importorskip("transformers")
    pytest.importorskip("trl")
    assert lines() == GOLDEN.read_text("utf-8").splitlines()


if __name__ == "__main__":
    GOLDEN.write_text("\n".join(lines()) + "\n", "utf-8")
