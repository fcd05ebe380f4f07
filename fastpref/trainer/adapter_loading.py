"""Loading an adapter by its directory or hub name, together with its base model."""

from __future__ import annotations

import contextlib
import json
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers.utils import cached_file, find_adapter_config_file

from fastpref.trainer.pickles import readable_weights

# The errors that peft raises for a configuration or weights that do not fit.
_UNLOADABLE = (
    OSError,
    LookupError,
    RuntimeError,
    TypeError,
    UserWarning,
    ValueError,
    SafetensorError,
)
_HUB = ("revision", "token", "cache_dir", "local_files_only", "force_download")
_OF_THE_ADAPTER = ("revision", "subfolder")  # options of the adapter and not of its base model
_WHOLE = ("config.json", "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin")
_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
_TOKENIZER = ("tokenizer_config.json", "tokenizer.json", "tokenizer.model")


def find_adapter(name: str, options: Mapping[str, Any]) -> dict[str, Any] | None:
    """The adapter_config.json of a directory or hub name; None if it is not an adapter.

    Args:
        name: the directory or hub name.
        options: arguments of from_pretrained, such as revision.

    Raises:
        ValueError: a directory whose adapters are in its subdirectories, or that holds both an
            adapter and a whole model.
    """
    hub_options = _hub_options(options, "subfolder")
    try:
        path = find_adapter_config_file(name, **hub_options)
    except (OSError, ValueError):  # not an adapter; the error comes when the model is loaded
        return None
    directory = Path(name) / hub_options.get("subfolder", "")
    model_files = [file for file in _WHOLE if (directory / file).is_file()]
    if path is None:
        adapters = sorted(p.parent.name for p in directory.glob("*/adapter_config.json"))
        if adapters and not model_files and directory.is_dir():
            raise ValueError(
                f"{name!r} holds no model, but adapters in {', '.join(adapters)}; expected one of "
                f"these, such as {str(directory / adapters[0])!r}"
            )
        return None
    if model_files[1:]:
        raise ValueError(
            f"{name!r} holds both an adapter (adapter_config.json) and a whole model "
            f"({model_files[-1]}); expected a directory for each"
        )
    try:
        config = json.loads(Path(path).read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} holds a {type(config).__name__}; expected a JSON object")
    return config


def _hub_options(options: Mapping[str, Any], *others: str) -> dict[str, Any]:
    """Those of the options that concern the hub, and `others`, without None."""
    return {key: options[key] for key in (*_HUB, *others) if options.get(key) is not None}


def load_adapter(
    name: str,
    config: Mapping[str, Any],
    options: Mapping[str, Any],
    load_base: Callable[[str, dict[str, Any]], Any],
    *,
    trainable: bool,
) -> Any:
    """The PeftModel of an adapter.

    Args:
        name: directory or hub name of the adapter.
        config: its adapter_config.json.
        options: arguments of from_pretrained. All but revision and subfolder apply to the base.
        load_base: loads the base model by its name and options.
        trainable: whether the adapter is to be trained further.

    Raises:
        ValueError: an adapter that is not of a causal language model; a base model that is not
            named, is an adapter or cannot be loaded; weights that are missing or do not fit.
    """
    task = config.get("task_type")
    if task not in (None, "CAUSAL_LM"):
        raise ValueError(f"the adapter {name!r} is of a {task} model; expected CAUSAL_LM")
    base = config.get("base_model_name_or_path")
    hint = (
        f"; load the base model and pass PeftModel.from_pretrained(base, {name!r}, "
        f"is_trainable={trainable})"
    )
    if not base:
        raise ValueError(f"the adapter {name!r} does not name its base model{hint}")
    directory = Path(name) / (options.get("subfolder") or "")
    if directory.is_dir() and not any((directory / file).is_file() for file in _WEIGHTS):
        raise ValueError(f"the adapter {name!r} lacks its weights, {_WEIGHTS[0]}")
    base_options = {k: v for k, v in options.items() if k not in _OF_THE_ADAPTER}
    if config.get("revision"):
        base_options["revision"] = config["revision"]
    if find_adapter(base, base_options) is not None:
        raise ValueError(
            f"the base model of the adapter {name!r}, {base!r}, is an adapter itself; merge that "
            "one into its own base first"
        )
    try:
        model = load_base(base, base_options)
    except ValueError as error:
        raise ValueError(f"the base model of the adapter {name!r}: {error}{hint}") from error
    from peft import PeftModel

    hub_options = _hub_options(options, "subfolder")
    try:
        with quiet_peft(), readable_weights(directory):
            warnings.filterwarnings("error", "Found missing adapter keys")
            return PeftModel.from_pretrained(model, name, is_trainable=trainable, **hub_options)
    except _UNLOADABLE as error:
        text = " ".join(str(error).split())[:500]
        raise ValueError(
            f"the adapter {name!r} could not be put on its base model {base!r}: {text}"
        ) from error


@contextlib.contextmanager
def quiet_peft() -> Iterator[None]:
    """Hide the warning that peft uses a deprecated name of transformers."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)
        yield


def is_path(name: str) -> bool:
    """Whether a model's name can only be a local directory, and not a hub name."""
    return name.startswith((".", "/", "~")) or name.count("/") > 1


def tokenizer_of(name: str, options: Mapping[str, Any]) -> str | None:
    """The adapter's name if it has a tokenizer; None if its base model's is to be used."""
    hub_options = _hub_options(options)
    quiet = ("gated_repo", "missing_entries", "connection_errors")
    hub_options.update({f"_raise_exceptions_for_{kind}": False for kind in quiet})
    has_tokenizer = any(cached_file(name, file, **hub_options) is not None for file in _TOKENIZER)
    return name if has_tokenizer else None
