"""Swap-ins for code written for other libraries: TRL, Liger-Kernel, cut-cross-entropy, torch.

Each has the names, arguments and return values of what it replaces. docs/trl.md, docs/liger.md and
docs/cce.md say what changes; docs/migration.md lists the options side by side.
"""

from __future__ import annotations

from fastpref.integrations.cce import linear_cross_entropy, torch_linear_cross_entropy
from fastpref.integrations.trl import patch_trl, unpatch_trl

__all__ = ["linear_cross_entropy", "patch_trl", "torch_linear_cross_entropy", "unpatch_trl"]
