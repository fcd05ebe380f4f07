"""`--loss` and `--loss-option` of the command line."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from fastpref.loss_options import LOSS_OPTIONS, LossOptions
from fastpref.loss_table import LOSS_TYPES

ALIASES = {"dpo": "sigmoid"}
OPTIONS = sorted(LOSS_OPTIONS - {"loss_type", "beta"} | {"nll_on_prompt"})
LOSS_HELP = f"Preference loss: dpo, {', '.join(LOSS_TYPES)}; several, joined by +, are added up."
OPTION_HELP = f"An option of the loss, such as label_smoothing=0.1: {', '.join(OPTIONS)}."


@dataclass(frozen=True)
class ChosenLoss:
    """What the user asked for, checked.

    title: for people. settings: arguments of `PreferenceConfig`. reference: as that of
    `LossOptions`.
    """

    title: str
    settings: dict[str, Any]
    reference: str


def choose_loss(loss: str, beta: float, options: list[str]) -> ChosenLoss:
    """Parse and check both options, before anything is loaded. Raises ValueError."""
    names = [name.strip().lower() for name in loss.split("+")]
    for name in names:
        if name not in (*ALIASES, *LOSS_TYPES):
            raise ValueError(f"--loss {loss}: expected {', '.join((*ALIASES, *LOSS_TYPES))}")
    settings: dict[str, Any] = {"loss_type": [ALIASES.get(name, name) for name in names]}
    for text in options:
        name, equals, value = text.partition("=")
        name = name.strip().replace("-", "_")
        if not equals or name not in OPTIONS:
            raise ValueError(
                f"--loss-option {text}: expected NAME=VALUE, NAME one of {', '.join(OPTIONS)}"
            )
        if name in settings:
            raise ValueError(f"--loss-option {name} is given twice")
        try:
            settings[name] = json.loads(value)
        except json.JSONDecodeError:  # a word
            settings[name] = value.strip()
    settings["beta"] = beta
    checked = LossOptions(**{k: v for k, v in settings.items() if k in LOSS_OPTIONS})
    return ChosenLoss(" + ".join(name.upper() for name in names), settings, checked.reference)
