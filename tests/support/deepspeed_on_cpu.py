"""DeepSpeed on processes of a CPU, which it runs with gloo where nothing is compiled."""

from __future__ import annotations

import os


def enable_launched() -> None:
    """Leave out an operation of DeepSpeed that it would compile for minutes when it starts.

    It is an all-reduce in shared memory, beside gloo's. Called before accelerate is set up.
    """
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
