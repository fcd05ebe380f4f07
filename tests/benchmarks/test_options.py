"""Options of the benchmarks that name several things."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def benchmarks(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(ROOT / "benchmarks"), *sys.path])


def test_both_losses_or_modes_in_one_word(capsys):
    import train
    import trl_step

    required = ["--model", "m", "--data", "d"]
    assert train.arguments([*required, "--losses", "both"]).losses == ["dpo", "ipo"]
    assert trl_step.arguments(["--modes", "both"]).modes == ["trainable", "frozen"]
    assert trl_step.arguments(["--modes", "frozen"]).modes == ["frozen"]
    for script, *argv in (
        (train, *required, "--losses", "both,kto"),
        (trl_step, "--modes", "whole"),
        (trl_step, "--modes", ""),
    ):
        with pytest.raises(SystemExit):
            script.arguments(argv)
        assert "or both" in capsys.readouterr().err


def test_an_unknown_shape_is_refused(capsys):
    import instructions

    with pytest.raises(SystemExit):
        instructions.main(["--shapes", "x"])
    assert "--shapes: got x, expected some of" in capsys.readouterr().err
