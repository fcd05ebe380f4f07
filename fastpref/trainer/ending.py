"""The part of a trainer that ends long computations between two batches after a signal.

Training ends between two steps, which `SignalCallback` does alone. An evaluation and the
computation of reference log-probs take long as well, and end between two of their batches.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import TrainerCallback

from fastpref.trainer.config import BaseConfig
from fastpref.trainer.processes import AgreeingTrainer
from fastpref.trainer.signals import RunEnded, SignalCallback, name_of


class Terminated(SystemExit):
    """SIGTERM has ended a run, after a checkpoint; exit status 143. See `Interrupted`."""

    def __init__(self, message: str) -> None:
        super().__init__(128 + signal.SIGTERM)
        self.message = message

    def __str__(self) -> str:
        return self.message


class Interrupted(KeyboardInterrupt):
    """Ctrl-C has ended a run, after a checkpoint; its message says how to continue."""


def raise_ended(number: int, message: str) -> None:
    """Raise what a run that this signal has ended raises."""
    raise Interrupted(message) if number == signal.SIGINT else Terminated(message)


class DueEvaluation(TrainerCallback):
    """Makes the evaluation that a signal has ended, before the first step of the continued run."""

    def __init__(self, trainer: EndingTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        trainer = self.trainer
        trainer._evaluated_step = None
        if args.eval_strategy == "no":
            trainer.evaluation_is_due = False
        if not trainer.evaluation_is_due:
            return
        metrics = trainer._evaluate(None, None)
        trainer._evaluated_step = state.global_step
        ended = trainer._signals.received
        if trainer.evaluation_is_due and ended is not None:
            raise RunEnded(ended)  # the checkpoint is of this step, so there is nothing to save
        if trainer._determine_best_metric(metrics, None) and args.save_strategy != "no":
            state.best_model_checkpoint = trainer.resumed_from


class EndingTrainer(AgreeingTrainer):
    """A trainer whose evaluations and precomputed log-probs end when a signal asks for it."""

    args: BaseConfig
    _signals: SignalCallback
    resumed_from: str | None = None  # the checkpoint that the run goes on from
    evaluation_is_due = False  # whether a signal has ended the evaluation after the last step
    _evaluated_step: int | None = None  # of the evaluation that was due when the run began

    def end_before_batch(self) -> None:
        """Raise `RunEnded` if a signal has asked for the end; called before each batch."""
        self._signals.check_batch()

    def finish_batches(self) -> None:
        """Called after the last batch. Other processes may have batches left, and signals."""
        self._signals.finish_batches()

    @contextmanager
    def ending_computation(self, what: str, fate: str) -> Iterator[None]:
        """Let signals end a computation before the training; within a training they do already.

        Args:
            what: what is computed, in the plural.
            fate: what becomes of it when a signal ends it, for people.

        Raises:
            Interrupted, Terminated: Ctrl-C or SIGTERM has ended it.
        """
        if self._signals.active or not self.args.handle_signals:
            yield
            return
        self._signals.install(self.args.world_size, "batch", self.args.ddp_timeout_delta)
        try:
            yield
        except RunEnded as ended:
            raise_ended(
                ended.number,
                f"{name_of(ended.number)} ended the run while it computed {what}, {fate}",
            )
        finally:
            self._signals.remove()

    def _evaluate(
        self, trial: Any, ignore_keys_for_eval: Any, skip_scheduler: bool = False
    ) -> dict[str, float]:
        """As in `transformers.Trainer`; no metrics if a signal has ended the evaluation.

        It is then due when the run is continued. With eval_on_start, which is what skip_scheduler
        tells here, each run evaluates when it begins: one that a signal has ended is not due.

        Raises:
            RunEnded: a signal has ended an evaluation of eval_on_start, before any step.
        """
        metrics: dict[str, float] = {}
        if skip_scheduler and self._evaluated_step == self.state.global_step:
            return metrics
        self.evaluation_is_due = not skip_scheduler
        if self._signals.active and self._signals.received is not None:
            return metrics
        try:
            with self._signals.within("batch"):
                metrics = super()._evaluate(trial, ignore_keys_for_eval, skip_scheduler)
            self.evaluation_is_due = False
        except RunEnded:
            if skip_scheduler:  # the last checkpoint, if any, is of this step
                raise
        self._signals.end_or_save(self.control)
        if skip_scheduler and self._signals.received is not None:  # in its last batch
            raise RunEnded(self._signals.received)
        return metrics

    def _determine_best_metric(self, metrics: Any, trial: Any) -> bool:
        """As in `transformers.Trainer`; an evaluation that a signal has ended has no metrics.

        The result tells whether to save a checkpoint with save_strategy="best".
        """
        if not metrics and self._signals.received is not None:
            return self.control.should_save
        return super()._determine_best_metric(metrics, trial)
