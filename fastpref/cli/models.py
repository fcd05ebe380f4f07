"""What a command line names: a model, an adapter, a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch


def load_model(name: str, dtype: torch.dtype) -> Any:
    from transformers import AutoModelForCausalLM

    from fastpref.loading import check_loaded

    model, info = from_pretrained(AutoModelForCausalLM, name, dtype=dtype, output_loading_info=True)
    check_loaded(model, info, f"--model {name}")
    return model


def from_pretrained(kind: Any, name: str, **options: Any) -> Any:
    """`kind.from_pretrained`, whose errors take many lines, with an error of one sentence."""
    from safetensors import SafetensorError

    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ValueError(f"--model {name} is a directory without config.json, so no model")
        name = str(path)
    elif path.exists() or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ValueError(f"--model {name} is not a directory")
    try:
        return kind.from_pretrained(name, **options)
    except (OSError, ValueError, SafetensorError) as error:
        first = str(error).strip().splitlines()[0].rstrip(" .:")
        what = "tokenizer" if "Tokenizer" in kind.__name__ else "model"
        raise ValueError(f"--model {name}: no {what} could be loaded ({first})") from error


def lora_config(rank: Any, alpha: Any, targets: Any) -> Any:
    """The adapter; None stands for the default of each option."""
    from peft import LoraConfig

    modules = [name.strip() for name in (targets or "all-linear").split(",")]
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=rank or 16,
        lora_alpha=alpha or 32,
        target_modules="all-linear" if modules == ["all-linear"] else modules,
    )


def latest_checkpoint(output: Path) -> str:
    """The newest complete checkpoint: trainer_state.json is what a checkpoint gets last."""
    found = [p.parent for p in output.glob("checkpoint-*/trainer_state.json")]
    steps = {int(step): path for path in found if (step := path.name[11:]).isdecimal()}
    if not steps:
        raise ValueError(f"--resume latest: there is no complete checkpoint in {output}")
    return str(steps[max(steps)])
