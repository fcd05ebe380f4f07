"""The fused losses as `torch.nn.Module`s, whose options are set at construction."""

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
    """`linear_preference_loss` as a module.

    Args:
        loss_type: as in `fastpref.LossOptions`.
        options: the other attributes of `fastpref.LossOptions` (beta, label_smoothing, ...), and
            the keywords of `linear_preference_loss` that are not tensors (softcap, precision,
            memory_budget, extras, ...).

    Raises:
        ValueError: an unknown loss or option, or an option that the loss does not support.
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
        """The loss of one batch.

        Args:
            hidden: [2P, T, H]. weight: [V, H]. labels: [2P, T] int64. ref_logps: [2P] or None.
            inputs: any other keyword of `linear_preference_loss`: bias, ref_hidden, pair_weight,
                margin, token_indices, ... They override the options of the constructor.
        """
        return linear_preference_loss(
            hidden, weight, labels, ref_logps, **{**self.options, **inputs}
        )

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())


class FusedLinearDPOLoss(FusedLinearPreferenceLoss):
    """DPO (Rafailov et al. 2023, arXiv:2305.18290); with label_smoothing > 0 cDPO.

    options: as in `FusedLinearPreferenceLoss`.
    """

    def __init__(self, *, beta: float = 0.1, **options: Any):
        super().__init__("sigmoid", beta=beta, **options)


class FusedLinearIPOLoss(FusedLinearPreferenceLoss):
    """IPO (Azar et al. 2023, arXiv:2310.12036); ipo_normalization is "token_mean" or "sum".

    options: as in `FusedLinearPreferenceLoss`.
    """

    def __init__(self, *, beta: float = 0.1, **options: Any):
        super().__init__("ipo", beta=beta, **options)
