"""What the trainers of a process share in accelerate, and how each keeps its own.

accelerate has one state for the process. Making a trainer, or arguments of one, replaces the mixed
precision of all; each micro-batch of an accumulation tells all optimisers whether to step.

    mixed precision       taken back before every pass of a trainer through its model
    accumulation          two trainings at once, in threads, are refused if one accumulates
    two mixed precisions  likewise, as each would compute in the other's
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from accelerate.state import AcceleratorState
from transformers import Trainer


class _Training(NamedTuple):
    thread: int
    accumulates: bool
    precision: str


_lock = threading.Lock()
_trainings: list[_Training] = []  # that run in this process


class SharingTrainer(Trainer):
    """A trainer beside others in its process."""

    _precision: str | None = None

    def create_accelerator_and_postprocess(self) -> None:
        """As in `transformers.Trainer`."""
        super().create_accelerator_and_postprocess()
        self._precision = self.accelerator.mixed_precision

    @contextmanager
    def beside_other_trainings(self) -> Iterator[None]:
        """The context of a training.

        Raises:
            RuntimeError: another thread trains, and the two would change each other's results.
        """
        assert self._precision is not None
        accumulates = self.args.gradient_accumulation_steps > 1
        training = _Training(threading.get_ident(), accumulates, self._precision)
        with _lock:
            others = [other for other in _trainings if other.thread != training.thread]
            if any(other.precision != training.precision for other in others):
                _refuse("with another mixed precision")
            if others and (training.accumulates or any(other.accumulates for other in others)):
                _refuse("and gradient_accumulation_steps of one of the two is above 1")
            _trainings.append(training)
        try:
            self.take_precision()
            yield
        finally:
            with _lock:
                _trainings.remove(training)

    def take_precision(self) -> None:
        """Make this trainer's mixed precision that of the process."""
        if self._precision is not None and not self.is_deepspeed_enabled:
            state: Any = AcceleratorState()
            if state._mixed_precision != self._precision:
                state._mixed_precision = self._precision

    def compute_loss_context_manager(self) -> Any:
        """As in `transformers.Trainer`, in the mixed precision that the trainer was made with."""
        self.take_precision()
        return super().compute_loss_context_manager()

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """As in `transformers.Trainer`, in the mixed precision that the trainer was made with."""
        self.take_precision()
        return super().evaluation_loop(*args, **kwargs)


def _refuse(why: str) -> None:
    raise RuntimeError(
        f"another thread of this process trains, {why}; accelerate has one such setting for all "
        "trainers of a process, so train in a process each, or one after the other"
    )
