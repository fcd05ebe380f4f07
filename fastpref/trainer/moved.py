"""`MovedWeights`: whether an optimiser's step changes the weights at all.

A bf16 weight w moves only if the step is at least about |w| / 512. AdamW's steps are about the
learning rate, so that at 5e-7 no weight above 2.6e-4 moves.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from fastpref.trainer.alarms import raise_alarm

TENSORS, ELEMENTS = 16, 4096  # that are sampled: the largest tensors, evenly spread elements
FEWEST = 0.1  # share of elements with a gradient that should change


class MovedWeights(TrainerCallback):
    """Samples weights around the first step whose learning rate is at least half of the option.

    A warm-up's first steps are smaller than the rest and say nothing. The counts stay on the device
    until the next log line. Elements whose gradient is 0 are left out: rows of embeddings that did
    not occur, and an adapter's A while B is 0.
    """

    def __init__(self) -> None:
        self._before: list[tuple[Tensor, Tensor, Tensor]] | None = None
        self._counts: Tensor | None = None
        self._rate = 0.0
        self._done = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._before, self._counts, self._done = None, None, bool(args.fp16)

    def on_pre_optimizer_step(
        self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any
    ) -> None:
        optimizer = kwargs.get("optimizer")
        if self._done or model is None or optimizer is None or args.learning_rate <= 0:
            return
        rates = [group["lr"] for group in optimizer.param_groups]
        if any(isinstance(rate, Tensor) and rate.device.type != "cpu" for rate in rates):
            return  # reading one would wait for the device
        self._rate = max(map(float, rates), default=0.0)
        if self._rate < args.learning_rate / 2:
            return
        self._done = True
        self._before = _sampled(model)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._before is None:
            return
        pairs, self._before = self._before, None
        if pairs:
            counts = [
                torch.stack([((after != before) & moves).sum(), moves.sum()])
                for after, before, moves in pairs
            ]
            self._counts = torch.stack([c.to(counts[0].device) for c in counts]).sum(0)

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        counts, self._counts = self._counts, None
        if counts is None or not state.is_world_process_zero:
            return
        changed, looked_at = counts.tolist()
        if looked_at and changed < FEWEST * looked_at:
            raise_alarm(
                "unmoved",
                f"only {100 * changed / looked_at:.1f} % of the sampled weights changed in a step "
                f"with learning rate {self._rate:g}: it is less than the rounding of the rest; "
                "load the weights in fp32 (dtype='float32', and bf16=True computes in bf16), train "
                "an adapter, or raise the learning rate",
                args,
            )


def _sampled(model: Any) -> list[tuple[Tensor, Tensor, Tensor]]:
    """For each sampled tensor its elements now (a view), a copy, and whether a gradient moves them.

    A process samples its own shard of weights that are sharded.
    """
    trained = [p for p in model.parameters() if p.requires_grad and p.grad is not None]
    trained.sort(key=lambda p: -p.numel())
    out = []
    for parameter in trained[:TENSORS]:
        weight, gradient = _local(parameter.detach()), _local(parameter.grad)
        if weight.numel() == 0 or weight.shape != gradient.shape or not weight.is_contiguous():
            continue
        stride = max(1, weight.numel() // ELEMENTS)
        now = weight.view(-1)[::stride]
        out.append((now, now.clone(), gradient.reshape(-1)[::stride] != 0))
    return out


def _local(tensor: Any) -> Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor
