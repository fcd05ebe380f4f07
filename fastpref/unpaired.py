"""Losses of single answers, which are in `fastpref.losses`; a name of earlier versions."""

from fastpref.fused import linear_kto_loss
from fastpref.losses import UNPAIRED_LOSS_TYPES, UnpairedLoss, kto_kl, kto_loss

__all__ = ["UNPAIRED_LOSS_TYPES", "UnpairedLoss", "kto_kl", "kto_loss", "linear_kto_loss"]
