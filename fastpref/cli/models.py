"""Loading the models, adapters and checkpoints that a command line names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch


def adapter_of(name: str, argument: str = "--model") -> dict[str, Any] | None:
    """The adapter_config.json of a directory or hub name; None if it is not an adapter.

    argument: what errors call the name.
    """
    from fastpref.trainer.adapter_loading import find_adapter, is_path

    if is_path(name) and not Path(name).expanduser().is_dir():
        return None  # the hub would be asked for it, again and again without a network
    try:
        return find_adapter(str(Path(name).expanduser()), {})
    except ValueError as error:
        raise ValueError(f"{argument} {name}: {error}") from error


def continues(name: str, options: list[str]) -> bool:
    """Whether --model is an adapter, which the run would train further.

    options: the options of a new adapter that were passed; they raise ValueError then.
    """
    if adapter_of(name) is None:
        return False
    if options:
        raise ValueError(
            f"{' and '.join(options)} would do nothing: --model {name} is an adapter, which is "
            "trained on as it is; merge it into its base model to train a new one"
        )
    return True


def load_model(
    name: str, dtype: torch.dtype, trust_remote_code: bool = False, argument: str = "--model"
) -> Any:
    """The model of a directory or hub name; of an adapter a PeftModel that trains it.

    trust_remote_code: whether code that comes with the model may run.
    argument: what errors call the name.
    """
    from fastpref.trainer.adapter_loading import load_adapter

    adapter = adapter_of(name, argument)
    options = {"dtype": dtype, "trust_remote_code": trust_remote_code}
    if adapter is None:
        return _load_whole(name, options, argument)
    path = str(Path(name).expanduser())
    try:
        return load_adapter(path, adapter, options, _load_base, trainable=True)
    except ValueError as error:
        raise ValueError(f"{argument} {name}: {error}") from error


def _load_base(name: str, options: dict[str, Any]) -> Any:
    return _load_whole(name, options, "base")


def _load_whole(name: str, options: dict[str, Any], argument: str) -> Any:
    from transformers import AutoModelForCausalLM

    from fastpref.trainer.loading import check_loaded

    options = {**options, "output_loading_info": True}
    model, info = from_pretrained(AutoModelForCausalLM, name, argument, **options)
    check_loaded(model, info, f"{argument} {name}")
    return model


def load_tokenizer(name: str, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a model; of an adapter its tokenizer or else its base model's."""
    from transformers import AutoTokenizer

    from fastpref.trainer.adapter_loading import tokenizer_of

    adapter, path = adapter_of(name), str(Path(name).expanduser())
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    if adapter is None:
        return from_pretrained(AutoTokenizer, name, **options)
    base = adapter.get("base_model_name_or_path")
    if tokenizer_of(path, {}) is None and base:
        return from_pretrained(AutoTokenizer, base, f"--model {name}: base", **options)
    return AutoTokenizer.from_pretrained(path, **options)


def load_config(name: str, trust_remote_code: bool = False) -> Any:
    """The config of a model; of an adapter that of its base model. No weights are needed."""
    from transformers import AutoConfig

    options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    adapter = adapter_of(name)
    base = None if adapter is None else adapter.get("base_model_name_or_path")
    if base:
        return from_pretrained(AutoConfig, base, f"--model {name}: base", **options)
    return from_pretrained(AutoConfig, name, **options)


_SIZES = ("vocab_size", "hidden_size", "num_hidden_layers")


def missing_sizes(name: str, config: Any) -> dict[str, int]:
    """The sizes that a model's config.json does not give, with those of its class."""
    from transformers import PretrainedConfig

    adapter = adapter_of(name)
    base = (adapter or {}).get("base_model_name_or_path") or name
    try:
        given, _ = PretrainedConfig.get_config_dict(str(Path(base).expanduser()))
    except (OSError, ValueError):
        return {}
    text = config.get_text_config()
    for part in (given, *(value for value in given.values() if isinstance(value, dict))):
        names = {text.attribute_map.get(size, size) for size in _SIZES} | set(_SIZES)
        if names & set(part):
            given = part
            break
    own = {size: {size, text.attribute_map.get(size, size)} for size in _SIZES}
    return {s: getattr(text, s) for s, names in own.items() if not names & set(given)}


def from_pretrained(auto_class: Any, name: str, argument: str = "--model", **options: Any) -> Any:
    """`auto_class.from_pretrained`, with errors of one sentence.

    argument: what errors call the name.
    """
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError

    from fastpref.trainer.adapter_loading import is_path
    from fastpref.trainer.pickles import readable_weights

    kinds = {"AutoTokenizer": "tokenizer", "AutoConfig": "config"}
    kind = kinds.get(auto_class.__name__, "model")
    path = Path(name).expanduser()
    if path.is_dir():
        expected = ["config.json"]
        if kind == "tokenizer":  # which may stand alone
            expected += ["tokenizer.json", "tokenizer_config.json"]
        if not any((path / file).is_file() for file in expected):
            raise ValueError(f"{argument} {name} is a directory without config.json, so no model")
        name = str(path)
    elif path.exists() or is_path(name):
        raise ValueError(f"{argument} {name} is not a directory")
    options.setdefault("trust_remote_code", False)  # without it transformers asks, and takes a "y"
    try:
        with readable_weights(name):
            return auto_class.from_pretrained(name, **options)
    # A config with a size of the wrong type fails in many ways.
    except (
        OSError, ValueError, TypeError, KeyError, AttributeError,
        SafetensorError, StrictDataclassError,
    ) as error:  # fmt: skip
        message = str(error).strip().splitlines() or [type(error).__name__]
        # The first line of a strict config names the check, and the last one the problem.
        first = message[-1 if isinstance(error, StrictDataclassError) else 0].strip().rstrip(" .:")
        if "backend tokenizer" in first:
            first = "it has no files of one, such as tokenizer.json"
        if "trust_remote_code" in str(error):
            first = "it brings code of its own, which runs only with --trust-remote-code"
        raise ValueError(f"{argument} {name}: no {kind} could be loaded ({first})") from error


def lora_config(rank: Any, alpha: Any, targets: Any) -> Any:
    """The configuration of a new adapter; None means the default of an option."""
    from peft import LoraConfig

    modules = [name.strip() for name in (targets or "all-linear").split(",")]
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=rank or 16,
        lora_alpha=alpha or 32,
        target_modules="all-linear" if modules == ["all-linear"] else modules,
    )
