"""The tables of `fastpref bench`: a header and rows of texts, for a terminal or an HTML page."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastpref.bench.compare import Change
from fastpref.bench.report import label_of, mib, number, size_notes, spread_of
from fastpref.bench.targets import fastest, usable

Table = tuple[list[str], list[list[str]]]
_SCALED = {"tokens": "N", "vocab": "V", "threads": "threads"}


def rates_table(rates: Sequence[dict[str, Any]]) -> Table:
    """The rates of the machine, for each dtype."""
    lines = []
    for measured in rates:
        peak, product, copy = measured["peak_tflop_per_s"], measured["product"], measured["copy"]
        peak_rate = "-" if peak is None else f"{1e3 * peak:,.1f}"
        rate = f"{1e3 * product['tflop_per_s']:,.1f}"
        lines.append([measured["dtype"], peak_rate, rate, f"{copy['gb_per_s']:,.1f}"])
    return ["", "multiply-adds, GFLOP/s", "bare product, GFLOP/s", "copy, GB/s"], lines


def title_of(cell: dict[str, Any]) -> str:
    """One line with the sizes, dtype, mode and threads of a cell."""
    size = cell["size"]
    text = f"N={size['n']:,} H={size['h']:,} V={size['v']:,}{size_notes(size)}"
    text += f", {cell['dtype']}, {cell['mode']}"
    if cell.get("threads"):
        text += f", {cell['threads']} threads"
    return text


def cell_table(cell: dict[str, Any]) -> Table:
    """The sides of a cell. The row of a wrong result has errors, but no time and no speed."""
    header = ["", "ms", "spread", "x eager", "roofline", "extra MiB"]
    header += ["error, nat", "of dX", "of dW"]
    lines = []
    for row in cell["variants"]:
        if "time" not in row or "missing" in row:
            continue
        median, good = row["time"]["median_ms"], usable(row)
        errors = row["errors"] or {}
        times = [
            f"{median:,.2f}",
            spread_of(row) if row["time"]["repeats"] > 1 else "-",
            number(row.get("speed_over_eager"), ".2f"),
            number(row.get("roofline_fraction"), ".0%"),
        ]
        lines.append(
            [
                label_of(row),
                *(times if good else ["WRONG", "-", "-", "-"]),
                number(mib(row, "extra"), ",.0f"),
                *(number(errors.get(k), ".1e") for k in ("sum_max", "dhidden", "dweight")),
            ]
        )
    used_columns = [i for i in range(len(header)) if i == 0 or {line[i] for line in lines} != {"-"}]
    return [header[i] for i in used_columns], [[line[i] for i in used_columns] for line in lines]


def notes_of(cell: dict[str, Any]) -> list[str]:
    """Sentences on a cell: wrong results, missing sides, and a machine that was not quiet."""
    out = []
    for row in cell["variants"]:
        if row.get("wrong"):
            out.append(f"{row['variant']} is wrong: {row['wrong_because']}")
        if "missing" in row:
            out.append(f"{row['variant']} was not measured: {row['missing']}")
    if any(row["other_function"] and "time" in row for row in cell["variants"]):
        out.append("* computes another function")
    canary = cell.get("canary")
    if canary is not None:
        low, high = canary["quartiles_ms"]
        if high > 1.2 * low:
            out.append(
                f"the machine was not quiet: a fixed product took {low:,.0f} to {high:,.0f} ms "
                "(quartiles)"
            )
    return out


def scaling_points(cells: Sequence[dict[str, Any]], scale: str) -> dict[str, dict[int, float]]:
    """The milliseconds of fastpref, eager and the fastest peer, by the size that was scaled.

    Of fastpref the fastest exact variant of each size is taken.
    """
    out: dict[str, dict[int, float]] = {}
    for cell in cells:
        size = int(cell["threads"] if scale == "threads" else cell["size"][_SCALED[scale].lower()])
        rows = cell["variants"]
        exact = [r for r in rows if r["ours"] and r["precision"] == "exact"]
        groups = {"fastpref": exact, "eager": [r for r in rows if r["variant"] == "eager"]}
        peers = [r for r in rows if not r["ours"] and not r["other_function"]]
        groups["fastest peer"] = [r for r in peers if r["variant"] != "eager"]
        for name, group in groups.items():
            if (best := fastest(group)) is not None:
                key = f"{name}, {cell['dtype']}, {cell['mode']}"
                out.setdefault(key, {})[size] = best["time"]["median_ms"]
    return out


def scaling_table(cells: Sequence[dict[str, Any]], scale: str) -> Table:
    """The milliseconds at each size. In brackets is their ratio to those of the first size."""
    points = scaling_points(cells, scale)
    sizes = sorted({size for times in points.values() for size in times})
    lines = []
    for name, times in points.items():
        first = times.get(sizes[0])
        line = [name]
        for size in sizes:
            text = "-" if size not in times else f"{times[size]:,.2f}"
            if first and size in times and size != sizes[0]:
                over = first / times[size] if scale == "threads" else times[size] / first
                text += f" ({over:.2f}x)"
            line.append(text)
        lines.append(line)
    header = ["ms, and speed over 1 thread" if scale == "threads" else "ms, and over the first"]
    return [*header, *(f"{_SCALED[scale]}={size:,}" for size in sizes)], lines


def changes_table(changes: Sequence[Change]) -> Table:
    """The old and the new time of each side. The spread is that of their ratio by quartiles."""
    lines = []
    for c in changes:
        spread = "-" if c.low is None else f"{c.low:.2f} to {c.high:.2f}"
        verdict = c.verdict + (" (regression)" if c.regression else "")
        old, new, ratio = number(c.old_ms, ",.2f"), number(c.new_ms, ",.2f"), c.ratio
        machine = number(c.canary, ".2f")
        lines.append([c.case, c.side, old, new, number(ratio, ".2f"), spread, machine, verdict])
    return ["case", "", "then, ms", "now, ms", "ratio", "spread", "machine", ""], lines
