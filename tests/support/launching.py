"""Programs of several processes: `accelerate launch` and `torchrun`, and what ends them.

A launch that waits for something is ended, and shows what its processes have said. Each process of
it calls `limit`, as killing a launcher leaves the processes that it has started.
"""

from __future__ import annotations

import faulthandler
import importlib
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path

import forked
from paths import search_path

_PROCESS_SECONDS = 240  # less than a launch may take, so that the processes end first
_LAUNCH_SECONDS = 300
_END_SECONDS = 45  # a launcher kills the processes that do not end within 30 s


def limit() -> None:
    """End this process after some minutes, with the lines at which its threads wait."""
    faulthandler.dump_traceback_later(_PROCESS_SECONDS, exit=True)


def free_port() -> int:
    """A port that no program has now and that no connection gets.

    The system gives connections and port 0 the ports above 32767. A port of those, free when
    asked for, can be another program's when it is used.
    """
    ports = random.SystemRandom().sample(range(10000, 32000), 100)
    for port in ports:
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise OSError("none of 100 ports is free")


def accelerate(configuration: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    """A script, with its arguments, by `accelerate launch` in two processes without a GPU."""
    return _run("accelerate.commands.launch", *_options(configuration), *arguments)


def _options(configuration: Path) -> list[object]:
    options = ["--config_file", configuration, "--num_processes", 2, "--mixed_precision", "no"]
    return [*options, "--main_process_port", free_port()]


def forked_accelerate(
    folder: Path, configuration: Path, *arguments: object
) -> subprocess.CompletedProcess[str]:
    """The same without new interpreters: the launcher and its processes are forked."""
    command = [*_options(configuration), *arguments]
    out, err = folder / "launch.out", folder / "launch.err"
    process = start_forked("accelerate.commands.launch", command, out, err)
    process.join(_LAUNCH_SECONDS)
    if process.is_alive():
        os.kill(process.pid, signal.SIGTERM)
        process.join(_END_SECONDS)
    texts = (path.read_text() if path.exists() else "" for path in (out, err))
    return subprocess.CompletedProcess(command, process.exitcode, *texts)


def start_forked(module: str, arguments: Sequence[object], out: Path, err: Path) -> BaseProcess:
    """A launcher, as `python -m` would start it, whose processes run a script.

    It is forked after the imports (forked.py), and so are they, by torch's elastic agent.

    Args:
        module: of the launcher, which uses torchrun.
        out: the file that the standard output of all goes to, and err the standard error.
    """
    words = [str(argument) for argument in arguments]
    return forked.start_call(_launcher, (module, words, str(out), str(err)))


def _launcher(module: str, words: list[str], out: str, err: str) -> None:
    for number, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    os.environ.update(PET_RUN_PATH="1", PET_START_METHOD="fork")  # torchrun's options
    sys.argv = [module, *words]
    importlib.import_module(module).main()


def _run(module: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "ignore", "-m", module, *map(str, arguments)]
    env = {**os.environ, "PYTHONPATH": search_path(), "OMP_NUM_THREADS": "1"}
    # Files, not pipes: a pipe stays open while any of the processes that have it runs.
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        process = subprocess.Popen(command, env=env, stdout=out, stderr=err)
        try:
            process.wait(_LAUNCH_SECONDS)
        except subprocess.TimeoutExpired:
            err.write(f"\nended after {_LAUNCH_SECONDS} s\n")
        finally:
            _end(process)
        out.seek(0)
        err.seek(0)
        return subprocess.CompletedProcess(command, process.returncode, out.read(), err.read())


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a launcher that still runs, in the way in which it ends its processes."""
    if process.poll() is not None:
        return
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(_END_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
