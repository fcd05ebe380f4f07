"""The reference's log-probabilities: of a second model, of the policy without its adapter, or
computed before training.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from fastpref.reference.model import (
    Reference,
    add_reference_adapter,
    as_reference,
    check_adapter_reference,
    frozen_copy,
    is_peft,
)
from fastpref.reference.precompute import has_reference, precompute

if TYPE_CHECKING:
    from fastpref.reference.store import ReferenceStore as ReferenceStore

# Needs the train extra: imported when asked for, and not part of `import *`.
_LAZY = {"ReferenceStore": "fastpref.reference.store"}

__all__ = [
    "Reference",
    "add_reference_adapter",
    "as_reference",
    "check_adapter_reference",
    "frozen_copy",
    "has_reference",
    "is_peft",
    "precompute",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        try:
            return getattr(importlib.import_module(_LAZY[name]), name)
        except ImportError as error:
            raise ImportError(f"{name}: {error}; run: pip install 'fastpref[train]'") from error
    raise AttributeError(f"module 'fastpref.reference' has no attribute {name!r}")
