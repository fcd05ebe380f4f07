"""Liger-Kernel's chunked preference losses, with its names, argument order and return values.

    - from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss
    + from fastpref.integrations.liger import LigerFusedLinearDPOLoss

The values are those of Liger 0.8.5; docs/liger.md lists the differences and their reasons. Liger is
not imported.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastpref.integrations.liger_base import LigerLoss, PairedLoss
from fastpref.losses.formulas import log_odds
from fastpref.losses.options import LossOptions
from fastpref.losses.preference import preference_loss
from fastpref.losses.table import LOSSES
from fastpref.losses.unpaired import kto_loss
from fastpref.validation import check_number

__all__ = [
    "LigerFusedLinearCPOLoss",
    "LigerFusedLinearDPOLoss",
    "LigerFusedLinearKTOLoss",
    "LigerFusedLinearORPOLoss",
    "LigerFusedLinearSimPOLoss",
]


_DPO = tuple(name for name, loss in LOSSES.items() if loss.reference == "required")


class LigerFusedLinearDPOLoss(PairedLoss):
    """DPO and its relatives (Rafailov et al. 2023, arXiv:2305.18290).

    The loss is alpha * nll + the mean loss of the pairs.

    Args:
        ignore_index: the label of positions that do not count.
        beta: strength of the pull towards the reference.
        alpha: weight of the NLL.
        compute_nll_loss: whether the NLL of the chosen answers is added.
        compiled, chunk_size: without effect.
        use_ref_model: whether there is a reference; without one its log-probs count as 0.
        average_log_prob: whether sequence log-probs are means over tokens instead of sums.
        loss_type: Liger's sigmoid, hinge, exo_pair, nca_pair, robust, bco_pair, sppo_hard,
            apo_zero, apo_down and discopop; and ipo (token mean), sigmoid_norm, aot and
            aot_unpaired, which Liger refuses.
        label_smoothing, discopop_tau: as in `fastpref.LossOptions`.
        head: precision, strategy, memory_budget, backend, gradient_tolerance,
            head_gradient_tolerance, gradient_seed of `fastpref.linear_token_logps`.

    Raises:
        ValueError: an unknown loss_type; a label_smoothing or discopop_tau that the loss_type does
            not use (Liger ignores it); exo_pair without label_smoothing; a label_smoothing outside
            [0, 0.5).
    """

    def __init__(
        self,
        ignore_index: int = -100,
        beta: float = 0.1,
        alpha: float = 1.0,
        compute_nll_loss: bool = False,
        compiled: bool = True,
        use_ref_model: bool = True,
        average_log_prob: bool = False,
        chunk_size: int = 1,
        loss_type: str = "sigmoid",
        label_smoothing: float = 0.0,
        discopop_tau: float = 0.05,
        **head: Any,
    ):
        numbers = dict(alpha=alpha, label_smoothing=label_smoothing, discopop_tau=discopop_tau)
        super().__init__(ignore_index, beta, compiled, chunk_size, head, **numbers)
        if loss_type not in _DPO:
            raise ValueError(f"loss_type: got {loss_type!r}, expected one of {', '.join(_DPO)}")
        if label_smoothing != 0 and loss_type in ("sigmoid", "sigmoid_norm"):
            raise ValueError(
                f"label_smoothing: loss_type {loss_type!r} does not use it in Liger, which drops "
                "it; for cDPO use fastpref.FusedLinearDPOLoss(label_smoothing=...)"
            )
        self._options: dict[str, Any] = dict(
            loss_type=loss_type,
            beta=beta,
            label_smoothing=label_smoothing,
            discopop_tau=discopop_tau,
            reference_free=not use_ref_model,
        )
        LossOptions(**self._options)
        self.alpha, self.compute_nll_loss, self.use_ref_model = (
            alpha,
            compute_nll_loss,
            use_ref_model,
        )
        self.average_log_prob, self.loss_type = average_log_prob, loss_type
        self.label_smoothing, self.discopop_tau = label_smoothing, discopop_tau

    def forward(
        self,
        lin_weight: Tensor,
        _input: Tensor,
        target: Tensor,
        bias: Tensor | None = None,
        ref_input: Tensor | None = None,
        ref_weight: Tensor | None = None,
        ref_bias: Tensor | None = None,
        ref_logps: Tensor | None = None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The loss of B pairs.

        Args:
            lin_weight: [V, H]. _input: [2B, T, H]. bias: [V] or None.
            target: [2B, T] int64, already shifted.
            ref_input: [2B, T, H], the reference's hidden states; or ref_logps.
            ref_weight, ref_bias: the reference's head; by default the policy's.
            ref_logps: [2B] sums over each sequence's labelled tokens; means with average_log_prob.

        Returns:
            The loss [] and, without gradients, (chosen_logps [B], rejected_logps [B],
            chosen_logits_mean [], rejected_logits_mean [], nll_loss [], chosen_rewards [B],
            rejected_rewards [B]).
        """
        average = self.average_log_prob
        scores = self._scores(lin_weight, _input, target, bias, average, self.compute_nll_loss)
        policy = _input, lin_weight, bias
        reference = ref_input, ref_weight, ref_bias, ref_logps
        ref = self._reference(self.use_ref_model, target, average, policy, *reference)
        refs = (None, None) if ref is None else ref.to(scores.chosen).chunk(2)
        chosen_lengths, rejected_lengths = scores.lengths
        out = preference_loss(
            scores.chosen,
            scores.rejected,
            *refs,
            chosen_lengths=chosen_lengths,
            rejected_lengths=rejected_lengths,
            **self._options,
        )
        return scores.result(self.alpha * scores.nll + out.loss, *out[1:])


class LigerFusedLinearCPOLoss(PairedLoss):
    """CPO (Xu et al. 2024, arXiv:2401.08417): DPO's loss with a uniform reference, plus the NLL.

    Sequence log-probs are sums, or means with average_log_prob. With label_smoothing e the loss of
    a pair is -(1-e) log sigmoid(x) - e log sigmoid(-x). Arguments as in `LigerFusedLinearDPOLoss`.
    """

    def __init__(
        self,
        ignore_index: int = -100,
        beta: float = 0.1,
        alpha: float = 1.0,
        label_smoothing: float = 0.0,
        compute_nll_loss: bool = True,
        compiled: bool = True,
        average_log_prob: bool = False,
        chunk_size: int = 1,
        **head: Any,
    ):
        numbers = dict(alpha=alpha, label_smoothing=label_smoothing)
        super().__init__(ignore_index, beta, compiled, chunk_size, head, **numbers)
        self.alpha, self.label_smoothing = alpha, label_smoothing
        self.compute_nll_loss, self.average_log_prob = compute_nll_loss, average_log_prob
        # nll_weight is 0, because `_scores` computes the NLL.
        self._options: dict[str, Any] = dict(
            loss_type="cpo", beta=beta, label_smoothing=label_smoothing, nll_weight=0.0
        )
        LossOptions(**self._options)
        self._margin = 0.0

    def forward(
        self, lin_weight: Tensor, _input: Tensor, target: Tensor, bias: Tensor | None = None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Arguments and returns as in `LigerFusedLinearDPOLoss`, without a reference."""
        average = self.average_log_prob
        scores = self._scores(lin_weight, _input, target, bias, average, self.compute_nll_loss)
        margin = torch.full_like(scores.chosen, self._margin)
        out = preference_loss(scores.chosen, scores.rejected, margin=margin, **self._options)
        return scores.result(self.alpha * scores.nll + out.loss, *out[1:])


class LigerFusedLinearSimPOLoss(LigerFusedLinearCPOLoss):
    """SimPO (Meng et al. 2024, arXiv:2405.14734): token-mean log-probs and a margin gamma.

    As in Liger the NLL is added by default; with compute_nll_loss=False the loss is the paper's.
    Arguments as in `LigerFusedLinearDPOLoss`.
    """

    def __init__(
        self,
        ignore_index: int = -100,
        beta: float = 0.1,
        alpha: float = 1.0,
        label_smoothing: float = 0.0,
        compute_nll_loss: bool = True,
        compiled: bool = True,
        gamma: float = 0.5,
        chunk_size: int = 1,
        **head: Any,
    ):
        check_number("gamma", gamma)
        super().__init__(
            ignore_index,
            beta,
            alpha,
            label_smoothing,
            compute_nll_loss,
            compiled,
            average_log_prob=True,
            chunk_size=chunk_size,
            **head,
        )
        self.gamma = self._margin = gamma


class LigerFusedLinearORPOLoss(PairedLoss):
    """ORPO (Hong et al. 2024, arXiv:2403.07691): NLL - beta log sigmoid(log-odds ratio).

    Sequence log-probs are means over tokens. Arguments as in `LigerFusedLinearDPOLoss`.
    """

    def __init__(
        self,
        ignore_index: int = -100,
        beta: float = 0.1,
        compute_nll_loss: bool = True,
        compiled: bool = True,
        chunk_size: int = 1,
        **head: Any,
    ):
        super().__init__(ignore_index, beta, compiled, chunk_size, head)
        self.compute_nll_loss = compute_nll_loss

    def forward(
        self,
        lin_weight: Tensor,
        _input: Tensor,
        target: Tensor,
        bias: Tensor | None = None,
        nll_target: Tensor | None = None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The loss of B pairs.

        Args:
            lin_weight, _input, target, bias: as in `LigerFusedLinearDPOLoss`.
            nll_target: [2B, T], the labels of the NLL, whose chosen half is read; default: target.

        Returns:
            As in `LigerFusedLinearDPOLoss`, then log_odds_ratio [] and log_odds_chosen [].
        """
        average, nll = True, self.compute_nll_loss
        scores = self._scores(lin_weight, _input, target, bias, average, nll, nll_target)
        chosen, rejected = scores[:2]
        odds = log_odds(chosen) - log_odds(rejected)
        pairs = max(chosen.shape[0], 1)
        ratio = F.logsigmoid(odds).sum() / pairs
        loss = scores.nll - self.beta * ratio
        rewards = self.beta * chosen, self.beta * rejected
        return scores.result(loss, *rewards, ratio, odds.sum() / pairs)


class LigerFusedLinearKTOLoss(LigerLoss):
    """KTO (Ethayarajh et al. 2024, arXiv:2402.01306): 1 - sigmoid(+-beta (logratio - kl)).

    Args:
        desirable_weight, undesirable_weight: weights of the two classes, which Liger lacks.
        ignore_index, beta, compiled, use_ref_model, average_log_prob, chunk_size, head: as in
            `LigerFusedLinearDPOLoss`.
    """

    def __init__(
        self,
        ignore_index: int = -100,
        beta: float = 0.1,
        compiled: bool = True,
        use_ref_model: bool = False,
        average_log_prob: bool = False,
        chunk_size: int = 1,
        *,
        desirable_weight: float = 1.0,
        undesirable_weight: float = 1.0,
        **head: Any,
    ):
        weights = dict(desirable_weight=desirable_weight, undesirable_weight=undesirable_weight)
        super().__init__(ignore_index, beta, compiled, chunk_size, head, **weights)
        self.use_ref_model, self.average_log_prob = use_ref_model, average_log_prob
        self.desirable_weight, self.undesirable_weight = desirable_weight, undesirable_weight

    def forward(
        self,
        _input: Tensor,
        lin_weight: Tensor,
        target: Tensor,
        bias: Tensor | None = None,
        preference_labels: Tensor | None = None,
        ref_input: Tensor | None = None,
        ref_weight: Tensor | None = None,
        ref_bias: Tensor | None = None,
        kl: Tensor | None = None,
        ref_logps: Tensor | None = None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The loss of B answers. As in Liger, _input comes before lin_weight here.

        Args:
            _input: [B, T, H]. lin_weight: [V, H]. target: [B, T] int64. bias: [V] or None.
            preference_labels: [B] bool, whether an answer is desirable.
            ref_input, ref_weight, ref_bias, ref_logps: as in `LigerFusedLinearDPOLoss`, for B.
            kl: [] or [B] estimate of the KL divergence, without a gradient; None means 0.

        Returns:
            The loss [] and, without gradients, sums over the desirable (chosen) and over the other
            (rejected) sequences: (chosen_logps, rejected_logps, chosen_logits, rejected_logits,
            chosen_rewards, rejected_rewards), all [].
        """
        self._check(_input, lin_weight, target, paired=False)
        size = target.shape[:1]
        if preference_labels is None or preference_labels.dtype != torch.bool:
            dtype = None if preference_labels is None else str(preference_labels.dtype)[6:]
            raise ValueError(f"preference_labels: got {dtype}, expected a bool tensor {[*size]}")
        if preference_labels.shape != size:
            raise ValueError(
                f"preference_labels: got shape {tuple(preference_labels.shape)}, expected {[*size]}"
            )
        average, desirable = self.average_log_prob, preference_labels
        logps = self._sums(self._tokens(_input, lin_weight, target, bias), target, average)
        policy = _input, lin_weight, bias
        reference = ref_input, ref_weight, ref_bias, ref_logps
        ref = self._reference(self.use_ref_model, target, average, policy, *reference)
        out = kto_loss(
            logps,
            None if ref is None else ref.to(logps),
            desirable,
            0.0 if kl is None else kl,
            beta=self.beta,
            desirable_weight=self.desirable_weight,
            undesirable_weight=self.undesirable_weight,
            reference_free=ref is None,
        )
        masks = desirable, ~desirable
        sums = [(t * mask).sum() for t in (logps, out.rewards) for mask in masks]
        logits = self._logit_means(_input, lin_weight, bias, desirable)
        logits_per_sequence = target.shape[1] * lin_weight.shape[0]
        logits *= torch.stack([mask.sum() for mask in masks]) * logits_per_sequence
        return out.loss, tuple(t.detach() for t in (*sums[:2], *logits, *sums[2:]))
