"""The options `--loss` and `--loss-option` of the command line."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from fastpref.losses.options import LOSS_OPTIONS, LossOptions
from fastpref.losses.table import LOSS_TYPES
from fastpref.losses.unpaired import UNPAIRED_LOSS_TYPES, check_unpaired_options

ALIASES = {"dpo": "sigmoid"}
OPTIONS = sorted(LOSS_OPTIONS - {"loss_type", "beta"} | {"nll_on_prompt"})
UNPAIRED_OPTIONS = ["desirable_weight", "undesirable_weight"]
PAIR_LOSS_HELP = (
    f"Preference loss: dpo, {', '.join(LOSS_TYPES)}; several, joined by +, are added up."
)
LOSS_HELP = (
    f"{PAIR_LOSS_HELP} Or one of single answers that are labelled desirable or not: "
    f"{', '.join(UNPAIRED_LOSS_TYPES)}."
)
_PAIR_OPTIONS = f"An option of the loss, such as label_smoothing=0.1: {', '.join(OPTIONS)}"
PAIR_OPTION_HELP = f"{_PAIR_OPTIONS}."
OPTION_HELP = f"{_PAIR_OPTIONS}; of single answers: {', '.join(UNPAIRED_OPTIONS)}."


@dataclass(frozen=True)
class ChosenLoss:
    """The loss of a run after checks.

    Attributes:
        title: the loss's name in texts.
        settings: arguments of `PreferenceConfig`, or of `UnpairedPreferenceConfig` if unpaired.
        reference: as `LossOptions.reference`.
        unpaired: whether it is a loss of single answers.
    """

    title: str
    settings: dict[str, Any]
    reference: str
    unpaired: bool = False


def choose_loss(loss: str, beta: float, options: list[str]) -> ChosenLoss:
    """Parse and check --loss and --loss-option. Raises ValueError.

    Args:
        loss: the value of --loss.
        beta: the value of --beta.
        options: the values of --loss-option, NAME=VALUE each.
    """
    names = [name.strip().lower() for name in loss.split("+")]
    unpaired = len(names) == 1 and names[0] in UNPAIRED_LOSS_TYPES
    for name in names:
        if name not in (*ALIASES, *LOSS_TYPES) and not unpaired:
            paired = ", ".join((*ALIASES, *LOSS_TYPES))
            unpaired_names = " or ".join(UNPAIRED_LOSS_TYPES)
            raise ValueError(f"--loss {loss}: expected {paired}, or {unpaired_names} alone")
    allowed = UNPAIRED_OPTIONS if unpaired else OPTIONS
    types = [ALIASES.get(name, name) for name in names]
    settings: dict[str, Any] = {"loss_type": types[0] if unpaired else types}
    for text in options:
        name, equals, value = text.partition("=")
        name = name.strip().replace("-", "_")
        if not equals or name not in allowed:
            raise ValueError(
                f"--loss-option {text}: expected NAME=VALUE, NAME one of {', '.join(allowed)}"
            )
        if name in settings:
            raise ValueError(f"--loss-option {name} is given twice")
        try:
            settings[name] = json.loads(value)
        except json.JSONDecodeError:  # a word
            settings[name] = value.strip()
    settings["beta"] = beta
    if unpaired:
        weights = (settings.get(name, 1.0) for name in UNPAIRED_OPTIONS)
        check_unpaired_options(settings["loss_type"], beta, *weights)
        return ChosenLoss(names[0].upper(), settings, "required", unpaired=True)
    loss_options = LossOptions(**{k: v for k, v in settings.items() if k in LOSS_OPTIONS})
    return ChosenLoss(" + ".join(name.upper() for name in names), settings, loss_options.reference)
