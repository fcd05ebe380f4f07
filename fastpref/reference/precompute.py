"""`precompute`: the reference's log-probabilities of a data set, computed before training."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from fastpref.data.columns import REFERENCE
from fastpref.progress import watched
from fastpref.reference.keys import DataKeys, Parts, labelled

if TYPE_CHECKING:  # they need more than torch
    from fastpref.reference.store import ReferenceStore


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
    from fastpref.data.loaders import row_lengths

    check_has_length(dataset, "precompute_ref_log_probs")
    options = collator, accelerator, batch_size, num_workers, name, disable_tqdm
    values = np.empty((len(dataset), len(columns)), dtype=np.float32)
    for rows, batch in _longest_first(dataset, np.array(row_lengths(dataset)), *options):
        sums = logps(batch).view(len(columns), -1).T.contiguous()  # [P, C], gathered on dim 0
        places = accelerator.gather(torch.from_numpy(rows).to(sums.device)).cpu().numpy()
        values[places] = accelerator.gather(sums).float().cpu().numpy()
    if not np.isfinite(values).all():
        index = int(np.flatnonzero(~np.isfinite(values).all(1))[0])
        row = dataset[index].get("row", index)
        raise ValueError(f"{name} data: the reference's log-probs of row {row} are {values[index]}")
    for i, column in enumerate(columns):
        dataset = dataset.add_column(column, values[:, i])
    return dataset


def extend_store(
    store: ReferenceStore,
    dataset: Any,
    keys_of_rows: DataKeys,
    token_logps: Callable[[dict[str, Any]], Tensor],
    parts: Parts,
    collator: Callable[[list[dict]], dict[str, Tensor]],
    accelerator: Any,
    *,
    batch_size: int,
    name: str,
    num_workers: int = 0,
    disable_tqdm: bool = False,
) -> None:
    """Compute the reference's token log-probs of a data set, and write them to a store.

    Every process of a run calls this, computes its share of the rows and writes parts of its own.
    One of them has the store's lock.

    Args:
        dataset: a tokenised `datasets.Dataset` of the rows that the store lacks.
        keys_of_rows: the keys of these rows.
        token_logps: maps a batch of S sequences on the device to token log-probs, of the shape of
            its labels.
        parts: as in `data_keys`.
        collator: makes the batches, of separate rows or of rows of segments.
        accelerator, batch_size, name, num_workers, disable_tqdm: as in `precompute`.

    Raises:
        ValueError: a log-prob that is not finite.
        StorageError: the store cannot be written.
    """
    options = collator, accelerator, batch_size, num_workers, name, disable_tqdm
    with store.writer() as writer:
        for rows, batch in _longest_first(dataset, keys_of_rows.lengths, *options):
            batches = parts(batch)
            # [P, C] in the parts' order: the first sequences of all rows before the second ones.
            keys, counts = (
                a[rows].T.reshape(len(batches), -1)
                for a in (keys_of_rows.keys, keys_of_rows.tokens)
            )
            for part, part_keys, part_counts in zip(batches, keys, counts, strict=True):
                values = labelled(part, token_logps(part))
                if not np.isfinite(values).all():
                    _raise_not_finite(batch, part_counts, values, name)
                writer.add(part_keys, part_counts, values)


def _longest_first(
    dataset: Any,
    lengths: np.ndarray,
    collator: Callable[[list[dict]], dict[str, Tensor]],
    accelerator: Any,
    batch_size: int,
    num_workers: int,
    name: str,
    disable_tqdm: bool,
) -> Iterator[tuple[np.ndarray, dict[str, Any]]]:
    """This process's batches, and which rows [P] of the data set they are of.

    Arguments: those of `extend_store`; lengths is the number of tokens of each row.
    """
    from fastpref.data.loaders import POSITION, NumberedCollator, NumberedRows, make_loader

    # Longest first: similar lengths need little padding, and the memory peak is in the first batch.
    order = np.argsort(-lengths, kind="stable")
    loader = make_loader(
        NumberedRows(dataset.select(order)),
        NumberedCollator(collator),
        accelerator,
        batch_size=batch_size,
        num_workers=num_workers,
    )
    title = f"Reference log-probs of {name} data"
    per_item = batch_size * accelerator.num_processes
    for batch in watched(loader, title, "rows", len(order), per_item, disable_tqdm):
        yield order[batch.pop(POSITION).cpu().numpy()], batch


def check_has_length(dataset: Any, option: str) -> None:
    """Raise ValueError for a stream, whose rows cannot be computed ahead.

    option: the trainer's option that asks for it.
    """
    from datasets import Dataset

    if not isinstance(dataset, Dataset):
        raise ValueError(
            f"{option} needs data of known length, got a stream; load the data, or leave {option} "
            "out to have the reference computed in each step"
        )


def _raise_not_finite(
    batch: dict[str, Any], counts: np.ndarray, values: np.ndarray, name: str
) -> None:
    owner = np.repeat(np.arange(len(counts)), counts)
    first = int(np.flatnonzero(~np.isfinite(values))[0])
    rows = batch.get("rows")
    where = "" if rows is None else f" of row {int(rows[int(owner[first]) % len(rows)])}"
    raise ValueError(
        f"{name} data: a log-prob of the reference{where} is {values[first]}; expected finite ones"
    )
