"""What benchmarks/head.py prints of its results."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastpref.bench.results import table, target_table
from fastpref.bench.run import BenchResult
from fastpref.bench.targets import fastest, speed

Row = dict[str, Any]


def report(result: dict[str, Any]) -> str:
    """The table of one task's result, or why the task failed."""
    if "failed" in result:
        return f"\n{result['id']}: {result['failed']}"
    make_table = {"cell": _cell_table, "overhead": _small_table}.get(result["kind"], _row_table)
    size = result["size"]
    head = f"\n{result['id']}: N={size['n']} H={size['h']} V={size['v']}{size_notes(size)}"
    return f"{head}, {result['seconds']:.0f} s\n{make_table(result)}"


def size_notes(size: dict[str, Any]) -> str:
    """The softcap and the model of a head, a text that follows its sizes."""
    cap = "" if size["softcap"] is None else f" softcap {size['softcap']:g}"
    return cap + (f" ({size['model']})" if size["model"] else "")


def number(value: float | None, spec: str) -> str:
    return "-" if value is None else format(value, spec)


def label_of(row: Row) -> str:
    return row["variant"] + ("*" if row["other_function"] else "")


def _missing(rows: list[Row], key: str) -> list[str]:
    return [f"{r[key]} is missing: {r['missing']}" for r in rows if "missing" in r]


def mib(row: Row, key: str) -> float | None:
    size = row.get("memory", {}).get(key)
    return None if size is None else size / 2**20


def _ratio(key: str) -> Callable[[Row], str]:
    return lambda r: "WRONG" if r["wrong"] else number(r.get(key), ".2f")


def _error(key: str) -> Callable[[Row], str]:
    return lambda r: number((r["errors"] or {}).get(key), ".1e")


def spread_of(row: Row) -> str:
    low, high = row["time"]["quartiles_ms"]
    return f"{(high - low) / row['time']['median_ms']:.0%}"


_COLUMNS: dict[str, Callable[[Row], str]] = {
    "": label_of,
    "ms": lambda r: f"{r['time']['median_ms']:.3f}",
    "IQR": spread_of,
    "calls": lambda r: str(r["time"]["repeats"]),
    "host ms": lambda r: number(r.get("host_ms"), ".3f"),
    "x eager": _ratio("speed_over_eager"),
    "x TRL": _ratio("speed_over_trl"),
    "roofline": lambda r: number(r.get("roofline_fraction"), ".0%"),
    "MiB": lambda r: number(mib(r, "peak_beyond"), ".1f"),
    "MiB extra": lambda r: number(mib(r, "extra"), ".1f"),
    "of eager's": lambda r: number(r.get("memory_over_eager"), ".3f"),
    "logp max": _error("logp_max"),
    "logp RMS": _error("logp_rms"),
    "sum error": _error("sum_max"),
    "dhidden": _error("dhidden"),
    "dweight": _error("dweight"),
    "same": lambda r: {True: "yes", False: "no"}.get(r.get("same_bits_twice", ""), "-"),
}


def _cell_table(result: dict[str, Any]) -> str:
    rows = [r for r in result["variants"] if "time" in r and "missing" not in r]
    columns = {title: [text(r) for r in rows] for title, text in _COLUMNS.items()}
    columns = {title: cells for title, cells in columns.items() if set(cells) != {"-"}}
    about = f"roofline {number(result['roofline_ms'], '.3f')} ms"
    if result.get("peak_tflop_per_s"):
        about += f" at {result['peak_tflop_per_s']:.4g} TFLOP/s"
    if result["products"]:
        rates = [f"{k} {g['tflop_per_s']:.4g}" for k, g in result["products"].items()]
        about += f"; TFLOP/s: {', '.join(rates)}"
    if result["canary"] is not None:
        low, high = result["canary"]["quartiles_ms"]
        about += f"; canary {result['canary']['median_ms']:.1f} ms ({low:.1f} to {high:.1f})"
    notes = _missing(result["variants"], "variant")
    if any(r["other_function"] for r in rows):
        notes.append("* computes another function")
    if result["canary"] is not None and result.get("targets"):
        notes.append(target_table(result["targets"]))
    lines = [list(line) for line in zip(*columns.values(), strict=True)]
    return "\n".join([about, table(list(columns), lines), *notes])


def _row_table(result: dict[str, Any]) -> str:
    lines, missing = [], []
    for k in result["kernels"]:
        name = f"{k['backend']} {k['precision']} {k['kernel']}"
        if "missing" in k:
            missing.append(f"{name} is missing: {k['missing']}")
            continue
        share = "-" if "of_copy" not in k else f"{100 * k['of_copy']:.0f}%"
        lines.append([name, f"{k['time']['median_ms']:.3f}", f"{k['gb_per_s']:.0f}", share])
    text = table(["", "ms", "GB/s", "of a copy's"], lines)
    return "\n".join([f"a copy: {result['copy']['gb_per_s']:.0f} GB/s", text, *missing])


def _small_table(result: dict[str, Any]) -> str:
    keys = "forward_us", "backward_us", "wall_us"
    lines, missing = [], []
    for mode, rows in result["modes"].items():
        for row in rows:
            name = f"{mode}: {row['variant']}"
            if "wall_us" in row:
                lines.append([name, *(number(row.get(k), ".0f") for k in keys)])
            else:
                missing.append(f"{name} is missing: {row['missing']}")
    header = ["", "host forward, us", "host backward", "until done"]
    return "\n".join([table(header, lines), *missing])


def _summary(cells: list[dict[str, Any]]) -> str:
    """A line per cell: fastpref's fastest exact variant beside the fastest peer."""
    lines = []
    for cell in cells:
        rows = cell["variants"]
        best = fastest([r for r in rows if r["ours"] and r["precision"] == "exact"])
        fast = fastest([r for r in rows if r["ours"] and r["precision"] == "fast"])
        peer = fastest([r for r in rows if not r["ours"] and not r["other_function"]])
        lines.append(
            [
                cell["id"],
                number(best["time"]["median_ms"] if best else None, ".3f"),
                number(fast["time"]["median_ms"] if fast else None, ".3f"),
                number(best.get("roofline_fraction") if best else None, ".2f"),
                number(best.get("speed_over_eager") if best else None, ".2f"),
                number(best.get("speed_over_trl") if best else None, ".2f"),
                number(speed(peer, best) if peer and best else None, ".2f"),
                peer["variant"] if peer else "-",
                number(mib(best, "peak_beyond") if best else None, ".0f"),
            ]
        )
    header = ["fastpref, exact", "ms", "fast ms", "roofline", "x eager", "x TRL", "x best peer"]
    return table([*header, "which", "MiB"], lines)


def closing(result: BenchResult) -> str:
    """The last lines: a summary, the targets that are not met, and what was left out."""
    targets = [target for r in result.results for target in r["targets"]]
    lines = ["", _summary(result.cells), ""]
    if any(not t["met"] for t in targets):
        lines.append(target_table([t for t in targets if not t["met"]]))
    if result.dropped:
        lines.append(f"left out: {', '.join(result.dropped)}")
    lines += [f"{r['id']}: {r['failed']}" for r in result.results if "failed" in r]
    lines += [f"stopped: {reason}" for reason in result.stops]
    met = [t["met"] for t in targets]
    lines.append(
        f"targets: {met.count(True)} met, {met.count(False)} missed, {met.count(None)} not measured"
    )
    return "\n".join(lines)
