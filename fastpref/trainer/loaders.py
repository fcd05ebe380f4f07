"""The trainers' loaders."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch.utils.data import Sampler
from transformers import Trainer, TrainerState
from transformers.trainer import TRAINER_STATE_NAME

from fastpref.data.loaders import (
    LengthSampler,
    NumberedCollator,
    NumberedRows,
    NumberedStream,
    make_loader,
    own_part,
    row_lengths,
    set_sampler_epoch,
)
from fastpref.trainer.checks import sampling
from fastpref.trainer.config import BaseConfig


class LoadingTrainer(Trainer):
    """The part of a trainer that makes its data loaders and takes batches from them."""

    args: BaseConfig
    _dispatches: bool  # whether the first process reads the data for all
    _train_loader: Any

    def _prepare_input(self, data: Any) -> Any:
        """As in `transformers.Trainer`, which rounds floats to 16 bits for DeepSpeed's models.

        Numbers of rows keep their dtype: a reference's log-prob has hundreds of nats.
        """
        if isinstance(data, torch.Tensor) and data.dim() < 2:
            return data.to(self.args.device)
        return super()._prepare_input(data)

    def _loader(self, dataset: Any, collator: Any, batch_size: int, **options: Any) -> Any:
        args = self.args
        names = ("num_workers", "pin_memory", "prefetch_factor", "multiprocessing_context")
        defaults = {name: getattr(args, f"dataloader_{name}", None) for name in names}
        options = {**{k: v for k, v in defaults.items() if v is not None}, **options}
        return make_loader(
            dataset,
            collator,
            self.accelerator,
            batch_size=batch_size,
            dispatch=self._dispatches,
            **options,
        )

    def get_train_dataloader(self) -> Any:
        """`transformers.Trainer`'s; with dispatch_batches a loader of dispatched batches."""
        self._train_loader = self._dispatching_loader() if self._dispatches else None
        if self._train_loader is None:
            self._train_loader = super().get_train_dataloader()
        self._check_has_batches(self._train_loader)
        return self._train_loader

    def _check_has_batches(self, loader: Any) -> None:
        """Raise ValueError for a loader without a batch, with which training would end at once."""
        rows: Any = self.train_dataset
        if not self.args.dataloader_drop_last or not hasattr(rows, "__len__"):
            return
        if hasattr(loader, "__len__") and len(loader) == 0:
            raise ValueError(
                f"dataloader_drop_last leaves out the only batch: the data has {len(rows)} rows, "
                f"and {self.args.world_size} processes read {self._train_batch_size} each; "
                "expected smaller batches, or dataloader_drop_last=False"
            )

    def _dispatching_loader(self) -> Any:
        dataset: Any = self.train_dataset
        options: dict[str, Any] = {}
        if hasattr(dataset, "__len__"):
            options["sampler"] = self._get_train_sampler()
            options["drop_last"] = self.args.dataloader_drop_last
        return self._loader(dataset, self.data_collator, self._train_batch_size, **options)

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler | None:
        args = self.args
        if sampling(args) != "group_by_length":
            return super()._get_train_sampler(train_dataset)
        dataset = self.train_dataset if train_dataset is None else train_dataset
        size = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        seed = args.seed if args.data_seed is None else args.data_seed
        return LengthSampler(row_lengths(dataset), size, seed)

    def _init_training_state(self, *args: Any, **kwargs: Any) -> tuple[int, int]:
        """The complete epochs of a resumed run, and the batches to skip in the next epoch."""
        epochs, batches = super()._init_training_state(*args, **kwargs)
        values = [*args, *kwargs.values()]  # the checkpoint's folder is the only string
        place = self._place_in_stream(next((v for v in values if isinstance(v, str)), ""))
        if place is not None:
            epochs, batches = place
            batches = 0 if self.args.ignore_data_skip else batches
        # accelerate may not find the sampler in a loader that skips batches.
        set_sampler_epoch(self._train_loader, epochs)
        return epochs, batches

    def _place_in_stream(self, checkpoint: str) -> tuple[int, int] | None:
        """`_place` of a checkpoint; None if the data is not a stream, or without a trainer state.

        transformers computes a wrong place, since it treats a stream of unknown length as endless.
        """
        path = os.path.join(checkpoint, TRAINER_STATE_NAME)
        if hasattr(self.train_dataset, "__len__") or not os.path.isfile(path):
            return None
        return _place(TrainerState.load_from_json(path), self.args.gradient_accumulation_steps)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        place = self._place_in_stream(resume_from_checkpoint)
        if place is not None and place[0] > 0 and not hasattr(Trainer, "_init_training_state"):
            raise ValueError(
                f"{resume_from_checkpoint} was saved after {place[0]} whole passes over a stream, "
                "which transformers before 5.3 resumes with the wrong rows; expected 5.3 or newer"
            )
        super()._load_from_checkpoint(resume_from_checkpoint, model)

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """`transformers.Trainer`'s; of dispatched batches, this process's part."""
        batches, count = super().get_batch_samples(*args, **kwargs)
        return [own_part(batch) for batch in batches] if self._dispatches else batches, count

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """A loader of prepared evaluation data, whose batches have their rows' positions.

        eval_dataset: prepared data, or a name; None means the trainer's evaluation data.
        """
        stored: Any = self.eval_dataset
        if isinstance(eval_dataset, str):
            eval_dataset = stored[eval_dataset]
        dataset = stored if eval_dataset is None else eval_dataset
        if dataset is None:
            raise ValueError("eval_dataset: got None, expected evaluation data")
        with_positions = NumberedRows if hasattr(dataset, "__len__") else NumberedStream
        collator = NumberedCollator(self.data_collator)
        return self._loader(with_positions(dataset), collator, self.args.eval_batch_size)

    def get_test_dataloader(self, test_dataset: Any) -> Any:
        """The same as `get_eval_dataloader`."""
        return self.get_eval_dataloader(test_dataset)


def _place(state: TrainerState, accumulation: int) -> tuple[int, int]:
    """The place of a checkpoint in a stream: complete epochs, and batches of the present one.

    In a run over a stream, the fraction of `state.epoch` is the number of batches of the present
    epoch divided by that of the whole run.
    """
    if not state.epoch:
        return 0, 0
    epochs, run_batches = int(state.epoch), state.max_steps * accumulation
    batches = round((state.epoch - epochs) * run_batches)
    return (epochs, batches) if batches else (epochs - 1, run_batches)
