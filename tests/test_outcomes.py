"""What tests/support/outcomes.py keeps: one outcome for the same inputs, and no failure."""

from __future__ import annotations

import outcomes
import pytest


@pytest.fixture
def made(tmp_path, monkeypatch):
    """Ask for an outcome of these inputs; the list has those that were made."""
    monkeypatch.setattr(outcomes, "FOLDER", tmp_path / "outcomes")
    calls: list[object] = []

    def ask(*inputs, **options):
        return outcomes.once("a b", inputs, lambda: calls.append(inputs) or len(calls), **options)

    return ask, calls


def test_once_for_the_same_inputs(made, tmp_path):
    ask, calls = made
    source = tmp_path / "source.cu"
    source.write_text("one")
    assert ask("-O2", source) == ask("-O2", source) == 1
    assert ask("-O3", source) == 2
    source.write_text("two")
    assert ask("-O3", source) == 3
    assert len(calls) == 3


def test_the_last_few_of_a_name_stay(made):
    """Each clone may have sources of its own."""
    ask, calls = made
    for i in range(outcomes.KEPT + 2):
        ask(i)
        ask(0)
    assert len(calls) == outcomes.KEPT + 2
    assert len(list(outcomes.FOLDER.glob("*.json.gz"))) == outcomes.KEPT


def test_the_folder_of_a_clone_does_not_count(made, monkeypatch, tmp_path):
    ask, calls = made
    for clone in ("one", "two"):
        monkeypatch.setattr(outcomes, "ROOT", tmp_path / clone)
        ask(["c++", f"-I{tmp_path / clone}/csrc"])
    assert len(calls) == 1


def test_a_failure_is_not_kept(made):
    ask, calls = made
    assert ask("x", failed=lambda found: found == 1) == 1
    assert ask("x", failed=lambda found: found == 1) == ask("x") == 2
    with pytest.raises(ZeroDivisionError):
        outcomes.once("other", ["x"], lambda: 1 // 0)
    assert outcomes.once("other", ["x"], lambda: 3) == 3
