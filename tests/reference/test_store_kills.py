"""`fastpref precompute` that is killed at random moments goes on where it was."""

from __future__ import annotations

import random
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import runs

pytest.importorskip("typer")
pytest.importorskip("transformers")

import forked  # noqa: E402

SEED, KILLS, PAIRS, LIMIT_S = 5, 3, 16, 240


def part_of_each_batch() -> None:
    from fastpref.reference import part_writer

    part_writer.FLUSH_SECONDS = 0.0


def start(data: Path, store: Path, log: Path):
    arguments = ["precompute", "--model", runs.ASSETS, "--data", data, "--reference-store", store]
    arguments += ["--fp32", "--max-length", 64, "--batch-size", 1]
    return forked.start(arguments, log, part_of_each_batch)


def parts(store: Path) -> list[Path]:
    return sorted((store / "parts").glob("*.parquet"))


def contents(store: Path) -> dict[bytes, list[float]]:
    """Every sequence of a store; one that is there twice fails the test."""
    import pyarrow.parquet as pq

    rows = [row for path in parts(store) for row in pq.read_table(path).to_pylist()]
    found = {row["key"]: row["logps"] for row in rows}
    assert len(found) == len(rows)
    return found


def test_killed_runs_leave_whole_parts_and_lose_no_work(tmp_path):
    data, log = runs.write_pairs(tmp_path, PAIRS), tmp_path / "log"
    undisturbed = start(data, tmp_path / "undisturbed", log)
    undisturbed.join(LIMIT_S)
    assert undisturbed.exitcode == 0, log.read_text()
    truth = contents(tmp_path / "undisturbed")
    draw, store = random.Random(SEED), tmp_path / "store"
    for kill in range(KILLS):
        wanted = len(parts(store)) + draw.randint(0 if kill else 1, 3)
        process, deadline = start(data, store, log), time.monotonic() + LIMIT_S
        while len(parts(store)) < wanted:
            assert process.is_alive() and time.monotonic() < deadline, log.read_text()
            time.sleep(0.0005)
        time.sleep(draw.random() * 0.01)
        process.kill()
        process.join(LIMIT_S)
        assert process.exitcode == -signal.SIGKILL, log.read_text()
        whole = contents(store)
        for key, logps in whole.items():
            np.testing.assert_allclose(logps, truth[key], rtol=1e-4, atol=1e-5)
    last = start(data, store, log)
    last.join(LIMIT_S)
    assert last.exitcode == 0, log.read_text()
    assert "which are computed now" in " ".join(log.read_text().split())  # whatever its lines
    assert set(contents(store)) == set(truth)  # and nothing of it was computed twice
    assert not list((store / "parts").glob(".*"))
