"""Models given as the directory or hub name of an adapter: its base model with it on top."""

from __future__ import annotations

import contextlib
import json
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers.utils import cached_file, find_adapter_config_file

# What peft raises for a configuration or weights that do not fit.
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
_OF_THE_ADAPTER = ("revision", "subfolder")  # these name it, and not its base
_WHOLE = ("config.json", "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin")
_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
_TOKENIZER = ("tokenizer_config.json", "tokenizer.json", "tokenizer.model")


def find_adapter(name: str, options: Mapping[str, Any]) -> dict[str, Any] | None:
    """The adapter_config.json of that directory or hub name; None if it is no adapter.

    Raises:
        ValueError: a directory whose adapters are in its subdirectories, or that holds both an
            adapter and a whole model.
    """
    given = {key: options[key] for key in (*_HUB, "subfolder") if options.get(key) is not None}
    try:
        path = find_adapter_config_file(name, **given)
    except (OSError, ValueError):  # of no adapter; loading the model says what is wrong
        return None
    directory = Path(name) / given.get("subfolder", "")
    here = [file for file in _WHOLE if (directory / file).is_file()]
    if path is None:
        inner = sorted(p.parent.name for p in directory.glob("*/adapter_config.json"))
        if inner and not here and directory.is_dir():
            raise ValueError(
                f"{name!r} holds no model, but adapters in {', '.join(inner)}; expected one of "
                f"these, such as {str(directory / inner[0])!r}"
            )
        return None
    if here[1:]:
        raise ValueError(
            f"{name!r} holds both an adapter (adapter_config.json) and a whole model "
            f"({here[-1]}); expected a directory for each"
        )
    try:
        config = json.loads(Path(path).read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} holds a {type(config).__name__}; expected a JSON object")
    return config


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
        options: arguments of from_pretrained. All but revision and subfolder go to the base.
        load_base: loads the base by its name and options.
        trainable: whether the adapter is to be trained on.

    Raises:
        ValueError: the adapter is of no causal language model; its base is not named or cannot be
            loaded; its weights are missing or do not fit the base.
    """
    task = config.get("task_type")
    if task not in (None, "CAUSAL_LM"):
        raise ValueError(f"the adapter {name!r} is of a {task} model; expected CAUSAL_LM")
    base = config.get("base_model_name_or_path")
    way_out = (
        f"; load the base model and pass PeftModel.from_pretrained(base, {name!r}, "
        f"is_trainable={trainable})"
    )
    if not base:
        raise ValueError(f"the adapter {name!r} does not name its base model{way_out}")
    directory = Path(name) / (options.get("subfolder") or "")
    if directory.is_dir() and not any((directory / file).is_file() for file in _WEIGHTS):
        raise ValueError(f"the adapter {name!r} lacks its weights, {_WEIGHTS[0]}")
    inner = {k: v for k, v in options.items() if k not in _OF_THE_ADAPTER}
    if config.get("revision"):
        inner["revision"] = config["revision"]
    if find_adapter(base, inner) is not None:
        raise ValueError(
            f"the base model of the adapter {name!r}, {base!r}, is an adapter itself; merge that "
            "one into its own base first"
        )
    try:
        model = load_base(base, inner)
    except ValueError as error:
        raise ValueError(f"the base model of the adapter {name!r}: {error}{way_out}") from error
    from peft import PeftModel

    hub = {key: options[key] for key in (*_HUB, "subfolder") if options.get(key) is not None}
    try:
        with quiet_peft():
            warnings.filterwarnings("error", "Found missing adapter keys")
            return PeftModel.from_pretrained(model, name, is_trainable=trainable, **hub)
    except _UNLOADABLE as error:
        text = " ".join(str(error).split())[:500]
        raise ValueError(
            f"the adapter {name!r} could not be put on its base model {base!r}: {text}"
        ) from error


@contextlib.contextmanager
def quiet_peft() -> Iterator[None]:
    """Within it nobody hears that peft asks transformers under a name that changed since."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)
        yield


def is_path(name: str) -> bool:
    """Whether a model's name can only be that of a directory of this machine."""
    return name.startswith((".", "/", "~")) or name.count("/") > 1


def tokenizer_of(name: str, options: Mapping[str, Any]) -> str | None:
    """The name itself where an adapter brings a tokenizer along; None where its base's is meant."""
    given = {key: options[key] for key in _HUB if options.get(key) is not None}
    quiet = ("gated_repo", "missing_entries", "connection_errors")
    given.update({f"_raise_exceptions_for_{kind}": False for kind in quiet})
    found = any(cached_file(name, file, **given) is not None for file in _TOKENIZER)
    return name if found else None
