"""From a collated batch to the arguments of the model and of `linear_preference_loss`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fastpref.data.columns import NUMBERS, UNPAIRED_NUMBERS
from fastpref.data.segments import PLAN


def loss_inputs(
    batch: dict[str, Any], ref_logps: Tensor | None, nll_on_prompt: bool
) -> dict[str, Tensor | None]:
    """Arguments of `linear_preference_loss` from a batch, on the batch's device.

    Args:
        batch: a batch of `PreferenceCollator` or of `SegmentCollator`; or another one with at least
            input_ids, attention_mask and completion_mask, [2P, T] int64.
        ref_logps: [2P], of the reference, or None.
        nll_on_prompt: whether the NLL counts the prompts' tokens as well.
    """
    inputs: dict[str, Tensor | None] = {
        "labels": batch_labels(batch),
        "token_indices": batch.get("token_indices"),
        "ref_logps": ref_logps,
        "pair_weight": batch.get("weight"),
        "margin": batch.get("margin"),
        "soft_labels": batch.get("soft_label"),
    }
    if PLAN in batch:
        inputs |= {"sequence_ids": batch["sequence_ids"], "lengths": batch["lengths"]}
        if nll_on_prompt:  # all flat tokens have one of the two labels
            positions = torch.arange(len(batch["labels"]), device=batch["labels"].device)
            inputs |= {"nll_labels": batch["nll_labels"], "token_indices": positions}
        return inputs
    # As in TRL, IPO divides by all completion tokens, also by an unlabelled one at position 0.
    inputs["lengths"] = batch["completion_mask"].sum(1).clamp(min=1)
    if nll_on_prompt:
        nll_labels = _next_tokens(batch["input_ids"], batch["attention_mask"])
        inputs |= {"nll_labels": nll_labels, "token_indices": None}
    return inputs


_OF_SEGMENTS = {
    PLAN, "hidden_indices", "sequence_ids", "nll_labels", "lengths", "sequence_tokens",
}  # fmt: skip
_NOT_FOR_MODEL = {
    "completion_mask", "labels", "token_indices", "rows", "label", *NUMBERS, *UNPAIRED_NUMBERS,
    *_OF_SEGMENTS,
}  # fmt: skip


def model_inputs(batch: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a collated batch that is passed to the model."""
    return {key: value for key, value in batch.items() if key not in _NOT_FOR_MODEL}


def batch_labels(batch: Mapping[str, Any]) -> Tensor:
    """A batch's labels [B, T] int64, aligned with the hidden states.

    Computed from input_ids and completion_mask if the collator does not return them.
    """
    if "labels" in batch:
        return batch["labels"]
    return _next_tokens(batch["input_ids"], batch["completion_mask"])


def _next_tokens(input_ids: Tensor, mask: Tensor) -> Tensor:
    """[B, T]: at position t the token t + 1, or -100 where mask [B, T] is 0 for it."""
    labels = torch.full_like(input_ids, -100)
    labels[:, :-1] = input_ids[:, 1:].masked_fill(mask[:, 1:] == 0, -100)
    return labels
