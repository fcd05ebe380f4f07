"""Keys of sequences by content: what the reference's log-probabilities of a sequence depend on."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastpref.data.batches import batch_labels, model_inputs
from fastpref.progress import watched

KEY_BYTES = 16
KEY = np.dtype(f"V{KEY_BYTES}")  # numpy sorts and compares these as bytes
_CHUNK = 64  # rows that are collated at a time
Batch = dict[str, Any]
Parts = Callable[[Batch], list[Batch]]


@dataclass
class DataKeys:
    """The keys of the sequences of a data set's rows.

    Attributes:
        keys: [rows, C] of `KEY`. A pair has C = 2 sequences, chosen and rejected. A single answer
            has one, or two with the mismatched answer of KTO's KL estimate.
        tokens: [rows, C] int32, the labelled tokens of each sequence.
        lengths: [rows] int32, the tokens of each row's longest sequence.
    """

    keys: np.ndarray
    tokens: np.ndarray
    lengths: np.ndarray

    def select(self, rows: np.ndarray) -> DataKeys:
        """Those of some rows."""
        return DataKeys(self.keys[rows], self.tokens[rows], self.lengths[rows])


def sequence_keys(batch: Batch) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The key, the labelled tokens and the length of each of a batch's S sequences.

    A key is a hash of the tokens, the labels and whatever else the model gets, at the positions of
    the attention mask. Padding does not change it.

    Args:
        batch: a collator's batch, on any device.

    Returns:
        Keys [S] of `KEY`, labelled tokens [S] int32, lengths [S] int32.

    Raises:
        ValueError: an input of the model that does not belong to single sequences.
    """
    labels = batch_labels(batch).cpu().numpy()
    ids: np.ndarray = batch["input_ids"].cpu().numpy()
    attention_mask = batch.get("attention_mask")
    mask: np.ndarray = (
        np.ones(ids.shape, bool) if attention_mask is None else attention_mask.cpu().numpy() != 0
    )
    inputs: dict[str, np.ndarray] = {}
    for name, value in sorted(model_inputs(batch).items()):
        if name in ("input_ids", "attention_mask"):
            continue
        if not isinstance(value, Tensor) or value.shape[:1] != ids.shape[:1]:
            raise ValueError(
                f"reference_store: the collator's {name} does not have a value for each sequence, "
                "so that a sequence cannot be recognised; expected reference_store=None"
            )
        inputs[name] = value.cpu().numpy()
    keys = []
    for i in range(len(ids)):
        is_token = mask[i]
        digest = hashlib.blake2b(digest_size=KEY_BYTES)
        digest.update(ids[i][is_token].astype("<i8").tobytes())
        digest.update(labels[i][is_token].astype("<i8").tobytes())
        for name, value in inputs.items():
            of_tokens = value[i][is_token] if value.shape[1:2] == is_token.shape else value[i]
            digest.update(name.encode() + np.ascontiguousarray(of_tokens).tobytes())
        keys.append(digest.digest())
    counts = (labels != -100).sum(1).astype(np.int32)
    return np.frombuffer(b"".join(keys), KEY), counts, mask.sum(1).astype(np.int32)


def data_keys(
    dataset: Any,
    collator: Callable[[list[dict]], Batch],
    parts: Parts,
    *,
    name: str,
    disable_tqdm: bool = False,
) -> DataKeys:
    """The keys of all rows of a map-style data set.

    Args:
        collator: makes a batch from a list of rows.
        parts: splits a batch of P rows into batches of sequences, C * P together, the first
            sequences of all rows before the second ones.
        name: what progress calls the data.
        disable_tqdm: whether to show no progress.
    """
    starts = range(0, len(dataset), _CHUNK)
    chunks: list[list[np.ndarray]] = []
    title = f"Looking up {name} data in the reference store"
    for start in watched(starts, title, "rows", len(dataset), _CHUNK, disable_tqdm):
        stop = min(start + _CHUNK, len(dataset))
        batch = collator([dataset[i] for i in range(start, stop)])
        arrays_of_parts = zip(*(sequence_keys(part) for part in parts(batch)), strict=True)
        chunks.append(
            [np.concatenate(arrays).reshape(-1, stop - start).T for arrays in arrays_of_parts]
        )
    keys, tokens, lengths = (np.concatenate(arrays) for arrays in zip(*chunks, strict=True))
    return DataKeys(keys, tokens, lengths.max(1))


def labelled(batch: Batch, token_logps: Tensor) -> np.ndarray:
    """The log-probs [S, T] of a batch at its labels, one sequence after the other, float32 [N]."""
    chosen = batch_labels(batch) != -100
    return token_logps.masked_select(chosen.to(token_logps.device)).to(torch.float32).cpu().numpy()


def among(keys: np.ndarray, ordered: np.ndarray) -> np.ndarray:
    """Which keys are in a sorted array."""
    if not len(ordered):
        return np.zeros(keys.shape, bool)
    return ordered[np.searchsorted(ordered, keys).clip(max=len(ordered) - 1)] == keys
