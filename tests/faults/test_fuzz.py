"""Any bytes of a data file become tokens, or one sentence that names the file and the place."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import reliability
from paths import search_path

pytest.importorskip("datasets")
pytest.importorskip("transformers")

import fuzz_readers  # noqa: E402

SECONDS = reliability.sized(600, 10)


@pytest.fixture(autouse=True)
def quiet():
    """What the target switches off, switched on again."""
    import logging

    import datasets

    yield
    logging.disable(logging.NOTSET)
    datasets.enable_caching()
    datasets.enable_progress_bars()


def test_inputs_that_crashed_once():
    target = fuzz_readers.Target()
    for name, data in fuzz_readers.CRASHED.items():
        assert target.read(data), name


@pytest.mark.slow
def test_generated_files():
    start = [*fuzz_readers.seeds(), *fuzz_readers.CRASHED.values()]
    found = fuzz_readers.fuzz(SECONDS if not ATHERIS else 10, 1, start)
    crashes = found.pop("crashes")
    shown = [f"{error}\n{data!r}" for error, data in crashes.items()]
    assert not crashes, f"{len(crashes)} crashes:\n" + "\n".join(shown[:5])
    if not ATHERIS:
        reliability.record("fuzzing", by="the mutator", seconds=SECONDS, crashes=0, **found)


ATHERIS = reliability.WHOLE and importlib.util.find_spec("atheris") is not None


@pytest.mark.skipif(not ATHERIS, reason="of make test-faults, with atheris")
def test_generated_files_with_atheris(tmp_path):
    command = [sys.executable, str(Path(fuzz_readers.__file__)), str(tmp_path), str(SECONDS)]
    environment = {**os.environ, "PYTHONPATH": search_path(), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    crashes = [path.read_bytes() for path in tmp_path.glob("crash-*")]
    assert done.returncode == 0 and not crashes, f"{crashes}\n{done.stderr[-3000:]}"
    inputs = re.search(r"Done (\d+) runs", done.stderr)
    features = re.findall(r"cov: (\d+)", done.stderr)
    assert inputs is not None and features, done.stderr[-2000:]
    reliability.record(
        "fuzzing", by="atheris", seconds=SECONDS, crashes=0, inputs=int(inputs[1]),
        reached=int(features[-1]), corpus=len(list((tmp_path / "corpus").iterdir())),
    )  # fmt: skip
