"""The output head of a transformers model, and calling a model without building its logits.

The loss runs inside the model's own forward: `install_head_forward` teaches a causal language model
one more keyword, `head_fn`, which receives the final hidden states and the head in place of logits.
So every wrapper around the model (DDP, PEFT, autocast, compile) sees an ordinary call, and with
bf16 autocast the hidden states are never converted on their way out. Without `head_fn` the model
behaves as before.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from .data_files import NUMBERS

_NOT_FOR_MODEL = {"completion_mask", "labels", "token_indices", "rows", *NUMBERS}


@dataclass(frozen=True)
class Head:
    """An output head: logits = softcap(scale * (hidden @ weight.T + bias)).

    Attributes:
        weight: [V, H].
        bias: [V] or None.
        scale: multiplies the logits, before the softcap.
        softcap: c in c * tanh(logits / c), or None.
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    def options(self) -> dict[str, Any]:
        """Bias, scale and softcap as keyword arguments of the `linear_*` functions."""
        return {"bias": self.bias, "scale": self.scale, "softcap": self.softcap}


def unwrap(model: Any) -> Any:
    """The causal language model inside DDP, compile and PEFT wrappers."""
    while True:
        if isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
            model = model.module
        elif hasattr(model, "_orig_mod"):  # torch.compile
            model = model._orig_mod
        elif hasattr(model, "get_base_model") and hasattr(model, "peft_config"):
            model = model.get_base_model()
        else:
            return model


def read_head(model: Any) -> Head:
    """Read a causal language model's output head and the transform of its logits.

    The scale comes from the first config key present of `logit_scale`, `output_multiplier`,
    `lm_head_multiplier`, `logits_scaling` (which divides, except in HyperCLOVA X), keys and order
    being TRL 1.16's; the softcap from the first of `final_logit_softcapping`, `logits_soft_cap`
    (RecurrentGemma) and `output_logit_soft_cap` (xLSTM).

    Raises:
        ValueError: the model has no output head, its head carries a PEFT adapter, or the head's
            weight is not whole on this process.
    """
    model = unwrap(model)
    getter = getattr(model, "get_output_embeddings", None)
    module = getter() if getter is not None else None
    if module is None or getattr(module, "weight", None) is None:
        raise ValueError(
            f"model {type(model).__name__} has no output head; expected a causal language model "
            "whose get_output_embeddings() returns a linear layer"
        )
    if _has_adapter(module):
        raise ValueError(
            "the model's output head carries a PEFT adapter, which would never be trained because "
            "the head's weight is used directly; leave 'lm_head' out of target_modules"
        )
    weight, bias = module.weight, getattr(module, "bias", None)
    if _is_sharded(weight):
        raise ValueError(
            f"the output head's weight of shape {tuple(weight.shape)} is sharded among processes "
            "(a DTensor); expected a whole tensor: leave the head out of what is sharded, or "
            "gather it first"
        )
    if weight.dim() != 2 or weight.numel() == 0 or not weight.is_floating_point():
        raise ValueError(
            f"the output head's weight has shape {tuple(weight.shape)} and dtype {weight.dtype}; "
            "expected a whole [vocabulary, hidden] matrix of floating-point numbers (sharded and "
            "quantised heads are not supported)"
        )
    config = model.config.get_text_config() if hasattr(model, "config") else None
    return Head(weight, bias, scale=_logit_scale(config), softcap=_softcap(config))


def _is_sharded(weight: Any) -> bool:
    return hasattr(weight, "device_mesh") and hasattr(weight, "placements")  # a DTensor


def _has_adapter(module: nn.Module) -> bool:
    try:
        from peft.tuners.tuners_utils import BaseTunerLayer
    except ImportError:
        return False
    return isinstance(module, BaseTunerLayer)


def _logit_scale(config: Any) -> float:
    for key in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        if (value := getattr(config, key, None)) is not None:
            return float(value)
    if (value := getattr(config, "logits_scaling", None)) is not None:
        return float(value) if config.model_type == "hyperclovax" else 1.0 / float(value)
    return 1.0


def _softcap(config: Any) -> float | None:
    for key in ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap"):
        if (value := getattr(config, key, None)) is not None:
            return float(value)
    return None


HeadFunction = Callable[..., Any]  # (hidden [B, T, H], Head, aux_loss or None, **head_inputs)


def install_head_forward(model: Any) -> None:
    """Let `model(..., head_fn=f, head_inputs={...})` return `f(hidden, head, aux_loss, **inputs)`.

    `hidden` is the last hidden state [B, T, H], `head` a `Head`, `aux_loss` the load-balancing loss
    of a mixture of experts when `output_router_logits=True` was passed and None otherwise. Install
    before the model is wrapped for distributed training; installing twice changes nothing.
    """
    model = unwrap(model)
    read_head(model)
    if getattr(model, "base_model", model) is model:
        raise ValueError(f"model {type(model).__name__} has no backbone apart from its output head")
    if "_forward_without_head_fn" in model.__dict__:
        return

    @functools.wraps(type(model).forward)  # generate() checks its arguments against the signature
    def forward(
        self: Any,
        *args: Any,
        head_fn: HeadFunction | None = None,
        head_inputs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        if head_fn is None:
            return self._forward_without_head_fn(*args, **kwargs)
        outputs = self.base_model(*args, **{**kwargs, "use_cache": False})
        aux_loss = None
        if kwargs.get("output_router_logits"):
            aux_loss = _load_balancing_loss(self, outputs, kwargs.get("attention_mask"))
        return head_fn(outputs[0], read_head(self), aux_loss, **(head_inputs or {}))

    model._forward_without_head_fn = model.forward
    model.forward = MethodType(forward, model)


# Largest difference of two log-probs, as a part of the largest logit, that is still rounding.
_ROUNDING = {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}


@torch.no_grad()
def check_head(model: Any) -> None:
    """Compare the model's own log-probs of three tokens with those that `read_head` leads to.

    A head that does more than scale and cap a linear layer, such as BERT's with its dense layer
    and norm, is found here. Costs two forward passes of three tokens; does nothing where weights
    are not whole on this process.

    Raises:
        ValueError: they differ by more than rounding.
    """
    model = unwrap(model)
    if any(p.is_meta or p.numel() == 0 or _is_sharded(p) for p in model.parameters()):
        return
    vocabulary = read_head(model).weight.shape[0]
    ids = torch.tensor([[token % vocabulary for token in (5, 6, 7)]])
    ids = ids.to(model.get_input_embeddings().weight.device)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        expected = model(**inputs).logits
        hidden = hidden_states(model, **inputs)
    finally:
        for module in training:
            module.training = True
    head = read_head(model)
    logits = nn.functional.linear(hidden.to(head.weight), head.weight, head.bias)
    logits = logits.float() * head.scale
    if head.softcap is not None:
        logits = head.softcap * torch.tanh(logits / head.softcap)
    logits, expected = logits.cpu(), expected.float().cpu()
    same_shape = logits.shape == expected.shape
    gap = torch.tensor(0.0)
    if same_shape:
        gap = (logits.log_softmax(-1) - expected.log_softmax(-1)).abs().max()
    limit = 1e-5 + _ROUNDING.get(hidden.dtype, 1e-4) * expected.abs().max()
    if not same_shape or gap > limit:  # not so if there are NaNs, which training will report
        found = f"by up to {gap:.2g}" if same_shape else f"in shape, {tuple(expected.shape)}"
        raise ValueError(
            f"the log-probs of {type(model).__name__} differ {found} from those of a linear output "
            f"head with scale {head.scale:g} and softcap {head.softcap}, which is all that its "
            "config and get_output_embeddings() tell; expected a head without further layers"
        )


def _load_balancing_loss(model: Any, outputs: Any, attention_mask: Tensor | None) -> Tensor:
    # The one that every mixture of experts in transformers uses.
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    config = model.config.get_text_config()
    experts = getattr(config, "num_experts", None) or config.num_local_experts
    per_token = config.num_experts_per_tok
    loss: Any = load_balancing_loss_func(outputs.router_logits, experts, per_token, attention_mask)
    return loss


def hidden_states(model: Any, **inputs: Any) -> Tensor:
    """Call a causal language model, wrapped or not, and return its final hidden states [B, T, H].

    No logits are computed. Prompt-learning adapters prepend virtual tokens; the positions of the
    real ones are the last T.
    """
    install_head_forward(model)
    return model(**inputs, head_fn=_return_hidden)


def _return_hidden(hidden: Tensor, head: Head, aux_loss: Tensor | None) -> Tensor:
    return hidden


def disable_dropout(model: nn.Module) -> None:
    """Set every dropout probability of the model to zero."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0  # type: ignore[assignment]  # read by functional attention


def align_to_tokens(hidden: Tensor, labels: Tensor) -> Tensor:
    """Drop the virtual tokens that prompt learning put in front: the last T positions remain."""
    return hidden if hidden.shape[1] == labels.shape[1] else hidden[:, -labels.shape[1] :]


def model_inputs(batch: Mapping[str, Any]) -> dict[str, Any]:
    """What of a collator's batch the model itself takes."""
    return {key: value for key, value in batch.items() if key not in _NOT_FOR_MODEL}


def batch_labels(batch: Mapping[str, Any]) -> Tensor:
    """A batch's labels [2P, T], aligned with the hidden states; made if the collator does not."""
    if "labels" in batch:
        return batch["labels"]
    ids, mask = batch["input_ids"], batch["completion_mask"]
    labels = torch.full_like(ids, -100)
    labels[:, :-1] = ids[:, 1:].masked_fill(mask[:, 1:] == 0, -100)
    return labels
