"""The trainers, based on `transformers.Trainer`. They need the extra `train`."""

from __future__ import annotations

from fastpref.trainer.config import PreferenceConfig, UnpairedPreferenceConfig
from fastpref.trainer.metrics import NonFiniteLossError
from fastpref.trainer.preference import PreferenceTrainer
from fastpref.trainer.unpaired import UnpairedPreferenceTrainer

__all__ = [
    "NonFiniteLossError",
    "PreferenceConfig",
    "PreferenceTrainer",
    "UnpairedPreferenceConfig",
    "UnpairedPreferenceTrainer",
]
