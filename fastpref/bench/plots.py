"""Plots of a benchmark's results."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastpref.bench.report import label_of, mib
from fastpref.bench.tables import scaling_points
from fastpref.bench.targets import usable

Row = dict[str, Any]

_PANELS: tuple[tuple[str, Callable[[Row], float | None]], ...] = (
    ("speed over eager", lambda r: r.get("speed_over_eager")),
    ("fraction of the roofline", lambda r: r.get("roofline_fraction")),
    ("extra memory, MiB", lambda r: None if (size := mib(r, "extra")) is None else max(size, 0.1)),
)


def plot(cells: list[dict[str, Any]], path: Path) -> None:
    """Write `figure_of`, if anything was measured."""
    figure = figure_of(cells)
    if figure is not None:
        figure.savefig(path, dpi=110)


def figure_of(cells: list[dict[str, Any]]) -> Any:
    """One panel for each dtype and mode; None if nothing was measured.

    Shapes with fewer tokens have panels of their own.
    """
    import matplotlib
    from matplotlib.figure import Figure

    groups: dict[tuple[str, str, bool], list[dict[str, Any]]] = {}
    for cell in cells:
        groups.setdefault((cell["dtype"], cell["mode"], "/" in cell["shape"]), []).append(cell)
    names = {r["variant"]: label_of(r) for c in cells for r in c["variants"] if usable(r)}
    if not names:
        return None
    names = {n: names[n] for n in sorted(names, key=lambda n: not n.startswith("fastpref"))}
    fastpref_names = [n for n in names if n.startswith("fastpref")]
    colours = {
        n: matplotlib.colormaps["Blues"](0.95 - 0.7 * i / len(fastpref_names))
        for i, n in enumerate(fastpref_names)
    }
    peers = [n for n in names if n not in fastpref_names]
    colours |= {n: matplotlib.colormaps["Set2"](i % 8) for i, n in enumerate(peers)}
    figure = Figure(figsize=(21, 3.4 * len(groups)), layout="constrained")
    axes = figure.subplots(len(groups), 3, squeeze=False)
    for line, ((dtype, mode, few), group) in zip(axes, groups.items(), strict=True):
        rows_of_cases = [{r["variant"]: r for r in c["variants"] if usable(r)} for c in group]
        present = [n for n in names if any(n in rows for rows in rows_of_cases)]
        width = 0.85 / max(len(present), 1)
        for axis, (title, value) in zip(line, _PANELS, strict=True):
            for i, name in enumerate(present):
                heights = [value(rows[name]) if name in rows else None for rows in rows_of_cases]
                offset = (i - (len(present) - 1) / 2) * width
                points = [
                    (position + offset, y) for position, y in enumerate(heights) if y is not None
                ]
                if points:
                    x, y = zip(*points, strict=True)
                    axis.bar(x, y, width, color=colours[name], label=names[name])
            sizes = ["N={n} H={h}\nV={v}".format(**c["size"]) for c in group]
            axis.set_xticks(range(len(group)), sizes, fontsize=8)
            about = f"{dtype}, {mode}{', few tokens' if few else ''}"
            axis.set_title(f"{title}: {about}", fontsize=10)
            axis.spines[["top", "right"]].set_visible(False)
        line[0].axhline(1, color="grey", linewidth=0.8, linestyle="--")
        line[2].set_yscale("log")
    handles: dict[str, Any] = {}
    for axis in axes.flat:
        handles.update(dict(zip(*axis.get_legend_handles_labels()[::-1], strict=True)))
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=6, fontsize=8)
    return figure


def scaling_figure(cells: list[dict[str, Any]], scale: str) -> Any:
    """Milliseconds against the size that was scaled, on logarithmic axes; None without times."""
    from matplotlib.figure import Figure

    points = scaling_points(cells, scale)
    if not points:
        return None
    figure = Figure(figsize=(7, 4), layout="constrained")
    axis = figure.subplots()
    for name, times in points.items():
        sizes = sorted(times)
        look: dict[str, Any] = {"marker": "o", "markersize": 4, "linewidth": 1.4}
        axis.plot(sizes, [times[size] for size in sizes], label=name, **look)
    ticks = sorted({size for times in points.values() for size in times})
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xticks(ticks, [f"{size:,}" for size in ticks], fontsize=8)
    axis.minorticks_off()
    axis.set_xlabel({"tokens": "labelled tokens N", "vocab": "vocabulary V"}.get(scale, scale))
    axis.set_ylabel("ms, forward and backward")
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=9)
    return figure
