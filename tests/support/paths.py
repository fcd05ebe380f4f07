"""Where things are, for tests that run programs."""

from __future__ import annotations

import os
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
ROOT = TESTS.parent
GOLDEN = TESTS / "golden"


def search_path(*more: Path) -> str:
    """PYTHONPATH for a program that imports the package and what tests import."""
    folders = [*more, ROOT, TESTS, TESTS / "support"]
    return os.pathsep.join([*map(str, folders), os.environ.get("PYTHONPATH", "")])
