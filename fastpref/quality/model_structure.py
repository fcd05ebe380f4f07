"""Findings about a model's structure: tied heads, adapters that change the base, routers."""

from __future__ import annotations

from typing import Any

import torch

from fastpref.data.batches import model_inputs
from fastpref.heads.reading import unwrap
from fastpref.quality.findings import Finding

# PEFT's initialisations that subtract the adapter's part from the base's weights.
_CHANGE_THE_BASE = ("pissa", "olora", "corda", "lora_ga", "loftq")


def check_tied_head(model: Any) -> list[Finding]:
    """A finding if an adapter keeps a whole copy of a head that is tied to the embeddings."""
    base = unwrap(model)
    configs = getattr(model, "peft_config", {})
    if not configs or not getattr(base.config.get_text_config(), "tie_word_embeddings", False):
        return []
    embeddings, head = base.get_input_embeddings(), base.get_output_embeddings()
    ends = {
        name.split(".")[-1]
        for name, module in base.named_modules()
        if module in (embeddings, head) or getattr(module, "original_module", None) is not None
    }
    for name, config in configs.items():
        copied = ends & set(getattr(config, "modules_to_save", None) or ())
        if copied and not getattr(config, "ensure_weight_tying", False):
            return [
                Finding(
                    "tied_head",
                    "warning",
                    f"the adapter {name!r} trains whole copies of {', '.join(sorted(copied))} "
                    "(modules_to_save), but the model's head and embeddings are one weight",
                    "merging keeps one of the two alone: set ensure_weight_tying=True in the "
                    "adapter's configuration, or untie the model first",
                )
            ]
    return []


def adapter_initialisation(model: Any) -> list[Finding]:
    """A finding if a PeftModel without its adapter is not the model that it was made of.

    PiSSA and its like move a part of each weight into the adapter (arXiv:2404.02948).
    """
    for name, config in getattr(model, "peft_config", {}).items():
        kind = getattr(config, "init_lora_weights", True)
        if isinstance(kind, str) and kind.lower().startswith(_CHANGE_THE_BASE):
            return [
                Finding(
                    "adapter_off",
                    "warning",
                    f"the adapter {name!r} has init_lora_weights={kind!r}, which moves a part of "
                    "the base's weights into it: the model without it is not the reference",
                    "fastpref's trainers keep a copy of the adapter as the reference; for others "
                    "pass ref_model, or leave init_lora_weights out",
                )
            ]
    return []


@torch.no_grad()
def check_router(model: Any, batch: dict[str, Any]) -> list[Finding]:
    """A finding if a mixture of experts returns probabilities as its router logits.

    The load-balancing loss takes their softmax once more, which leaves it nearly constant.
    """
    base = unwrap(model)
    if not hasattr(base.config.get_text_config(), "output_router_logits"):
        return []
    inputs = {key: value[:1] for key, value in model_inputs(batch).items()}
    try:
        layers = getattr(base(**inputs, output_router_logits=True), "router_logits", None)
    except TypeError:  # the forward has no such argument
        return []
    layers = [layer for layer in layers or () if layer is not None]
    if not layers or not all(_are_probabilities(layer.float()) for layer in layers):
        return []
    return [
        Finding(
            "router",
            "warning",
            "the router logits of the model are probabilities already, and its load-balancing "
            "loss takes a softmax of them",
            "set router_aux_loss_coef=0, or update transformers: the loss hardly balances",
        )
    ]


def _are_probabilities(layer: torch.Tensor) -> bool:
    sums = layer.sum(-1)
    return bool((layer >= 0).all()) and bool(((sums - 1).abs() < 1e-2).all())
