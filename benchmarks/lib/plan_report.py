"""The figures of docs/plan.md, from what benchmarks/plan.py wrote."""

from __future__ import annotations

import statistics
from typing import Any

Result = dict[str, Any]


def _percent(share: float) -> str:
    return f"{100 * share:.2g} %" if share < 0.1 else f"{100 * share:.0f} %"


def grid(found: Result) -> str:
    """How far the predictions of the grid are off, by head."""
    lines = [
        "| head | runs | tensors, at most | resident, median | resident, at most | within 10 % | "
        "seconds, median | seconds, at most | within 10 % |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for head in ("fastpref", "eager"):
        rows = [row for row in found["rows"] if row["head"] == head]
        off = [abs(row["predicted_seconds"] / row["step_seconds"] - 1) for row in rows]
        memory = max(abs(row["error"]) for row in rows)
        cells = [head, len(rows), _percent(memory)]
        for errors in ([abs(row["resident_error"]) for row in rows], off):
            within = sum(error <= 0.1 for error in errors)
            cells += [_percent(statistics.median(errors)), _percent(max(errors)), within]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    machine = found["machine"]
    return "\n".join(lines) + (
        f"\n\n{machine['cpu']}, {machine['threads']} threads. A second run of the same training "
        f"differed by {_percent(found['median_difference_of_runs'])} in the median and\nby "
        f"{_percent(found['largest_difference_of_runs'])} at most.\n"
    )
