"""The fused losses as modules, for code that builds its loss once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from fastpref.fused.pair_loss import PreferenceOutput
from fastpref.fused.preference import linear_preference_loss
from fastpref.logps.options import HEAD_OPTIONS, HeadOptions
from fastpref.losses.options import LOSS_OPTIONS, LossType, pop_loss_options

_OPTIONS = (*sorted(LOSS_OPTIONS), *HEAD_OPTIONS, "extras")


class FusedLinearPreferenceLoss(nn.Module):
    """`linear_preference_loss` with its options fixed at construction.

    Those of the loss are the attributes of `fastpref.LossOptions` (loss_type, beta,
    label_smoothing, ...); any other keyword of `linear_preference_loss` that is not a tensor
    (softcap, precision, memory_budget, extras, ...) is passed through. Raises ValueError at
    construction for a loss or option that does not exist or does not fit.
    """

    def __init__(self, loss_type: LossType | Sequence[LossType] = "sigmoid", **options: Any):
        super().__init__()
        for name in options:
            if name not in _OPTIONS:
                raise ValueError(f"{name}: not an option; expected some of {', '.join(_OPTIONS)}")
        self.options = dict(options, loss_type=loss_type)
        head = dict(self.options)
        pop_loss_options(head)
        head.pop("extras", None)
        HeadOptions(**head)

    def forward(
        self,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        ref_logps: Tensor | None = None,
        **inputs: Any,
    ) -> PreferenceOutput:
        """hidden [2P, T, H], weight [V, H], labels [2P, T], ref_logps [2P].

        inputs: bias, ref_hidden, ref_weight, ref_bias, sequence_ids, lengths, pair_weight, margin,
        soft_labels, token_indices, ...; they win over the options fixed at construction.
        """
        return linear_preference_loss(
            hidden, weight, labels, ref_logps, **{**self.options, **inputs}
        )

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())


class FusedLinearDPOLoss(FusedLinearPreferenceLoss):
    """DPO (arXiv:2305.18290) from hidden states; label_smoothing > 0 is cDPO."""

    def __init__(self, *, beta: float = 0.1, **options: Any):
        super().__init__("sigmoid", beta=beta, **options)


class FusedLinearIPOLoss(FusedLinearPreferenceLoss):
    """IPO (arXiv:2310.12036) from hidden states; ipo_normalization "token_mean" or "sum"."""

    def __init__(self, *, beta: float = 0.1, **options: Any):
        super().__init__("ipo", beta=beta, **options)
