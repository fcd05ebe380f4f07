"""Preference losses: pure functions of sequence log-probabilities.

A loss is one function of the margin data of P pairs that returns the loss of each pair; `_LOSSES`
lists it with the options it understands. Everything else, checks, weights, rewards and the mean, is
shared. The functions are differentiable by autograd; a backend's `pair_loss` has closed forms.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastpref.backends.tile import check_number

IPO_NORMALIZATIONS = ("token_mean", "sum")


class PreferenceLoss(NamedTuple):
    """loss []: mean over the pairs. The rewards [P]: beta (logp - ref), detached."""

    loss: Tensor
    chosen_rewards: Tensor
    rejected_rewards: Tensor


@dataclass(frozen=True)
class Pairs:
    """What a loss function sees. chosen, rejected [P]: policy minus reference log-probabilities."""

    chosen: Tensor
    rejected: Tensor
    beta: float
    label_smoothing: float
    margin: Tensor | float
    chosen_lengths: Tensor | None
    rejected_lengths: Tensor | None


def sigmoid(pairs: Pairs) -> Tensor:
    """DPO, Rafailov et al. 2023 (arXiv:2305.18290), Eq. 7: -log sigmoid(beta d).

    d is chosen - rejected. label_smoothing e gives cDPO (Mitchell 2023):
    -(1-e) log sigmoid(beta d) - e log sigmoid(-beta d).
    margin m gives DPO with an offset (Amini et al. 2024, arXiv:2402.10571): beta d - m for beta d.
    Gradient in d: -beta (1-e) sigmoid(-x) + beta e sigmoid(x), x = beta d - m.
    """
    x = pairs.beta * (pairs.chosen - pairs.rejected) - pairs.margin
    e = pairs.label_smoothing
    loss = -F.logsigmoid(x)
    return loss if e == 0 else (1 - e) * loss - e * F.logsigmoid(-x)


def ipo(pairs: Pairs) -> Tensor:
    """IPO, Azar et al. 2023 (arXiv:2310.12036), Eq. 17: (d - 1/(2 beta))^2, beta their tau.

    With lengths each log-ratio is divided by its answer's tokens first ("token_mean", as TRL does
    and as the paper's experiments did); without, they are the paper's sums. Gradient in d:
    2 (d - 1/(2 beta)).
    """
    chosen, rejected = pairs.chosen, pairs.rejected
    if pairs.chosen_lengths is not None and pairs.rejected_lengths is not None:
        chosen = chosen / pairs.chosen_lengths.clamp(min=1)
        rejected = rejected / pairs.rejected_lengths.clamp(min=1)
    return (chosen - rejected - 1 / (2 * pairs.beta)) ** 2


@dataclass(frozen=True)
class Loss:
    """A loss function and the options that mean something to it."""

    function: Callable[[Pairs], Tensor]
    options: frozenset[str] = frozenset()
    needs_lengths: bool = False


_LOSSES = {
    "sigmoid": Loss(sigmoid, frozenset({"label_smoothing", "margin"})),
    "ipo": Loss(ipo, frozenset({"ipo_normalization"}), needs_lengths=True),
}
LOSS_TYPES = tuple(_LOSSES)
NEEDS_LENGTHS = frozenset(name for name, loss in _LOSSES.items() if loss.needs_lengths)


def check_options(
    loss_type: str,
    beta: float,
    label_smoothing: float,
    ipo_normalization: str,
    margin: Tensor | None,
) -> Loss:
    """Raise ValueError for an unknown loss, a bad value, or an option the loss does not support."""
    if loss_type not in _LOSSES:
        raise ValueError(f"loss_type: got {loss_type!r}, expected one of {', '.join(LOSS_TYPES)}")
    loss = _LOSSES[loss_type]
    check_number("beta", beta)
    check_number("label_smoothing", label_smoothing)
    if not 0 < beta < math.inf:
        raise ValueError(f"beta: got {beta}, expected a positive number")
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing: got {label_smoothing}, expected a value in [0, 0.5)")
    if ipo_normalization not in IPO_NORMALIZATIONS:
        raise ValueError(
            f"ipo_normalization: got {ipo_normalization!r}, expected one of "
            f"{', '.join(IPO_NORMALIZATIONS)}"
        )
    given = {
        "label_smoothing": label_smoothing != 0,
        "margin": margin is not None,
        "ipo_normalization": ipo_normalization != "token_mean",
    }
    for option, is_given in given.items():
        if is_given and option not in loss.options:
            supporters = [name for name, other in _LOSSES.items() if option in other.options]
            raise ValueError(
                f"{option}: loss_type {loss_type!r} does not support it; "
                f"only {', '.join(supporters)} does"
            )
    return loss


def _check_pairs(shape: torch.Size, **tensors: Tensor | None) -> None:
    for name, t in tensors.items():
        if t is not None and not isinstance(t, Tensor):
            raise ValueError(f"{name}: got {type(t).__name__}, expected a tensor {tuple(shape)}")
        if t is not None and t.shape != shape:
            raise ValueError(f"{name}: got shape {tuple(t.shape)}, expected {tuple(shape)}")


def preference_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor | None,
    ref_rejected_logps: Tensor | None,
    *,
    loss_type: str = "sigmoid",
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    ipo_normalization: str = "token_mean",
    chosen_lengths: Tensor | None = None,
    rejected_lengths: Tensor | None = None,
    reference_free: bool = False,
    weight: Tensor | None = None,
    margin: Tensor | None = None,
) -> PreferenceLoss:
    """The loss of P preference pairs from sequence log-probabilities.

    Args:
        chosen_logps, rejected_logps: [P] policy log-probabilities, summed over the answer's tokens.
        ref_chosen_logps, ref_rejected_logps: [P] of the reference; None with reference_free.
        loss_type: "sigmoid" (DPO) or "ipo"; their docstrings have the formulas.
        beta: strength of the pull towards the reference; IPO's tau.
        label_smoothing: probability that a label is flipped (cDPO), in [0, 0.5).
        ipo_normalization: "token_mean" divides each log-ratio by its answer's tokens, "sum" does
            not.
        chosen_lengths, rejected_lengths: [P] labelled tokens per answer; IPO's token mean needs
            them.
        reference_free: the reference is the uniform policy; its log-probabilities count as 0.
        weight: [P] factor on each pair's loss. The mean still divides by P.
        margin: [P] by how much the chosen answer's reward should exceed the rejected one's.

    Returns:
        PreferenceLoss. Zero pairs give a zero loss that is connected to the graph.

    Raises:
        ValueError: an unknown loss, an option that the loss does not support, shapes that differ, a
            missing reference, or one given with reference_free.
    """
    loss = check_options(loss_type, beta, label_smoothing, ipo_normalization, margin)
    if not isinstance(chosen_logps, Tensor):
        raise ValueError(f"chosen_logps: got {type(chosen_logps).__name__}, expected a tensor [P]")
    if chosen_logps.dim() != 1:
        raise ValueError(f"chosen_logps: got shape {tuple(chosen_logps.shape)}, expected [P]")
    _check_pairs(
        chosen_logps.shape,
        rejected_logps=rejected_logps,
        ref_chosen_logps=ref_chosen_logps,
        ref_rejected_logps=ref_rejected_logps,
        chosen_lengths=chosen_lengths,
        rejected_lengths=rejected_lengths,
        weight=weight,
        margin=margin,
    )
    check_reference(reference_free, ref_chosen_logps is not None, ref_rejected_logps is not None)
    if loss.needs_lengths and ipo_normalization == "token_mean":
        for side, lengths in (("chosen", chosen_lengths), ("rejected", rejected_lengths)):
            if lengths is None:
                raise ValueError(
                    f"{side}_lengths: got None, expected the number of labelled tokens of each "
                    "answer; IPO divides by them unless ipo_normalization='sum'"
                )
    else:
        chosen_lengths = rejected_lengths = None
    if ref_chosen_logps is None or ref_rejected_logps is None:
        chosen, rejected = chosen_logps, rejected_logps
    else:
        chosen = chosen_logps - ref_chosen_logps
        rejected = rejected_logps - ref_rejected_logps
    pairs = Pairs(
        chosen,
        rejected,
        beta,
        label_smoothing,
        0.0 if margin is None else margin,
        chosen_lengths,
        rejected_lengths,
    )
    per_pair = loss.function(pairs)
    if weight is not None:
        per_pair = per_pair * weight
    return PreferenceLoss(
        per_pair.sum() / max(per_pair.shape[0], 1),
        beta * chosen.detach(),
        beta * rejected.detach(),
    )


def check_reference(reference_free: bool, *given: bool) -> None:
    """Raise ValueError unless the reference is given, or reference_free says that there is none."""
    if reference_free and any(given):
        raise ValueError(
            "reference_free: got True with reference log-probs, expected one of the two"
        )
    if not reference_free and not all(given):
        raise ValueError(
            "ref_logps: got None, expected the reference's log-probs; without a reference model "
            "pass reference_free=True"
        )
