"""A trainer's progress as lines in a log file, instead of bars."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from fastpref.progress import ProgressLines, stream_for_lines


class ProgressLinesCallback(TrainerCallback):
    """Prints the number of training steps and of evaluation batches, with rate and time left.

    Only the first of several processes prints.
    """

    def __init__(self, stream: Any) -> None:
        self.stream = stream
        self._training: ProgressLines | None = None
        self._evaluation: ProgressLines | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.is_world_process_zero:
            done = state.global_step
            self._training = ProgressLines(
                "Training", "steps", state.max_steps, self.stream, start=done
            )

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self._training is not None:
            self._training.update(state.global_step)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self._training is not None:
            self._training.close()
        self._training = None

    def on_prediction_step(
        self, args: Any, state: Any, control: Any, eval_dataloader: Any = None, **_: Any
    ) -> None:
        if not state.is_world_process_zero:
            return
        if self._evaluation is None:
            try:
                total = len(eval_dataloader)
            except TypeError:  # a stream has no length
                total = None
            self._evaluation = ProgressLines("Evaluating", "batches", total, self.stream)
        self._evaluation.add()

    def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self._evaluation is not None:
            self._evaluation.close()
        self._evaluation = None

    def on_predict(self, args: Any, state: Any, control: Any, metrics: Any, **_: Any) -> None:
        self.on_evaluate(args, state, control)


def use_lines(trainer: Any) -> None:
    """Replace transformers' bars by lines, unless on a terminal or with `disable_tqdm`."""
    stream = stream_for_lines(bool(trainer.args.disable_tqdm))
    if stream is None:
        return
    if trainer.pop_callback(ProgressCallback) is not None:  # it prints the log lines as well
        trainer.add_callback(PrinterCallback)
    trainer.add_callback(ProgressLinesCallback(stream))
