"""benchmarks/step.py: pairs of a kind of length, and what is made of two runs."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def step(monkeypatch):
    pytest.importorskip("transformers")
    monkeypatch.setattr(sys, "path", [str(ROOT / "benchmarks"), *sys.path])
    import step

    return step


class Words:
    """A tokenizer whose tokens are words."""

    def __call__(self, text, add_special_tokens):
        return {"input_ids": text.split()}

    def decode(self, ids):
        return " ".join(ids)


def pairs(count, words):
    texts = [" ".join(f"w{i}.{j}" for j in range(words)) for i in range(count)]
    return [{"prompt": "p", "chosen": [{"role": "assistant", "content": t}]} for t in texts]


@pytest.mark.parametrize("kind", ["HH-RLHF", "TL;DR"])
def test_pairs_have_the_lengths_of_their_kind(step, kind):
    cut = step.cut_pairs(pairs(60, 400), kind, 30, Words(), 0)
    assert cut == step.cut_pairs(pairs(60, 400), kind, 30, Words(), 0)
    prompt, answer = step.LENGTHS[kind]
    for row in cut:
        for name, (_, _, low, high) in zip(row, (prompt, answer, answer), strict=True):
            assert low <= len(row[name].split()) <= high
    words = [word for row in cut for text in row.values() for word in text.split()]
    assert len(set(words)) == len(words)  # no text is used twice
    with pytest.raises(SystemExit, match="too short"):
        step.cut_pairs(pairs(2, 100), kind, 30, Words(), 0)


def test_the_datas_own_lengths(step):
    given = pairs(9, 5)
    cut = step.cut_pairs(given, "data", 4, None, 0)
    assert len(cut) == 4 and all(row in given for row in cut)


def test_two_runs_are_compared(step, monkeypatch):
    asked = {}

    def take_turns(script, wanted):
        asked.update(wanted)
        log = [{"loss": 0.5}]
        sizes = {"peak_bytes": 7 << 30, "floor_bytes": 3 << 30}
        return {
            name: {"step_s_with_reference": 2.0 * i, "log": log, **sizes}
            for i, name in enumerate(wanted, 1)
        }

    monkeypatch.setattr(step, "take_turns", take_turns)
    args = step.arguments(["--model", "m", "--data", "d"])
    found = step.turns_of(args, "rows", None)
    assert found["speedup"] == 2 and found["memory"] == 1 and found["largest_loss_gap"] == 0
    assert asked["TRL"]["trainer"] == "trl" and not asked["TRL"]["precompute"]
    assert asked["fastpref"]["fastpref_options"] == step.ON and asked["fastpref"]["precompute"]
    step.turns_of(args, "rows", "no packing")
    assert asked["no packing"]["fastpref_options"] == step.ON | {"packing": False}
    reached = step.targets({"TL;DR": {"TRL": found}})
    assert [row["measured"] for row in reached] == [2.0, 1.0]
