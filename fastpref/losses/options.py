"""`LossOptions`: the options of the preference losses, checked at construction."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor

from fastpref.losses.pairs import F_DIVERGENCES, Pairs
from fastpref.losses.table import LOSS_TYPES, LOSSES, Loss
from fastpref.validation import cached_options, check_number

IPO_NORMALIZATIONS = ("token_mean", "sum")
LossType = str | Loss | Callable[[Pairs], Tensor]

# Options that only some losses support. A value other than the default is an error for the others.
_LOSS_SPECIFIC = (
    "label_smoothing",
    "ipo_normalization",
    "f_divergence_type",
    "discopop_tau",
    "simpo_gamma",
    "alpha",
    "ld_alpha",
    "use_weighting",
)
# Options and inputs that all losses of a list must support: they describe the pair's preference.
_SHARED = ("f_divergence_type", "soft_labels", "weight", "use_weighting")


class _Derived:
    """What follows from the options: computed at construction, read by every training step.

    The attributes are here and not in `LossOptions`, where they would become dataclass fields.
    """

    losses: tuple[Loss, ...]
    terms: tuple[tuple[Loss, float], ...]
    closed_form: str | None
    needs_lengths: bool
    needs_nll: bool


@dataclass(frozen=True)
class LossOptions(_Derived):
    """The options of the preference losses. Names and defaults are those of TRL 1.16.

    Attributes:
        loss_type: one of LOSS_TYPES; a function of `Pairs`, or a `Loss`, of your own; or a list of
            such, whose weighted sum is the loss (MPO, Wang et al. 2024, arXiv:2411.10442).
        loss_weights: the weight of each loss of the list; 1 by default.
        beta: strength of the pull towards the reference; IPO's tau, ORPO's lambda.
        label_smoothing: probability that a label is flipped, in [0, 0.5).
        ipo_normalization: "token_mean" divides IPO's log-ratios by the number of the answer's
            tokens; "sum" does not.
        reference_free: the reference is a uniform policy, whose log-probabilities count as 0.
        f_divergence_type, f_alpha_divergence_coef: see `fastpref.losses.pairs.divergence_scores`.
        discopop_tau: temperature of DiscoPOP's mixture.
        simpo_gamma: target margin of the rewards in SimPO and AlphaPO.
        alpha: shape of AlphaPO's reward, not 0.
        nll_weight: weight of the NLL of the chosen answers, a mean over their tokens, that is added
            to the loss (cpo_alpha in TRL's CPO trainer, alpha in Liger). None means the weight of
            the papers: for cpo and orpo 1 times the loss's weight, and 0 for the others.
        ld_alpha: weight, in [0, 1], of an answer's tokens beyond the length of the pair's shorter
            answer (LD-DPO, Liu et al. 2024, arXiv:2409.06411); None means 1.
        use_weighting: weight each pair by its probability under the policy (WPO, Zhou et al. 2024,
            arXiv:2406.11827); see `fastpref.losses.tokens.wpo_weights`.
        losses: derived; the losses of loss_type as `Loss`.
        terms: derived; the summands of the loss with their weights: `losses` and the NLL.
        closed_form: derived; the loss's name for a backend's `pair_loss`, or None if the options
            ask for something that `pair_loss` lacks.
        needs_lengths: derived; whether a loss divides by the answers' lengths.
        needs_nll: derived; whether the NLL of the chosen answers is part of the loss.

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

    def __post_init__(self) -> None:
        self._check_losses()
        self._set(losses=tuple(as_loss(name) for name in self.names))
        self._check_values()
        self._check_combinations()
        terms, sums = self._terms(), self.ipo_normalization == "sum"
        self._set(
            terms=terms,
            closed_form=self._closed_form(terms),
            needs_lengths=any(loss.needs_lengths and not (sums and loss.sums) for loss, _ in terms),
            needs_nll=any(loss.needs_nll for loss, _ in terms),
        )

    def _set(self, **derived: Any) -> None:
        for name, value in derived.items():
            object.__setattr__(self, name, value)  # a frozen dataclass refuses plain assignment

    def _check_losses(self) -> None:
        names, weights = self.names, self.loss_weights
        if not names:
            raise ValueError(f"loss_type: got {self.loss_type!r}, expected at least one loss")
        for name in names:
            known = name in LOSSES if isinstance(name, str) else isinstance(name, Loss)
            if not known and (isinstance(name, str) or not callable(name)):
                raise ValueError(
                    f"loss_type: got {name!r}, expected one of {', '.join(LOSS_TYPES)}"
                )
        if weights is None:
            return
        if not isinstance(weights, (list, tuple)) or len(weights) != len(names):
            raise ValueError(
                f"loss_weights: got {weights!r}, expected one number for each of {len(names)} "
                "losses"
            )
        for weight in weights:
            _check_value("loss_weights", weight, "finite numbers")

    def _check_combinations(self) -> None:
        for option in _LOSS_SPECIFIC:
            if getattr(self, option) != getattr(type(self), option):
                self.check_takes(option)
        if self.f_divergence_type != "alpha_divergence" and self.f_alpha_divergence_coef != 0.5:
            raise ValueError(
                f"f_alpha_divergence_coef: f_divergence_type {self.f_divergence_type!r} does not "
                "support it; only 'alpha_divergence' does"
            )
        if "exo_pair" in self.names and self.label_smoothing == 0:
            raise ValueError(
                "label_smoothing: got 0 with loss_type 'exo_pair', expected more, such as 0.001"
            )
        if "alphapo" in self.names and self.alpha == 0:
            raise ValueError(
                "alpha: got 0 with loss_type 'alphapo', expected another value, such as 0.25; at 0 "
                "it is 'simpo'"
            )

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
        """loss_type as a tuple: names, functions and `Loss` objects."""
        losses = self.loss_type
        return tuple(losses) if isinstance(losses, (list, tuple)) else (losses,)

    def _terms(self) -> tuple[tuple[Loss, float], ...]:
        weights = (1.0,) * len(self.losses) if self.loss_weights is None else self.loss_weights
        terms = tuple(zip(self.losses, weights, strict=True))
        nll_weight = self.nll_weight
        if nll_weight is None:
            nll_weight = sum(weight * loss.nll_weight for loss, weight in terms)
        return (*terms, (LOSSES["sft"], nll_weight)) if nll_weight else terms

    def _closed_form(self, terms: tuple[tuple[Loss, float], ...]) -> str | None:
        """The name of the one term, if neither a weight nor an option modifies it."""
        name = self.names[0]
        modified = self.f_divergence_type != "reverse_kl" or self.ld_alpha is not None
        modified = modified or self.use_weighting or len(terms) > 1 or terms[0][1] != 1
        return name if isinstance(name, str) and not modified else None

    @property
    def pair_parameters(self) -> dict[str, float]:
        """The loss-specific arguments of a backend's `pair_loss`."""
        if self.closed_form == "discopop":
            return {"option": self.discopop_tau}
        if self.closed_form in ("simpo", "alphapo"):
            return {"option": self.simpo_gamma, "shape": self.alpha}
        return {}

    @property
    def reference(self) -> str:
        """Whether reference log-probs are "required", "optional" or not accepted ("none")."""
        kinds = [loss.reference for loss in self.losses]
        if self.reference_free:
            return "none"
        return next((kind for kind in ("required", "optional") if kind in kinds), "none")

    def check_takes(self, option: str, name: str | None = None) -> None:
        """Raise ValueError unless the losses support an option or an input of each pair.

        Of a list of losses one must support it, or all if it is shared by the losses of a pair.

        Args:
            option: as in `Loss.takes`.
            name: what the error calls the option; by default `option`.
        """
        losses = self.losses
        supporting = [loss for loss in losses if loss.takes(option)]
        refusing = [loss for loss in losses if not loss.takes(option) and not loss.batch_mean]
        if supporting and not (refusing and option in _SHARED):
            return
        others = [loss_type for loss_type, loss in LOSSES.items() if loss.takes(option)]
        raise ValueError(
            f"{name or option}: loss_type {(refusing or losses)[0].name!r} does not support it; "
            f"only {', '.join(others)} {'does' if len(others) == 1 else 'do'}"
        )

    def check_reference(self, *present: bool) -> None:
        """Raise ValueError if reference log-probs are missing, or present for a loss without.

        Args:
            present: whether each of the tensors of reference log-probs was passed.
        """
        if self.reference_free and any(present):
            raise ValueError(
                "reference_free: got True with reference log-probs, expected one of the two"
            )
        if self.reference == "none" and any(present):
            raise ValueError(
                f"ref_logps: got them for loss_type {self.losses[0].name!r}, which has no "
                "reference; expected None"
            )
        if not all(present) and (any(present) or self.reference == "required"):
            raise ValueError(
                "ref_logps: got None, expected the reference's log-probs; without a reference "
                "model pass reference_free=True"
            )


LOSS_OPTIONS = frozenset(option.name for option in fields(LossOptions))


def as_loss(name: LossType) -> Loss:
    """The `Loss` of a name, of a function of `Pairs`, or the `Loss` itself."""
    if isinstance(name, str):
        return LOSSES[name]
    return name if isinstance(name, Loss) else Loss(name)


def pop_loss_options(keywords: dict[str, Any]) -> LossOptions:
    """Remove the options of the loss from a function's keyword arguments.

    They are either the attributes of `LossOptions` one by one, or a `LossOptions` as loss_options.
    """
    options = keywords.pop("loss_options", None)
    if options is not None:
        if not isinstance(options, LossOptions):
            raise ValueError(f"loss_options: got {type(options).__name__}, expected LossOptions")
        for name in LOSS_OPTIONS & keywords.keys():
            raise ValueError(f"{name}: got it with loss_options, expected one of the two")
        return options
    return cached_options(
        LossOptions, {name: keywords.pop(name) for name in LOSS_OPTIONS & keywords.keys()}
    )


def refuse_unknown(function: str, options: dict[str, Any]) -> None:
    """Raise TypeError for a keyword argument that is left over, with Python's message."""
    for name in options:
        raise TypeError(f"{function}() got an unexpected keyword argument {name!r}")


def _check_value(name: str, value: Any, expected: str, low: float = -math.inf) -> None:
    check_number(name, value)
    if not low < value < math.inf:
        raise ValueError(f"{name}: got {value}, expected {expected}")
