"""The options of every preference loss, checked once and passed along."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

from torch import Tensor

from fastpref.losses.pairs import F_DIVERGENCES, Pairs
from fastpref.losses.table import LOSS_TYPES, LOSSES, Loss
from fastpref.validation import cached_options, check_number

IPO_NORMALIZATIONS = ("token_mean", "sum")
LossType = str | Loss | Callable[[Pairs], Tensor]

# Options that only some losses have; any other value than the default must mean something.
_OWN = (
    "label_smoothing",
    "ipo_normalization",
    "f_divergence_type",
    "discopop_tau",
    "simpo_gamma",
    "alpha",
    "ld_alpha",
    "use_weighting",
)
# What every loss of a list must take, as it belongs to the pair's preference itself.
_SHARED = ("f_divergence_type", "soft_labels", "weight", "use_weighting")


@dataclass(frozen=True)
class LossOptions:
    """The options of every preference loss. Names and defaults are those of TRL 1.16.

    Attributes:
        loss_type: one of LOSS_TYPES; a function of `Pairs`, or a `Loss`, of your own; or a list of
            such, whose sum is taken (MPO, Wang et al. 2024, arXiv:2411.10442).
        loss_weights: a factor for each loss of the list; 1 by default.
        beta: strength of the pull towards the reference; IPO's tau, ORPO's lambda.
        label_smoothing: probability that a label is flipped, in [0, 0.5).
        ipo_normalization: "token_mean" divides IPO's log-ratios by the answers' tokens, "sum" does
            not.
        reference_free: the reference is the uniform policy; its log-probabilities count as 0.
        f_divergence_type, f_alpha_divergence_coef: see `fastpref.losses.pairs.divergence_scores`.
        discopop_tau: temperature of DiscoPOP's mixture.
        simpo_gamma: target margin of the rewards in SimPO and AlphaPO.
        alpha: shape of AlphaPO's reward, not 0.
        nll_weight: weight of the NLL of the chosen answers, a mean over their tokens, that is added
            to the loss (cpo_alpha in TRL's CPO trainer, alpha in Liger). None: 1 for cpo and orpo,
            as in their papers, times the loss's own weight, and 0 for the others.
        ld_alpha: weight, in [0, 1], of an answer's tokens past the length of the pair's shorter one
            (LD-DPO, Liu et al. 2024, arXiv:2409.06411); None: 1.
        use_weighting: weigh each pair by how likely the policy is to have written it (WPO, Zhou et
            al. 2024, arXiv:2406.11827); see `fastpref.losses.tokens.wpo_weights`.
        losses, terms: derived; the losses as entries of the table, and with their factors and the
            NLL that comes with them.
        closed_form: derived; the loss's name, if it is one alone and without what a backend's
            `pair_loss` lacks.
        needs_lengths, needs_nll: derived; whether a loss divides by the answers' lengths, and
            whether the NLL of the chosen answers is part of it.

    Raises:
        ValueError: an unknown loss, a bad value, or an option that the loss does not support.
    """

    loss_type: LossType | Sequence[LossType] = "sigmoid"
    loss_weights: Sequence[float] | None = None
    beta: float = 0.1
    label_smoothing: float = 0.0
    ipo_normalization: str = "token_mean"
    reference_free: bool = False
    f_divergence_type: str = "reverse_kl"
    f_alpha_divergence_coef: float = 0.5
    discopop_tau: float = 0.05
    simpo_gamma: float = 0.5
    alpha: float = 0.0
    nll_weight: float | None = None
    ld_alpha: float | None = None
    use_weighting: bool = False
    if TYPE_CHECKING:  # what follows from the options, once: a training step asks for it often
        losses: tuple[Loss, ...] = field(init=False)
        terms: tuple[tuple[Loss, float], ...] = field(init=False)
        closed_form: str | None = field(init=False)
        needs_lengths: bool = field(init=False)
        needs_nll: bool = field(init=False)

    def __post_init__(self) -> None:
        names = self.names
        if not names:
            raise ValueError(f"loss_type: got {self.loss_type!r}, expected at least one loss")
        for name in names:
            known = name in LOSSES if isinstance(name, str) else isinstance(name, Loss)
            if not known and (isinstance(name, str) or not callable(name)):
                raise ValueError(
                    f"loss_type: got {name!r}, expected one of {', '.join(LOSS_TYPES)}"
                )
        object.__setattr__(self, "losses", tuple(as_loss(name) for name in names))
        self._check_values()
        if self.loss_weights is not None:
            given = self.loss_weights
            if not isinstance(given, (list, tuple)) or len(given) != len(names):
                raise ValueError(
                    f"loss_weights: got {given!r}, expected one number for each of {len(names)} "
                    "losses"
                )
            for weight in given:
                _check_value("loss_weights", weight, "finite numbers")
        for option in _OWN:
            if getattr(self, option) != getattr(type(self), option):
                self.check_takes(option)
        if self.f_divergence_type != "alpha_divergence" and self.f_alpha_divergence_coef != 0.5:
            raise ValueError(
                f"f_alpha_divergence_coef: f_divergence_type {self.f_divergence_type!r} does not "
                "support it; only 'alpha_divergence' does"
            )
        if "exo_pair" in names and self.label_smoothing == 0:
            raise ValueError(
                "label_smoothing: got 0 with loss_type 'exo_pair', expected more, such as 0.001"
            )
        if "alphapo" in names and self.alpha == 0:
            raise ValueError(
                "alpha: got 0 with loss_type 'alphapo', expected another value, such as 0.25; at 0 "
                "it is 'simpo'"
            )
        terms, sums = self._terms(), self.ipo_normalization == "sum"
        plain = self.f_divergence_type == "reverse_kl" and self.ld_alpha is None
        plain = plain and not self.use_weighting and len(terms) == 1 and terms[0][1] == 1
        derived = {
            "terms": terms,
            "closed_form": names[0] if plain and isinstance(names[0], str) else None,
            "needs_lengths": any(x.needs_lengths and not (sums and x.sums) for x, _ in terms),
            "needs_nll": any(loss.needs_nll for loss, _ in terms),
        }
        for name, value in derived.items():
            object.__setattr__(self, name, value)

    def _check_values(self) -> None:
        for name in ("beta", "discopop_tau"):
            _check_value(name, getattr(self, name), "a positive number", 0.0)
        for name in ("f_alpha_divergence_coef", "simpo_gamma", "alpha"):
            _check_value(name, getattr(self, name), "a finite number")
        if self.nll_weight is not None:
            _check_value("nll_weight", self.nll_weight, "a finite number or None")
        check_number("label_smoothing", self.label_smoothing)
        if not 0 <= self.label_smoothing < 0.5:
            raise ValueError(
                f"label_smoothing: got {self.label_smoothing}, expected a value in [0, 0.5)"
            )
        if self.ld_alpha is not None:
            check_number("ld_alpha", self.ld_alpha)
            if not 0 <= self.ld_alpha <= 1:
                raise ValueError(f"ld_alpha: got {self.ld_alpha}, expected a value in [0, 1]")
        for name, choices in (
            ("ipo_normalization", IPO_NORMALIZATIONS),
            ("f_divergence_type", F_DIVERGENCES),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(
                    f"{name}: got {getattr(self, name)!r}, expected one of {', '.join(choices)}"
                )

    @property
    def names(self) -> tuple[Any, ...]:
        """The losses as they were given."""
        given = self.loss_type
        return tuple(given) if isinstance(given, (list, tuple)) else (given,)

    def _terms(self) -> tuple[tuple[Loss, float], ...]:
        weights = (1.0,) * len(self.losses) if self.loss_weights is None else self.loss_weights
        terms = tuple(zip(self.losses, weights, strict=True))
        nll = self.nll_weight
        if nll is None:
            nll = sum(weight * loss.nll_weight for loss, weight in terms)
        return (*terms, (LOSSES["sft"], nll)) if nll else terms

    @property
    def pair_parameters(self) -> dict[str, float]:
        """What `pair_loss` is told besides of a loss that has it."""
        if self.closed_form == "discopop":
            return {"option": self.discopop_tau}
        if self.closed_form in ("simpo", "alphapo"):
            return {"option": self.simpo_gamma, "shape": self.alpha}
        return {}

    @property
    def reference(self) -> str:
        """Whether there must, may or must not be a reference: "required", "optional", "none"."""
        kinds = [loss.reference for loss in self.losses]
        if self.reference_free:
            return "none"
        return next((kind for kind in ("required", "optional") if kind in kinds), "none")

    def check_takes(self, option: str, name: str | None = None) -> None:
        """Raise ValueError, under this name, unless the losses support an option or an input."""
        losses = self.losses
        takers = [loss for loss in losses if loss.takes(option)]
        refusers = [loss for loss in losses if not loss.takes(option) and not loss.batch_mean]
        if takers and not (refusers and option in _SHARED):
            return
        others = [known for known, loss in LOSSES.items() if loss.takes(option)]
        raise ValueError(
            f"{name or option}: loss_type {(refusers or losses)[0].name!r} does not support it; "
            f"only {', '.join(others)} {'does' if len(others) == 1 else 'do'}"
        )

    def check_reference(self, *given: bool) -> None:
        """Raise ValueError unless the reference is given, or there is none to give."""
        if self.reference_free and any(given):
            raise ValueError(
                "reference_free: got True with reference log-probs, expected one of the two"
            )
        if self.reference == "none" and any(given):
            raise ValueError(
                f"ref_logps: got them for loss_type {self.losses[0].name!r}, which has no "
                "reference; expected None"
            )
        if not all(given) and (any(given) or self.reference == "required"):
            raise ValueError(
                "ref_logps: got None, expected the reference's log-probs; without a reference "
                "model pass reference_free=True"
            )


LOSS_OPTIONS = frozenset(option.name for option in fields(LossOptions))


def as_loss(name: LossType) -> Loss:
    """The entry of the table, or one for a function from elsewhere."""
    if isinstance(name, str):
        return LOSSES[name]
    return name if isinstance(name, Loss) else Loss(name)


def take_options(given: dict[str, Any]) -> LossOptions:
    """Remove the options of the loss, or a ready `loss_options`, from keyword arguments."""
    ready = given.pop("loss_options", None)
    if ready is not None:
        if not isinstance(ready, LossOptions):
            raise ValueError(f"loss_options: got {type(ready).__name__}, expected LossOptions")
        for name in LOSS_OPTIONS & given.keys():
            raise ValueError(f"{name}: got it with loss_options, expected one of the two")
        return ready
    return cached_options(
        LossOptions, {name: given.pop(name) for name in LOSS_OPTIONS & given.keys()}
    )


def refuse_unknown(function: str, options: dict[str, Any]) -> None:
    """Raise TypeError if a keyword argument is left over, as Python does."""
    for name in options:
        raise TypeError(f"{function}() got an unexpected keyword argument {name!r}")


def _check_value(name: str, value: Any, expected: str, low: float = -math.inf) -> None:
    check_number(name, value)
    if not low < value < math.inf:
        raise ValueError(f"{name}: got {value}, expected {expected}")
