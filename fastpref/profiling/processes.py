"""Work in a process of its own, which tells how far it is in lines of JSON.

A worker reads a request from stdin, a line of JSON, and answers in lines of JSON on stdout
(`serve`); `Child` is the other end.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch

Say = Callable[[dict[str, Any]], None]
_PARENT = "FASTPREF_PARENT"  # the variable with the process that a worker ends with
_OF_INPUT = (ValueError, OSError, ImportError)


def failure(error: BaseException) -> str:
    """One line on why something cannot run here; running out of memory is a result like others."""
    text = " ".join((str(error).strip().splitlines() or [""])[0].split())
    line = f"{type(error).__name__}: {text}"[:200]
    return f"out of memory: {line}" if isinstance(error, torch.OutOfMemoryError) else line


def _end_with(parent: int) -> None:
    """End this process when its parent has ended, whose SIGKILL or SIGTERM does not reach it."""
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(1)


def serve(answer: Callable[[dict[str, Any], Say], None]) -> None:
    """The worker's end: call `answer` with the request and with a function that sends a message.

    Whatever else prints to stdout, a peer or its compiler, goes to stderr. An error is told as
    {"failed": why, "input": whether the input may be to blame}, and ends the process. So does the
    end of the parent.
    """
    warnings.filterwarnings("ignore")
    parent = int(os.environ.get(_PARENT, os.getppid()))  # it may have ended during the imports
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    channel = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)

    def say(message: dict[str, Any]) -> None:
        channel.write(json.dumps(message) + "\n")

    try:
        answer(json.loads(sys.stdin.readline()), say)
    except Exception as error:
        say({"failed": failure(error), "input": isinstance(error, _OF_INPUT)})
        raise


class Child:
    """A worker process, started by a command.

    `last` is the last line of its stderr, which is passed on if `loud`.
    """

    def __init__(
        self,
        command: list[str],
        request: dict[str, Any],
        env: dict[str, str] | None = None,
        loud: bool = True,
    ):
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            env={**os.environ, **(env or {}), _PARENT: str(os.getpid())},
        )
        self._messages: queue.Queue[dict[str, Any] | None] = queue.Queue()
        self._loud, self.last = loud, ""
        self._readers = [
            threading.Thread(target=self._read, daemon=True),
            threading.Thread(target=self._read_errors, daemon=True),
        ]
        for reader in self._readers:
            reader.start()
        try:
            self.tell(json.dumps(request))  # a long request waits until the worker has started
        except BaseException:
            self.stop()
            raise

    def tell(self, line: str = "") -> None:
        """A line to its stdin. If it is dead, the end of its output says so."""
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.write(line + "\n")
            self._process.stdin.flush()

    def hear(self, timeout: float | None = None) -> dict[str, Any] | None:
        """The next message; None at its end. Raises queue.Empty after `timeout` seconds."""
        message = self._messages.get(timeout=timeout)
        if message is None:
            self._process.wait()
            self._readers[1].join(timeout=5)
        return message

    def ending(self) -> str:
        """How it ended, once `hear` gave None."""
        return f"the process ended with status {self._process.wait()}: {self.last}"

    def stop(self) -> None:
        self._process.kill()
        self._process.wait()
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        for reader in self._readers:
            reader.join(timeout=5)

    def _read(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as lines:
            for line in lines:
                with contextlib.suppress(ValueError):
                    message = json.loads(line)
                    if isinstance(message, dict):
                        self._messages.put(message)
        self._messages.put(None)

    def _read_errors(self) -> None:
        assert self._process.stderr is not None
        with self._process.stderr as lines:
            for line in lines:
                if self._loud:
                    sys.stderr.write(line)
                if line.strip():
                    self.last = " ".join(line.split())
