"""The options of the head that every linear_* function takes, checked once."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from fastpref.backends.tile import Transform
from fastpref.plan import check_plan_options


@dataclass(frozen=True)
class HeadOptions:
    """How the logits are formed and computed; `linear_token_logps` documents each.

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

    def __post_init__(self) -> None:
        check_plan_options(self.strategy, self.memory_budget, self.precision, self.fused)
        self.transform  # noqa: B018  raises

    @property
    def transform(self) -> Transform:
        return Transform(self.scale, self.softcap, self.temperature)


_HEAD_OPTIONS = frozenset(field.name for field in fields(HeadOptions))


def take_head_options(function: str, given: dict[str, Any]) -> HeadOptions:
    """The options of the head from keyword arguments; TypeError if there are others."""
    for name in given:
        if name not in _HEAD_OPTIONS:
            raise TypeError(f"{function}() got an unexpected keyword argument {name!r}")
    return HeadOptions(**given)
