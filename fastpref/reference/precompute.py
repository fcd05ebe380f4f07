"""`precompute`: the reference's log-probabilities of a data set, computed before training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastpref.data.columns import REFERENCE
from fastpref.progress import watched


def has_reference(dataset: Any, names: Sequence[str] = REFERENCE) -> bool:
    """Whether a data set has the columns of reference log-probs."""
    columns = dataset.column_names or list(next(iter(dataset), {}))
    return set(names) <= set(columns)


def precompute(
    dataset: Any,
    logps: Callable[[dict[str, Any]], Tensor],
    collator: Callable[[list[dict]], dict[str, Tensor]],
    accelerator: Any,
    *,
    batch_size: int,
    name: str,
    columns: Sequence[str] = REFERENCE,
    num_workers: int = 0,
    disable_tqdm: bool = False,
) -> Any:
    """Add the columns of reference log-probs to a map-style data set.

    Args:
        dataset: a tokenised `datasets.Dataset`.
        logps: maps a batch of P rows on the device to the reference's sequence log-probs, [C * P]
            for C columns, one column after the other.
        collator: makes a batch from a list of rows.
        accelerator: the `accelerate.Accelerator`, which splits the work among processes.
        batch_size: rows per batch and process.
        name: what progress and errors call the data.
        columns: the names of the new columns.
        num_workers: of the data loader.
        disable_tqdm: whether to show no progress.

    Returns:
        The data set with the columns, float32.

    Raises:
        ValueError: a stream, or a log-prob that is not finite.
    """
    from datasets import Dataset

    from fastpref.data.loaders import make_loader, row_lengths

    if not isinstance(dataset, Dataset):
        raise ValueError(
            "precompute_ref_log_probs=True needs data of known length, got a stream; load the data "
            "or set precompute_ref_log_probs=False"
        )
    # Longest first: similar lengths need little padding, and the memory peak is in the first batch.
    order = np.argsort(-np.array(row_lengths(dataset)), kind="stable")
    longest_first = dataset.select(order)
    loader = make_loader(
        longest_first, collator, accelerator, batch_size=batch_size, num_workers=num_workers
    )
    parts = []
    rows = batch_size * accelerator.num_processes
    title = f"Reference log-probs of {name} data"
    for batch in watched(loader, title, "rows", len(order), rows, disable_tqdm):
        sums = logps(batch).view(len(columns), -1).T.contiguous()  # [P, C], gathered on dim 0
        parts.append(accelerator.gather_for_metrics(sums).cpu())
    values = np.empty((len(order), len(columns)), dtype=np.float32)
    values[order] = torch.cat(parts).float().numpy()
    if not np.isfinite(values).all():
        index = int(np.flatnonzero(~np.isfinite(values).all(1))[0])
        row = dataset[index].get("row", index)
        raise ValueError(f"{name} data: the reference's log-probs of row {row} are {values[index]}")
    for i, column in enumerate(columns):
        dataset = dataset.add_column(column, values[:, i])
    return dataset
