"""The identity of a reference: everything but the tokens that its log-probabilities depend on."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from fastpref.heads.reading import read_head, unwrap
from fastpref.reference.model import REF_ADAPTER, as_reference, is_peft

# Options of an adapter that determine what it computes or how it is trained.
ADAPTER_OPTIONS = (
    "peft_type",
    "r",
    "lora_alpha",
    "lora_dropout",
    "target_modules",
    "modules_to_save",
    "use_rslora",
    "use_dora",
    "bias",
    "layers_to_transform",
    "rank_pattern",
    "alpha_pattern",
)
# Those of an adapter's options that change no log-probability of a given set of weights.
_WITHOUT_EFFECT = ("target_modules", "layers_to_transform", "inference_mode", "auto_mapping")
# Keys of a model's config that change no log-probability of a given set of weights: names, the
# dtype (the weights' own counts), what is returned, and how it is trained.
_CONFIG_WITHOUT_EFFECT = {
    "transformers_version", "architectures", "dtype", "torch_dtype", "use_cache", "return_dict",
    "output_hidden_states", "output_attentions", "output_router_logits", "router_aux_loss_coef",
    "id2label", "label2id", "problem_type", "initializer_range", "pretraining_tp", "torchscript",
    "gradient_checkpointing", "tie_word_embeddings", "task_specific_params", "finetuning_task",
}  # fmt: skip
_WRAPPERS = {"base_layer", "original_module", "token_adapter"}  # names that PEFT puts in between


def adapter_options(model: Any) -> dict[str, dict[str, Any]]:
    """The options of each adapter of a model as JSON values, by the adapter's name."""
    configs = getattr(model, "peft_config", None) or {}
    return {
        name: {key: as_json(getattr(config, key, None)) for key in ADAPTER_OPTIONS}
        for name, config in configs.items()
    }


def as_json(value: Any) -> Any:
    """A value as JSON has it: sets and tuples are lists, other objects their names."""
    if isinstance(value, (set, frozenset)):
        return sorted(as_json(v) for v in value)
    if isinstance(value, (list, tuple)):
        return [as_json(v) for v in value]
    if isinstance(value, dict):
        return {str(k): as_json(v) for k, v in value.items()}
    if value is None or isinstance(value, (str, int, float, bool)):
        return getattr(value, "value", value)  # of an enum of strings
    return getattr(value, "__name__", None) or str(getattr(value, "value", value))


def describe_reference(
    model: Any, *, adapter: bool, compute_dtype: str, precision: str
) -> dict[str, Any]:
    """The identity of a reference, as JSON values that two runs can compare.

    A base model has the same identity alone and as the base of a PeftModel without its adapter. An
    adapter has the same identity under every name.

    Args:
        model: a second model, or the policy before its first step.
        adapter: whether model is a PeftModel that is to be its own reference; see `as_reference`.
        compute_dtype: the dtype of autocast, or "none".
        precision: "exact" or "fast", as in `linear_token_logps`.

    Raises:
        ValueError: weights that are not whole on this process.
    """
    names: list[str] = []
    if adapter:
        names = [REF_ADAPTER] if REF_ADAPTER in model.peft_config else []
        with as_reference(model):
            head = read_head(model, adapters=True)
    else:
        head = read_head(model, adapters=True)
        names = sorted(model.active_adapters) if is_peft(model) and _is_enabled(model) else []
    base = _base_weights(model)
    return {
        "model": type(unwrap(model)).__name__,
        "weights": _digest(base),
        "weights' dtype": ", ".join(
            sorted({_name(p.dtype) for _, p in base if isinstance(p, nn.Parameter)})
        ),
        "adapter": [found for name in names if (found := _adapter(model, name))] or None,
        "compute dtype": compute_dtype,
        "config": _config(unwrap(model)),
        "head": {
            "vocabulary": head.vocab_size,
            "bias": head.bias is not None,
            "scale": head.scale,
            "softcap": head.softcap,
            "row scale": head.row_scale is not None,
            "precision": precision,
        },
    }


def identity_differences(stored: dict[str, Any], present: dict[str, Any]) -> list[str]:
    """The differences of a reference from the stored one, a phrase each.

    A config, or a key of it, that one of the two lacks is not compared: stores of earlier
    versions have none, and versions of transformers have other keys.
    """
    differences = []
    for name in ("model", "weights' dtype", "compute dtype"):
        if stored.get(name) != present.get(name):
            differences.append(f"{name} {present.get(name)} instead of {stored.get(name)}")
    if not differences and stored.get("weights") != present.get("weights"):
        differences.append("the model's weights are others")
    before, after = stored.get("adapter"), present.get("adapter")
    if before != after:
        change = "no adapter instead of one" if before else "an adapter instead of none"
        differences.append(
            "the adapter's weights or options are others" if before and after else change
        )
    before, after = stored.get("config") or {}, present.get("config") or {}
    for name in sorted(before.keys() & after.keys()):
        differences += _config_differences(name, before[name], after[name])
    before, after = stored.get("head") or {}, present.get("head") or {}
    for name in sorted({*before, *after}):
        if before.get(name) != after.get(name):
            differences.append(f"head's {name} {after.get(name)} instead of {before.get(name)}")
    return differences


def _config(model: Any) -> dict[str, Any]:
    """What of a model's config its log-probs depend on beside the weights, as JSON values."""
    config: Any = getattr(model, "config", None)
    values: dict[str, Any] = as_json(config.to_dict()) if hasattr(config, "to_dict") else {}
    return _with_effect(values)


def _with_effect(values: dict[str, Any]) -> dict[str, Any]:
    relevant = {}
    for key, value in values.items():
        is_name = key.startswith("_") or key.endswith(("_token_id", "_name_or_path"))
        if key not in _CONFIG_WITHOUT_EFFECT and not is_name and "drop" not in key:
            relevant[key] = _with_effect(value) if isinstance(value, dict) else value
    return relevant


def _config_differences(name: str, stored: Any, present: Any) -> list[str]:
    """One phrase for each value that differs, where dicts may be nested."""
    if stored == present:
        return []
    if isinstance(stored, dict) and isinstance(present, dict):
        keys = sorted(stored.keys() & present.keys())  # others come and go with versions
        pairs = [(f"{name}.{key}", stored[key], present[key]) for key in keys]
        return [text for pair in pairs for text in _config_differences(*pair)]
    return [f"config's {name} {present} instead of {stored}"]


def _base_weights(model: Any) -> list[tuple[str, Tensor]]:
    """What a checkpoint holds below all adapters, under the names that it has without PEFT, sorted.

    Quantised layers keep their weights or the scales of them in buffers.
    """
    adapters = {*(getattr(model, "peft_config", None) or {})}
    by_name: dict[str, Tensor] = {}
    named = dict(unwrap(model).named_parameters())
    parameters = {id(p) for p in named.values()}
    state = unwrap(model).state_dict(keep_vars=True).items()
    named |= {n: t for n, t in state if isinstance(t, Tensor) and id(t) not in parameters}
    for name, p in named.items():
        parts = name.split(".")
        # Of PEFT's modules_to_save the original module is part of the base.
        copied = "modules_to_save" in parts and "original_module" not in parts
        if copied or adapters & set(parts):
            continue
        by_name[".".join(part for part in parts if part not in _WRAPPERS)] = p
    return sorted(by_name.items())


def _adapter(model: Any, name: str) -> dict[str, Any] | None:
    """The weights and options of an adapter; None for a LoRA adapter that changes nothing yet."""
    from peft import get_peft_model_state_dict

    weights = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    is_lora = all(".lora_A." in n or ".lora_B." in n for n in weights)
    if is_lora and not any(bool(p.count_nonzero()) for n, p in weights.items() if ".lora_B." in n):
        return None
    return {"weights": _digest(sorted(weights.items())), **_effective(model.peft_config[name])}


def _effective(config: Any) -> dict[str, Any]:
    """The options of an adapter that its log-probs depend on, without those that are off.

    Methods name their options differently. What scales or places the weights are numbers, lists of
    numbers and patterns.
    """
    effective = {}
    for key, value in vars(config).items():
        counts = isinstance(value, (int, float, dict)) or "indices" in key or key in ADAPTER_OPTIONS
        is_training = "drop" in key or key.startswith("init") or key in _WITHOUT_EFFECT
        if value and counts and not is_training:
            effective[key] = as_json(value)
    return effective


def _is_enabled(model: Any) -> bool:
    """Whether a PeftModel computes with its adapters; the user may have disabled them."""
    disabled = [m._disable_adapters for m in model.modules() if hasattr(m, "_disable_adapters")]
    return not disabled or not all(disabled)


def _digest(weights: Iterable[tuple[str, Tensor]]) -> str:
    """The SHA-256 of the names, shapes, dtypes and values of weights."""
    digest = hashlib.sha256()
    for name, p in weights:
        if p.is_meta or hasattr(p, "_local_tensor") or hasattr(p, "ds_id"):
            raise ValueError(
                f"reference_store: the reference's weight {name} is in shards or not loaded, and a "
                "store is of a reference whose weights are known; expected whole weights on each "
                "process (DDP, or one process), or reference_store=None"
            )
        digest.update(f"{name} {tuple(p.shape)} {_name(p.dtype)}\n".encode())
        values = p.detach().reshape(-1).contiguous().cpu()
        if values.numel():
            data: Any = values.view(torch.uint8).numpy()
            digest.update(data)
    return digest.hexdigest()


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
