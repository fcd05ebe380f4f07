"""Reading the output head of a transformers model: its matrix, bias, scale and softcap."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastpref.heads.adapters import adapter_options
from fastpref.heads.layer import HeadAdapter, read_layer


@dataclass(frozen=True)
class Head:
    """An output head: logits = softcap * tanh(scale * (hidden @ weight.T + bias) / softcap).

    Adapters add to hidden @ weight.T, without being merged into it.

    Attributes:
        weight: [V, H].
        bias: [V] or None.
        scale: multiplies the logits, before the softcap.
        softcap: None for none.
        tied: whether the weight is also the input embedding's.
        padding: rows of the model's layer that its logits leave out; weight and bias end before
            them. Padding that a model's own logits count, as after
            `resize_token_embeddings(pad_to_multiple_of=64)`, counts here too.
        adapters: LoRA and DoRA adapters that are active on the layer. The head that a `head_fn`
            gets has them, and that of `read_head(model, adapters=True)`.
        adapted: whether the layer has such adapters at all, active or not.
        row_scale: [V] factors on hidden @ weight.T that the layer has of its own, or None.
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None
    tied: bool = False
    padding: int = 0
    adapters: tuple[HeadAdapter, ...] = ()
    adapted: bool = False
    row_scale: Tensor | None = None

    @property
    def fused(self) -> bool | None:
        """The `fused` option of the `linear_*` functions for a policy and its reference alike.

        False with adapters, which a logit-free product does not have: the reference may be the same
        model with its adapters switched off, and takes the policy's kernels.
        """
        return False if self.adapted else None

    @property
    def vocab_size(self) -> int:
        """V, the number of logits of each token."""
        return self.weight.shape[0]

    def options(self, hidden: Tensor | None = None) -> dict[str, Any]:
        """Bias, scale, softcap and adapters as keyword arguments of the `linear_*` functions.

        Args:
            hidden: [..., H] the hidden states that those functions are given, which a head with
                adapters multiplies here with their A; others do without.

        Raises:
            ValueError: the head has adapters and hidden is None, or adapters that cannot be used
                unmerged (see docs/heads.md).
        """
        own = {"scale": self.scale, "softcap": self.softcap}
        if not self.adapters:
            scaled = {} if self.row_scale is None else {"weight_scale": self.row_scale}
            return {"bias": self.bias, **scaled, **own}
        if hidden is None:
            raise ValueError(
                "the output head carries a PEFT adapter, which multiplies the hidden states; "
                "expected them: head.options(hidden)"
            )
        return {**adapter_options(hidden, self.weight, self.bias, self.adapters), **own}

    def logits(self, hidden: Tensor) -> Tensor:
        """The logits [..., V] of hidden [..., H] in plain torch, float32 at least: for checks."""
        options = self.options(hidden)
        wide = torch.float64 if self.weight.dtype == torch.float64 else torch.float32
        z = F.linear(hidden, self.weight).to(wide)
        if options.get("low_rank") is not None:
            low, up = options["low_rank"]
            z = z + F.linear(low, up)
        if options.get("weight_scale") is not None:
            z = z * options["weight_scale"]
        if options["bias"] is not None:
            z = z + options["bias"]
        z = z * self.scale
        return z if self.softcap is None else self.softcap * torch.tanh(z / self.softcap)


_ADAPTED = (
    "the model's output head carries a PEFT adapter, which would never be trained if the head's "
    "weight were used alone; expected read_head(model, adapters=True), whose options(hidden) have "
    "the adapter too"
)


def unwrap(model: Any) -> Any:
    """The causal language model inside DDP, FSDP, DeepSpeed, compile and PEFT wrappers."""
    while True:
        if "module" in getattr(model, "_modules", ()):
            model = model.module
        elif hasattr(model, "_orig_mod"):  # torch.compile
            model = model._orig_mod
        elif hasattr(model, "get_base_model") and hasattr(model, "peft_config"):
            model = model.get_base_model()
        else:
            return model


def read_head(model: Any, *, adapters: bool = False) -> Head:
    """Read a causal language model's output head, as it is active now, and its logits' transform.

    The scale comes from the first config key present of `logit_scale`, `output_multiplier`,
    `lm_head_multiplier`, `logits_scaling` (which divides, except in HyperCLOVA X), keys and order
    being TRL 1.16's, and `logits_mup_width_multiplier` (Inkling; divides); the softcap from the
    first of `final_logit_softcapping`, `logits_soft_cap` (RecurrentGemma) and
    `output_logit_soft_cap` (xLSTM); how many rows count from `unpadded_vocab_size` (Inkling). A
    `transform` that was given to `install_head_forward` goes before scale and softcap.

    Args:
        model: a causal language model, wrapped or not.
        adapters: return the head's LoRA and DoRA adapters too instead of refusing them.

    Raises:
        ValueError: the model has no output head, its head carries a PEFT adapter (unless
            `adapters`), is quantised, or is not whole on this process.
    """
    model = unwrap(model)
    getter = getattr(model, "get_output_embeddings", None)
    module = getter() if getter is not None else None
    if not isinstance(module, nn.Module):
        raise ValueError(
            f"model {type(model).__name__} has no output head; expected a causal language model "
            "whose get_output_embeddings() returns a linear layer"
        )
    layer = read_layer(module)
    if layer.adapters and not adapters:
        raise ValueError(_ADAPTED)
    tied = getattr(_embeddings(model), "weight", None) is layer.weight
    config = _text_config(model)
    transform = getattr(model, "_head_transform", None) or {
        "scale": _logit_scale(config),
        "softcap": _softcap(config),
    }
    weight, bias, active = layer.weight, layer.bias, layer.adapters
    rows = weight.shape[0]
    kept = min(rows, getattr(config, "unpadded_vocab_size", None) or rows)
    if kept < rows:
        weight, bias = weight[:kept], None if bias is None else bias[:kept]
        active = tuple(adapter.rows(kept) for adapter in active)
    row_scale = None if layer.row_scale is None else layer.row_scale[:kept]
    padding = rows - kept
    return Head(
        weight,
        bias,
        **transform,
        tied=tied,
        padding=padding,
        adapters=active,
        adapted=layer.adapted,
        row_scale=row_scale,
    )


def _embeddings(model: Any) -> Any:
    try:
        return model.get_input_embeddings()
    except (AttributeError, NotImplementedError):  # audio and vision backbones
        return None


def _text_config(model: Any) -> Any:
    return model.config.get_text_config(decoder=True) if hasattr(model, "config") else None


def _logit_scale(config: Any) -> float:
    for key in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        if (value := getattr(config, key, None)) is not None:
            return float(value)
    for key in ("logits_scaling", "logits_mup_width_multiplier"):
        if (value := getattr(config, key, None)) is not None:
            multiplies = key == "logits_scaling" and config.model_type == "hyperclovax"
            return float(value) if multiplies else 1.0 / float(value)
    return 1.0


def _softcap(config: Any) -> float | None:
    for key in ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap"):
        if (value := getattr(config, key, None)) is not None:
            return float(value)
    return None
