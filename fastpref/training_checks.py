"""What is refused before the first step, rather than ignored."""

from __future__ import annotations

from typing import Any


def check_trains(model: Any) -> None:
    """Raise ValueError unless there is a weight to train."""
    if any(parameter.requires_grad for parameter in model.parameters()):
        return
    hint = ""
    if hasattr(model, "peft_config"):
        hint = " (PeftModel.from_pretrained(..., is_trainable=True) loads an adapter to train)"
    raise ValueError(
        "model: got one whose weights are all frozen, expected at least one with "
        f"requires_grad=True{hint}"
    )


def check_optimizer(model: Any, optimizer: Any) -> None:
    """Raise ValueError if the user's optimizer would change none of the weights to be trained."""
    trained = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    groups = getattr(optimizer, "param_groups", None)
    if not groups or not trained:  # the latter is an error of its own
        return
    if not any(id(p) in trained for group in groups for p in group["params"]):
        raise ValueError(
            "optimizers: got an optimizer that holds none of the model's trainable weights, "
            "expected one made of them (those of an adapter exist once it is there: with "
            "optimizers, pass a PeftModel and not a peft_config)"
        )
