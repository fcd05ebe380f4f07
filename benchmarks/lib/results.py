"""Where the benchmarks put what they measure; the rest is fastpref.bench.results."""

from __future__ import annotations

from pathlib import Path

from fastpref.bench.results import machine, table, target, target_table, write_json

__all__ = ["machine", "results_path", "table", "target", "target_table", "write_json"]
RESULTS = Path(__file__).resolve().parent.parent / "results"


def results_path(output: str) -> Path:
    """The JSON that --output asks for: a path, or the name of a file in results/."""
    path = Path(output)
    return (path if path.parent != Path(".") else RESULTS / path.name).with_suffix(".json")
