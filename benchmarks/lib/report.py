"""Tables and plots of head.py's results."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from . import runner


def _cells(row: dict[str, Any]) -> list[str]:
    if "missing" in row:
        return [row["variant"], "missing", *["-"] * 9]
    e, m, t = row["errors"], row["memory"], row["time"]

    def number(value: float | None, spec: str) -> str:
        return "-" if value is None else format(value, spec)

    spread = (t["quartiles_ms"][1] - t["quartiles_ms"][0]) / t["median_ms"]
    wrong = "WRONG" if row["wrong"] else number(row.get("speed_over_eager"), ".2f")
    return [
        row["variant"],
        f"{t['median_ms']:.1f}",
        f"{100 * spread:.0f}%",
        str(t["repeats"]),
        wrong,
        f"{100 * row['roofline_fraction']:.0f}%",
        number(m["extra"] / 2**20 if "extra" in m else None, ".1f"),
        number(row.get("memory_over_eager"), ".3f"),
        number(e["logp_max"], ".1e"),
        number(e["logp_rms"], ".1e"),
        number(e["sum_max"], ".1e"),
    ]


HEADER = ["", "ms", "IQR", "calls", "x eager", "roofline", "MiB extra", "of eager's"]
HEADER += ["logp max", "logp RMS", "sum error"]


def report(cell: dict[str, Any]) -> str:
    n, h, v = cell["shape"].values()
    rates = ", ".join(f"{k} {g['gflop_per_s']:.0f}" for k, g in cell["head_products"].items())
    low, high = cell["canary"]["quartiles_ms"]
    lines = [
        f"\n{cell['dtype']}, {cell['mode']} head, N={n} H={h} V={v}",
        f"GFLOP/s: {rates}; roofline {cell['roofline_ms']:.1f} ms; "
        f"canary {cell['canary']['median_ms']:.1f} ms ({low:.1f} to {high:.1f})",
        runner.table(HEADER, [_cells(row) for row in cell["variants"]]),
    ]
    for row in cell["variants"]:
        if "missing" in row:
            lines.append(f"{row['variant']} is missing: {row['missing']}")
    lines.append(runner.target_table(cell["targets"]))
    return "\n".join(lines)


def plot(cells: list[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names: list[str] = []
    for cell in cells:
        names += [r["variant"] for r in cell["variants"] if r["variant"] not in names]
    ours = [n for n in names if n.startswith("fastpref")]
    colours = {n: plt.get_cmap("Blues")(0.95 - 0.14 * (i % 6)) for i, n in enumerate(ours)}
    others = [n for n in names if n not in ours]
    colours |= {n: plt.get_cmap("Set2")(i % 8) for i, n in enumerate(others)}
    panels = [("speed_over_eager", "speed over eager"), ("mib", "extra memory, MiB")]
    kinds = sorted({(c["dtype"], c["mode"]) for c in cells}, reverse=True)
    figure, axes = plt.subplots(
        len(kinds), 2, figsize=(15, 3.6 * len(kinds)), squeeze=False, layout="constrained"
    )
    for line, (dtype, mode) in zip(axes, kinds, strict=True):
        group = [c for c in cells if (c["dtype"], c["mode"]) == (dtype, mode)]
        here = [n for n in names if any(n == r["variant"] for c in group for r in c["variants"])]
        width = 0.85 / len(here)
        for axis, (key, title) in zip(line, panels, strict=True):
            for i, name in enumerate(here):
                points = []
                for at, cell in enumerate(group):
                    row = next((r for r in cell["variants"] if r["variant"] == name), {})
                    value = row.get(key)
                    if key == "mib" and "extra" in row.get("memory", {}):
                        value = max(row["memory"]["extra"] / 2**20, 0.1)
                    if value is not None:
                        points.append((at + (i - (len(here) - 1) / 2) * width, value))
                if points:
                    axis.bar(*zip(*points, strict=True), width, color=colours[name], label=name)
            shapes = ["N={N} H={H} V={V}".format(**c["shape"]) for c in group]
            axis.set_xticks(range(len(group)), shapes)
            axis.set_title(f"{title}: {dtype}, {mode} head", fontsize=10)
            axis.spines[["top", "right"]].set_visible(False)
        line[0].axhline(1, color="grey", linewidth=0.8, linestyle="--")
        line[1].set_yscale("log")
    handles: dict[str, Any] = {}
    for axis in axes.flat:
        handles.update(dict(zip(*axis.get_legend_handles_labels()[::-1], strict=True)))
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=6, fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)
