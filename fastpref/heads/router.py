"""The load-balancing loss of a mixture of experts, from its backbone's router logits."""

from __future__ import annotations

import inspect
import sys
from typing import Any

import torch
from torch import Tensor

# The config keys for the number of experts, and for the number chosen per token.
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_CHOSEN = ("num_experts_per_tok", "moe_k", "num_experts_per_token", "top_k")
ROUTED = "routed"  # the name of the sums of `router_rows` among a row's values


def load_balancing_loss(model: Any, outputs: Any, attention_mask: Tensor | None) -> Tensor:
    """E * sum over experts of (fraction of tokens routed to it) * (mean router probability of it).

    Fedus et al. 2021 (arXiv:2101.03961), eq. 4 to 6. It is computed as in the model's forward: by
    `load_balancing_loss_func` of the model's module or, if a family has none, by Mixtral's, which
    TRL uses for every family. The result [] is not multiplied by the loss's weight.

    Args:
        model: a causal language model.
        outputs: the backbone's outputs with output_router_logits=True.
        attention_mask: [B, >= T], the backbone's argument; the last T columns count, since prefix
            tuning makes it longer. None counts every token.

    Raises:
        ValueError: no router logits, or a family whose loss has other arguments.
    """
    logits, experts, chosen, function = _routed(model, outputs)
    if attention_mask is not None:
        attention_mask = attention_mask[:, -outputs[0].shape[1] :]
    loss: Any = function(logits, experts, chosen, attention_mask)
    return loss


def _routed(model: Any, outputs: Any) -> tuple[Any, int, int, Any]:
    """The router logits of each layer, the number of experts, the number chosen per token, and the
    family's loss function.
    """
    name = type(model).__name__
    hint = "leave output_router_logits out (router_aux_loss_coef=0)"
    logits = getattr(outputs, "router_logits", None)
    if not logits:
        raise ValueError(
            f"output_router_logits: got True but the backbone of {name} returns no router logits; "
            f"expected a mixture of experts that does: {hint}"
        )
    config = model.config.get_text_config(decoder=True)
    experts, chosen = _setting(model, config, _EXPERTS), _setting(model, config, _CHOSEN)
    function = _function(model)
    if function is None or experts is None or chosen is None or logits[0].shape[-1] != experts:
        raise ValueError(
            f"output_router_logits: got True but {name} balances its experts in a way of its own "
            f"(router logits of shape {tuple(logits[0].shape)}, {experts} experts); {hint}"
        )
    return logits, experts, chosen, function


def _setting(model: Any, config: Any, names: tuple[str, ...]) -> int | None:
    """The first integer under one of these names, of the model or else of its config."""
    for source in (model, config):
        for name in names:
            if isinstance(value := getattr(source, name, None), int):
                return value
    return None


def _function(model: Any) -> Any:
    """The load-balancing loss of the model's family; None if it has other arguments."""
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    for cls in type(model).__mro__:
        function = getattr(sys.modules.get(cls.__module__), "load_balancing_loss_func", None)
        if function is not None:
            usual = list(inspect.signature(load_balancing_loss_func).parameters)
            return function if list(inspect.signature(function).parameters) == usual else None
    return load_balancing_loss_func


def router_rows(model: Any, outputs: Any, attention_mask: Tensor | None) -> Tensor:
    """The sums of each sequence, [B, 2 E + 1], from which `balance` computes the loss of many.

    With E experts, the first E columns count how often each expert is chosen, the next E sum its
    probability, and the last one counts tokens. All are sums over the layers and over the tokens
    that attention_mask counts. Arguments and errors: those of `load_balancing_loss`.
    """
    logits, experts, chosen, _ = _routed(model, outputs)
    batch, length = outputs[0].shape[:2]
    mask = torch.ones(batch, length, device=logits[0].device)
    if attention_mask is not None:
        mask = attention_mask[:, -length:].to(mask)
    total = mask.new_zeros(batch, 2 * experts + 1)
    for layer in logits:
        weights = layer.to(mask.device).float().softmax(-1)
        selected = torch.zeros_like(weights).scatter_(-1, weights.topk(chosen, -1).indices, 1.0)
        ones = torch.ones_like(weights[..., :1])
        per_token = torch.cat([selected, weights, ones], -1).view(batch, length, -1)
        total += (per_token * mask[..., None]).sum(1)
    return total


def balance(sums: Tensor) -> Tensor:
    """`load_balancing_loss` [] of sequences, from the sum [2 E + 1] of their `router_rows`."""
    experts = (len(sums) - 1) // 2
    chosen, probability = sums[:experts], sums[experts : 2 * experts]
    tokens = sums[-1].clamp(min=1)
    return experts * (chosen / tokens * (probability / tokens)).sum()
