"""The length of the tests of tests/faults, and the figures that they leave.

FASTPREF_FAULTS=whole, which `make test-faults` sets, asks for the whole length, and the figures
then go to benchmarks/results/reliability.json. Without it the tests are short and write nothing.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")
WHOLE = os.environ.get("FASTPREF_FAULTS") == "whole"
_ROOT = Path(__file__).resolve().parents[2]
RESULTS = _ROOT / "benchmarks" / "results" / "reliability.json"


def sized(whole: T, short: T) -> T:
    """A size for the length that was asked for."""
    return whole if WHOLE else short


def record(part: str, **figures: Any) -> None:
    """Write the figures of a part, with the machine, the versions and the commit."""
    if not WHOLE:
        return
    sys.path.insert(0, str(_ROOT / "benchmarks"))
    try:
        from lib.results import machine, write_json
    finally:
        sys.path.pop(0)
    found = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    here = machine()
    parts = {**found.get("parts", {}), part: {**figures, "commit": here["commit"]}}
    write_json(RESULTS, {"machine": here, "parts": dict(sorted(parts.items()))})
