"""Preference losses from hidden states or logits: the functions that a training step calls."""

from __future__ import annotations

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

__all__ = [
    "FusedLinearDPOLoss",
    "FusedLinearIPOLoss",
    "FusedLinearPreferenceLoss",
    "PreferenceOutput",
    "dpo_loss",
    "ipo_loss",
    "linear_dpo_loss",
    "linear_ipo_loss",
    "linear_kto_loss",
    "linear_preference_loss",
]
