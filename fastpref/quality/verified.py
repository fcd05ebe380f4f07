"""`Verification`: the result of `verify`."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from fastpref.quality.displacement import PairScore
from fastpref.quality.findings import LEVELS, Finding
from fastpref.quality.first_step import Check


@dataclass
class PathError:
    """How far the sequence log-probs of one way of computing are from the exact ones.

    Attributes:
        max_nats, mean_nats: over the sequences.
        max_reward, mean_reward: beta times the error of a pair's margin.
    """

    max_nats: float
    mean_nats: float
    max_reward: float
    mean_reward: float


@dataclass
class Verification:
    """The result of `verify`.

    Attributes:
        dtype: of the model's weights.
        exact: "float64" or "float32", in which the log-probs that count as exact were computed;
            or why there are none.
        pairs: pairs of the checks; compared: of them, those of the errors.
        errors: by the way of computing.
        left_out: ways that were not taken, and why.
        checks: what has to hold before the first step.
        findings: what was found, the worst first.
        figures: loss and expected loss of the first step, NLL per token of both sides, share of
            pairs that the model ranks as the data.
        displacement: the pairs by CHES, the likeliest to displace their chosen answer first.
    """

    dtype: str
    exact: str
    pairs: int = 0
    compared: int = 0
    errors: dict[str, PathError] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    checks: list[Check] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    figures: dict[str, float] = field(default_factory=dict)
    displacement: list[PairScore] = field(default_factory=list)

    def worst(self) -> str | None:
        """The level of the worst finding; None if there is none."""
        return min((f.level for f in self.findings), key=LEVELS.index, default=None)

    def as_dict(self) -> dict[str, Any]:
        """The attributes, as values for JSON."""
        return {**asdict(self), "findings": [finding.as_dict() for finding in self.findings]}
