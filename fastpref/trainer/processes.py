"""The part of a trainer that keeps several processes alike."""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from accelerate.utils import broadcast_object_list, gather_object

from fastpref.trainer.shared_state import SharingTrainer

T = TypeVar("T")


class AgreeingTrainer(SharingTrainer):
    """A trainer that checks that all of its processes train the same weights."""

    def on_first(self, function: Callable[[], T] | None) -> T:
        """Call a function on the first process; all processes get its result, or its error."""
        outcome: list[Any] = [None, None]
        if self.args.process_index == 0 and function is not None:
            try:
                outcome[0] = function()
            except Exception as error:  # of any kind: the other processes wait for an answer
                outcome[1] = error
        if self.args.world_size > 1:
            if outcome[1] is not None and not _travels(outcome[1]):
                outcome[1] = RuntimeError(f"{type(outcome[1]).__name__}: {outcome[1]}")
            broadcast_object_list(outcome)
        if outcome[1] is not None:
            raise outcome[1]
        return outcome[0]

    def check_same_weights(self) -> None:
        """Raise RuntimeError unless all processes have trained the same weights."""
        whole = not (self.is_deepspeed_enabled or self.is_fsdp_enabled)
        if self.args.world_size == 1 or not whole:
            return
        model: Any = self.model
        digest = hashlib.sha256()
        for p in model.parameters():
            if p.requires_grad:
                flat = p.detach().reshape(-1).contiguous().view(torch.uint8)
                digest.update(memoryview(flat.cpu().numpy()))
        digests = gather_object([digest.hexdigest()])
        odd = [rank for rank, value in enumerate(digests) if value != digests[0]]
        if odd:
            raise RuntimeError(
                f"after training, the weights of process {', '.join(map(str, odd))} differ from "
                "those of process 0; the run is not to be trusted"
            )

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        """As in `transformers.Trainer`, where a model that an evaluation has prepared stays as it
        is: without the wrapper that makes processes agree on their gradients."""
        several = self.args.world_size > 1
        whole = not (self.is_deepspeed_enabled or self.is_fsdp_enabled)
        if several and whole and self.model_wrapped is self.model:
            model: Any = self.model
            model._is_accelerate_prepared = False
        prepared = super()._prepare_for_training(*args, **kwargs)
        if several and whole and self.model_wrapped is self.model:
            raise RuntimeError(
                f"{self.args.world_size} processes train, but nothing makes them agree on their "
                "gradients: the model was not wrapped for that"
            )
        return prepared


def _travels(error: Exception) -> bool:
    """Whether an error can be sent to another process."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # of a class that another library has made
        return False
    return True
