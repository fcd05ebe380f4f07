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


def test_a_profile_as_tables(tables, monkeypatch, tmp_path):
    side = {
        "name": "fastpref", "missing": None, "step_seconds": 1.5, "peak_bytes": 4_000_000,
        "tensor_bytes": 3_000_000, "unaccounted_bytes": 0, "phases": {"head": 1.25, "data": 0.01},
        "components": {"weights": 2_000_000, "head": 1_000_000, "malloc": 1_000_000, "other": 3},
    }  # fmt: skip
    found = {
        "settings": {"model": "small", "batch_size": 2, "max_length": 64},
        "machine": {"cpu": "a CPU", "threads": 2},
        "wall_s": 90.0,
        "sides": [side, {"name": "liger", "missing": "not installed"}],
    }
    text = tables.profile_report.tables(found)
    for line in (
        "| weights | 2 |",
        "| measured peak | 4 |",
        "| head | 1.250 |",
        "| step | 1.500 |",
    ):
        assert line in text
    assert "other" not in text and "data" not in text and "Liger" not in text
    # A page keeps its figures where there are no results.
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    block = "<!-- benchmarks/tables.py profile -->\nold\n<!-- end -->"
    assert tables.fill(block) == block
    (tmp_path / "profile.json").write_text(json.dumps(found))
    assert tables.fill(block) == block.replace("old\n", text)


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
