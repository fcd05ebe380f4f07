"""Context managers that change a model's state and restore it exactly."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Evaluation mode for every module; at the end each module has its previous mode.

    `model.eval()` and `model.train()` would put a module that the user keeps in evaluation mode
    into training mode.
    """
    training = [module for module in model.modules() if module.training]
    try:
        for module in training:
            module.training = False
        yield
    finally:
        for module in training:
            module.training = True


@contextlib.contextmanager
def same_weights_trained(model: Any) -> Iterator[None]:
    """Restores every weight's requires_grad at the end.

    PEFT makes all weights of an adapter trainable when it switches, disables or loads one, also
    those that the user has frozen.
    """
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    finally:
        for parameter, trained in before:
            if parameter.requires_grad != trained:
                parameter.requires_grad_(trained)
