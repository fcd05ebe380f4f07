"""Lets accelerate shard a model by FSDP2 among processes on CPUs, for tests.

accelerate takes FSDP for GPUs alone: AcceleratorState asks for the type MULTI_GPU, though torch's
FSDP2 runs on CPUs with gloo. `enable` says FSDP where it would say MULTI_CPU.
"""

from __future__ import annotations

import os
from typing import Any

from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType

SETTINGS = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_TRANSFORMER_CLS_TO_WRAP": "LlamaDecoderLayer",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
}

_original = AcceleratorState.__init__


def _init(self: Any, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
    _original(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
    if fsdp_plugin is None or self.distributed_type != DistributedType.MULTI_CPU:
        return
    self.distributed_type = DistributedType.FSDP
    if self._mixed_precision != "no":
        fsdp_plugin.set_mixed_precision(self._mixed_precision)
    self.fsdp_plugin = fsdp_plugin
    PartialState._shared_state["distributed_type"] = DistributedType.FSDP


def enable(**settings: str) -> None:
    """For the trainers that this process makes from now on; settings replace those above."""
    os.environ.update({**SETTINGS, **settings})
    enable_launched()


def enable_launched() -> None:
    """The same with the settings that `accelerate launch` has made."""
    AcceleratorState.__init__ = _init
