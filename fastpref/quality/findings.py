"""`Finding`: one thing found in preference data, with its rows and what to do about it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

# error: rows teach something wrong, or cannot be trained on. warning: a property of the data that
# often spoils a training. note: worth knowing.
LEVELS = ("error", "warning", "note")


@dataclass(frozen=True)
class Finding:
    """One thing found in the data.

    Attributes:
        check: the name of the check, such as "identical".
        level: one of `LEVELS`.
        message: one sentence with the figures.
        advice: what to do, in one sentence.
        rows: the numbers of all rows concerned, from 0.
        values: figures by name.
        data: which data it concerns, such as "train".
        drops: whether `write_fixed` drops the rows.
    """

    check: str
    level: str
    message: str
    advice: str
    rows: tuple[int, ...] = ()
    values: dict[str, Any] = field(default_factory=dict)
    data: str = "train"
    drops: bool = False

    def as_dict(self) -> dict[str, Any]:
        """The attributes, as values for JSON."""
        return {**asdict(self), "rows": list(self.rows)}


def share(count: float, whole: float) -> str:
    """A count of a whole as text, such as "3 of 200 rows (1.5 %)"."""
    percent = 100 * count / whole if whole else 0.0
    digits = 1 if percent >= 0.1 or count == 0 else 3
    return f"{count:,} of {whole:,} rows ({percent:.{digits}f} %)"


def of_rows(
    check: str,
    level: str,
    rows: Sequence[int],
    total: int,
    what: str,
    advice: str,
    *,
    data: str = "train",
    drops: bool = False,
    values: dict[str, Any] | None = None,
) -> list[Finding]:
    """The finding that these rows have a property; none if there are no such rows.

    Args:
        total: how many rows were looked at.
        what: the property, such as "have an empty prompt".
        values: figures by name.
    """
    if not rows:
        return []
    numbers = tuple(sorted({int(row) for row in rows}))
    message = f"{share(len(numbers), total)} {what}"
    return [Finding(check, level, message, advice, numbers, values or {}, data, drops)]
