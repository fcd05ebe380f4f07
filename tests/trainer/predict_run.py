"""Predictions of both trainers on seven rows, as one of several processes: see test_predict.py.

The first process writes them to the file that is named on the command line.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import test_unpaired_trainer as unpaired
import tiny
import torch

TRAINERS: dict[str, Any] = {
    "pairs": (tiny.trainer, tiny.rows),
    "answers": (unpaired.trainer, unpaired.rows),
}


def predictions(where: Path) -> tuple[dict[str, np.ndarray], bool]:
    """By name, and whether this is the first process."""
    found, first = {}, True
    for name, (make, rows) in TRAINERS.items():
        other = tiny.model(seed=5)
        trainer = make(where, ref_model=other, per_device_eval_batch_size=2)
        data = rows(7, seed=4)
        found[name] = trainer.predict(data).predictions
        stream = tiny.Dataset.from_list(data).to_iterable_dataset()
        found[f"{name}-stream"] = trainer.predict(stream).predictions
        first = trainer.args.process_index == 0
    return found, first


if __name__ == "__main__":
    torch.set_num_threads(1)
    target = Path(sys.argv[1])
    result, is_first = predictions(target.parent)
    if is_first:
        np.savez(target, **result)
