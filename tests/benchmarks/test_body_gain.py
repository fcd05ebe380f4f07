"""benchmarks/body.py: the tokens of both sides, and targets that are of the ratios."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from support import tiny

pytest.importorskip("transformers")
ROOT = Path(__file__).resolve().parents[2]


def test_it_measures_a_tiny_model(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "path", [str(ROOT / "benchmarks"), *sys.path])
    import body

    tiny.model(vocab_size=64).save_pretrained(tmp_path / "model")
    options = ["--model", str(tmp_path / "model"), "--pairs", "1", "--repeats", "1"]
    body.main([*options, "--output", str(tmp_path / "out")])
    found, printed = json.loads((tmp_path / "out.json").read_text()), capsys.readouterr().out
    for name, case in found["cases"].items():
        assert case["ideal"] == case["tokens"]["padded"] / case["tokens"]["segments"] > 1
        assert case["ratio"] == case["seconds"]["padded"] / case["seconds"]["segments"]
        assert name in printed
    shared = found["cases"]["prefix sharing, P = 512, C = 128"]
    assert shared["tokens"] == {"padded": 2 * 640, "segments": 768}
    assert len(found["targets"]) == 3
