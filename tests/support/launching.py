"""Programs of several processes: `accelerate launch`, and what ends them.

A launch that waits for something is ended, and shows what its processes have said. Each process of
it calls `limit`, as killing a launcher leaves the processes that it has started.
"""

from __future__ import annotations

import faulthandler
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

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
    options = ["--config_file", configuration, "--num_processes", 2, "--mixed_precision", "no"]
    options += ["--main_process_port", free_port()]
    return _run("accelerate.commands.launch", *options, *arguments)


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
