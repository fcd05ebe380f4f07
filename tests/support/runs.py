"""A small training run of the command line, the same each time, and what it leaves."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

ASSETS = Path(__file__).resolve().parents[2] / "fastpref" / "assets" / "demo"
_TIMES = re.compile(r"runtime|per_second|total_flos|memory")


def write_pairs(folder: Path, count: int = 12) -> Path:
    """A data file with the first pairs of the demo."""
    lines = (ASSETS / "train.jsonl").read_text("utf-8").splitlines(keepends=True)
    path = folder / "pairs.jsonl"
    path.write_text("".join(lines[:count]), "utf-8")
    return path


def command(data: Path, output: Path, *options: Any) -> list[Any]:
    """The arguments of a run of eight steps with four checkpoints, two of which stay."""
    return [
        "train", "--model", ASSETS, "--data", data, "--output", output, "--fp32",
        "--batch-size", 2, "--no-gradient-checkpointing", "--max-length", 64,
        "--max-steps", 8, "--save-steps", 2, "--eval-split", 0.3, "--eval-steps", 3,
        "--logging-steps", 1, "--lr", 1e-3, *options,
    ]  # fmt: skip


def trajectory(output: Path) -> dict[str, Any]:
    """What two runs that are the same have in common: every logged figure, and the weights."""
    history = json.loads((output / "training_log.json").read_text("utf-8"))["history"]
    figures = [
        {key: value for key, value in line.items() if not _TIMES.search(key)} for line in history
    ]
    weights = hashlib.sha256((output / "model.safetensors").read_bytes()).hexdigest()
    return {"history": figures, "weights": weights}
