"""Every loss by its name, with the options and the inputs that mean something to it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fastpref.losses import formulas as losses
from fastpref.losses.pairs import Pairs


@dataclass(frozen=True)
class Loss:
    """A loss function and what it takes.

    Attributes:
        function: from `Pairs` to the loss of each pair, [P].
        options: which of the options that not every loss has it understands; None: all of them.
        needs_lengths: whether it reads the answers' lengths.
        needs_nll: whether it reads the NLL of the chosen answers.
        reference: "required"; "optional" where only the rewards, which are reported, depend on it;
            "none" for a loss that has none.
        sums: whether it reads them for ipo_normalization="token_mean" alone.
        per_pair: whether [i] is the loss of pair i, to which weights per pair can be applied.
        batch_mean: whether [i] is pair i's share of one mean over the batch, as in the NLL.
        nll_weight: the weight of the NLL that comes with it unless an option says otherwise.
        rewards: from `Pairs` to the rewards of both answers over beta; None: the log-ratios.
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
        """Whether an option, or an input, means something to this loss."""
        if option == "weight":
            return self.per_pair
        if option == "use_weighting":
            return self.per_pair and not self.batch_mean
        if option == "ld_alpha":
            return not self.batch_mean
        return self.options is None or option in self.options


def _loss(function: Callable[[Pairs], Tensor], options: str = "", **more: Any) -> Loss:
    return Loss(function, frozenset(options.split()), **more)


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
