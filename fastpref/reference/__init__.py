"""The reference's log-probabilities: of a second model, of the policy without its adapter, or
computed before training.
"""

from __future__ import annotations

from fastpref.reference.model import (
    Reference,
    add_reference_adapter,
    as_reference,
    check_adapter_reference,
    frozen_copy,
    is_peft,
)
from fastpref.reference.precompute import has_reference, precompute
from fastpref.reference.store import ReferenceStore

__all__ = [
    "Reference",
    "ReferenceStore",
    "add_reference_adapter",
    "as_reference",
    "check_adapter_reference",
    "frozen_copy",
    "has_reference",
    "is_peft",
    "precompute",
]
