"""What of a trainer saves a model: beside what is there, until it is whole."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fastpref.reference.model import REF_ADAPTER
from fastpref.storage import StorageError, disk_problem, move_into
from fastpref.trainer.config import BaseConfig
from fastpref.trainer.output_directory import ADAPTER_FILES, WEIGHT_FILES, OutputDirectory
from fastpref.trainer.processes import AgreeingTrainer


class SavingTrainer(AgreeingTrainer):
    """A trainer whose model replaces another one only when it is whole."""

    args: BaseConfig
    output_directory: OutputDirectory

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model beside what is there, and move it to its place when it is whole.

        Raises:
            StorageError: the disk is full or fails; what was there is still there.
        """
        if _internal_call:
            folder = self.args.output_dir if output_dir is None else output_dir
            self._write_model(str(folder), _internal_call)
            return
        directory = self.output_directory if output_dir is None else OutputDirectory(output_dir)
        target = directory.path
        beside = directory.beside
        try:
            if self.args.should_save:
                directory.clear()
                beside.mkdir(parents=True)
                if (target / "README.md").is_file():  # whose text the model card keeps
                    shutil.copy2(target / "README.md", beside)
            with self._not_pushed():
                self._write_model(str(beside), _internal_call)
            if self.is_deepspeed_enabled or self.is_fsdp_enabled:
                self.accelerator.wait_for_everyone()
            if self.args.should_save:
                _replace_model(beside, target)
                directory.clear()
        except Exception as error:
            problem = disk_problem(error)
            directory.clear()
            if problem is None:
                raise
            raise StorageError(
                f"the model could not be saved in {target}: {problem}; what was there before has "
                "not been changed"
            ) from error
        if self.args.push_to_hub:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _write_model(self, folder: str, in_checkpoint: bool) -> None:
        if self.is_fsdp_enabled and not in_checkpoint:
            self._save(folder, self._whole_weights())
        elif self._divides_adapters():
            # transformers leaves frozen weights out, and PEFT then writes the trained adapter's
            # under the name of the reference's.
            weights = self.accelerator.get_state_dict(self.deepspeed)
            if self.args.should_save:
                self._save(folder, weights)
        else:
            super().save_model(folder, in_checkpoint)

    def _divides_adapters(self) -> bool:
        """Whether ZeRO-3 has divided a model with a frozen adapter, and may gather it."""
        engine: Any = self.deepspeed
        return (
            engine is not None
            and REF_ADAPTER in getattr(self.model, "peft_config", {})
            and engine.zero_optimization_partition_weights()
            and engine.zero_gather_16bit_weights_on_model_save()
        )

    def _whole_weights(self) -> dict[str, Any]:
        """The weights of a model that FSDP shards, on the first process, and tied ones once.

        `transformers.Trainer` saves no model where FSDP's checkpoints are shards.
        """
        model: Any = self.model
        weights: dict[str, Any] = self.accelerator.get_state_dict(model)
        names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
        once = {name for name, _ in model.named_parameters()}
        for name in names:
            if name not in once:
                weights.pop(name, None)
        return weights

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """As in `transformers.Trainer`, but for weights that are tied to some that were loaded."""
        model: Any = self.model
        weights = dict(model.named_parameters(remove_duplicate=False))
        missing = set(load_result.missing_keys)
        loaded = {p.data_ptr() for name, p in weights.items() if name not in missing}
        tied = {n for n in missing if n in weights and weights[n].data_ptr() in loaded}
        untied = [name for name in load_result.missing_keys if name not in tied]
        super()._issue_warnings_after_load(type(load_result)(untied, load_result.unexpected_keys))

    @contextmanager
    def _not_pushed(self) -> Iterator[None]:
        """While files are not where they stay, nothing is uploaded."""
        pushes, self.args.push_to_hub = self.args.push_to_hub, False
        try:
            yield
        finally:
            self.args.push_to_hub = pushes


def _replace_model(beside: Path, target: Path) -> None:
    """Move a whole model into a directory, and then remove what is left there of an older one.

    Beside the weights of a whole model, shards and an adapter of another one would be loaded as
    well. Beside an adapter nothing is removed: the weights may be those of its base model.
    """
    names = {path.name for path in beside.iterdir()}
    move_into(beside, target)
    if names.isdisjoint(WEIGHT_FILES[:2]):
        return
    for pattern in (*WEIGHT_FILES, *ADAPTER_FILES):
        for path in target.glob(pattern):
            if path.name not in names:
                path.unlink()
