"""The load-balancing loss of a mixture of experts, from its backbone's router logits."""

from __future__ import annotations

import inspect
import sys
from typing import Any

from torch import Tensor

_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
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
    if attention_mask is not None:
        attention_mask = attention_mask[:, -outputs[0].shape[1] :]
    loss: Any = function(logits, experts, chosen, attention_mask)
    return loss


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
