"""Run by test_signals.py in each of two processes, of which one gets a signal."""

import os
import signal
import sys
from pathlib import Path

import launching
import tiny
import torch
from datasets import disable_progress_bars
from ranks import leave
from test_signals import InEvaluation, Signalling, precomputing, start

UNEVEN = {"even_batches": False}


class Late(InEvaluation):
    """Gets the signal in the third batch, which the other process does not have."""

    def on_prediction_step(self, args, state, control, **kwargs):
        self.batches += 1
        if self.batches == 3 and self.number is not None:
            os.kill(os.getpid(), self.number)


def ended(train, callback):
    try:
        train()
        said = "finished"
    except SystemExit as error:
        said = str(error)
    return {"said": said, "batches": callback.batches}


def main(path: Path) -> None:
    launching.limit()
    torch.set_num_threads(1)
    disable_progress_bars()
    rank = int(os.environ["RANK"])
    found = {}
    for name, rows, config, to, kind in (
        ("even", 8, {}, 1, InEvaluation),
        ("uneven", 9, UNEVEN, 1, InEvaluation),
        ("late", 9, UNEVEN, 0, Late),
        ("finished", 9, UNEVEN, None, InEvaluation),
    ):
        callback = kind(signal.SIGTERM if rank == to else None)
        t = start(
            path / name, callback, eval_dataset=tiny.rows(rows, seed=3), accelerator_config=config
        )
        found[name] = ended(t.train, callback)
    collator = tiny.trainer(path / "a").data_collator
    signalling = Signalling(collator, signal.SIGTERM if rank == 0 else 0)  # 0: no signal
    found["references"] = ended(lambda: precomputing(path / "b", signalling), signalling)
    leave(path, "ended", found)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
