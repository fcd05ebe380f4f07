"""Data loaders: with row positions, with dispatch from one process, and by length.

With dispatch, accelerate reads batches in the first process, joins them on dimension 0 and splits
the result among the processes. That would separate chosen from rejected sequences, and split flat
token positions. So a dispatched batch here is a stack of complete batches, one for each process.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.data_loader import prepare_data_loader
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler, get_worker_info
from transformers.trainer_pt_utils import get_length_grouped_indices

POSITION = "position"  # the key of a row's position in its data set, in rows and in batches
_FLAT = "token_indices"  # the suffix of keys that hold positions in flattened labels
Batch = dict[str, Tensor]
Collator = Callable[[list[dict]], Batch]


class NumberedRows(Dataset):
    """A map-style data set that adds its position to each row."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {**self.dataset[index], POSITION: index}

    def __getitems__(self, indices: list[int]) -> list[dict[str, Any]]:
        get_rows = getattr(self.dataset, "__getitems__", None)
        rows = get_rows(indices) if get_rows else [self.dataset[i] for i in indices]
        return [{**row, POSITION: i} for row, i in zip(rows, indices, strict=True)]


class NumberedStream(IterableDataset):
    """A stream that adds a position to each row.

    A row's position is the same in every process. Two workers of a loader, which read different
    rows, never give the same position.
    """

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __iter__(self) -> Iterator[dict[str, Any]]:
        worker = get_worker_info()
        workers, worker_id = (1, 0) if worker is None else (worker.num_workers, worker.id)
        for i, row in enumerate(self.dataset):
            yield {**row, POSITION: i * workers + worker_id}


@dataclass
class NumberedCollator:
    """Another collator's batches, with the positions of their rows, int64 [P]."""

    collator: Collator

    def __call__(self, examples: list[dict[str, Any]]) -> Batch:
        positions = [example[POSITION] for example in examples]
        rows = [{k: v for k, v in example.items() if k != POSITION} for example in examples]
        return {**self.collator(rows), POSITION: torch.tensor(positions)}


@dataclass
class StackedCollator:
    """Another collator's batches, one for each process, stacked to [processes, ...].

    Batches are padded to the same length, labels with -100 and all else with 0. Rows are repeated
    if their number is not divisible by the number of processes. Flat token positions are left out,
    since their number differs between batches; the loss computes them.
    """

    collator: Collator
    processes: int

    def __call__(self, examples: list[dict[str, Any]]) -> Batch:
        size = -(-len(examples) // self.processes)
        whole = [examples[i % len(examples)] for i in range(size * self.processes)]
        parts = [self.collator(whole[i : i + size]) for i in range(0, len(whole), size)]
        keys = [key for key in parts[0] if not key.endswith(_FLAT)]
        return {key: _stack([part[key] for part in parts], key) for key in keys}


def _stack(tensors: list[Tensor], key: str) -> Tensor:
    if tensors[0].dim() < 2:
        return torch.stack(tensors)
    width = max(t.shape[1] for t in tensors)
    fill = -100 if key.endswith("labels") else 0
    padded = []
    for t in tensors:
        wide = t.new_full((t.shape[0], width, *t.shape[2:]), fill)
        wide[:, : t.shape[1]] = t
        padded.append(wide)
    return torch.stack(padded)


def row_lengths(dataset: Any) -> list[int]:
    """The number of tokens of each row of tokenised data: prompt + longest answer."""
    answers = [key for key in dataset.column_names if key.endswith("_ids") and key != "prompt_ids"]
    return [len(row["prompt_ids"]) + max(len(row[key]) for key in answers) for row in dataset]


class LengthSampler(Sampler):
    """Samples rows so that those of a batch have similar lengths, in a new order in every epoch.

    Args:
        lengths: the rows' numbers of tokens.
        batch_size: rows per optimiser step.
        seed: determines the order, together with the epoch.
    """

    def __init__(self, lengths: list[int], batch_size: int, seed: int) -> None:
        self.lengths, self.batch_size, self.seed = lengths, batch_size, seed
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        yield from get_length_grouped_indices(self.lengths, self.batch_size, generator=generator)
        self.epoch += 1

    def set_epoch(self, epoch: int) -> None:
        """Set the number of the next epoch."""
        self.epoch = epoch


def set_sampler_epoch(loader: Any, epoch: int) -> None:
    """Set the next epoch of a loader's sampler, which may be inside several batch samplers."""
    batches = getattr(loader, "batch_sampler", None)
    while batches is not None:
        sampler: Any = getattr(batches, "sampler", None)
        if hasattr(sampler, "set_epoch"):
            sampler.set_epoch(epoch)
        batches = getattr(batches, "batch_sampler", None)


def own_part(batch: Any) -> Any:
    """This process's batch from its part [1, ...] of a dispatched stack."""
    return {key: value.squeeze(0) for key, value in batch.items()}


def make_loader(
    dataset: Any,
    collator: Collator,
    accelerator: Any,
    *,
    batch_size: int,
    dispatch: bool = False,
    **options: Any,
) -> Any:
    """A loader of this process's part of a data set, on its device.

    Args:
        dataset: map-style or a stream.
        collator: makes a batch from a list of rows.
        accelerator: the `accelerate.Accelerator`.
        batch_size: rows per batch and process; with split_batches of the accelerator, rows per
            batch of all processes.
        dispatch: whether the first process reads the data for all. Batches are then parts of a
            `StackedCollator`'s, to be passed through `own_part`.
        options: of `torch.utils.data.DataLoader`.
    """
    processes = accelerator.num_processes
    if dispatch:
        collator = StackedCollator(collator, processes)
        batch_size *= 1 if accelerator.split_batches else processes
    loader = DataLoader(dataset, batch_size=batch_size, collate_fn=collator, **options)
    # The mesh says which processes get the same batches. Older versions of accelerate lack it.
    device_mesh = getattr(accelerator, "_prepare_device_mesh", lambda: None)
    version_options = {
        "data_seed": getattr(accelerator.dataloader_config, "data_seed", None),
        "torch_device_mesh": device_mesh(),
    }
    return prepare_data_loader(
        loader,
        accelerator.device,
        num_processes=processes,
        process_index=accelerator.process_index,
        split_batches=dispatch or accelerator.split_batches,
        put_on_device=True,
        rng_types=list(accelerator.rng_types or ()),
        dispatch_batches=dispatch,
        even_batches=True,  # equal numbers of batches; evaluation counts repeated rows once
        use_seedable_sampler=accelerator.use_seedable_sampler,
        non_blocking=accelerator.non_blocking,
        **{name: value for name, value in version_options.items() if value is not None},
    )
