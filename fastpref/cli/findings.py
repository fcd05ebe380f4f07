"""Findings on a terminal, in a report, and as an exit status."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from typing import Any

SHOWN_ROWS = 5


class FailOn(str, enum.Enum):
    """The least level of a finding that makes the exit status 6."""

    error = "error"
    warning = "warning"
    note = "note"
    never = "never"


def fails(findings: Sequence[Any], fail_on: FailOn) -> bool:
    """Whether one of the findings is of this level or a worse one."""
    from fastpref.quality import LEVELS

    if fail_on is FailOn.never:
        return False
    least = LEVELS.index(fail_on.value)
    return any(LEVELS.index(finding.level) <= least for finding in findings)


def rows_text(rows: Sequence[int]) -> str:
    """The first numbers of rows; "" for none."""
    shown = ", ".join(map(str, rows[:SHOWN_ROWS]))
    return f"rows {shown}{', ...' if len(rows) > SHOWN_ROWS else ''}" if rows else ""


def show_findings(console: Any, findings: Sequence[Any]) -> None:
    """Print findings, with their first rows and what to do."""
    if not findings:
        console.print("nothing found", highlight=False)
    colours = {"error": "red", "warning": "yellow", "note": "cyan"}
    for finding in findings:
        colour, where = colours[finding.level], "" if finding.data == "train" else " (eval)"
        text = f"[{colour}]{finding.level}[/] [bold]{finding.check}[/]{where}: "
        console.print(text, end="", highlight=False)
        console.print(finding.message, markup=False, highlight=False)
        if finding.rows:
            console.print(f"    {rows_text(finding.rows)}", markup=False, highlight=False)
        console.print(f"    {finding.advice}", markup=False, highlight=False)


def add_findings(page: Any, findings: Sequence[Any]) -> None:
    """Add findings to an `HtmlReport`, with their first rows."""
    lines = []
    for finding in findings:
        where = "" if finding.data == "train" else " (eval)"
        rows = f" ({rows_text(finding.rows)})" if finding.rows else ""
        lines.append((finding.level, finding.check + where, finding.message + rows, finding.advice))
    page.findings(lines)
