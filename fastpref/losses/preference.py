"""Preference losses: pure functions of sequence log-probabilities.

A loss is one function (formulas.py) of the `Pairs` of a batch, and a line in
table.py that says which options and inputs it takes. Everything else, checks, weights,
rewards and the mean, is shared and here. The functions are differentiable by autograd; a backend's
`pair_loss` has closed forms of some of them. Losses of single answers are in unpaired.py.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastpref import validation
from fastpref.losses.options import LossOptions, refuse_unknown, take_options
from fastpref.losses.pairs import Pairs, divergence_scores
from fastpref.validation import check_number


class PreferenceLoss(NamedTuple):
    """loss []: mean over the pairs. The rewards [P]: beta (logp - ref), detached.

    The rewards of simpo, alphapo and orpo, where they are the only loss besides an NLL, are beta
    times what these compare: the mean log-probability of a token, or its transform.
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
        chosen_logps, rejected_logps: [P] policy log-probabilities, summed over the answer's tokens.
        ref_chosen_logps, ref_rejected_logps: [P] of the reference; None with reference_free and for
            a loss that has none.
        chosen_lengths, rejected_lengths: [P] labelled tokens per answer; losses per token need them
            (ipo, sigmoid_norm, simpo, alphapo, orpo), and an NLL the chosen ones.
        weight: [P] factor on each pair's loss. The mean still divides by P.
        margin: [P] by how much the chosen answer's reward should exceed the rejected one's.
        soft_labels: [P] probability, in [0, 1], that the chosen answer is the preferred one; a
            label_smoothing for each pair.
        options: loss_type, "sigmoid" (DPO) by default, beta=0.1, label_smoothing, loss_weights,
            ipo_normalization, reference_free, f_divergence_type, f_alpha_divergence_coef,
            discopop_tau, simpo_gamma, alpha, nll_weight: see `LossOptions`. The functions in
            fastpref/losses/formulas.py has the formulas.

    Returns:
        PreferenceLoss. Zero pairs give a zero loss that is connected to the graph.

    Raises:
        ValueError: an unknown loss, an option that the loss does not support, shapes that differ, a
            missing reference, or one given to a loss without.
    """
    checked = take_options(options)
    refuse_unknown("preference_loss", options)
    for name, given in (("ld_alpha", checked.ld_alpha), ("use_weighting", checked.use_weighting)):
        if given is not None and given is not False:
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
    check_inputs(checked, chosen_logps.shape[0], weight, margin, soft_labels, "weight")
    checked.check_reference(*(t is not None for t in references.values()))
    needed = {"chosen_lengths": checked.needs_lengths or checked.needs_nll}
    needed["rejected_lengths"] = checked.needs_lengths
    for name, lengths in (
        ("chosen_lengths", chosen_lengths),
        ("rejected_lengths", rejected_lengths),
    ):
        if needed[name] and lengths is None:
            raise ValueError(
                f"{name}: got None, expected the number of labelled tokens of each answer, by "
                "which this loss divides"
            )
    pairs = make_pairs(
        checked,
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
    """What the loss functions see, from checked tensors [P]."""
    if ref_chosen_logps is None or ref_rejected_logps is None:
        ref_chosen_logps = ref_rejected_logps = torch.zeros_like(chosen_logps)
        chosen, rejected = chosen_logps, rejected_logps
    else:
        chosen = chosen_logps - ref_chosen_logps
        rejected = rejected_logps - ref_rejected_logps
    kind = options.f_divergence_type, options.f_alpha_divergence_coef
    return Pairs(
        options,
        options.beta,
        chosen_logps,
        rejected_logps,
        ref_chosen_logps,
        ref_rejected_logps,
        chosen,
        rejected,
        divergence_scores(chosen, *kind),
        divergence_scores(rejected, *kind),
        None if chosen_lengths is None else chosen_lengths.clamp(min=1),
        None if rejected_lengths is None else rejected_lengths.clamp(min=1),
        0.0 if margin is None else margin,
        **inputs,  # type: ignore[arg-type]
    )


def evaluate(
    pairs: Pairs, weight: Tensor | None = None, policy_weight: Tensor | None = None
) -> PreferenceLoss:
    """The weighted sum of the losses, each a mean over the pairs, and the rewards.

    policy_weight: [P], WPO's, which leaves an NLL alone.
    """
    size = max(pairs.chosen.shape[0], 1)
    total = pairs.chosen.new_zeros(())
    for loss, factor in pairs.options.terms:
        each = loss.function(pairs)
        if not isinstance(each, Tensor) or each.shape != pairs.chosen.shape:
            given = tuple(each.shape) if isinstance(each, Tensor) else type(each).__name__
            raise ValueError(
                f"loss_type: {loss.name} returned {given}, expected a tensor "
                f"{tuple(pairs.chosen.shape)}, the loss of each pair"
            )
        if policy_weight is not None and not loss.batch_mean:
            each = each * policy_weight
        if weight is not None:
            each = each * weight
        mean = each.sum() / size
        total = total + (mean if factor == 1 else factor * mean)
    chosen, rejected = pairs.chosen, pairs.rejected
    own = [loss.rewards for loss in pairs.options.losses if not loss.batch_mean]
    if len(own) == 1 and own[0] is not None:
        chosen, rejected = own[0](pairs)
    return PreferenceLoss(total, pairs.beta * chosen.detach(), pairs.beta * rejected.detach())


def check_inputs(
    options: LossOptions,
    pairs: int,
    weight: Tensor | None,
    margin: Tensor | None,
    soft_labels: Tensor | None,
    weight_name: str = "pair_weight",
) -> None:
    """Raise ValueError unless what comes with each pair fits the pairs and the loss."""
    names = {"weight": weight_name, "margin": "margin", "soft_labels": "soft_labels"}
    given = {"weight": weight, "margin": margin, "soft_labels": soft_labels}
    for option, t in given.items():
        if t is not None:
            options.check_takes(option, names[option])
            _check_pairs(torch.Size((pairs,)), **{names[option]: t})
    if soft_labels is None:
        return
    if options.label_smoothing != 0:
        raise ValueError("soft_labels: got them with label_smoothing, expected one of the two")
    if validation.may_synchronise(soft_labels.device):
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
    """The loss of a reward model under Bradley and Terry's model of preferences.

    The mean over the pairs of -log sig(x), x = score_w - score_l - margin, sig the logistic
    function: Ouyang et al. 2022 (arXiv:2203.02155), Eq. 1; the margin is that of Touvron et al.
    2023 (arXiv:2307.09288), Eq. 2. Gradient in score_w: -sig(-x) / P.

    Args:
        chosen_scores, rejected_scores: [P] the model's scores of the two answers.
        margin: [P] by how much they should differ.
        weight: [P] factor on each pair's loss.
        soft_labels: [P] probability p, in [0, 1], that the chosen answer is the preferred one:
            -p log sig(x) - (1-p) log sig(-x).
        center_rewards_coefficient: c adds c times the mean of (score_w + score_l)^2, which centres
            the scores at 0 (Eisenstein et al. 2023, arXiv:2312.09244).

    Returns:
        The loss [], in the scores' dtype, at least float32. Zero pairs give 0.

    Raises:
        ValueError: shapes that differ, a coefficient that is not a number.
    """
    pairs = LossOptions()
    if not isinstance(chosen_scores, Tensor) or chosen_scores.dim() != 1:
        given = getattr(chosen_scores, "shape", type(chosen_scores).__name__)
        raise ValueError(f"chosen_scores: got {given}, expected a tensor [P]")
    _check_pairs(chosen_scores.shape, rejected_scores=rejected_scores)
    check_inputs(pairs, chosen_scores.shape[0], weight, margin, soft_labels, "weight")
    if center_rewards_coefficient is not None:
        check_number("center_rewards_coefficient", center_rewards_coefficient)
    wide = torch.promote_types(chosen_scores.dtype, torch.float32)
    chosen, rejected = chosen_scores.to(wide), rejected_scores.to(wide)
    x = chosen - rejected if margin is None else chosen - rejected - margin
    each = -F.logsigmoid(x)
    if soft_labels is not None:
        each = soft_labels * each - (1 - soft_labels) * F.logsigmoid(-x)
    if center_rewards_coefficient is not None:
        each = each + center_rewards_coefficient * (chosen + rejected) ** 2
    if weight is not None:
        each = each * weight
    return each.sum() / max(each.shape[0], 1)
