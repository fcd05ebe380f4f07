"""The table of preference losses by name, with the options and inputs that each supports."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fastpref.losses import formulas as losses
from fastpref.losses.pairs import Pairs


@dataclass(frozen=True)
class Loss:
    """A loss function, and the options and inputs that it supports.

    Attributes:
        function: maps `Pairs` to the loss of each pair, [P].
        options: the loss-specific options that the function reads; None means all of them.
        needs_lengths: whether the function divides by the answers' lengths.
        needs_nll: whether the function reads the NLL of the chosen answers.
        reference: "required" if the loss depends on the reference; "optional" if only the reported
            rewards do; "none" if the loss has no reference.
        sums: whether ipo_normalization="sum" makes the lengths unnecessary.
        per_pair: whether element i of the result is the loss of pair i, so that pairs can be
            weighted.
        batch_mean: whether element i is pair i's share of one mean over the batch, as in the NLL.
        nll_weight: the default weight of the NLL that is added to the loss.
        rewards: maps `Pairs` to the chosen and the rejected reward divided by beta, [P] each; None
            means the log-ratios.
    """

    function: Callable[[Pairs], Tensor]
    options: frozenset[str] | None = None
    needs_lengths: bool = False
    needs_nll: bool = False
    reference: str = "required"
    sums: bool = False
    per_pair: bool = True
    batch_mean: bool = False
    nll_weight: float = 0.0
    rewards: Callable[[Pairs], tuple[Tensor, Tensor]] | None = None

    @property
    def name(self) -> str:
        return getattr(self.function, "__name__", type(self.function).__name__)

    def takes(self, option: str) -> bool:
        """Whether the loss supports an option of `LossOptions` or an input of each pair.

        The inputs are "weight", "margin" and "soft_labels".
        """
        if option == "weight":
            return self.per_pair
        if option == "use_weighting":
            return self.per_pair and not self.batch_mean
        if option == "ld_alpha":
            return not self.batch_mean
        return self.options is None or option in self.options


def _loss(function: Callable[[Pairs], Tensor], options: str = "", **attributes: Any) -> Loss:
    return Loss(function, frozenset(options.split()), **attributes)


_SMOOTH = "label_smoothing soft_labels margin"
LOSSES: dict[str, Loss] = {
    "sigmoid": _loss(losses.sigmoid, f"{_SMOOTH} f_divergence_type"),
    "ipo": _loss(
        losses.ipo, "ipo_normalization soft_labels f_divergence_type", needs_lengths=True, sums=True
    ),
    "hinge": _loss(losses.hinge, "soft_labels margin f_divergence_type"),
    "exo_pair": _loss(losses.exo_pair, "label_smoothing margin f_divergence_type"),
    "nca_pair": _loss(losses.nca_pair),
    "robust": _loss(losses.robust, "label_smoothing margin f_divergence_type"),
    "bco_pair": _loss(losses.bco_pair),
    "sppo_hard": _loss(losses.sppo_hard, "soft_labels"),
    "aot": _loss(losses.aot, "label_smoothing", per_pair=False),
    "aot_unpaired": _loss(losses.aot_unpaired, "label_smoothing", per_pair=False),
    "apo_zero": _loss(losses.apo_zero),
    "apo_down": _loss(losses.apo_down),
    "discopop": _loss(losses.discopop, "discopop_tau margin f_divergence_type"),
    "sft": _loss(
        losses.sft, "f_divergence_type", reference="optional", needs_nll=True, batch_mean=True
    ),
    "sigmoid_norm": _loss(losses.sigmoid_norm, f"{_SMOOTH} f_divergence_type", needs_lengths=True),
    "cpo": _loss(losses.cpo, _SMOOTH, reference="none", nll_weight=1.0),
    "simpo": _loss(
        losses.simpo,
        f"{_SMOOTH} simpo_gamma",
        needs_lengths=True,
        reference="none",
        rewards=Pairs.mean_logps,
    ),
    "alphapo": _loss(
        losses.alphapo,
        f"{_SMOOTH} simpo_gamma alpha",
        needs_lengths=True,
        reference="none",
        rewards=losses.alphapo_rewards,
    ),
    "orpo": _loss(
        losses.orpo,
        "soft_labels",
        needs_lengths=True,
        reference="none",
        nll_weight=1.0,
        rewards=Pairs.mean_logps,
    ),
}
LOSS_TYPES = tuple(LOSSES)
