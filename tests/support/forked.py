"""`fastpref` commands in processes that are forked after the imports, so that a start takes little.

The standard library's fork server imports the package once. It is started with the library of
tests/support/failing_files.c in it, where that compiles.
"""

from __future__ import annotations

import atexit
import gc
import multiprocessing
import os
import sys
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import failing_files
import pytest

MODULES = (
    "torch",
    "transformers",
    "transformers.models.llama.modeling_llama",
    "peft",
    "matplotlib.pyplot",
    "rich.logging",
    "rich.progress",
    "datasets",
    "fastpref.cli",
    "fastpref.cli.progress",
    "fastpref.trainer.preference",
    "fastpref.trainer.unpaired",
)
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(list(MODULES))
_started: list[BaseProcess] = []


@atexit.register  # before multiprocessing's own, which waits for them
def kill_all() -> None:
    """End the processes that still run, as where a test has failed."""
    for process in _started:
        if process.pid is not None and process.exitcode is None:
            process.kill()


def start(
    arguments: list[Any],
    log: Path,
    prepare: Callable[..., None] | None = None,
    prepare_arguments: tuple = (),
    environment: dict[str, str] | None = None,
) -> BaseProcess:
    """Start `fastpref` with these arguments.

    Args:
        log: the file that the output of the process goes to.
        prepare: a function of a module that the process calls first.
    """
    words = [str(argument) for argument in arguments]
    return start_call(_command, (words, str(log), prepare, prepare_arguments, environment or {}))


def start_call(function: Callable[..., None], arguments: tuple) -> BaseProcess:
    """Start a process that calls a function of a module."""
    process = _context.Process(target=_call, args=(function, arguments))
    _started.append(process)
    preloaded, _ = failing_files.library()
    with pytest.MonkeyPatch.context() as patch:  # for the fork server, which starts with the first
        patch.setenv("OMP_NUM_THREADS", "1")
        if preloaded is not None:
            patch.setenv("LD_PRELOAD", str(preloaded))
        process.start()
    return process


def _call(function: Callable[..., None], arguments: tuple) -> None:
    gc.freeze()  # what was imported: transformers collects after each training, in 0.4 s with it
    function(*arguments)


def _command(
    words: list[str],
    log: str,
    prepare: Callable[..., None] | None,
    prepare_arguments: tuple,
    environment: dict[str, str],
) -> None:
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.environ.update(environment)
    sys.argv = ["fastpref", *words]
    import torch

    torch.set_num_threads(1)
    if prepare is not None:
        prepare(*prepare_arguments)
    from fastpref.cli import main

    try:
        main()
    finally:
        sys.stdout.flush()  # an error of which would be the interpreter's status
