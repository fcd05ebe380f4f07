"""Models that DeepSpeed divides or converts: whole where the trainers look at them.

ZeRO-3's part of a training:

    from_pretrained      transformers divides each weight while it loads it; `loads_whole` prevents
                         it, and `make_whole` undoes it for a model that is loaded already
    the trainer is made  reads the head, adds an adapter, copies the reference, compares rows
    train()              DeepSpeed divides the weights, and gathers them layer by layer

With mixed precision DeepSpeed converts weights to 16 bits when the training begins, and buffers
not. Other engines leave the weights in their dtype under autocast. `trained_form` is the model as
the training will have it, for log-probs that are compared with the training's.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers.integrations import deepspeed as hf_deepspeed

from fastpref.heads.sharded import is_partitioned, is_sharded

_HALVES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@contextlib.contextmanager
def loads_whole() -> Iterator[None]:
    """Keep transformers from dividing for ZeRO-3 what from_pretrained loads."""
    before = hf_deepspeed._hf_deepspeed_config_weak_ref
    hf_deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        hf_deepspeed._hf_deepspeed_config_weak_ref = before


def make_whole(model: nn.Module) -> None:
    """Replace weights that ZeRO-3 has divided by whole ones in this process's memory.

    All processes call it. Tied weights stay tied.

    Raises:
        ValueError: DeepSpeed has trained the model, and its hooks are still there; or the weights
            are quantised.
    """
    whole: dict[int, nn.Parameter] = {}
    for module in model.modules():
        if hasattr(module, "ds_id"):
            raise ValueError(
                "model: DeepSpeed's ZeRO-3 trains it already, and gathers its weights in hooks of "
                "that training; expected a model that is loaded anew, such as what save_model wrote"
            )
        for name, weight in list(module._parameters.items()):
            if weight is None or not is_partitioned(weight):
                continue
            if hasattr(weight, "quant_state") or hasattr(weight, "SCB"):  # of bitsandbytes
                raise ValueError(
                    "model: ZeRO-3 has divided its quantised weights while they were loaded; "
                    "expected a model that is loaded before the training's arguments are made"
                )
            if id(weight) not in whole:
                whole[id(weight)] = _gathered(weight)
            module._parameters[name] = whole[id(weight)]


def _gathered(weight: Any) -> nn.Parameter:
    import deepspeed

    with deepspeed.zero.GatheredParameters([weight]):
        values = weight.detach().cpu().clone()
    return nn.Parameter(values, weight.requires_grad)


def engine_dtype(accelerator: Any) -> torch.dtype | None:
    """The 16-bit dtype that DeepSpeed gives the weights of a model that it trains, or None."""
    if getattr(accelerator.state, "deepspeed_plugin", None) is None:
        return None
    return _HALVES.get(accelerator.mixed_precision)


def convert_weights(model: nn.Module, dtype: torch.dtype) -> None:
    """Convert the weights of a model in place, and not its buffers, such as RoPE's frequencies."""
    for weight in model.parameters():
        if weight.is_floating_point():
            weight.data = weight.data.to(dtype)


@contextlib.contextmanager
def trained_form(model: nn.Module, accelerator: Any) -> Iterator[nn.Module]:
    """The model on the device and in the dtype in which the training will have it.

    DeepSpeed and FSDP leave a model where it was loaded until the training begins. In another dtype
    it is a copy, which ends with the context.
    """
    if any(is_partitioned(p) or is_sharded(p) for p in model.parameters()):  # the training has it
        yield model
        return
    device, dtype = accelerator.device, engine_dtype(accelerator)
    floats = [p for p in model.parameters() if p.is_floating_point()]
    places = {p.device for p in model.parameters()} - {torch.device(device)}
    if dtype is not None and any(p.dtype != dtype for p in floats):
        copied = copy.deepcopy(model)
        convert_weights(copied, dtype)
        yield copied.to(device)
    elif places == {torch.device("cpu")}:
        model.to(device)
        try:
            yield model
        finally:
            model.to("cpu")
    else:
        yield model
