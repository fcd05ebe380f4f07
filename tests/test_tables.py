"""README.md and docs/ show the figures that the benchmarks wrote, and no others."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def tables(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(ROOT / "benchmarks"), *sys.path])
    import tables

    return tables


def test_the_pages_have_the_figures_of_the_results(tables):
    found = ""
    for page in tables.pages():
        text = page.read_text()
        assert tables.fill(text) == text, f"{page.name}: run python benchmarks/tables.py"
        found += text
    for name in tables.BLOCKS:
        assert f"tables.py {name} -->" in found


def test_a_stale_figure_is_replaced_and_nothing_else(tables):
    block = "<!-- benchmarks/tables.py fp32 -->\n{}<!-- end -->"
    new = tables.fill("before " + block.format("3x\n") + " after")
    assert new == "before " + block.format(tables.fp32()) + " after"
