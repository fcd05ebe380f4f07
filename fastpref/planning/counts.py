"""Tokens of a batch, weights of a model and FLOPs of its body, without weights."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from fastpref.heads.reading import unwrap
from fastpref.planning.simulate import Pair, StepOptions, build_model, silent


def batch_tokens(pairs: Sequence[Pair], sharing: bool) -> tuple[int, int]:
    """Positions of the micro-batch's rows, with padding, and labelled tokens."""
    prompt, chosen, rejected = np.array(pairs, dtype=np.int64).T
    labelled = int((chosen + rejected).sum())
    if sharing:
        return len(pairs) * int((prompt + chosen + rejected).max()), labelled
    return 2 * len(pairs) * int((prompt + np.maximum(chosen, rejected)).max()), labelled


@functools.lru_cache(maxsize=64)
def _counted(text: str, method: str, lora_r: int) -> tuple[int, int, int]:
    """Weights of a model: all, those that train, and those of its layers that products read."""
    from transformers import AutoConfig

    given = json.loads(text)
    config = AutoConfig.for_model(given.pop("model_type"), **given)
    with silent():
        model = build_model(config, StepOptions(method=method, lora_r=lora_r))
    parameters = list(model.parameters())
    unwrapped = unwrap(model)
    outside = {
        id(p)
        for e in (unwrapped.get_input_embeddings(), unwrapped.get_output_embeddings())
        for p in e.parameters()
    }
    products = sum(
        p.numel()
        for n, p in model.named_parameters()
        if p.dim() == 2 and id(p) not in outside and "lora_" not in n and ".wpe." not in n
    )
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    return sum(p.numel() for p in parameters), trained, products


def count_weights(config: Any, options: StepOptions) -> tuple[int, int, int]:
    """Weights of the model: all, those that train, and those of its layers that products read."""
    return _counted(config.to_json_string(use_diff=False), options.method, options.lora_r)


def trained_share(config: Any, options: StepOptions) -> int:
    """How many weights train."""
    return count_weights(config, options)[1]


def body_flops(config: Any, pairs: Sequence[Pair], sharing: bool) -> float:
    """FLOPs of the body's forward pass on these pairs: its matrix products and its attention."""
    text = config.get_text_config()
    tokens, _ = batch_tokens(pairs, sharing)
    heads = text.num_attention_heads
    width = getattr(text, "head_dim", None) or text.hidden_size // heads
    prompt, chosen, rejected = np.array(pairs, dtype=np.float64).T
    seen = float(((prompt + chosen) ** 2 + (prompt + rejected) ** 2).sum()) / 2
    products = count_weights(config, StepOptions())[2]
    return 2.0 * tokens * products + 4.0 * text.num_hidden_layers * seen * heads * width
