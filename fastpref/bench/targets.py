"""Ratios between the sides of a result, and its targets with the figures that were measured."""

from __future__ import annotations

from typing import Any

from fastpref.bench.peers import EAGER, LIGER, TRL
from fastpref.bench.results import target

Row = dict[str, Any]

# Targets for the fraction of the roofline of a pass with gradients. Those of the smaller heads are
# lower, because the passes over the logits take a larger share of their time.
_ROOFLINE = {"a": 0.90, "e": 0.90, "c": 0.85, "b": 0.75, "d": 0.68}
# Targets for the peak memory beyond that before the call, with the returned gradients, in GB.
_MEMORY = {"trainable": {"a": 3.2, "b": 2.8, "c": 3.3, "d": 1.7, "e": 2.7}, "frozen": {"a": 1.1}}
_WIDE = ("a", "c", "e")
_SMALL_CALL_US = 100.0


def usable(row: dict[str, Any]) -> bool:
    """Whether a row has a time and a result that is not wrong."""
    return "time" in row and "missing" not in row and not row["wrong"]


def speed(slow: dict[str, Any], fast: dict[str, Any]) -> float:
    return slow["time"]["median_ms"] / fast["time"]["median_ms"]


def fastest(rows: list[Row]) -> Row | None:
    measured = [r for r in rows if usable(r)]
    return min(measured, key=lambda r: r["time"]["median_ms"]) if measured else None


def compared(result: dict[str, Any]) -> dict[str, Any]:
    """The result, with each side's speed over eager and TRL and its memory over eager's.

    A side whose result is wrong gets no speed.
    """
    rows = {row["variant"]: row for row in result.get("variants", ())}
    for key, name in (("speed_over_eager", EAGER), ("speed_over_trl", TRL)):
        base = rows.get(name)
        for row in rows.values():
            if base is not None and usable(base) and usable(row):
                row[key] = round(speed(base, row), 3)
    eager_extra = rows.get(EAGER, {}).get("memory", {}).get("extra")
    for row in rows.values():
        if eager_extra and "extra" in row.get("memory", {}):
            row["memory_over_eager"] = round(row["memory"]["extra"] / eager_extra, 4)
    return result


def targets(result: dict[str, Any]) -> list[dict[str, Any]]:
    """The targets of one task: on a CPU of fastpref as a whole, on a GPU of each backend.

    Those of a GPU are for the default precision.
    """
    if "failed" in result:
        return []
    kind = result["kind"]
    if kind == "roofline":
        return []
    if kind == "cell" and result["canary"] is not None:
        return _cpu_targets(result)
    make_targets = {"cell": _cell_targets, "overhead": _small_targets}
    return make_targets.get(kind, _row_targets)(result)


def _cpu_targets(result: dict[str, Any]) -> list[dict[str, Any]]:
    """The targets of a cell on a CPU. Speeds are those of the fastest strategy in a precision."""
    rows = {row["variant"]: row for row in result["variants"]}
    trainable, narrow = result["mode"] == "trainable", result["dtype"] == "bf16"
    ours = [r for r in rows.values() if r["ours"]]
    out = []

    def over(peer: str, precision: str) -> float | None:
        best = fastest([r for r in ours if r["precision"] == precision])
        base = rows.get(peer, {})
        return speed(base, best) if best and "time" in base else None

    if result["mode"] == "forward-only":
        return []
    if narrow and any(r["precision"] == "fast" for r in ours):
        for peer, times in {EAGER: 1.8 if trainable else 2.2, TRL: 9.0, LIGER: 2.0}.items():
            out.append(target(f"fast: speed over {peer}", times, over(peer, "fast")))
    if not narrow:
        out.append(target("fp32: speed over eager", 1.2, over(EAGER, "exact")))
    for row in ours:
        fraction = 1 / 6 if row["strategy"] == "stash" else 1 / 16
        what = f"{row['variant']}: extra memory over eager's"
        out.append(target(what, fraction, row.get("memory_over_eager"), most=True))
    for row in ours:
        if row["precision"] == "exact" and narrow and "errors" in row:
            what = f"{row['variant']}: error of a 512-token sum, nat"
            out.append(target(what, 1e-3, row["errors"]["sum_max"], most=True))
    return out


def _backends(rows: list[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(r["backend"] for r in rows if r["ours"]))


def _cell_targets(result: dict[str, Any]) -> list[dict[str, Any]]:
    rows, mode, name = result["variants"], result["mode"], result["shape"]
    peers = [r for r in rows if not r["ours"] and not r["other_function"]]
    trl = fastest([r for r in peers if r["variant"] == TRL])
    out = []
    for backend in _backends(rows):
        ours = [r for r in rows if r["backend"] == backend and r["precision"] == "exact"]
        best = fastest(ours)

        def aim(what: str, wanted: float, measured: float | None, most: bool = False) -> None:
            what = f"{result['id']}, {backend}: {what}"  # noqa: B023
            out.append(target(what, wanted, measured, most=most))

        def over(peer: dict[str, Any] | None) -> float | None:
            return speed(peer, best) if peer and best else None  # noqa: B023

        if mode == "trainable" and name in _WIDE:
            aim("speed over TRL", 1.4, over(trl))
            again = [r for r in peers if r["products"] == 4]
            aim("speed over the best peer with 8NHV", 1.25, over(fastest(again)))
        if mode == "frozen" and name in _ROOFLINE:
            aim("speed over TRL", 1.5, over(trl))
        aim("speed over the fastest peer", 1.0, over(fastest(peers)))
        fraction = best.get("roofline_fraction") if best else None
        if mode != "forward-only" and name in _ROOFLINE:
            aim("fraction of the roofline", _ROOFLINE[name], fraction)
        if mode == "forward-only":
            if name == "a":
                aim("fraction of the roofline", 0.92, fraction)
            fuses = result["plan_fuses"]
            chosen = [r for r in ours if r.get("plan", {}).get("logit_free") == fuses]
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
    """The time of the fastest row over that of `best`."""
    row = fastest(rows)
    return speed(row, best) if row and best else None


def _row_targets(result: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        target(
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
            out.append(target(f"{what}host, us", _SMALL_CALL_US, host, most=True))
            fastest = min((r["wall_us"] for r in peers), default=None)
            speed = fastest / best["wall_us"] if best and fastest else None
            out.append(target(f"{what}speed over the fastest peer", 1.0, speed))
    return out
