"""Reading the output head of a transformers model: its matrix, bias, scale and softcap."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from .head_layers import HeadAdapter, read_layer


@dataclass(frozen=True)
class Head:
    """An output head: logits = softcap * tanh(scale * (hidden @ weight.T + bias) / softcap).

    Attributes:
        weight: [V, H].
        bias: [V] or None.
        scale: multiplies the logits, before the softcap.
        softcap: None for none.
        tied: whether the weight is also the input embedding's.
        padding: rows of the model's layer that its logits leave out; weight and bias end before
            them. Padding that a model's own logits count, as after
            `resize_token_embeddings(pad_to_multiple_of=64)`, counts here too.
        adapters: LoRA and DoRA adapters that are active on the layer; only `read_head(model,
            adapters=True)` returns a head that has some.
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None
    tied: bool = False
    padding: int = 0
    adapters: tuple[HeadAdapter, ...] = ()

    @property
    def vocab_size(self) -> int:
        """V, the number of logits of each token."""
        return self.weight.shape[0]

    def options(self) -> dict[str, Any]:
        """Bias, scale and softcap as keyword arguments of the `linear_*` functions.

        Raises:
            ValueError: the head has adapters, which those functions would leave out.
        """
        if self.adapters:
            raise ValueError(_ADAPTED)
        return {"bias": self.bias, "scale": self.scale, "softcap": self.softcap}


_ADAPTED = (
    "the model's output head carries a PEFT adapter, which would never be trained because "
    "the head's weight is used directly; leave 'lm_head' out of target_modules, or train the whole "
    "layer with modules_to_save=['lm_head']"
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
    weight, bias = layer.weight, layer.bias
    rows = weight.shape[0]
    kept = min(rows, getattr(config, "unpadded_vocab_size", None) or rows)
    if kept < rows:
        weight, bias = weight[:kept], None if bias is None else bias[:kept]
    return Head(weight, bias, **transform, tied=tied, padding=rows - kept, adapters=layer.adapters)


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
