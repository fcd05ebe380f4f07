"""Preference losses: pure functions of sequence log-probabilities."""

from __future__ import annotations

from fastpref.losses.options import LOSS_OPTIONS, LossOptions
from fastpref.losses.pairs import Pairs
from fastpref.losses.preference import PreferenceLoss, preference_loss, reward_loss
from fastpref.losses.table import LOSS_TYPES, Loss
from fastpref.losses.unpaired import UNPAIRED_LOSS_TYPES, UnpairedLoss, kto_kl, kto_loss

__all__ = [
    "LOSS_OPTIONS",
    "LOSS_TYPES",
    "Loss",
    "LossOptions",
    "Pairs",
    "PreferenceLoss",
    "UNPAIRED_LOSS_TYPES",
    "UnpairedLoss",
    "kto_kl",
    "kto_loss",
    "preference_loss",
    "reward_loss",
]
