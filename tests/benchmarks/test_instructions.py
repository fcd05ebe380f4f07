"""benchmarks/instructions.py: no kernel takes more instructions than it did."""

from __future__ import annotations

import json
import sys

import outcomes
import pytest
from paths import ROOT

from fastpref.backends.processor import read_processor

sys.path.append(str(ROOT / "benchmarks"))

import instructions  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "instructions.json"
KEY = ("kernel", "dtype", "of")


@pytest.mark.slow
def test_no_count_grew(tmp_path):
    """By more than 3 %, with the compiler that the file's counts are of."""
    reason, kept = instructions.missing(), json.loads(RESULTS.read_text())
    if reason is not None:
        pytest.skip(reason)
    if instructions.compiler() != kept["compiler"]:
        pytest.skip(f"the counts are of {kept['compiler']}")
    if not (read_processor()[1] or {}).get("avx2"):
        pytest.skip("no AVX2: other clones run")
    shape = instructions.SHAPES["small"]
    headers = sorted(instructions.CSRC.glob("*.h"))
    made_of = [kept["compiler"], instructions.FLAGS, shape, *instructions.SOURCES, *headers]
    found = outcomes.once(
        "instructions", made_of, lambda: instructions.count(instructions.build(tmp_path), shape)
    )
    before = {tuple(c[k] for k in KEY): c for c in kept["counts"] if c["shape"] == list(shape)}
    assert {tuple(c[k] for k in KEY) for c in found} == set(before)
    for counted in found:
        name = tuple(counted[k] for k in KEY)
        assert counted["ratio"] <= 1.03 * before[name]["ratio"], name
