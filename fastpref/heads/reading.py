"""Reading the output head of a transformers model: its matrix, bias, scale and softcap."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastpref.heads.adapters import adapter_options
from fastpref.heads.layer import HeadAdapter, read_layer
from fastpref.heads.sharded import is_sharded, local_rows, vocab_parallel_weight


@dataclass(frozen=True)
class Head:
    """An output head: logits = softcap * tanh(scale * (hidden @ weight.T + bias) / softcap).

    Adapters are applied to hidden without being merged into the weight.

    Attributes:
        weight: [V, H]; a `VocabParallelWeight` where tensor parallelism divides it.
        bias: [V] or None.
        scale: factor on the logits, before the softcap.
        softcap: bound of the logits' magnitude, or None.
        tied: whether the weight is also the input embedding's.
        padding: number of rows of the model's layer that its logits leave out; weight and bias end
            before them. Padding rows that the model's logits include, as after
            `resize_token_embeddings(pad_to_multiple_of=64)`, are part of V.
        adapters: the active LoRA and DoRA adapters of the layer. `read_head(model, adapters=True)`
            and `head_fn` return them; `read_head(model)` refuses them.
        adapted: whether the layer has such adapters, active or not.
        row_scale: [V] learned factors on hidden @ weight.T, or None.
    """

    weight: Any  # a Tensor or a VocabParallelWeight
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
        """The argument `fused` of the `linear_*` functions.

        With it a policy and its reference run the same kernels, also if the reference is the
        policy with its adapters disabled.
        """
        return False if self.adapted else None

    @property
    def vocab_size(self) -> int:
        """V, the number of logits of each token."""
        return self.weight.shape[0]

    def options(self, hidden: Tensor | None = None) -> dict[str, Any]:
        """Bias, scale, softcap and adapters as keyword arguments of the `linear_*` functions.

        Args:
            hidden: [..., H], the hidden states that those functions will get. Only a head with
                adapters needs them: they are multiplied by lora_A here.

        Raises:
            ValueError: the head has adapters and hidden is None, or it has adapters that must be
                merged (see docs/heads.md).
        """
        transform = {"scale": self.scale, "softcap": self.softcap}
        if not self.adapters:
            scaled = {} if self.row_scale is None else {"dora_scale": self.row_scale}
            return {"bias": self.bias, **scaled, **transform}
        if hidden is None:
            raise ValueError(
                "the output head carries a PEFT adapter, which multiplies the hidden states; "
                "expected them: head.options(hidden)"
            )
        return {**adapter_options(hidden, self.weight, self.bias, self.adapters), **transform}

    def logits(self, hidden: Tensor) -> Tensor:
        """The logits [..., V] of hidden [..., H] by plain torch, at least float32; for checks."""
        options = self.options(hidden)
        wide = torch.float64 if self.weight.dtype == torch.float64 else torch.float32
        z = F.linear(hidden, self.weight).to(wide)
        if options.get("lora_hidden") is not None:
            z = z + F.linear(options["lora_hidden"], options["lora_B"])
        if options.get("dora_scale") is not None:
            z = z * options["dora_scale"]
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
    """Read a causal language model's output head in its present state, and its logits' transform.

    They come from the first of these config keys that is present:

    - scale: `logit_scale`, `output_multiplier`, `lm_head_multiplier`, `logits_scaling` (a divisor,
      except in HyperCLOVA X), `logits_mup_width_multiplier` (Inkling; a divisor). All but the last
      are TRL 1.16's, in TRL's order.
    - softcap: `final_logit_softcapping`, `logits_soft_cap` (RecurrentGemma),
      `output_logit_soft_cap` (xLSTM).
    - number of rows: `unpadded_vocab_size` (Inkling).

    The `transform` of `install_head_forward` takes precedence over scale and softcap.

    Args:
        model: a causal language model, wrapped or not.
        adapters: whether to return the head's LoRA and DoRA adapters; by default they are refused.

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
    weight: Any = layer.weight
    bias, active = layer.bias, layer.adapters
    rows = weight.shape[0]
    vocab_size = min(rows, getattr(config, "unpadded_vocab_size", None) or rows)
    if vocab_size < rows:
        weight, bias = weight[:vocab_size], None if bias is None else bias[:vocab_size]
        active = tuple(adapter.rows(vocab_size) for adapter in active)
    row_scale = None if layer.row_scale is None else layer.row_scale[:vocab_size]
    if is_sharded(weight):
        if layer.adapted or row_scale is not None or vocab_size < rows:
            raise ValueError(
                "the output head is divided by tensor parallelism and has an adapter, factors of "
                "its rows or padding rows; expected a plain linear layer there"
            )
        weight, bias = vocab_parallel_weight(weight, gathers_tokens=False), local_rows(bias)
    return Head(
        weight,
        bias,
        **transform,
        tied=tied,
        padding=rows - vocab_size,
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
