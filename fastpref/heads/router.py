"""The load-balancing loss of a mixture of experts, from its backbone's router logits."""

from __future__ import annotations

import inspect
import sys
from typing import Any

import torch
from torch import Tensor

_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
ROUTED = "routed"  # names `router_rows` among the figures of a row
_CHOSEN = ("num_experts_per_tok", "moe_k", "num_experts_per_token", "top_k")


def load_balancing_loss(model: Any, outputs: Any, attention_mask: Tensor | None) -> Tensor:
    """E * sum over experts of (fraction of tokens routed to it) * (mean router probability of it).

    arXiv 2101.03961, eq. 4 to 6, over the tokens that attention_mask [B, T] counts, as the model's
    own forward computes it: by the function `load_balancing_loss_func` of the model's module or,
    where a family has none, by Mixtral's, which is what TRL does for every family. Not weighted.

    Args:
        model: a causal language model.
        outputs: what its backbone returned when it was called with output_router_logits=True.
        attention_mask: what the backbone was called with; of a longer one, as with prefix tuning,
            the last T columns count. None counts every token.

    Raises:
        ValueError: there are no router logits, or the family's loss is of a form of its own.
    """
    logits, experts, chosen, function = _routed(model, outputs)
    if attention_mask is not None:
        attention_mask = attention_mask[:, -outputs[0].shape[1] :]
    loss: Any = function(logits, experts, chosen, attention_mask)
    return loss


def _routed(model: Any, outputs: Any) -> tuple[Any, int, int, Any]:
    """The routers' logits by layer, the numbers of experts and of chosen ones, and the loss."""
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
    for source in (model, config):
        for name in names:
            if isinstance(value := getattr(source, name, None), int):
                return value
    return None


def _function(model: Any) -> Any:
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    for cls in type(model).__mro__:
        own = getattr(sys.modules.get(cls.__module__), "load_balancing_loss_func", None)
        if own is not None:
            usual = list(inspect.signature(load_balancing_loss_func).parameters)
            return own if list(inspect.signature(own).parameters) == usual else None
    return load_balancing_loss_func


def router_rows(model: Any, outputs: Any, attention_mask: Tensor | None) -> Tensor:
    """What the loss of many sequences is made of, of each [B, 2 E + 1]; see `balance`.

    Arguments and errors: those of `load_balancing_loss`. The columns are, summed over layers and
    the tokens that count, how often each expert is chosen, its probability, and how many there are.
    """
    logits, experts, chosen, _ = _routed(model, outputs)
    batch, length = outputs[0].shape[:2]
    mask = torch.ones(batch, length, device=logits[0].device)
    if attention_mask is not None:
        mask = attention_mask[:, -length:].to(mask)
    total = mask.new_zeros(batch, 2 * experts + 1)
    for layer in logits:
        weights = layer.to(mask.device).float().softmax(-1)
        picked = torch.zeros_like(weights).scatter_(-1, weights.topk(chosen, -1).indices, 1.0)
        ones = torch.ones_like(weights[..., :1])
        each = torch.cat([picked, weights, ones], -1).view(batch, length, -1)
        total += (each * mask[..., None]).sum(1)
    return total


def balance(sums: Tensor) -> Tensor:
    """`load_balancing_loss` of the sequences whose `router_rows` add up to these sums."""
    experts = (len(sums) - 1) // 2
    chosen, probability = sums[:experts], sums[experts : 2 * experts]
    tokens = sums[-1].clamp(min=1)
    return experts * (chosen / tokens * (probability / tokens)).sum()
