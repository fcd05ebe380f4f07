"""The phases of a trainer's steps: how long each takes, and where each begins among allocations.

A trainer of transformers calls, for each optimiser step,

    get_batch_samples                   data
    training_step                       body forward, and then
        the backbone has returned       head: logits or none, the loss, and their backward pass
        the backbone's output has       body backward
        a gradient
        a forward pass without          reference
        gradients begins
    training_step has returned          optimiser, up to the end of the step

so that hooks on the model and wrapped methods see all of it, whatever the head is.
"""

from __future__ import annotations

import functools
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from transformers import TrainerCallback

from fastpref.heads.calling import backbone
from fastpref.heads.reading import unwrap
from fastpref.profiling.account import GRADIENTS, MARK, storage_of


class StepClock(TrainerCallback):
    """Times the phases of each step of a trainer, and marks them for a profiler.

    Attributes:
        steps: for each optimiser step that has ended, the seconds of each phase.
        gradients: for each backward pass while `marking`, the addresses of the gradients.
        marking: whether marks are written for a profiler.
    """

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []
        self.gradients: list[set[int]] = []
        self.marking = False
        self._phase = "other"
        self._since = time.perf_counter()
        self._seconds: dict[str, float] = defaultdict(float)
        self._on_gpu = torch.cuda.is_available()

    def attach(self, trainer: Any) -> None:
        """Wrap the trainer's methods and put hooks on its models."""
        self.trainer = trainer
        trainer.add_callback(self)
        self._wrap("get_batch_samples", "data", "other")
        self._wrap("compute_loss", "body forward", "head")
        self._wrap("training_step", "body forward", "optimiser", self._end_of_backward)
        models = [trainer.model]
        if getattr(trainer, "ref_model", None) is not None:
            models.append(trainer.ref_model)
        for model in models:
            before: list[str] = []
            model.register_forward_pre_hook(functools.partial(self._model_begins, before))
            model.register_forward_hook(functools.partial(self._model_ends, before))
        base = backbone(unwrap(trainer.model))
        base.register_forward_pre_hook(self._body_begins)
        base.register_forward_hook(self._body_ends)

    def mark(self, phase: str) -> None:
        """Begin a phase."""
        if self._on_gpu:
            torch.cuda.synchronize()
        now = time.perf_counter()
        self._seconds[self._phase] += now - self._since
        self._phase, self._since = phase, now
        self._write(phase)

    def _write(self, text: str) -> None:
        if self.marking:
            with torch.profiler.record_function(MARK + text):
                pass

    def _wrap(
        self, name: str, begin: str, end: str, then: Callable[[], None] | None = None
    ) -> None:
        method = getattr(self.trainer, name)

        @functools.wraps(method)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            self.mark(begin)
            out = method(*args, **kwargs)
            if then is not None:
                then()
            self.mark(end)
            return out

        setattr(self.trainer, name, wrapped)

    def _end_of_backward(self) -> None:
        if not self.marking:
            return
        grads = (p.grad for p in self.trainer.model.parameters() if p.grad is not None)
        self.gradients.append({storage_of(grad)[0] for grad in grads})
        self._write(GRADIENTS)

    # ---- hooks ----

    def _model_begins(self, before: list[str], *_: Any) -> None:
        if not torch.is_grad_enabled():
            before.append(self._phase)
            self.mark("reference")

    def _model_ends(self, before: list[str], *_: Any) -> None:
        if before and not torch.is_grad_enabled():
            self.mark(before.pop())

    def _body_begins(self, *_: Any) -> None:
        if torch.is_grad_enabled():
            self.mark("body forward")

    def _body_ends(self, module: Any, inputs: Any, outputs: Any) -> None:
        if not torch.is_grad_enabled():
            return
        hidden = outputs[0]
        if hidden.requires_grad:
            hidden.register_hook(self._hidden_has_gradient)
        self.mark("head")

    def _hidden_has_gradient(self, grad: torch.Tensor) -> None:
        self.mark("body backward")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.mark("other")
        self.steps.append(dict(self._seconds))
        self._seconds.clear()
