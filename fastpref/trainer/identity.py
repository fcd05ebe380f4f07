"""What a training run is: what its checkpoints may be continued with, and what differs."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from fastpref.heads.reading import unwrap
from fastpref.losses.options import LossOptions
from fastpref.reference.identity import adapter_options, as_json
from fastpref.trainer.config import BaseConfig

# Options that the trajectory depends on, apart from those of the loss and the number of steps.
_OPTIONS = (
    "seed",
    "data_seed",
    "learning_rate",
    "weight_decay",
    "lr_scheduler_type",
    "max_grad_norm",
    "optim",
    "max_length",
    "truncation_mode",
    "train_sampling_strategy",
    "group_by_length",
    "dataloader_drop_last",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "optim_args",
    "warmup_steps",
    "warmup_ratio",
    "lr_scheduler_kwargs",
    "neftune_noise_alpha",
    "precision",
    "bf16",
    "fp16",
    "sync_ref_model",
    "ref_model_mixup_alpha",
    "ref_model_sync_steps",
    "router_aux_loss_coef",
)
# Options of an adapter that change no weight's shape.
_SCALES = ("lora_alpha", "lora_dropout", "use_rslora", "alpha_pattern")


def describe_run(
    args: BaseConfig,
    model: Any,
    data: dict[str, Any],
    loss: LossOptions | dict[str, Any],
    weights: dict[str, str | None],
) -> dict[str, Any]:
    """What a run is, as JSON values that are compared with those of a checkpoint.

    Args:
        args: the trainer's options.
        model: the policy, with its adapter.
        data: `fingerprint` of the training data.
        loss: the loss's options; a function of the user's own goes by its name.
        weights: `untrained_weights` of the trainer's models.
    """
    if not isinstance(loss, dict):
        loss = {f.name: getattr(loss, f.name) for f in dataclasses.fields(loss) if f.init}
    return {
        "model": _model(model),
        "adapter": adapter_options(model),
        "weights": weights,
        "data": data,
        "loss": {name: as_json(value) for name, value in loss.items()},
        "options": {name: as_json(getattr(args, name, None)) for name in _OPTIONS},
        "rows per step": args.per_device_train_batch_size
        * args.gradient_accumulation_steps
        * args.world_size,
    }


def untrained_weights(model: Any, reference: Any) -> dict[str, str | None]:
    """The SHA-256 of samples of weights that a run depends on and that its checkpoints lack.

    Args:
        model: the policy. If it has an adapter, the sample is of the base model.
        reference: the model that reference log-probs come from, or None.
    """
    adapters = getattr(model, "peft_config", None) or {}
    base = None
    if adapters:
        parts = {*adapters, "modules_to_save", "original_module"}
        base = _sample(
            (name, p)
            for name, p in model.named_parameters()
            if not (p.requires_grad or "lora_" in name or parts & set(name.split(".")))
        )
    digest = None if reference is None else _sample(unwrap(reference).named_parameters())
    return {"base": base, "reference": digest}


def _sample(weights: Iterable[tuple[str, Tensor]]) -> str:
    """The SHA-256 of a few values of each weight; of one in shards or without values, of none."""
    digest = hashlib.sha256()
    for name, p in weights:
        digest.update(name.encode())
        if not (p.is_meta or hasattr(p, "_local_tensor")):
            values = p.detach().reshape(-1)
            for part in (values[:32], values[-32:]):
                digest.update(part.contiguous().cpu().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def fingerprint(dataset: Any) -> dict[str, Any]:
    """The number of rows of tokenised data and the SHA-256 of its columns; of a stream, neither."""
    if not hasattr(dataset, "__len__"):
        return {"rows": "a stream"}
    import pyarrow as pa

    digest = hashlib.sha256()
    for batch in dataset.with_format("arrow").iter(batch_size=1000):
        sink = pa.BufferOutputStream()
        bare = batch.replace_schema_metadata(None).combine_chunks()
        with pa.ipc.new_stream(sink, bare.schema) as writer:
            writer.write_table(bare)
        digest.update(sink.getvalue())
    return {"rows": len(dataset), "sha256": digest.hexdigest()}


def differences(saved: dict[str, Any], present: dict[str, Any]) -> list[str]:
    """The differences of a run from the one that wrote a checkpoint, a phrase each."""
    trained, trains = _trained(saved), _trained(present)
    if trained != trains:
        return [f"the checkpoint is of a run that trains {trained}, and this one trains {trains}"]
    phrases = []
    for key in ("rows", "sha256"):
        before, after = ((run.get("data") or {}).get(key) for run in (saved, present))
        if before != after:
            text = (
                f"{after} training rows instead of {before}"
                if key == "rows"
                else ("training data whose contents are others")
            )
            phrases.append(text)
            break
    for title, part in (("", "options"), ("loss option ", "loss"), ("model's ", "model")):
        before, after = saved.get(part) or {}, present.get(part) or {}
        if part == "loss":  # of losses of different kinds, what both have
            before, after = (
                {k: v for k, v in d.items() if k in before.keys() & after} for d in (before, after)
            )
        phrases += _changes(title, before, after)
    for title in ("base", "reference"):
        before, after = ((run.get("weights") or {}).get(title) for run in (saved, present))
        if before and after and before != after:
            phrases.append(
                f"the {title}'s weights are others: a run goes on with the model that it began "
                "with, and takes what was trained from the checkpoint"
            )
    before, after = saved.get("adapter") or {}, present.get("adapter") or {}
    for name in sorted({*before, *after}):
        phrases += _changes(f"adapter {name!r}: ", before.get(name) or {}, after.get(name) or {})
    phrases += _changes(
        "", *({"rows per step": run.get("rows per step")} for run in (saved, present))
    )
    return phrases


def why_never(saved: dict[str, Any], present: dict[str, Any]) -> list[str]:
    """The `differences` that forbid to resume: files that do not fit the model or the optimiser.

    Arguments and phrases: those of `differences`.
    """
    trained, trains = _trained(saved), _trained(present)
    if trained != trains:
        return differences(saved, present)
    phrases = _changes("model's ", saved.get("model") or {}, present.get("model") or {})
    before, after = saved.get("adapter") or {}, present.get("adapter") or {}
    for name in sorted({*before, *after}):
        shapes = (
            {k: v for k, v in (d.get(name) or {}).items() if k not in _SCALES}
            for d in (before, after)
        )
        phrases += _changes(f"adapter {name!r}: ", *shapes)
    optimisers = ({"optim": (run.get("options") or {}).get("optim")} for run in (saved, present))
    return phrases + _changes("", *optimisers)


def _changes(title: str, saved: dict[str, Any], present: dict[str, Any]) -> list[str]:
    names = [name for name in {**saved, **present} if saved.get(name) != present.get(name)]
    return [f"{title}{name} {present.get(name)} instead of {saved.get(name)}" for name in names]


def _trained(run: dict[str, Any]) -> str:
    return "a LoRA adapter" if run.get("adapter") else "all weights"


def _model(model: Any) -> dict[str, Any]:
    base = unwrap(model)
    config = getattr(base, "config", None)
    return {
        "class": type(base).__name__,
        "parameters": sum(p.numel() for n, p in base.named_parameters() if "lora_" not in n),
        "vocabulary": getattr(config, "vocab_size", None),
    }
