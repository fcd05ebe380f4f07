"""The memory of a long run stays flat."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import reliability
import runs

pytest.importorskip("typer")
pytest.importorskip("transformers")

import forked  # noqa: E402

pytestmark = pytest.mark.train

STEPS = reliability.sized(2000, 200)
WARM_UP = STEPS // 4
LIMIT = reliability.sized(1024, 64 * 1024)  # bytes a step; a short run has not settled
LIMIT_S = 1200


def note_memory(path: str) -> None:
    """Have this process write its resident bytes to a file after every step."""
    import gc
    import resource

    from fastpref.trainer.preference import PreferenceTrainer

    page = resource.getpagesize()
    file, statm = open(path, "w", buffering=1 << 20), open("/proc/self/statm")
    original = PreferenceTrainer.training_step

    def step(self, *args, **kwargs):
        out = original(self, *args, **kwargs)
        if self.state.global_step % 10 == 0:
            gc.collect()  # what waits for the collector is no leak
            statm.seek(0)
            file.write(f"{self.state.global_step} {int(statm.read().split()[1]) * page}\n")
            file.flush()
        return out

    PreferenceTrainer.training_step = step


def slope(points: list[tuple[int, int]]) -> float:
    """Bytes a step, by least squares."""
    x, y = (sum(values) / len(points) for values in zip(*points, strict=True))
    return sum((a - x) * (b - y) for a, b in points) / sum((a - x) ** 2 for a, _ in points)


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="no /proc")
def test_memory_of_a_long_run_is_flat(tmp_path):
    data, marks = runs.write_pairs(tmp_path, 40), tmp_path / "memory"
    arguments = [
        "train", "--model", runs.ASSETS, "--data", data, "--output", tmp_path / "out", "--fp32",
        "--batch-size", 2, "--no-gradient-checkpointing", "--max-length", 64, "--quiet",
        "--max-steps", STEPS, "--logging-steps", 10, "--save-steps", STEPS // 10,
        "--eval-split", 0.2, "--eval-steps", STEPS // 10,
    ]  # fmt: skip
    process = forked.start(arguments, tmp_path / "log", note_memory, (str(marks),))
    process.join(LIMIT_S)
    assert process.exitcode == 0, (tmp_path / "log").read_text()
    points = [tuple(map(int, line.split())) for line in marks.read_text().splitlines()]
    after = [(step, size) for step, size in points if step >= WARM_UP]
    found = slope(after)
    assert found < LIMIT, f"{found:.0f} bytes a step; {after[:: max(1, len(after) // 20)]}"
    log = json.loads((tmp_path / "out" / "training_log.json").read_text())
    assert log["history"][-1]["step"] == STEPS
    reliability.record(
        "soak", steps=STEPS, warm_up=WARM_UP, bytes_per_step=round(found),
        first_mib=round(after[0][1] / 2**20, 1), last_mib=round(after[-1][1] / 2**20, 1),
    )  # fmt: skip
