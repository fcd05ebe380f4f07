"""The output directory of a run: one run at a time, and no run over another's files."""

from __future__ import annotations

import json
import os
import shutil
import socket
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from fastpref.storage import check_writable, disk_errors, write_json
from fastpref.trainer.manifest import checkpoints, clear_removed, remove_checkpoint

RUN_FILE = "run.json"
_LOCK_FILE = ".run.lock"
_BESIDE = ".final-model.new"  # where the final model is written before it takes its place
# What a finished model leaves in the directory itself. Other names are the user's files.
_SHARD = "model-" + "[0-9]" * 5 + "-of-" + "[0-9]" * 5 + ".safetensors"
WEIGHT_FILES = ("model.safetensors", "model.safetensors.index.json", _SHARD)
ADAPTER_FILES = ("adapter_model.safetensors", "adapter_config.json")
_MODEL_FILES = (*WEIGHT_FILES, *ADAPTER_FILES, "training_log.json", "training.png")


class OutputDirectory:
    """The directory that a run writes to, held by a lock of the system while it trains.

    The lock ends with the process, however that ends. Only the first of several processes makes
    one of these.

    Args:
        path: the directory; it is made if it does not exist.
    """

    def __init__(self, path: str | Path) -> None:
        # Absolute, so that a run stays where it is when the working directory changes.
        self.path = Path(os.path.abspath(Path(path).expanduser()))
        self.run_id = uuid.uuid4().hex
        self._lock: FileLock | None = None
        self._holds = 0  # how often it is held; a run inside another hold keeps it

    @property
    def beside(self) -> Path:
        """Where the final model is written before it takes its place."""
        return self.path / _BESIDE / self.path.resolve().name  # a model card's title is the name

    def clear(self) -> None:
        """Remove the remains of a save or a deletion that was interrupted."""
        shutil.rmtree(self.path / _BESIDE, ignore_errors=True)
        clear_removed(self.path)

    def hold(self) -> None:
        """Take the lock. StorageError if the directory cannot be written, ValueError if another
        process holds it."""
        if self._lock is not None:
            self._holds += 1
            return
        check_writable(self.path)
        lock = FileLock(self.path / _LOCK_FILE, timeout=0)
        try:
            with disk_errors(f"output directory {self.path} cannot be locked"):
                lock.acquire()
        except Timeout:
            holder = self.read().get("process", {})
            who = f" (process {holder['pid']} on {holder['host']})" if holder else ""
            raise ValueError(
                f"output directory {self.path} is in use by another run{who}; wait for its end or "
                "choose another directory"
            ) from None
        process = {"pid": os.getpid(), "host": socket.gethostname()}
        try:
            self._write({**self.read(), "process": process})
        except BaseException:
            lock.release()
            raise
        self._lock, self._holds = lock, 1

    @contextmanager
    def held(self) -> Iterator[OutputDirectory]:
        """Hold the directory inside a `with` block, as `hold` and `release` do."""
        self.hold()
        try:
            yield self
        finally:
            self.release()

    def release(self) -> None:
        """Give the lock back."""
        self._holds = max(0, self._holds - 1)
        if self._lock is not None and self._holds == 0:
            self._lock.release()
            self._lock = None

    def read(self) -> dict[str, Any]:
        """What run.json says of the run whose directory this is; {} if there is none."""
        try:
            value = json.loads((self.path / RUN_FILE).read_text("utf-8"))
        except (OSError, ValueError):
            return {}
        return value if isinstance(value, dict) else {}

    def foreign_files(self) -> list[str]:
        """The names of what another run has left here: its checkpoints and its final model."""
        if not self.path.is_dir() or self.read().get("run_id") == self.run_id:
            return []
        names = [path.name for _, path in checkpoints(self.path)]
        for pattern in _MODEL_FILES:
            names += sorted(path.name for path in self.path.glob(pattern))
        return names

    def check_free(self, foreign_files: list[str]) -> None:
        """Raise ValueError if another run has left files here."""
        if foreign_files:
            raise ValueError(
                f"output directory {self.path} holds another run's {listed(foreign_files)}; "
                "continue that run (resume_from_checkpoint=True, or --resume latest), choose "
                "another directory, or have it replaced (overwrite_output_dir=True, or --overwrite)"
            )

    def check_not_source(self, source: str | Path) -> None:
        """Raise ValueError if `begin` with overwrite=True would remove the model that is trained.

        Args:
            source: the directory that it was loaded from, or any other name of a model.
        """
        if not source or not Path(source).is_dir():
            return
        place, output = Path(source).resolve(), self.path.resolve()
        if place == output or place in [output / name for name in self.foreign_files()]:
            raise ValueError(
                f"output directory {self.path} holds the model {source} that is to be trained, "
                "which overwriting would remove; choose another directory"
            )

    def begin(self, overwrite: bool = False) -> list[str]:
        """Make the directory that of a new run, which `hold` holds.

        Args:
            overwrite: remove what another run has left.

        Returns:
            The names of what was removed.

        Raises:
            ValueError: another run has left something here, and overwrite is False.
        """
        foreign = self.foreign_files()
        if not overwrite:
            self.check_free(foreign)
        for name in foreign:
            path = self.path / name
            remove_checkpoint(path)
        self._start()
        return foreign

    def go_on(self) -> None:
        """Make this process the one that continues the run whose directory this is."""
        self.run_id = str(self.read().get("run_id") or self.run_id)
        self._start()

    def _start(self) -> None:
        self.clear()
        started = time.strftime("%Y-%m-%dT%H:%M:%S%z")
        self._write({**self.read(), "run_id": self.run_id, "started": started})

    def _write(self, value: dict[str, Any]) -> None:
        path = self.path / RUN_FILE
        with disk_errors(f"{path} could not be written"):
            write_json(path, value)


def listed(names: list[str], most: int = 4) -> str:
    """Names as a list for people, of which the first few are said."""
    if len(names) <= most:
        return ", ".join(names)
    return f"{', '.join(names[:most])} and {len(names) - most} more"
