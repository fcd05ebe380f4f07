"""The model card of a saved model: README.md with its origin and its training options."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import ModelCard, ModelCardData
from transformers import Trainer
from yaml import YAMLError

from fastpref.heads.reading import unwrap
from fastpref.reference.model import is_peft
from fastpref.trainer.adapter_loading import is_path

logger = logging.getLogger("fastpref")
MARK = "<!-- written by fastpref -->"
SHOWN = (
    "loss_type",
    "beta",
    "learning_rate",
    "num_train_epochs",
    "max_steps",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "max_length",
    "seed",
)


class CardTrainer(Trainer):
    """The part of a trainer that writes a model card with every model that it saves."""

    _tag_names: list[str] = []

    def create_model_card(
        self,
        language: str | None = None,
        license: str | None = None,
        tags: str | list[str] | None = None,
        model_name: str | None = None,
        finetuned_from: str | None = None,
        tasks: str | list[str] | None = None,
        dataset_tags: str | list[str] | None = None,
        dataset: str | list[str] | None = None,
        dataset_args: str | list[str] | None = None,
        *,
        dataset_name: str | list[str] | None = None,
        output_dir: str | None = None,
    ) -> None:
        """Write README.md with the model's base, tags and training options.

        A README.md that was not generated keeps its text and gets the tags. Nothing is uploaded.

        Args:
            language, license, tasks, dataset_tags: metadata of the card.
            tags: further tags besides the trainer's.
            model_name: the card's title; by default the directory's name.
            finetuned_from: the base model; by default the hub name that the model was loaded by.
            dataset, dataset_name: names of the data, for the text and, without dataset_tags, for
                the metadata. dataset is the argument's name in transformers, the other in TRL.
            dataset_args: names of the data's configurations.
            output_dir: the directory; by default the trainer's output directory.
        """
        if not self.is_world_process_zero():
            return
        path = Path(output_dir or str(self.args.output_dir)) / "README.md"
        names = [*_listed(dataset), *_listed(dataset_name)]
        base = finetuned_from or _hub_name(self.model)
        metadata: dict[str, Any] = {
            "base_model": base,
            "library_name": "peft" if is_peft(self.model) else "transformers",
            "model_name": model_name or path.parent.resolve().name,
            "pipeline_tag": next(iter(_listed(tasks)), "text-generation"),
            "language": language,
            "license": license,
            "datasets": _listed(dataset_tags) or names or None,
        }
        try:
            before = ModelCard.load(path) if path.is_file() else None
        except (ValueError, YAMLError) as error:  # the saved weights are worth more than the card
            logger.warning(f"{path} is left as it is, because its metadata cannot be read: {error}")
            return
        old_tags = _listed(before.data.tags) if before is not None else []
        if base is None:  # peft's tag would name a local directory
            old_tags = [tag for tag in old_tags if not tag.startswith("base_model:")]
        all_tags = sorted({*old_tags, *_listed(tags), *self._tag_names})
        if before is not None and not _generated(before.text):
            before.data.tags = all_tags
            before.save(path)
            return
        data = ModelCardData(tags=all_tags, **{k: v for k, v in metadata.items() if v is not None})
        text = _text(str(metadata["model_name"]), base, names + _listed(dataset_args), self)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"---\n{data.to_yaml()}\n---\n\n{text}", "utf-8")

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        super().save_model(output_dir, _internal_call)
        if self.args.should_save:
            self.create_model_card(output_dir=output_dir)


def _generated(text: str) -> bool:
    """Whether a card's text was written by this module, or is peft's unfilled template."""
    return MARK in text or "# Model Card for Model ID" in text


def _listed(names: str | Iterable[str] | None) -> list[str]:
    return [names] if isinstance(names, str) else list(names or [])


def _hub_name(model: Any) -> str | None:
    """The hub name that the base model was loaded by; None for a local directory."""
    name = getattr(unwrap(model).config, "_name_or_path", "")
    return None if not name or is_path(name) or os.path.exists(name) else name


def _text(name: str, base: str | None, data: list[str], trainer: Any) -> str:
    from fastpref import __version__

    kind = "A LoRA or other PEFT adapter" if is_peft(trainer.model) else "A language model"
    origin = f" of [{base}](https://huggingface.co/{base})" if base else ""
    on = f" on {', '.join(data)}" if data else ""
    options = {key: getattr(trainer.args, key) for key in SHOWN}
    rows = [f"| {key} | {_shown(value)} |" for key, value in options.items()]
    versions = {"fastpref": __version__, "transformers": transformers.__version__}
    versions["torch"] = torch.__version__
    lines = [
        f"# {name}",
        "",
        f"{kind}{origin}, trained{on} with `{type(trainer).__name__}` of fastpref: preference "
        "optimisation without logits.",
        "",
        "## Training",
        "",
        "| option | value |",
        "| --- | --- |",
        *rows,
        "",
        "## Versions",
        "",
        *(f"- {library} {version}" for library, version in versions.items()),
        "",
        MARK,
        "",
    ]
    return "\n".join(lines)


def _shown(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
