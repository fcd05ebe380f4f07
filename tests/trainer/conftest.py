"""Fixtures of the tests of checkpoints: a run that was saved."""

from __future__ import annotations

import shutil

import pytest
import saved_runs


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """The folder of a run of four steps, with checkpoints after the second and the fourth."""
    path = tmp_path_factory.mktemp("finished")
    saved_runs.start(path).train()
    return path


@pytest.fixture
def run(finished, tmp_path):
    """A copy of it."""
    shutil.copytree(finished / "out", tmp_path / "out")
    return tmp_path
