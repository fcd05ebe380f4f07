"""The events of a run as lines of JSON on standard output, for programs that watch it."""

from __future__ import annotations

import json
import logging
import math
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import TrainerCallback

from fastpref.cli.progress import discard_output

logger = logging.getLogger("fastpref")


class Events(TrainerCallback):
    """Prints a line of JSON for each event of a run: start, step, eval, save, alarm, end.

    Every line has `event` and `time`, seconds since 1970. A `step` and an `eval` have the step and
    the metrics, a `save` the checkpoint's directory, an `alarm` its name ("warning" for other
    warnings of the package) and its message. Numbers that are not finite are null.

    Args:
        enabled: whether anything is printed.

    Attributes:
        alarms: the name and the message of each alarm so far.
    """

    def __init__(self, enabled: bool) -> None:
        self.enabled = enabled
        self.alarms: list[tuple[str, str]] = []

    def write(self, event: str, **values: Any) -> None:
        """Print one event."""
        if self.enabled:
            line = {"event": event, "time": round(time.time(), 3), **_finite(values)}
            try:
                print(json.dumps(line, default=str), file=sys.stdout, flush=True)
            except OSError as error:  # whoever reads is gone, or the disk of a log is full
                self.enabled = False  # the run is worth more than its events
                discard_output()
                logger.warning(f"standard output cannot be written, so events end here: {error}")

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.write("start", step=state.global_step, steps=state.max_steps, output=args.output_dir)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if logs and "train_runtime" not in logs:
            event = "eval" if any(key.startswith("eval_") for key in logs) else "step"
            self.write(event, step=state.global_step, **logs)

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        name = f"checkpoint-{state.global_step}"
        self.write("save", step=state.global_step, checkpoint=f"{args.output_dir}/{name}")

    @contextmanager
    def notes(self) -> Iterator[None]:
        """Inside a `with` block, the package's warnings are alarms."""
        handler = _AlarmHandler(self)
        logger = logging.getLogger("fastpref")
        logger.addHandler(handler)
        try:
            yield
        finally:
            logger.removeHandler(handler)


class _AlarmHandler(logging.Handler):
    def __init__(self, events: Events) -> None:
        super().__init__(logging.WARNING)
        self.events = events

    def emit(self, record: logging.LogRecord) -> None:
        name, message = getattr(record, "alarm", "warning"), record.getMessage()
        self.events.alarms.append((name, message))
        self.events.write("alarm", name=name, message=message)


def _finite(values: dict[str, Any]) -> dict[str, Any]:
    return {
        key: None if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in values.items()
    }
