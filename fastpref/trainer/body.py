"""The part of a trainer that makes steps on a CPU faster: the body's product, and kept memory."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn
from transformers import Trainer

from fastpref.backends.processor import say_once
from fastpref.body import (
    LinearProducts,
    choose_layers,
    keep_cpu_memory,
    speedup,
    unavailable_reason,
)
from fastpref.body.attach import Speedup
from fastpref.heads.reading import unwrap
from fastpref.trainer.config import BaseConfig


class BodyTrainer(Trainer):
    """A trainer whose steps run the body's linear layers on the native product.

    `cpu_linear` says which layers. Between steps they are those of the model's own classes.
    """

    args: BaseConfig
    _products: LinearProducts = LinearProducts()

    def set_up_body(self, ref_model: Any) -> None:
        """Choose the layers of the policy and of its reference, and log which they are.

        Raises:
            ValueError: cpu_linear is "native", and the native product cannot run here.
        """
        setting = self.args.cpu_linear
        if setting == "torch":
            return
        if (reason := self._why_torch()) is not None:
            if setting == "native":
                raise ValueError(f"cpu_linear is 'native', but {reason}; expected 'torch' here")
            return
        models = [unwrap(model) for model in (self.model, ref_model) if model is not None]
        heads = [model.get_output_embeddings() for model in models]
        dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16}
        products = choose_layers(
            models,
            compute_dtype=dtypes.get(self.accelerator.mixed_precision),
            heads=[head for head in heads if isinstance(head, nn.Module)],
            speedup=None if setting == "native" else self._agreed_speedup(),
        )
        if setting == "native" and not products.layers:
            raise ValueError(
                "cpu_linear is 'native', but the model has no Linear layer in float32, bfloat16 or "
                "float16 on the CPU; expected 'torch' here"
            )
        if products.layers:
            self._products = products
            if self.args.process_index == 0:
                say_once(str(products))

    def _why_torch(self) -> str | None:
        """Why the native product cannot run in this trainer, or None."""
        if self.accelerator.device.type != "cpu":
            return f"training is on {self.accelerator.device.type}"
        if self.args.torch_compile:
            return "torch_compile is on, which cannot compile the native product"
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:
            return "the weights are sharded"
        return unavailable_reason()

    def _agreed_speedup(self) -> Speedup:
        """`speedup` as the first process measures it, alike in all processes."""
        if self.args.world_size == 1:
            return speedup
        speedups: dict[Any, float] = {}

        def agreed(shape: tuple[int, int], dtype: torch.dtype) -> float:
            if (shape, dtype) not in speedups:
                found = [speedup(shape, dtype) if self.args.process_index == 0 else None]
                (speedups[shape, dtype],) = broadcast_object_list(found)
            return speedups[shape, dtype]

        return agreed

    def kept_memory(self) -> AbstractContextManager[None]:
        """The context in which freed memory is kept, if training is on a CPU and that is wanted."""
        on_cpu = self.accelerator.device.type == "cpu"
        return keep_cpu_memory(on_cpu and self.args.keep_cpu_memory)

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """The forward and backward pass of a micro-batch."""
        with self._products.attached():
            return super().training_step(*args, **kwargs)

    def prediction_step(self, *args: Any, **kwargs: Any) -> Any:
        """The forward pass of a batch of an evaluation."""
        with self._products.attached():
            return super().prediction_step(*args, **kwargs)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluate or predict on all batches."""
        with self.kept_memory():
            return super().evaluation_loop(*args, **kwargs)

    def _precompute(self, *args: Any, **kwargs: Any) -> Any:
        with self._products.attached(), self.kept_memory():
            return super()._precompute(*args, **kwargs)  # type: ignore[misc]
