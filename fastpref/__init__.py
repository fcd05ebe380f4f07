"""fastpref: preference optimisation of language models without the logits."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

import torch  # noqa: F401  first: the native module shares the OpenMP pool that torch loads

from fastpref.fused.modules import FusedLinearDPOLoss, FusedLinearIPOLoss, FusedLinearPreferenceLoss
from fastpref.fused.pair_loss import PreferenceOutput
from fastpref.fused.preference import (
    dpo_loss,
    ipo_loss,
    linear_dpo_loss,
    linear_ipo_loss,
    linear_preference_loss,
)
from fastpref.fused.unpaired import linear_kto_loss
from fastpref.logps import compile as _ops  # noqa: F401  registers the operators
from fastpref.logps.forward import TokenStats
from fastpref.logps.linear import linear_token_logps
from fastpref.logps.logits import token_logps
from fastpref.logps.plan import HeadPlan, plan_head
from fastpref.logps.sequences import sequence_logps
from fastpref.losses.options import LossOptions
from fastpref.losses.preference import PreferenceLoss, preference_loss, reward_loss
from fastpref.losses.unpaired import UnpairedLoss, kto_loss

if TYPE_CHECKING:
    from fastpref.integrations.trl import patch_trl as patch_trl
    from fastpref.integrations.trl import unpatch_trl as unpatch_trl
    from fastpref.trainer import PreferenceConfig as PreferenceConfig
    from fastpref.trainer import PreferenceTrainer as PreferenceTrainer
    from fastpref.trainer import UnpairedPreferenceConfig as UnpairedPreferenceConfig
    from fastpref.trainer import UnpairedPreferenceTrainer as UnpairedPreferenceTrainer

__version__ = "0.1.0"

# These need the train extra, or TRL: imported when asked for, and not part of `import *`.
_LAZY = {
    "PreferenceTrainer": "fastpref.trainer",
    "PreferenceConfig": "fastpref.trainer",
    "UnpairedPreferenceTrainer": "fastpref.trainer",
    "UnpairedPreferenceConfig": "fastpref.trainer",
    "patch_trl": "fastpref.integrations.trl",
    "unpatch_trl": "fastpref.integrations.trl",
}

__all__ = [
    "FusedLinearDPOLoss",
    "FusedLinearIPOLoss",
    "FusedLinearPreferenceLoss",
    "HeadPlan",
    "LossOptions",
    "PreferenceLoss",
    "PreferenceOutput",
    "TokenStats",
    "UnpairedLoss",
    "dpo_loss",
    "ipo_loss",
    "kto_loss",
    "linear_dpo_loss",
    "linear_ipo_loss",
    "linear_kto_loss",
    "linear_preference_loss",
    "linear_token_logps",
    "plan_head",
    "preference_loss",
    "reward_loss",
    "sequence_logps",
    "token_logps",
]


_EARLIER = {"config", "loss_tokens", "plan", "unpaired", "unpaired_data"}  # modules of these names


def __getattr__(name: str) -> Any:
    if name in _EARLIER:
        return importlib.import_module(f"fastpref.{name}")
    if name in _LAZY:
        try:
            return getattr(importlib.import_module(_LAZY[name]), name)
        except ImportError as error:
            raise ImportError(f"{name}: {error}; run: pip install 'fastpref[train]'") from error
    raise AttributeError(f"module 'fastpref' has no attribute {name!r}")
