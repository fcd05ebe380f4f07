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
        "| head | runs | tensors, at most | resident, median | from, to | resident within 10 % | "
        "seconds, median | from, to | seconds within 10 % |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for head in ("fastpref", "eager"):
        rows = [row for row in found["rows"] if row["head"] == head]
        seconds = [row["predicted_seconds"] / row["step_seconds"] - 1 for row in rows]
        memory = max(abs(row["error"]) for row in rows)
        cells = [head, len(rows), _percent(memory)]
        for errors in ([row["resident_error"] for row in rows], seconds):
            sizes = [abs(error) for error in errors]
            within = f"{sum(size <= 0.1 for size in sizes)} of {len(rows)}"
            span = f"{round(100 * min(errors)):+d} to {round(100 * max(errors)):+d} %"
            cells += [_percent(statistics.median(sizes)), span, within]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    machine = found["machine"]
    return "\n".join(lines) + (
        f"\n\n{machine['cpu']}, {machine['threads']} threads. A second run of the same training "
        f"differed by {_percent(found['median_difference_of_runs'])} in the median and\nby "
        f"{_percent(found['largest_difference_of_runs'])} at most.\n"
    )
