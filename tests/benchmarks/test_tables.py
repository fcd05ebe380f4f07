"""README.md and docs/ show the figures that the benchmarks wrote, and no others."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from fastpref.backends import native

ROOT = Path(__file__).resolve().parents[2]


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


def test_host_time_runs(tables, tmp_path):
    import host_time

    out = tmp_path / "host_time.json"
    before, threads = native.fold, torch.get_num_threads()
    try:
        host_time.main(["--repeats", "3", "--warm-up", "1", "--output", str(out)])
    finally:
        torch.set_num_threads(threads)
    assert native.fold is before
    us = json.loads(out.read_text())["us"]
    assert len([name for name in us if name.startswith("without kernels")]) == 3
    assert all(found["median"] > 0 for found in us.values())


def test_cpu_linear_runs(tables, tmp_path):
    pytest.importorskip("transformers")
    import cpu_linear

    out = tmp_path / "cpu_linear.json"
    sizes = "hidden 32 intermediate 48 heads 2 kv-heads 1 layers 1 vocab 60 prompt 3 answer 5"
    words = [f"--{w}" if not w.isdigit() else w for w in sizes.split()]
    cpu_linear.main([*words, "--repeats", "1", "--output", str(out)])
    found = json.loads(out.read_text())
    assert len(found["products"]) == 3 * 4
    assert sum(row["layers"] for row in found["products"]) == 3 * 7
    assert all(found["step_s"][side]["median"] > 0 for side in ("torch", "native"))
