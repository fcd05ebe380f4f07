"""The options of the head that every linear_* function takes, checked once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from fastpref.backends.tile import Transform
from fastpref.logps.plan import FUSED, check_plan_options, check_tolerance
from fastpref.validation import cached_options, check_integer


@dataclass(frozen=True)
class HeadOptions:
    """How the logits are formed and computed, as documented by `linear_token_logps`.

    Raises ValueError for a bad value; TypeError for a name that is not an option.
    """

    scale: float = 1.0
    softcap: float | None = None
    temperature: float = 1.0
    ignore_index: int = -100
    strategy: str = "auto"
    memory_budget: int | None = None
    precision: str = "exact"
    fused: bool | None = None
    backend: str | None = None
    gradient_tolerance: float | None = None
    head_gradient_tolerance: float | None = None
    gradient_seed: int = 0

    transform: Transform = field(init=False, repr=False, compare=False)  # of the first three

    def __post_init__(self) -> None:
        check_plan_options(self.strategy, self.memory_budget, self.precision, self.fused)
        check_integer("ignore_index", self.ignore_index)
        check_tolerance("gradient_tolerance", self.gradient_tolerance)
        check_tolerance("head_gradient_tolerance", self.head_gradient_tolerance)
        check_integer("gradient_seed", self.gradient_seed)
        transform = Transform(self.scale, self.softcap, self.temperature)
        object.__setattr__(self, "transform", transform)


HEAD_OPTIONS = tuple(option.name for option in fields(HeadOptions) if option.init)


def flat_options(options: HeadOptions) -> tuple[Any, ...]:
    """The values of the options, in types that an operator of torch.library can take."""
    values = {name: getattr(options, name) for name in HEAD_OPTIONS}
    return (*(values | {"fused": FUSED.index(options.fused)}).values(),)


def from_flat(values: Sequence[Any]) -> HeadOptions:
    """The options whose `flat_options` these are."""
    options = dict(zip(HEAD_OPTIONS, values, strict=True))
    return HeadOptions(**options | {"fused": FUSED[options["fused"]]})


def take_head_options(function: str, keywords: dict[str, Any]) -> HeadOptions:
    """The options of the head from keyword arguments; TypeError if there are others."""
    for name in keywords:
        if name not in HEAD_OPTIONS:
            raise TypeError(f"{function}() got an unexpected keyword argument {name!r}")
    return cached_options(HeadOptions, keywords)
