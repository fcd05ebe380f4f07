"""`preference_loss`: preference losses from sequence log-probabilities.

A loss is a function of `Pairs` in formulas.py, and an entry of table.py with the options and inputs
that it supports. The code here is common to all losses: checks, weights, rewards and the mean.
Autograd differentiates the functions; a backend's `pair_loss` has some of them in closed form.
Losses of single answers are in unpaired.py.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastpref import validation
from fastpref.losses.options import LossOptions, pop_loss_options, refuse_unknown
from fastpref.losses.pairs import Pairs, divergence_scores
from fastpref.validation import check_number


class PreferenceLoss(NamedTuple):
    """A preference loss and the rewards of the answers.

    Attributes:
        loss: [], the mean over the pairs.
        chosen_rewards, rejected_rewards: [P], beta (logp - ref_logp), detached. For simpo, alphapo
            and orpo alone or with an NLL they are beta times the quantity that these losses
            compare: the mean token log-probability, which alphapo transforms.
    """

    loss: Tensor
    chosen_rewards: Tensor
    rejected_rewards: Tensor


def preference_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor | None = None,
    ref_rejected_logps: Tensor | None = None,
    *,
    chosen_lengths: Tensor | None = None,
    rejected_lengths: Tensor | None = None,
    weight: Tensor | None = None,
    margin: Tensor | None = None,
    soft_labels: Tensor | None = None,
    **options: Any,
) -> PreferenceLoss:
    """The loss of P preference pairs from sequence log-probabilities.

    Args:
        chosen_logps, rejected_logps: [P] policy log-probabilities in nats, summed over the answer's
            tokens, float32 or float64.
        ref_chosen_logps, ref_rejected_logps: [P] of the reference; None with reference_free and for
            a loss without a reference.
        chosen_lengths, rejected_lengths: [P] labelled tokens per answer. Losses per token need both
            (ipo, sigmoid_norm, simpo, alphapo, orpo); an NLL needs the chosen ones.
        weight: [P] factor on each pair's loss. The mean still divides by P.
        margin: [P] target difference between the chosen and the rejected reward.
        soft_labels: [P] probability, in [0, 1], that the chosen answer is the preferred one; a
            label_smoothing for each pair.
        options: loss_type, "sigmoid" (DPO) by default, beta=0.1, label_smoothing, loss_weights,
            ipo_normalization, reference_free, f_divergence_type, f_alpha_divergence_coef,
            discopop_tau, simpo_gamma, alpha, nll_weight: see `LossOptions`. The formulas and the
            papers are in fastpref/losses/formulas.py.

    Returns:
        PreferenceLoss. Zero pairs give a zero loss that is connected to the graph.

    Raises:
        ValueError: an unknown loss, an option that the loss does not support, shapes that differ,
            reference log-probs that are missing, or passed for a loss without a reference.
        TypeError: an unknown keyword.
    """
    loss_options = pop_loss_options(options)
    refuse_unknown("preference_loss", options)
    for name in ("ld_alpha", "use_weighting"):
        if getattr(loss_options, name) not in (None, False):
            raise ValueError(
                f"{name}: sums of log-probs do not support it, expected None; use "
                "linear_preference_loss or the functions of fastpref.losses.tokens"
            )
    if not isinstance(chosen_logps, Tensor):
        raise ValueError(f"chosen_logps: got {type(chosen_logps).__name__}, expected a tensor [P]")
    if chosen_logps.dim() != 1:
        raise ValueError(f"chosen_logps: got shape {tuple(chosen_logps.shape)}, expected [P]")
    references = {"ref_chosen_logps": ref_chosen_logps, "ref_rejected_logps": ref_rejected_logps}
    _check_pairs(
        chosen_logps.shape,
        rejected_logps=rejected_logps,
        **references,
        chosen_lengths=chosen_lengths,
        rejected_lengths=rejected_lengths,
    )
    check_inputs(loss_options, chosen_logps.shape[0], weight, margin, soft_labels, "weight")
    loss_options.check_reference(*(t is not None for t in references.values()))
    needs_lengths, needs_nll = loss_options.needs_lengths, loss_options.needs_nll
    for name, lengths, needed in (
        ("chosen_lengths", chosen_lengths, needs_lengths or needs_nll),
        ("rejected_lengths", rejected_lengths, needs_lengths),
    ):
        if needed and lengths is None:
            raise ValueError(
                f"{name}: got None, expected the number of labelled tokens of each answer, by "
                "which this loss divides"
            )
    pairs = make_pairs(
        loss_options,
        chosen_logps,
        rejected_logps,
        ref_chosen_logps,
        ref_rejected_logps,
        chosen_lengths=chosen_lengths,
        rejected_lengths=rejected_lengths,
        margin=margin,
        soft_labels=soft_labels,
        chosen_nll=-chosen_logps,
        nll_lengths=chosen_lengths,
    )
    return evaluate(pairs, weight)


def make_pairs(
    options: LossOptions,
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor | None,
    ref_rejected_logps: Tensor | None,
    *,
    chosen_lengths: Tensor | None = None,
    rejected_lengths: Tensor | None = None,
    margin: Tensor | None = None,
    **inputs: Tensor | None,
) -> Pairs:
    """The `Pairs` of checked tensors [P]; inputs: soft_labels, chosen_nll and nll_lengths."""
    if ref_chosen_logps is None or ref_rejected_logps is None:
        ref_chosen_logps = ref_rejected_logps = torch.zeros_like(chosen_logps)
        chosen, rejected = chosen_logps, rejected_logps
    else:
        chosen = chosen_logps - ref_chosen_logps
        rejected = rejected_logps - ref_rejected_logps
    divergence = options.f_divergence_type, options.f_alpha_divergence_coef
    return Pairs(
        options,
        options.beta,
        chosen_logps,
        rejected_logps,
        ref_chosen_logps,
        ref_rejected_logps,
        chosen,
        rejected,
        divergence_scores(chosen, *divergence),
        divergence_scores(rejected, *divergence),
        None if chosen_lengths is None else chosen_lengths.clamp(min=1),
        None if rejected_lengths is None else rejected_lengths.clamp(min=1),
        0.0 if margin is None else margin,
        **inputs,
    )


def evaluate(
    pairs: Pairs, weight: Tensor | None = None, policy_weight: Tensor | None = None
) -> PreferenceLoss:
    """The weighted sum of the losses, each a mean over the pairs, and the rewards.

    Args:
        pairs: P pairs; pairs.options names the losses.
        weight: [P] factor on each pair in every loss.
        policy_weight: [P] WPO's factor on each pair, which does not apply to an NLL.
    """
    size = max(pairs.chosen.shape[0], 1)
    total = pairs.chosen.new_zeros(())
    for loss, loss_weight in pairs.options.terms:
        pair_losses = loss.function(pairs)
        if not isinstance(pair_losses, Tensor) or pair_losses.shape != pairs.chosen.shape:
            is_tensor = isinstance(pair_losses, Tensor)
            result = tuple(pair_losses.shape) if is_tensor else type(pair_losses).__name__
            raise ValueError(
                f"loss_type: {loss.name} returned {result}, expected a tensor "
                f"{tuple(pairs.chosen.shape)}, the loss of each pair"
            )
        if policy_weight is not None and not loss.batch_mean:
            pair_losses = pair_losses * policy_weight
        if weight is not None:
            pair_losses = pair_losses * weight
        mean = pair_losses.sum() / size
        total = total + (mean if loss_weight == 1 else loss_weight * mean)
    chosen, rejected = pairs.chosen, pairs.rejected
    reward_functions = [loss.rewards for loss in pairs.options.losses if not loss.batch_mean]
    if len(reward_functions) == 1 and reward_functions[0] is not None:
        chosen, rejected = reward_functions[0](pairs)
    return PreferenceLoss(total, pairs.beta * chosen.detach(), pairs.beta * rejected.detach())


def check_inputs(
    options: LossOptions,
    pairs: int,
    weight: Tensor | None,
    margin: Tensor | None,
    soft_labels: Tensor | None,
    weight_name: str = "pair_weight",
) -> None:
    """Raise ValueError unless the inputs of each pair are [pairs] and supported by the loss.

    weight_name is what errors call the weight.
    """
    for option, name, t in (
        ("weight", weight_name, weight),
        ("margin", "margin", margin),
        ("soft_labels", "soft_labels", soft_labels),
    ):
        if t is not None:
            options.check_takes(option, name)
            _check_pairs(torch.Size((pairs,)), **{name: t})
    if soft_labels is None:
        return
    if options.label_smoothing != 0:
        raise ValueError("soft_labels: got them with label_smoothing, expected one of the two")
    if validation.may_synchronise(soft_labels):
        bad = ~((soft_labels >= 0) & (soft_labels <= 1))
        if bool(bad.any()):
            raise ValueError(
                f"soft_labels: got {soft_labels[bad][0].item()}, expected values in [0, 1]"
            )


def _check_pairs(shape: torch.Size, **tensors: Tensor | None) -> None:
    for name, t in tensors.items():
        if t is not None and not isinstance(t, Tensor):
            raise ValueError(f"{name}: got {type(t).__name__}, expected a tensor {tuple(shape)}")
        if t is not None and t.shape != shape:
            raise ValueError(f"{name}: got shape {tuple(t.shape)}, expected {tuple(shape)}")


def reward_loss(
    chosen_scores: Tensor,
    rejected_scores: Tensor,
    margin: Tensor | None = None,
    *,
    weight: Tensor | None = None,
    soft_labels: Tensor | None = None,
    center_rewards_coefficient: float | None = None,
) -> Tensor:
    """The loss of a reward model under the Bradley-Terry model of preferences.

    The mean over the pairs of -log sig(x), where x = score_w - score_l - margin and sig is the
    logistic function: Ouyang et al. 2022 (arXiv:2203.02155), Eq. 1. The margin is that of Touvron
    et al. 2023 (arXiv:2307.09288), Eq. 2. Gradient in score_w: -sig(-x) / P.

    Args:
        chosen_scores, rejected_scores: [P] the model's scores of the two answers.
        margin: [P] target difference between the two scores.
        weight: [P] factor on each pair's loss.
        soft_labels: [P] probability p, in [0, 1], that the chosen answer is the preferred one; the
            loss of a pair is -p log sig(x) - (1-p) log sig(-x).
        center_rewards_coefficient: weight of a further term, the mean of (score_w + score_l)^2,
            which centres the scores at 0 (Eisenstein et al. 2023, arXiv:2312.09244).

    Returns:
        The loss [], in the scores' dtype, at least float32. Zero pairs give 0.

    Raises:
        ValueError: shapes that differ, a coefficient that is not a number.
    """
    if not isinstance(chosen_scores, Tensor) or chosen_scores.dim() != 1:
        shape = getattr(chosen_scores, "shape", type(chosen_scores).__name__)
        raise ValueError(f"chosen_scores: got {shape}, expected a tensor [P]")
    _check_pairs(chosen_scores.shape, rejected_scores=rejected_scores)
    check_inputs(LossOptions(), chosen_scores.shape[0], weight, margin, soft_labels, "weight")
    if center_rewards_coefficient is not None:
        check_number("center_rewards_coefficient", center_rewards_coefficient)
    wide = torch.promote_types(chosen_scores.dtype, torch.float32)
    chosen, rejected = chosen_scores.to(wide), rejected_scores.to(wide)
    x = chosen - rejected if margin is None else chosen - rejected - margin
    pair_losses = -F.logsigmoid(x)
    if soft_labels is not None:
        pair_losses = soft_labels * pair_losses - (1 - soft_labels) * F.logsigmoid(-x)
    if center_rewards_coefficient is not None:
        pair_losses = pair_losses + center_rewards_coefficient * (chosen + rejected) ** 2
    if weight is not None:
        pair_losses = pair_losses * weight
    return pair_losses.sum() / max(pair_losses.shape[0], 1)
