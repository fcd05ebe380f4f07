"""Loaders: of evaluation data, whose rows are known again, of data that one process dispatches, of
rows by their length.

accelerate's dispatcher reads batches in the first process, joins them on dimension 0 and cuts it
into as many pieces as there are processes. A batch [chosen; rejected] would be torn apart, and flat
token positions cut. So a batch that is to be dispatched is a stack of finished batches, one for
each process, and the cut falls between them.
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

POSITION = "position"  # of a row in its data set; also the batch's key of all of them
_FLAT = "token_indices"  # ends the keys of positions in flattened labels
Batch = dict[str, Tensor]
Collator = Callable[[list[dict]], Batch]


class NumberedRows(Dataset):
    """A map-style data set whose rows have their position."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {**self.dataset[index], POSITION: index}

    def __getitems__(self, indices: list[int]) -> list[dict[str, Any]]:
        several = getattr(self.dataset, "__getitems__", None)
        rows = several(indices) if several else [self.dataset[i] for i in indices]
        return [{**row, POSITION: i} for row, i in zip(rows, indices, strict=True)]


class NumberedStream(IterableDataset):
    """A stream whose rows have their position: the same in every process, and its own in every
    worker of a loader."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __iter__(self) -> Iterator[dict[str, Any]]:
        worker = get_worker_info()
        workers, own = (1, 0) if worker is None else (worker.num_workers, worker.id)
        for i, row in enumerate(self.dataset):
            yield {**row, POSITION: i * workers + own}


@dataclass
class NumberedCollator:
    """Any collator's batches, with their rows' positions, int64 [P]."""

    collator: Collator

    def __call__(self, examples: list[dict[str, Any]]) -> Batch:
        positions = [example[POSITION] for example in examples]
        rows = [{k: v for k, v in example.items() if k != POSITION} for example in examples]
        return {**self.collator(rows), POSITION: torch.tensor(positions)}


@dataclass
class StackedCollator:
    """Any collator's batches of so many processes, stacked [processes, ...].

    Batches of different lengths are padded, labels with -100 and all else with 0, and rows are
    repeated where there are too few for batches of one size. Flat token positions are left out:
    they differ in number, and the loss finds them itself.
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
    """The tokens of each row of tokenised data: its prompt with its longest answer."""
    answers = [key for key in dataset.column_names if key.endswith("_ids") and key != "prompt_ids"]
    return [len(row["prompt_ids"]) + max(len(row[key]) for key in answers) for row in dataset]


class LengthSampler(Sampler):
    """Rows of like lengths in the same batches, in another order in every pass.

    Args:
        lengths: of the rows.
        batch_size: rows per step.
        seed: with the number of the pass it determines the order.
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
        """Say which pass is next."""
        self.epoch = epoch


def set_sampler_epoch(loader: Any, epoch: int) -> None:
    """Say which pass is next to the sampler under however many batch samplers."""
    batches = getattr(loader, "batch_sampler", None)
    while batches is not None:
        sampler: Any = getattr(batches, "sampler", None)
        if hasattr(sampler, "set_epoch"):
            sampler.set_epoch(epoch)
        batches = getattr(batches, "batch_sampler", None)


def own_part(batch: Any) -> Any:
    """A process's batch [1, ...], as the dispatcher cuts it off a stack of them, without the 1."""
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
    """A loader of each process's part of a data set, on its device.

    Args:
        dataset: map-style or a stream.
        batch_size: rows per batch and process; of all processes where the accelerator's
            split_batches is set.
        dispatch: the first process reads the data and sends the others theirs; batches are those of
            `StackedCollator`, for `own_part`.
        options: of `torch.utils.data.DataLoader`.
    """
    processes = accelerator.num_processes
    if dispatch:
        collator = StackedCollator(collator, processes)
        batch_size *= 1 if accelerator.split_batches else processes
    loader = DataLoader(dataset, batch_size=batch_size, collate_fn=collator, **options)
    shared = getattr(accelerator, "_prepare_device_mesh", lambda: None)  # who shares batches
    more = {
        "data_seed": getattr(accelerator.dataloader_config, "data_seed", None),
        "torch_device_mesh": shared(),
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
        even_batches=True,  # so that processes wait for one another; repeated rows count once
        use_seedable_sampler=accelerator.use_seedable_sampler,
        non_blocking=accelerator.non_blocking,
        **{name: value for name, value in more.items() if value is not None},
    )
