"""The output head of a transformers model: reading it, and calling the model without its logits."""

from __future__ import annotations

import importlib
from typing import Any

from fastpref.heads.calling import (
    align_to_tokens,
    check_head,
    disable_dropout,
    hidden_states,
    install_head_forward,
    uninstall_head_forward,
)
from fastpref.heads.layer import HeadAdapter
from fastpref.heads.reading import Head, read_head, unwrap

__all__ = [
    "Head",
    "HeadAdapter",
    "align_to_tokens",
    "batch_labels",
    "check_head",
    "disable_dropout",
    "hidden_states",
    "install_head_forward",
    "model_inputs",
    "read_head",
    "uninstall_head_forward",
    "unwrap",
]

# Of data packages, which are not imported before they are asked for.
_LAZY = {"batch_labels": "fastpref.data.batches", "model_inputs": "fastpref.data.batches"}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
