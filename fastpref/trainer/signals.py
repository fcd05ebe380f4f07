"""A run that is asked to end: it finishes its step, saves a checkpoint and says how to go on."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
import time
from types import FrameType
from typing import Any

import torch
from transformers import TrainerCallback

logger = logging.getLogger("fastpref")

# Signals by what they ask for; Windows lacks the last.
_ENDS = ("SIGTERM", "SIGINT")
_SAVES = ("SIGUSR1",)


class Terminated(SystemExit):
    """SIGTERM has ended a run, after a checkpoint; exit status 143. See `Interrupted`."""

    def __init__(self, message: str) -> None:
        super().__init__(128 + signal.SIGTERM)
        self.message = message

    def __str__(self) -> str:
        return self.message


class Interrupted(KeyboardInterrupt):
    """Ctrl-C has ended a run, after a checkpoint; its message says how to continue."""


class SignalCallback(TrainerCallback):
    """Ends or saves a run between two steps, when a signal has asked for it.

    SIGTERM and SIGINT (Ctrl-C) end the run after the present step, with a checkpoint; a second one
    ends the process at once, as without this callback. SIGUSR1 saves a checkpoint and goes on. All
    processes of a run act after the same step, whichever of them got the signal. While a run is
    not between its first and its last step, the signals do what they did before.

    Attributes:
        received: the number of the signal that has ended the run, or None.
    """

    def __init__(self, saves: bool = True) -> None:
        self.saves = saves  # whether a run that is ended saves a checkpoint
        self.received: int | None = None
        self._asked: int | None = None
        self._save = False
        self._before: dict[int, Any] = {}
        self._group: Any = None
        self._step_began = time.monotonic()
        self.step_seconds: float | None = None

    # ---- the handlers ----

    def reset(self) -> None:
        """Forget the signals of an earlier training."""
        self.received = self._asked = None
        self._save = False

    def install(self) -> None:
        """Take the signals over, except for those that are ignored, as under nohup.

        Only the main thread can; in another one nothing is done.
        """
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
        while self._before:
            number, handler = self._before.popitem()
            signal.signal(number, handler)

    def _end(self, number: int, frame: FrameType | None) -> None:
        if self._asked is not None:  # the second: as if nobody had asked for more than the end
            self.remove()
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        self._asked = number
        step = "" if self.step_seconds is None else f" (about {self.step_seconds:.1f} s)"
        then = " and saving a checkpoint" if self.saves else ""
        # A handler interrupts whatever runs, a write to the log as well, so it does not log.
        text = f"{name_of(number)}: finishing the step{step}{then}; once more ends at once\n"
        with contextlib.suppress(OSError):  # a terminal that was closed
            os.write(2, text.encode())

    def _save_soon(self, number: int, frame: FrameType | None) -> None:
        self._save = True

    # ---- between the steps ----

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if args.world_size > 1 and self._group is None:
            # Of the CPU: agreeing must not wait for the GPU.
            self._group = torch.distributed.new_group(backend="gloo")
        self._step_began = time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        now = time.monotonic()
        self.step_seconds, self._step_began = now - self._step_began, now
        end, save = self._agree(self._asked or 0, int(self._save))
        if save:
            self._save = False
            control.should_save = True
        if end:
            self.received = end
            control.should_training_stop = True
            control.should_save = control.should_save or self.saves

    def _agree(self, end: int, save: int) -> tuple[int, int]:
        """The signals that any of the processes has had."""
        if self._group is None:
            return end, save
        asked = torch.tensor([end, save])
        torch.distributed.all_reduce(asked, torch.distributed.ReduceOp.MAX, group=self._group)
        return int(asked[0]), int(asked[1])


def name_of(number: int) -> str:
    """A signal's name for people: "SIGTERM", "Ctrl-C"."""
    return "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
