"""Fixtures of the tests of reference stores."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def quiet():
    from datasets import disable_progress_bars

    disable_progress_bars()


@pytest.fixture
def calls(monkeypatch):
    """The number of sequences of each batch that a reference was asked for."""
    from fastpref.data.segments import PLAN
    from fastpref.reference import Reference

    found, original = [], Reference.token_logps

    def token_logps(self, batch):
        found.append(len(batch["lengths" if PLAN in batch else "input_ids"]))
        return original(self, batch)

    monkeypatch.setattr(Reference, "token_logps", token_logps)
    return found
