"""The progress bar of a training run, and the counts for its summary."""

from __future__ import annotations

import os
import sys
import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback


class RunConsole(Console):
    """A console that does not end the run when the reader of its output is gone."""

    def on_broken_pipe(self) -> None:
        discard_output()
        self.quiet = True


def discard_output() -> None:
    """Let what is written to standard output be lost, so that a closed pipe raises no more."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)


class ProgressBar(TrainerCallback):
    """A bar of optimiser steps with the latest metrics; plain lines without a terminal.

    Args:
        console: where to print.
        title: the name of the bar.
        lines: whether to print metrics where there is no terminal.
        evaluations: whether to print the metrics of held-out data.
    """

    def __init__(
        self,
        console: Console,
        title: str = "Training",
        lines: bool = True,
        evaluations: bool = True,
    ) -> None:
        self.console = console
        self.title = title
        self.lines = lines
        self.evaluations = evaluations
        self.bar: Progress | None = None
        self.resumed_tokens = 0
        self.seconds = 0.0  # of training, without evaluation
        self._clock: float | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        logged = [row["num_tokens"] for row in state.log_history if "num_tokens" in row]
        self.resumed_tokens = logged[-1] if logged else 0
        if not (state.is_world_process_zero and self.console.is_terminal):
            return
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("[dim]{task.fields[metrics]}"),
            console=self.console,
        )
        self.task = self.bar.add_task(
            self.title, total=state.max_steps, completed=state.global_step, metrics=""
        )
        self.bar.start()

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._clock = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self._clock is not None:
            self.seconds += time.perf_counter() - self._clock
        if self.bar:
            self.bar.update(self.task, completed=state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        prefix = "eval_" if "eval_loss" in logs else ""
        if not state.is_world_process_zero or f"{prefix}loss" not in logs:
            return
        text = f"loss {logs[f'{prefix}loss']:.4f}"
        # Single answers have no accuracy, and no margin if all are of one class.
        for title, key, spec in (("accuracy", "accuracies", ".2f"), ("margin", "margins", "+.3f")):
            if (value := logs.get(f"{prefix}rewards/{key}")) is not None:
                text += f"  {title} {value:{spec}}"
        if prefix and self.evaluations:
            self.console.print(f"Held out after step {state.global_step}: {text}")
        elif prefix:
            return
        elif self.bar:
            self.bar.update(self.task, metrics=text)
        elif self.lines:
            self.console.print(f"step {state.global_step}/{state.max_steps}  {text}")

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.close()

    def close(self) -> None:
        """Remove the bar from the screen, also after an error."""
        if self.bar:
            self.bar.stop()
            self.bar = None


class CountingCollator:
    """A collator that records the size of its largest batch.

    Attributes:
        positions: the largest number of positions of a batch, including padding. A model that
            computes logits has that many rows of them.
        labelled: the largest number of labelled tokens of a batch.
    """

    def __init__(self, collator: Any) -> None:
        self.collator = collator
        self.positions = 0
        self.labelled = 0

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        batch = self.collator(examples)
        self.positions = max(self.positions, batch["input_ids"].numel())
        self.labelled = max(self.labelled, batch["token_indices"].numel())
        return batch
