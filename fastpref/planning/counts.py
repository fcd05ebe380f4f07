"""Tokens of a batch, weights of a model and FLOPs of its body, without weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from fastpref.heads.reading import unwrap
from fastpref.planning.model import StepOptions, build_model, silent
from fastpref.planning.simulate import Pair


def batch_tokens(pairs: Sequence[Pair], sharing: bool) -> tuple[int, int]:
    """Positions of the micro-batch's rows, with padding, and labelled tokens."""
    prompt, chosen, rejected = np.array(pairs, dtype=np.int64).T
    labelled = int((chosen + rejected).sum())
    if sharing:
        return len(pairs) * int((prompt + chosen + rejected).max()), labelled
    return 2 * len(pairs) * int((prompt + np.maximum(chosen, rejected)).max()), labelled


_counts: dict[tuple[str, str, int], tuple[int, int, int]] = {}


def _counted(config: Any, options: StepOptions) -> tuple[int, int, int]:
    with silent():
        model = build_model(config, StepOptions(method=options.method, lora_r=options.lora_r))
    parameters = list(model.parameters())
    unwrapped = unwrap(model)
    outside = {
        id(p)
        for e in (unwrapped.get_input_embeddings(), unwrapped.get_output_embeddings())
        for p in e.parameters()
    }
    products = 0
    for name, p in model.named_parameters():
        if id(p) in outside or "lora_" in name or ".wpe." in name:
            continue
        if p.dim() == 2:
            products += p.numel()
        elif p.dim() == 3 and ".experts." in name:  # [E, in, out], of which a token has a few
            products += p.numel() // p.shape[0] * _experts_of_a_token(config)
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    return sum(p.numel() for p in parameters), trained, products


def _experts_of_a_token(config: Any) -> int:
    text = config.get_text_config()
    names = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k")
    return next((int(k) for name in names if (k := getattr(text, name, None))), 1)


def count_weights(config: Any, options: StepOptions) -> tuple[int, int, int]:
    """The numbers of weights: all, those that train, and those of the layers that GEMMs read.

    A token reads only some experts of a layer, and only those count as read.
    """
    key = config.to_json_string(use_diff=False), options.method, options.lora_r
    if key not in _counts:
        _counts[key] = _counted(config, options)
    return _counts[key]


def trained_share(config: Any, options: StepOptions) -> int:
    """How many weights train."""
    return count_weights(config, options)[1]


def body_flops(config: Any, pairs: Sequence[Pair], sharing: bool) -> float:
    """FLOPs of the body's forward pass on these pairs: its matrix products and its attention."""
    text = config.get_text_config()
    tokens, _ = batch_tokens(pairs, sharing)
    heads = getattr(text, "num_attention_heads", 0)  # state space models have none
    width = getattr(text, "head_dim", None) or text.hidden_size // max(heads, 1)
    prompt, chosen, rejected = np.array(pairs, dtype=np.float64).T
    attended = float(((prompt + chosen) ** 2 + (prompt + rejected) ** 2).sum()) / 2
    products = count_weights(config, StepOptions())[2]
    return 2.0 * tokens * products + 4.0 * text.num_hidden_layers * attended * heads * width
