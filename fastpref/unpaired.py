"""Earlier path of the losses of single answers, in `fastpref.losses` and `fastpref.fused`."""

from fastpref.fused import linear_kto_loss
from fastpref.losses import UNPAIRED_LOSS_TYPES, UnpairedLoss, kto_kl, kto_loss

__all__ = ["UNPAIRED_LOSS_TYPES", "UnpairedLoss", "kto_kl", "kto_loss", "linear_kto_loss"]
