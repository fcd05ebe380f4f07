"""A model to plan for, which has shapes and no data: a config and the options of its training."""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from fastpref.heads.calling import disable_dropout

METHODS = ("full", "lora", "qlora")


@dataclass(frozen=True)
class StepOptions:
    """A configuration of training.

    Attributes:
        method: "full" trains all weights; "lora" an adapter of rank lora_r on all linear layers;
            "qlora" the same over weights of 4 bits.
        head: "fastpref", or "eager" with logits.
        dtype: of the weights.
        bf16: whether the step runs under bf16 autocast.
        gradient_checkpointing: whether activations are recomputed.
        prefix_sharing: whether a pair's prompt is computed once.
        reference: "precompute", "model" (a second model) or "adapter".
        head_strategy: as in `plan_head`.
        memory_budget: bytes of the head's stash and tile; None: `default_memory_budget`.
        device: "cpu" or "cuda", for the head's plan.
        accumulates: whether gradients of an earlier micro-batch are there. It is an option of
            `simulate_step`: a plan sets it itself.
        sync_each_batch: whether devices exchange gradients after each micro-batch, not only after
            the last one of an optimiser step; accelerate's option of that name.
    """

    method: str = "full"
    head: str = "fastpref"
    dtype: torch.dtype = torch.float32
    bf16: bool = False
    gradient_checkpointing: bool = True
    prefix_sharing: bool = True
    reference: str = "precompute"
    lora_r: int = 16
    head_strategy: str = "auto"
    memory_budget: int | None = None
    device: str = "cpu"
    accumulates: bool = False
    sync_each_batch: bool = False

    @property
    def item(self) -> int:
        """The bytes of a number in matrix products."""
        return 2 if self.bf16 or self.dtype.itemsize == 2 else 4


def check_config(config: Any) -> None:
    """Raise ValueError for a config of something else than a causal language model."""
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(
            f"config: the type {config.model_type!r} has an encoder; expected that of a causal "
            "language model"
        )
    text = config.get_text_config()
    for name in ("num_hidden_layers", "hidden_size", "vocab_size"):
        if not isinstance(getattr(text, name, None), int):
            raise ValueError(
                f"config: the type {config.model_type!r} has no {name}; expected that of a causal "
                "language model"
            )


def build_model(config: Any, options: StepOptions) -> Any:
    """The model on the meta device, ready to train."""
    from transformers import AutoModelForCausalLM

    config = copy.deepcopy(config)
    config.use_cache = False
    # A config with code of its own has run it already.
    remote_code = {"trust_remote_code": type(config).__module__.startswith("transformers_modules.")}
    with torch.device("meta"):
        try:
            model: Any = AutoModelForCausalLM.from_config(
                config, dtype=options.dtype, **remote_code
            )
        except ValueError as error:
            raise ValueError(
                f"config: got one of the type {config.model_type!r}, of which transformers makes "
                f"no causal language model ({first_line(error)})"
            ) from error
        if options.method != "full":
            from peft import LoraConfig, get_peft_model

            lora = LoraConfig(
                task_type="CAUSAL_LM",
                r=options.lora_r,
                lora_alpha=32,
                target_modules="all-linear",
            )
            model = get_peft_model(model, lora)
    disable_dropout(model)  # as the trainers do
    model.train()
    if options.gradient_checkpointing:
        # Its name since transformers 5.24, and the name before that.
        enable = getattr(model, "activation_checkpointing_enable", None)
        (enable or model.gradient_checkpointing_enable)()
        if options.method != "full":
            model.enable_input_require_grads()
    return model


def with_layers(config: Any, layers: int) -> Any:
    config = copy.deepcopy(config)
    text = config.get_text_config()
    text.num_hidden_layers = layers
    for name in ("layer_types", "mlp_layer_types"):
        if getattr(text, name, None):
            setattr(text, name, getattr(text, name)[:layers])
    return config


@contextlib.contextmanager
def silent() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
