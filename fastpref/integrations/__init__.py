"""Drop-in replacements for functions of TRL, Liger-Kernel, cut-cross-entropy and torch.

Each has the names, arguments and return values of the original. docs/trl.md, docs/liger.md and
docs/cce.md list the differences; docs/migration.md compares the options.
"""

from __future__ import annotations

from fastpref.integrations.cce import linear_cross_entropy, torch_linear_cross_entropy
from fastpref.integrations.trl import patch_trl, unpatch_trl

__all__ = ["linear_cross_entropy", "patch_trl", "torch_linear_cross_entropy", "unpatch_trl"]
