"""What a model is changed in for a moment, and exactly as it was afterwards."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Within it every module is in evaluation mode; afterwards each is in its own mode again.

    A module that was in evaluation mode stays in it, whatever the modules around it do.
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
    """Afterwards the same weights are trainable as before.

    Within it PEFT may switch, disable or load adapters, each of which makes all of an adapter's
    weights trainable, those too that the user has frozen.
    """
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    finally:
        for parameter, trained in before:
            if parameter.requires_grad != trained:
                parameter.requires_grad_(trained)
