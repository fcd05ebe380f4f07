"""What a collated batch gives to the model and to `linear_preference_loss`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fastpref.data.columns import NUMBERS


def loss_inputs(
    batch: dict[str, Any], ref_logps: Tensor | None, nll_on_prompt: bool
) -> dict[str, Tensor | None]:
    """What the loss takes of a batch, on the batch's device.

    Args:
        batch: as `PreferenceCollator` makes it, or with no more than input_ids, attention_mask and
            completion_mask.
        ref_logps: [2P] of the reference, if there is one.
        nll_on_prompt: whether an NLL counts the prompts' tokens as well.
    """
    inputs = {
        "labels": batch_labels(batch),
        "token_indices": batch.get("token_indices"),
        "ref_logps": ref_logps,
        # As in TRL, IPO divides by all completion tokens, also one at position 0.
        "lengths": batch["completion_mask"].sum(1).clamp(min=1),
        "pair_weight": batch.get("weight"),
        "margin": batch.get("margin"),
        "soft_labels": batch.get("soft_label"),
    }
    if nll_on_prompt:
        tokens, real = batch["input_ids"], batch["attention_mask"]
        whole = torch.full_like(tokens, -100)
        whole[:, :-1] = tokens[:, 1:].masked_fill(real[:, 1:] == 0, -100)
        inputs |= {"nll_labels": whole, "token_indices": None}
    return inputs


_NOT_FOR_MODEL = {"completion_mask", "labels", "token_indices", "rows", *NUMBERS}


def model_inputs(batch: Mapping[str, Any]) -> dict[str, Any]:
    """What of a collator's batch the model itself takes."""
    return {key: value for key, value in batch.items() if key not in _NOT_FOR_MODEL}


def batch_labels(batch: Mapping[str, Any]) -> Tensor:
    """A batch's labels [2P, T], aligned with the hidden states; made if the collator does not."""
    if "labels" in batch:
        return batch["labels"]
    ids, mask = batch["input_ids"], batch["completion_mask"]
    labels = torch.full_like(ids, -100)
    labels[:, :-1] = ids[:, 1:].masked_fill(mask[:, 1:] == 0, -100)
    return labels
