"""KTO's KL term in the trainer of single answers: its rows, its references, its estimate.

The term is max(0, mean(log pi(y'|x) - log pi_ref(y'|x))) over the answers of a batch of all
processes, each with another prompt. It has no gradient. Per batch:

    KL_ keys of a batch -> policy's log-probs [B] - reference's log-probs [B] = log-ratios [B]
    log-ratios of all parts and processes -> mean, at least 0 -> every part's loss

An evaluation stores the log-ratios of its rows instead, and estimates the term once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Sampler, SequentialSampler
from transformers.trainer_utils import has_length

from fastpref.data.columns import UNPAIRED_REFERENCE
from fastpref.data.segments import PLAN
from fastpref.trainer.references import ReferencingTrainer
from fastpref.trainer.rows import RowsTrainer

_SEQUENCES = (
    "input_ids", "attention_mask", "completion_mask", "labels", "token_indices", "position_ids",
    PLAN, "hidden_indices", "sequence_ids", "lengths",
)  # fmt: skip


class EstimatingTrainer(RowsTrainer, ReferencingTrainer):
    """The part of a trainer of single answers that estimates KTO's KL term.

    Attributes:
        estimates_kl: whether the loss has the term.
    """

    estimates_kl: bool
    _estimates: list[tuple[Tensor, Tensor | None]]  # of the parts of the present batch
    _kl: Tensor | None = None  # of the present batch

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler | None:
        """The rows in the data's order, in which the mismatched answers were chosen."""
        if not self.estimates_kl:
            return super()._get_train_sampler(train_dataset)
        dataset = self.train_dataset if train_dataset is None else train_dataset
        return self.exchanging(SequentialSampler(dataset)) if has_length(dataset) else None

    def reference_columns(self) -> tuple[str, ...]:
        return UNPAIRED_REFERENCE if self.estimates_kl else UNPAIRED_REFERENCE[:1]

    def reference_parts(self, batch: dict[str, Any]) -> list[dict[str, Any]]:
        parts = ("", "KL_") if self.estimates_kl else ("",)
        return [sequences(batch, part) for part in parts]

    def estimate(self, model: nn.Module, batches: Sequence[dict[str, Any]], by_row: bool) -> None:
        """Store the reference's log-probs and the log-ratios of batches, and the KL term.

        Args:
            model: the policy.
            batches: the parts of a batch, or the batch.
            by_row: whether the term is left to the end of an evaluation.
        """
        self._estimates = [self._log_ratios(model, batch) for batch in batches]
        self._kl, ratios = None, [ratios for _, ratios in self._estimates if ratios is not None]
        if ratios and not by_row:
            mean = torch.cat(ratios).mean()
            self._kl = self.accelerator.gather(mean).mean().clamp(min=0)

    def _log_ratios(self, model: nn.Module, inputs: dict[str, Any]) -> tuple[Tensor, Tensor | None]:
        """The reference's log-probs of a batch's answers [B], and the log-ratios of the mismatched
        answers [B] or None.
        """
        reference = self.reference_logps(inputs)
        assert reference is not None
        if not self.estimates_kl:
            return reference, None
        # In the policy's mode, training with dropout and noise, because the estimate is compared
        # with rewards that are computed in that mode.
        policy = replace(self._policy_reference, model=model, adapter=False, own_mode=True)
        with self.accelerator.autocast():
            logps = policy.logps(sequences(inputs, "KL_"))
        ref_logps, ref_kl_logps = reference.chunk(2)
        return ref_logps, logps - ref_kl_logps


def sequences(batch: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """The part of a batch with the answers; with the prefix KL_ that with the mismatched ones."""
    return {key: batch[prefix + key] for key in _SEQUENCES if prefix + key in batch}
