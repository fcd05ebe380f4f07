"""What the DPO loss of an output head costs on this machine, in fastpref and in other libraries.

`fastpref bench` is the command. docs/bench.md describes the figures.
"""

from __future__ import annotations

from fastpref.bench.bench import run_bench
from fastpref.bench.compare import Change, compare_results, load_result
from fastpref.bench.run import BenchResult

__all__ = ["BenchResult", "Change", "compare_results", "load_result", "run_bench"]
