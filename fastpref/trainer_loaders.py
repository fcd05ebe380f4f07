"""The trainers' loaders."""

from __future__ import annotations

from typing import Any

from transformers import Trainer

from .config import BaseConfig
from .loaders import NumberedCollator, NumberedRows, NumberedStream, make_loader, own_part


class LoadingTrainer(Trainer):
    """What of a trainer makes its loaders and takes batches from them."""

    args: BaseConfig
    _dispatches: bool  # whether the first process reads the data of all

    def _loader(self, dataset: Any, collator: Any, batch_size: int, **options: Any) -> Any:
        args = self.args
        names = ("num_workers", "pin_memory", "prefetch_factor", "multiprocessing_context")
        given = {name: getattr(args, f"dataloader_{name}", None) for name in names}
        options = {**{k: v for k, v in given.items() if v is not None}, **options}
        return make_loader(
            dataset,
            collator,
            self.accelerator,
            batch_size=batch_size,
            dispatch=self._dispatches,
            **options,
        )

    def get_train_dataloader(self) -> Any:
        """As in `transformers.Trainer`; with dispatch_batches the first process reads all data."""
        if not self._dispatches:
            return super().get_train_dataloader()
        dataset: Any = self.train_dataset
        options: dict[str, Any] = {"drop_last": self.args.dataloader_drop_last}
        if hasattr(dataset, "__len__"):
            options["sampler"] = self._get_train_sampler()
        size = self._train_batch_size
        return self._loader(dataset, self.data_collator, size, **options)

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """As in `transformers.Trainer`; of dispatched batches, this process's part."""
        batches, count = super().get_batch_samples(*args, **kwargs)
        return [own_part(batch) for batch in batches] if self._dispatches else batches, count

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """A loader of prepared evaluation data, by default the trainer's own, or of that name."""
        own: Any = self.eval_dataset
        if isinstance(eval_dataset, str):
            eval_dataset = own[eval_dataset]
        dataset = own if eval_dataset is None else eval_dataset
        if dataset is None:
            raise ValueError("eval_dataset: got None, expected evaluation data")
        numbered = NumberedRows if hasattr(dataset, "__len__") else NumberedStream
        collator = NumberedCollator(self.data_collator)
        return self._loader(numbered(dataset), collator, self.args.eval_batch_size)

    def get_test_dataloader(self, test_dataset: Any) -> Any:
        """As `get_eval_dataloader`."""
        return self.get_eval_dataloader(test_dataset)
