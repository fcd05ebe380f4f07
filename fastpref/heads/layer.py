"""`read_layer`: weight, bias and adapters of an output layer, inside PEFT's wrappers."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from fastpref.heads.sharded import is_sharded, is_tensor_parallel
from fastpref.validation import FLOATS


@dataclass(frozen=True)
class HeadAdapter:
    """A LoRA or DoRA adapter of the output layer.

    With x = dropout(hidden) and no dropout, LoRA adds scaling * (x @ lora_A.T) @ lora_B.T to
    hidden @ weight.T. DoRA (arXiv 2402.09353) multiplies their sum, without the bias, by
    magnitude / norm, where norm is the length of each row of weight + scaling * lora_B @ lora_A and
    has no gradient.

    Attributes:
        lora_A: [r, H].
        lora_B: [V, r].
        scaling: alpha / r, or alpha / sqrt(r) for rsLoRA.
        magnitude: [V], DoRA's; None for LoRA.
        bias: [V], the bias of lora_B before scaling, or None.
        dropout: the probability that an element of hidden is dropped in training mode.
        training: whether the adapter is in training mode, so that its dropout is active.
    """

    lora_A: Tensor
    lora_B: Tensor
    scaling: float
    magnitude: Tensor | None = None
    bias: Tensor | None = None
    dropout: float = 0.0
    training: bool = False

    def rows(self, n: int) -> HeadAdapter:
        """The adapter of the layer's first n rows."""

        def first(t: Tensor | None) -> Tensor | None:
            return None if t is None else t[:n]

        magnitude, bias = first(self.magnitude), first(self.bias)
        return replace(self, lora_B=self.lora_B[:n], magnitude=magnitude, bias=bias)


@dataclass(frozen=True)
class Layer:
    """The parameters of an output layer.

    Attributes:
        module: the layer inside PEFT's wrapper.
        weight: [V, H].
        bias: [V] or None.
        adapters: the active adapters.
        adapted: whether the layer has adapters, active or not.
        row_scale: [V] learned factors on hidden @ weight.T, before the bias (nGPT, arXiv
            2410.01131), or None.
    """

    module: nn.Module
    weight: Tensor
    bias: Tensor | None
    adapters: tuple[HeadAdapter, ...] = ()
    adapted: bool = False
    row_scale: Tensor | None = None


def read_layer(module: nn.Module) -> Layer:
    """Read an output layer in its present state.

    Of PEFT's `modules_to_save` the active copy is read, or the original layer if adapters are
    disabled. Of `trainable_token_indices` the weight with the trained rows is read.

    Raises:
        ValueError: a weight that is not a whole floating-point matrix on this process, an adapter
            that is neither LoRA nor DoRA, or an adapter on a layer with a row_scale.
    """
    adapters: tuple[HeadAdapter, ...] = ()
    weight: Any = None
    bias: Any = None
    adapted = isinstance(getattr(module, "lora_A", None), nn.ModuleDict)
    if "peft" in sys.modules:  # otherwise no layer can be PEFT's
        module, weight, adapters = _inside_peft(module)
    if weight is None:
        weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
    _check_weight(weight, module)
    scale = _row_scale(module, weight)
    if scale is not None and (adapters or weight is not module.weight):
        raise ValueError(
            f"the output head is a {type(module).__name__}, which scales each logit by itself, and "
            "carries a PEFT adapter; expected modules_to_save there, or no adapter"
        )
    return Layer(module, weight, bias, adapters, adapted, scale)


def _row_scale(module: nn.Module, weight: Tensor) -> Tensor | None:
    """The learned factors on an output layer's logits, as Dory has them; else None.

    probe.py checks that they act like that.
    """
    scale = getattr(module, "logit_scale", None)
    if not isinstance(scale, Tensor) or scale.shape != weight.shape[:1]:
        return None
    wide = scale.dtype if scale.dtype == torch.float64 else torch.float32
    return scale.to(wide) * getattr(module, "logit_scale_factor", 1.0)


def _check_weight(weight: Any, module: nn.Module) -> None:
    name = type(module).__name__
    if isinstance(module, nn.ModuleList):
        raise ValueError(
            f"the output head is a list of {len(module)} layers; expected one linear layer: give "
            "linear_token_logps the states and the weight of each"
        )
    if not isinstance(weight, Tensor):
        packed = next((n for n in ("qweight", "W_q", "weight_packed") if hasattr(module, n)), None)
        reason = f"is quantised (it keeps {packed!r})" if packed else "has no weight"
        raise ValueError(
            f"the output head is a {name}, which {reason}; expected a linear layer in float: "
            f"{_KEEP}"
        )
    if is_tensor_parallel(weight):
        return
    if is_sharded(weight):
        raise ValueError(
            f"the output head's weight of shape {tuple(weight.shape)} is sharded among processes "
            "(a DTensor); expected a whole tensor: leave the head out of what is sharded, or "
            "gather it first"
        )
    quantised = weight.dtype not in FLOATS or hasattr(weight, "__tensor_flatten__")
    if weight.dim() != 2 or weight.numel() == 0 or quantised:
        kind = f"a {type(weight).__name__} of " if hasattr(weight, "__tensor_flatten__") else ""
        raise ValueError(
            f"the output head ({name}) has {kind}shape {tuple(weight.shape)} and dtype "
            f"{str(weight.dtype)[6:]}; expected a whole [vocabulary, hidden] matrix of "
            "float64, float32, bfloat16 or float16 numbers: "
            + (_KEEP if quantised else "gather a head that is sharded (ZeRO-3) first")
        )


_KEEP = (
    "keep the head out of the quantisation (llm_int8_skip_modules=['lm_head'] of bitsandbytes, "
    "modules_to_not_convert of others)"
)


def _inside_peft(module: nn.Module) -> tuple[nn.Module, Tensor | None, tuple[HeadAdapter, ...]]:
    """The layer inside PEFT's wrapper, its weight if that is not `layer.weight`, its adapters."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper

    if isinstance(module, ModulesToSaveWrapper):
        active = module.active_adapters
        copies = module.modules_to_save
        off = module.disable_adapters or not active or any(a not in copies for a in active)
        return (module.original_module if off else copies[active[0]]), None, ()
    if isinstance(module, AuxiliaryTrainingWrapper):
        module = getattr(module, "token_adapter", module)
    if not isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
        return module, None, ()
    name = f"{type(module).__module__.removeprefix('peft.tuners.')}.{type(module).__name__}"
    if isinstance(module, AuxiliaryTrainingWrapper):
        raise ValueError(f"the output head is in PEFT's {name}; {_REFUSED}")
    base = module.get_base_layer()
    if module.disable_adapters:
        if module.merged:
            raise ValueError(
                "the output head's adapter is switched off while it is merged into the weight; "
                "expected it to be unmerged first: call unmerge_adapter() of the PEFT model"
            )
        return base, None, ()
    if module.merged or not module.active_adapters:
        return base, None, ()
    if hasattr(module, "trainable_tokens_delta"):
        return base, module.get_merged_weights(module.active_adapters), ()
    if not isinstance(getattr(module, "lora_A", None), nn.ModuleDict):
        raise ValueError(f"the output head carries a PEFT adapter of kind {name}; {_REFUSED}")
    names = [n for n in module.active_adapters if n in module.lora_A]
    return base, None, tuple(_lora(module, n) for n in names)


_REFUSED = "expected LoRA, DoRA, modules_to_save or trainable_token_indices there, or no adapter"


def _lora(module: Any, name: str) -> HeadAdapter:
    variant = getattr(module, "lora_variant", {}).get(name)
    if variant is not None and type(variant).__name__ != "DoraLinearVariant":
        kind = type(variant).__name__
        raise ValueError(f"the output head carries a PEFT adapter of kind {kind}; {_REFUSED}")
    a, b = module.lora_A[name], module.lora_B[name]
    magnitude = None if variant is None else module.lora_magnitude_vector[name].weight
    dropout = module.lora_dropout[name]
    p, training = getattr(dropout, "p", 0.0), dropout.training
    scaling = float(module.scaling[name])
    return HeadAdapter(a.weight, b.weight, scaling, magnitude, b.bias, p, training)
