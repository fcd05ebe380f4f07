"""A run that is asked to end: it finishes its step, saves a checkpoint and says how to go on."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from types import FrameType
from typing import Any

import torch
from transformers import TrainerCallback

logger = logging.getLogger("fastpref")

# Signals by what they ask for; Windows lacks the last.
_ENDS = ("SIGTERM", "SIGINT")
_SAVES = ("SIGUSR1",)


class RunEnded(Exception):
    """A signal has ended an evaluation or another computation between two of its batches."""

    def __init__(self, number: int) -> None:
        super().__init__(name_of(number))
        self.number = number


class SignalCallback(TrainerCallback):
    """Ends or saves a run between two steps, when a signal has asked for it.

    SIGTERM and SIGINT (Ctrl-C) end the run after the present step, with a checkpoint; a second one
    ends the process at once, as without this callback. Within an evaluation they end it after the
    present batch. SIGUSR1 saves a checkpoint and goes on. All processes of a run act after the same
    step or batch, whichever of them got the signal. Between `remove` and `install` the signals do
    what they did before.

    Attributes:
        received: the number of the signal that has ended the run, or None.
        active: whether signals are heeded.
    """

    def __init__(self, saves: bool = True) -> None:
        self.saves = saves  # whether a run that is ended saves a checkpoint
        self.received: int | None = None
        self.active = False
        self._unit = "step"  # what is finished before the end
        self._requested: int | None = None
        self._save = False
        self._before: dict[int, Any] = {}
        self._group: Any = None
        self._trains = False  # or computes something before a training
        self._step_began = time.monotonic()
        self.step_seconds: float | None = None

    # ---- the handlers ----

    def reset(self) -> None:
        """Forget the signals of an earlier training."""
        self.received = self._requested = None
        self._save = False

    def install(
        self, world_size: int = 1, unit: str = "step", timeout: timedelta | None = None
    ) -> None:
        """Take the signals over, except for those that are ignored, as under nohup.

        Only the main thread can; in another one they stay as they are.

        Args:
            world_size: the number of processes, all of which must call this.
            unit: what is finished before the end, for people: "step" or "batch".
            timeout: how long a process waits for the others; None is torch's default.
        """
        self.reset()
        self.active, self._unit = True, unit
        self._trains = unit == "step"
        if world_size > 1 and self._group is None:
            # Of the CPU: agreeing must not wait for the GPU.
            self._group = torch.distributed.new_group(timeout=timeout, backend="gloo")
        if threading.current_thread() is not threading.main_thread():
            return
        for names, handler in ((_ENDS, self._end), (_SAVES, self._save_soon)):
            for name in names:
                number = getattr(signal, name, None)
                if number is None:
                    continue
                # None: a handler of C code. SIG_IGN: a shell's background job, say.
                if signal.getsignal(number) not in (None, signal.SIG_IGN):
                    self._before[number] = signal.signal(number, handler)

    def remove(self) -> None:
        """Give the signals back to whatever had them before."""
        self.active = False
        while self._before:
            number, handler = self._before.popitem()
            signal.signal(number, handler)

    def _end(self, number: int, frame: FrameType | None) -> None:
        if self._requested is not None:  # the second: as if nobody had asked for more than the end
            self.remove()
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        self._requested = number
        text = f"{name_of(number)}: finishing the {self._unit}"
        if self._unit == "step" and self.step_seconds is not None:
            text += f" (about {self.step_seconds:.1f} s)"
        text += " and saving a checkpoint" if self.saves and self._trains else ""
        text += "; once more ends at once\n"
        # A handler interrupts whatever runs, a write to the log as well, so it does not log.
        with contextlib.suppress(OSError):  # a terminal that was closed
            os.write(2, text.encode())

    def _save_soon(self, number: int, frame: FrameType | None) -> None:
        self._save = True

    # ---- between the steps ----

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._step_began = time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.step_seconds = time.monotonic() - self._step_began
        self.end_or_save(control)

    def end_or_save(self, control: Any) -> None:
        """Ask transformers to stop, or to save, if any of the processes has been asked to."""
        if not self.active:
            return
        end, save = self._agree(self.received or self._requested or 0, int(self._save))
        if save:
            self._save = False
            control.should_save = True
        if end:
            self.received = end
            control.should_training_stop = True
            control.should_save = control.should_save or self.saves

    # ---- between the batches of something else ----

    @contextmanager
    def within(self, unit: str) -> Iterator[None]:
        """Name what is finished before the end, for people."""
        before, self._unit = self._unit, unit
        try:
            yield
        finally:
            self._unit = before

    def check_batch(self) -> None:
        """Raise `RunEnded` in all processes if any of them has been asked to end.

        Called before each batch by every process that has one. Each process calls `finish_batches`
        after its last one, as their numbers may differ.
        """
        if self.active:
            self._raise_if_asked(self._agree(self.received or self._requested or 0, 1)[0])

    def finish_batches(self) -> None:
        """Wait until no process has a batch left; raises `RunEnded` as `check_batch`."""
        busy = int(self.active and self._group is not None)
        while busy:
            end, busy = self._agree(self.received or self._requested or 0, 0)
            if busy:
                self._raise_if_asked(end)

    def _raise_if_asked(self, number: int) -> None:
        if number:
            self.received = number
            raise RunEnded(number)

    def _agree(self, end: int, save: int) -> tuple[int, int]:
        """The largest of each number among the processes."""
        if self._group is None:
            return end, save
        largest = torch.tensor([end, save])
        torch.distributed.all_reduce(largest, torch.distributed.ReduceOp.MAX, group=self._group)
        return int(largest[0]), int(largest[1])


def name_of(number: int) -> str:
    """A signal's name for people: "SIGTERM", "Ctrl-C"."""
    return "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
