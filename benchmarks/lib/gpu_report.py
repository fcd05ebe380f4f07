"""Ratios, targets, tables and plots of the GPU mode's results."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from . import runner
from .gpu_peers import EAGER, TRL

# Of the roofline, with a gradient: what the large heads allow, and the small ones, where the passes
# over the logits weigh more.
_ROOFLINE = {"a": 0.90, "e": 0.90, "c": 0.85, "b": 0.75, "d": 0.68}
# Bytes at the peak beyond those before the call, the returned gradients among them, in GB.
_MEMORY = {
    "trainable": {"a": 3.2, "b": 2.8, "c": 3.3, "d": 1.7, "e": 2.7},
    "frozen": {"a": 1.1},
}
_WIDE = ("a", "c", "e")
_SMALL_CALL_US = 100.0


def _usable(row: dict[str, Any]) -> bool:
    return "time" in row and "missing" not in row and not row["wrong"]


def _speed(slow: dict[str, Any], fast: dict[str, Any]) -> float:
    return slow["time"]["median_ms"] / fast["time"]["median_ms"]


def compared(result: dict[str, Any]) -> dict[str, Any]:
    """The result with each side's speed over eager and TRL; a wrong one has none."""
    rows = {row["variant"]: row for row in result.get("variants", ())}
    for key, name in (("speed_over_eager", EAGER), ("speed_over_trl", TRL)):
        base = rows.get(name)
        for row in rows.values():
            if base is not None and _usable(base) and _usable(row):
                row[key] = round(_speed(base, row), 3)
    return result


# ---- targets -----------------------------------------------------------------------------------


def targets(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The aims, measured, for each of fastpref's GPU backends in its default precision."""
    out: list[dict[str, Any]] = []
    for result in results:
        if "failed" in result:
            continue
        make = {"cell": _cell_targets, "rows": _row_targets, "overhead": _small_targets}
        make["logits"] = _row_targets
        out += make[result["kind"]](result)
    return out


def _fastest(rows: list[dict[str, Any]]) -> dict[str, Any] | None:
    usable = [r for r in rows if _usable(r)]
    return min(usable, key=lambda r: r["time"]["median_ms"]) if usable else None


def _backends(rows: list[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(r["backend"] for r in rows if r["ours"]))


def _cell_targets(result: dict[str, Any]) -> list[dict[str, Any]]:
    rows, mode, name = result["variants"], result["mode"], result["shape"]
    peers = [r for r in rows if not r["ours"] and not r["other_function"]]
    trl = _fastest([r for r in peers if r["variant"] == TRL])
    out = []
    for backend in _backends(rows):
        ours = [r for r in rows if r["backend"] == backend and r["precision"] == "exact"]
        best = _fastest(ours)

        def aim(what: str, wanted: float, measured: float | None, most: bool = False) -> None:
            what = f"{result['id']}, {backend}: {what}"  # noqa: B023
            out.append(runner.target(what, wanted, measured, most=most))

        def over(peer: dict[str, Any] | None) -> float | None:
            return _speed(peer, best) if peer and best else None  # noqa: B023

        if mode == "trainable" and name in _WIDE:
            aim("speed over TRL", 1.4, over(trl))
            again = [r for r in peers if r["products"] == 4]
            aim("speed over the best peer with 8NHV", 1.25, over(_fastest(again)))
        if mode == "frozen" and name in _ROOFLINE:
            aim("speed over TRL", 1.5, over(trl))
        aim("speed over the fastest peer", 1.0, over(_fastest(peers)))
        fraction = best.get("roofline_fraction") if best else None
        if mode != "forward-only" and name in _ROOFLINE:
            aim("fraction of the roofline", _ROOFLINE[name], fraction)
        if mode == "forward-only":
            if name == "a":
                aim("fraction of the roofline", 0.92, fraction)
            chosen = [r for r in ours if r.get("plan", {}).get("fused") == result["plan_fuses"]]
            aim("the plan's choice over the faster one", 1.03, _over(chosen, best), most=True)
        if name in _MEMORY.get(mode, {}):
            used = best["memory"]["peak_beyond"] / 1e9 if best else None
            aim("memory with the gradients, GB", _MEMORY[mode][name], used, most=True)
        checked = [r for r in ours if r.get("errors")]
        worst = max((1e3 * r["errors"]["sum_max"] for r in checked), default=None)
        aim("error of a 512-token sum, 1e-3 nat", 1.0, worst, most=True)
        twice = [float(r["same_bits_twice"]) for r in ours if "same_bits_twice" in r]
        aim("the same bits twice", 1.0, min(twice, default=None))
    return out


def _over(rows: list[dict[str, Any]], best: dict[str, Any] | None) -> float | None:
    one = _fastest(rows)
    return _speed(one, best) if one and best else None


def _row_targets(result: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        runner.target(
            f"{result['id']}, {k['backend']} {k['precision']} {k['kernel']}: of the copy's rate",
            0.85,
            k.get("of_copy"),
        )
        for k in result["kernels"]
        if not k.get("peer")
    ]


def _small_targets(result: dict[str, Any]) -> list[dict[str, Any]]:
    out = []
    for mode, rows in result["modes"].items():
        peers = [r for r in rows if not r["ours"] and not r["other_function"] and "wall_us" in r]
        for backend in _backends(rows):
            ours = [r for r in rows if r["backend"] == backend and r["precision"] == "exact"]
            ours = [r for r in ours if "wall_us" in r]
            best = min(ours, key=lambda r: r["wall_us"]) if ours else None
            what = f"{result['id']}, {mode}, {backend}: "
            host = best["forward_us"] if best else None
            out.append(runner.target(f"{what}host, us", _SMALL_CALL_US, host, most=True))
            fastest = min((r["wall_us"] for r in peers), default=None)
            speed = fastest / best["wall_us"] if best and fastest else None
            out.append(runner.target(f"{what}speed over the fastest peer", 1.0, speed))
    return out


# ---- tables ------------------------------------------------------------------------------------


def report(result: dict[str, Any]) -> str:
    """What one task gave, as a table."""
    if "failed" in result:
        return f"\n{result['id']}: {result['failed']}"
    table = {"cell": _cell_table, "rows": _row_table, "overhead": _small_table}
    table["logits"] = _row_table
    size = result["size"]
    head = f"\n{result['id']}: N={size['n']} H={size['h']} V={size['v']}"
    if size["softcap"] is not None:
        head += f" softcap {size['softcap']:g}"
    if size["model"]:
        head += f" ({size['model']})"
    return f"{head}, {result['seconds']:.0f} s\n{table[result['kind']](result)}"


def _number(value: float | None, spec: str) -> str:
    return "-" if value is None else format(value, spec)


def _label(row: dict[str, Any]) -> str:
    return row["variant"] + ("*" if row["other_function"] else "")


def _missing(rows: list[dict[str, Any]], key: str) -> list[str]:
    return [f"{r[key]} is missing: {r['missing']}" for r in rows if "missing" in r]


def _cell_table(result: dict[str, Any]) -> str:
    header = ["", "ms", "IQR", "host ms", "x eager", "x TRL", "roofline", "GB", "GB extra"]
    header += ["logp max", "sum error", "dhidden", "dweight", "same"]
    lines = []
    for row in result["variants"]:
        if "time" not in row or "missing" in row:
            continue
        t, e, m = row["time"], row["errors"] or {}, row["memory"]
        spread = (t["quartiles_ms"][1] - t["quartiles_ms"][0]) / t["median_ms"]
        wrong = "WRONG" if row["wrong"] else None
        fraction = row.get("roofline_fraction")
        lines.append(
            [
                _label(row),
                f"{t['median_ms']:.3f}",
                f"{100 * spread:.0f}%",
                f"{row['host_ms']:.3f}",
                wrong or _number(row.get("speed_over_eager"), ".2f"),
                wrong or _number(row.get("speed_over_trl"), ".2f"),
                "-" if fraction is None else f"{100 * fraction:.0f}%",
                f"{m['peak_beyond'] / 1e9:.2f}",
                f"{m['extra'] / 1e9:.2f}",
                *(_number(e.get(k), ".1e") for k in ("logp_max", "sum_max", "dhidden", "dweight")),
                "yes" if row["same_bits_twice"] else "no",
            ]
        )
    rates = [f"{k} {g['tflop_per_s']:.0f}" for k, g in result["products"].items()]
    about = f"roofline {_number(result['roofline_ms'], '.3f')} ms"
    if rates:
        about += f"; TFLOP/s: {', '.join(rates)}"
    notes = _missing(result["variants"], "variant")
    if any(r["other_function"] and "time" in r for r in result["variants"]):
        notes.append("* computes another function")
    return "\n".join([about, runner.table(header, lines), *notes])


def _row_table(result: dict[str, Any]) -> str:
    lines, missing = [], []
    for k in result["kernels"]:
        name = f"{k['backend']} {k['precision']} {k['kernel']}"
        if "missing" in k:
            missing.append(f"{name} is missing: {k['missing']}")
            continue
        share = "-" if "of_copy" not in k else f"{100 * k['of_copy']:.0f}%"
        lines.append([name, f"{k['time']['median_ms']:.3f}", f"{k['gb_per_s']:.0f}", share])
    table = runner.table(["", "ms", "GB/s", "of a copy's"], lines)
    return "\n".join([f"a copy: {result['copy']['gb_per_s']:.0f} GB/s", table, *missing])


def _small_table(result: dict[str, Any]) -> str:
    keys = "forward_us", "backward_us", "wall_us"
    lines, missing = [], []
    for mode, rows in result["modes"].items():
        for row in rows:
            name = f"{mode}: {row['variant']}"
            if "wall_us" in row:
                lines.append([name, *(_number(row.get(k), ".0f") for k in keys)])
            else:
                missing.append(f"{name} is missing: {row['missing']}")
    header = ["", "host forward, us", "host backward", "until done"]
    return "\n".join([runner.table(header, lines), *missing])


def _summary(results: list[dict[str, Any]]) -> str:
    """A line per cell: fastpref's fastest exact way beside the fastest peer."""
    lines = []
    for result in results:
        if result["kind"] != "cell" or "failed" in result:
            continue
        rows = result["variants"]
        best = _fastest([r for r in rows if r["ours"] and r["precision"] == "exact"])
        fast = _fastest([r for r in rows if r["ours"] and r["precision"] == "fast"])
        peer = _fastest([r for r in rows if not r["ours"] and not r["other_function"]])
        fraction = best.get("roofline_fraction") if best else None
        lines.append(
            [
                result["id"],
                _number(best and best["time"]["median_ms"], ".3f"),
                _number(fast and fast["time"]["median_ms"], ".3f"),
                _number(fraction, ".2f"),
                _number(best and best.get("speed_over_eager"), ".2f"),
                _number(best and best.get("speed_over_trl"), ".2f"),
                _number(_speed(peer, best) if peer and best else None, ".2f"),
                peer["variant"] if peer else "-",
                _number(best and best["memory"]["peak_beyond"] / 1e9, ".2f"),
            ]
        )
    header = ["fastpref, exact", "ms", "fast ms", "roofline", "x eager", "x TRL", "x best peer"]
    return runner.table([*header, "which", "GB"], lines)


def closing(results: dict[str, Any]) -> str:
    """A summary, the targets that are not met, and what is not there. Short: it comes last."""
    targets = results["targets"]
    lines = ["", _summary(results["results"]), ""]
    if any(not t["met"] for t in targets):
        lines.append(runner.target_table([t for t in targets if not t["met"]]))
    if results["dropped"]:
        lines.append(f"left out: {', '.join(results['dropped'])}")
    lines += [f"{r['id']}: {r['failed']}" for r in results["results"] if "failed" in r]
    lines += [f"stopped: {why}" for why in results["stops"]]
    met = [t["met"] for t in targets]
    lines.append(
        f"targets: {met.count(True)} met, {met.count(False)} missed, {met.count(None)} not measured"
    )
    return "\n".join(lines)


# ---- plot --------------------------------------------------------------------------------------

_PANELS = (
    ("speed over eager", lambda r: r.get("speed_over_eager")),
    ("fraction of the roofline", lambda r: r.get("roofline_fraction")),
    ("extra memory, GB", lambda r: max(r["memory"]["extra"] / 1e9, 1e-3)),
)


def plot(results: list[dict[str, Any]], path: Path) -> None:
    """A line of panels per mode, full shapes and those with fewer tokens apart."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    cells = [r for r in results if r["kind"] == "cell" and "failed" not in r]
    groups: dict[tuple[str, bool], list[dict[str, Any]]] = {}
    for cell in cells:
        groups.setdefault((cell["mode"], "/" in cell["shape"]), []).append(cell)
    drawn = [r for c in cells for r in c["variants"] if _usable(r)]
    names = {r["variant"]: _label(r) for r in drawn}
    if not names:
        return
    others = [n for n in names if not n.startswith("fastpref")]
    theirs = {n: plt.get_cmap("Set2")(i % 8) for i, n in enumerate(others)}
    figure, axes = plt.subplots(
        len(groups), 3, figsize=(21, 3.4 * len(groups)), squeeze=False, layout="constrained"
    )
    for line, ((mode, few), group) in zip(axes, groups.items(), strict=True):
        here = [n for n in names if any(r["variant"] == n for c in group for r in c["variants"])]
        ours = [n for n in here if n not in theirs]
        here = [*ours, *(n for n in here if n in theirs)]
        blues = {n: plt.get_cmap("Blues")(0.95 - 0.6 * i / len(ours)) for i, n in enumerate(ours)}
        colours = theirs | blues
        width = 0.85 / len(here)
        for axis, (title, value) in zip(line, _PANELS, strict=True):
            for i, name in enumerate(here):
                points = []
                for at, cell in enumerate(group):
                    row = next((r for r in cell["variants"] if r["variant"] == name), None)
                    height = value(row) if row is not None and _usable(row) else None
                    if height is not None:
                        points.append((at + (i - (len(here) - 1) / 2) * width, height))
                if points:
                    axis.bar(
                        *zip(*points, strict=True), width, color=colours[name], label=names[name]
                    )
            sizes = [f"{c['shape']}\nN={c['size']['n']} H={c['size']['h']}" for c in group]
            axis.set_xticks(range(len(group)), sizes, fontsize=8)
            axis.set_title(f"{title}: {mode}{', few tokens' if few else ''}", fontsize=10)
            axis.spines[["top", "right"]].set_visible(False)
        line[0].axhline(1, color="grey", linewidth=0.8, linestyle="--")
        line[2].set_yscale("log")
    handles: dict[str, Any] = {}
    for axis in axes.flat:
        handles.update(dict(zip(*axis.get_legend_handles_labels()[::-1], strict=True)))
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=6, fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)
