"""Functions that several processes run together, joined by gloo.

The processes are forked after the imports (forked.py). Each returns a value, or the text of its
error.
"""

from __future__ import annotations

import os
import pickle
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import forked

_SECONDS = 600


def run(function: Callable[..., Any], processes: int, path: Path, *arguments: Any) -> list[Any]:
    """What function(*arguments) returns on each of so many processes; AssertionError if one fails.

    Args:
        function: of a module that can be imported.
        path: a folder that is empty, for what the processes write.
    """
    path.mkdir(parents=True, exist_ok=True)
    started = [
        forked.start_call(_run, (function, rank, processes, str(path), arguments))
        for rank in range(processes)
    ]
    end = time.monotonic() + _SECONDS
    try:
        for process in started:
            process.join(max(0.1, end - time.monotonic()))
    finally:
        for process in started:
            if process.is_alive():
                process.kill()
                process.join()
    outcomes = []
    for rank, process in enumerate(started):
        file = path / f"outcome-{rank}"
        assert file.is_file(), f"process {rank} ended with {process.exitcode} and without a result"
        returned, value = pickle.loads(file.read_bytes())
        assert returned, f"process {rank}:\n{value}"
        outcomes.append(value)
    return outcomes


def _run(
    function: Callable[..., Any], rank: int, processes: int, path: str, arguments: tuple
) -> None:
    import torch

    torch.set_num_threads(1)
    # What a launcher tells accelerate.
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes}
    ranks |= {"LOCAL_WORLD_SIZE": processes, "MASTER_ADDR": "localhost", "MASTER_PORT": 1}
    os.environ.update({name: str(value) for name, value in ranks.items()})
    store = torch.distributed.FileStore(f"{path}/store", processes)
    torch.distributed.init_process_group(
        "gloo", store=store, rank=rank, world_size=processes, timeout=timedelta(seconds=60)
    )
    try:
        outcome = True, function(*arguments)
    except BaseException:
        outcome = False, traceback.format_exc()
    beside = Path(path, f"outcome-{rank}.part")
    beside.write_bytes(pickle.dumps(outcome))
    beside.rename(Path(path, f"outcome-{rank}"))
    if outcome[0]:
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
