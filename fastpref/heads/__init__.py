"""The output head of a transformers model: reading it, and calling the model without its logits.

Two checks verify what `read_head` returns, since neither finds all errors:

- `install_head_forward` runs the model's forward with stand-ins for backbone and output layer
  (probe.py). This needs no weights, so it works for models that are sharded or on the meta device.
  It finds a scale, a softcap or another operation between backbone and logits, and names it.
- `check_head` runs the whole model on three tokens and compares log-probs. It needs all weights on
  this process. It finds what the stand-ins hide: an adapter or an output layer that computes
  something else, a forward that passes its backbone further arguments, NaNs.
"""

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
from fastpref.heads.sharded import vocab_parallel_token_logps, vocab_parallel_weight

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
    "vocab_parallel_token_logps",
    "vocab_parallel_weight",
]

# Imported on access: they are in fastpref.data.
_LAZY = {"batch_labels": "fastpref.data.batches", "model_inputs": "fastpref.data.batches"}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
