"""Compares two results: which sides are slower, larger or less exact than they were.

old and new results -> cells that have the same sizes, dtype, mode and threads -> sides of the same
     name -> `Change`s
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# By how many nats the error of a sum of log-probs, and by how many bytes the memory of a call, may
# grow before it counts as worse.
_NATS = 1e-3
_BYTES = 8 * 2**20
_MACHINE = {"cpu": "processor", "threads": "threads", "gpu": "GPU"}


@dataclass(frozen=True)
class Change:
    """One side of one case in an old result and in a new one.

    Attributes:
        case: the name of the case.
        side: such as "fastpref exact, stash".
        old_ms: the median time in the old result.
        new_ms: the median time in the new one; None if it was not measured or is wrong.
        ratio: new_ms over old_ms; above 1 it is slower.
        low: the ratio of the new first quartile to the old third one.
        high: the ratio of the new third quartile to the old first one.
        canary: the ratio of the times of a fixed matrix product, which shows a change of the
            machine's own speed; None on a GPU.
        verdict: "same", "slower", "faster", "less exact", "more memory", "wrong", or "gone" for a
            side that only the old result has.
        regression: whether it is one of fastpref's sides and became worse.
    """

    case: str
    side: str
    old_ms: float | None
    new_ms: float | None
    ratio: float | None
    low: float | None
    high: float | None
    canary: float | None
    verdict: str
    regression: bool


def load_result(path: str | os.PathLike[str]) -> dict[str, Any]:
    """A result that `fastpref bench` or benchmarks/head.py wrote.

    Raises:
        ValueError: a file that cannot be read, is no JSON, or holds something else.
    """
    path = Path(path).expanduser()
    try:
        loaded = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no JSON"
        raise ValueError(
            f"{path} could not be read as a result of fastpref bench: {reason}"
        ) from None
    good = isinstance(loaded, dict) and isinstance(loaded.get("machine"), dict)
    try:
        cells = dict(_cells(loaded)) if good else {}
        measured = [c for cell in cells.values() for c in _changes(cell, {"id": "", **cell}, 0.0)]
    except (ArithmeticError, AttributeError, IndexError, KeyError, TypeError, ValueError):
        cells, measured = {}, []
    if not cells or not measured:
        raise ValueError(f"{path} is no result of fastpref bench: it has no measured cells")
    return dict(loaded)


def machine_differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """The differences of two machines that make their times incomparable, one phrase each.

    Args:
        old: the `machine` of the old result.
        new: the `machine` of the new one.
    """
    return [
        f"{name} {old.get(key) or 'none'} then, {new.get(key) or 'none'} here"
        for key, name in _MACHINE.items()
        if old.get(key) != new.get(key)
    ]


def compare_results(
    old: Mapping[str, Any], new: Mapping[str, Any], threshold: float = 0.05
) -> list[Change]:
    """What changed between two results, case by case.

    A side counts as slower if its ratio is above 1 + threshold, both by itself and divided by the
    canary's, and if the quartiles of its old and new times do not overlap. A side counts as faster
    in the same way.

    Args:
        old: the old result, from `load_result(path)` or `BenchResult.as_dict()`.
        new: the new one.
        threshold: the fraction by which a time may grow.

    Raises:
        ValueError: results of two machines, without a case in common, or a bad threshold.
    """
    check_threshold(threshold)
    check_machines(old["machine"], new["machine"], "the old result")
    before = dict(_cells(old))
    pairs = [(before[key], cell) for key, cell in _cells(new) if key in before]
    if not pairs:
        raise ValueError("the old result has none of these cases")
    return [change for then, now in pairs for change in _changes(then, now, threshold)]


def check_machines(old: Mapping[str, Any], new: Mapping[str, Any], name: str) -> None:
    """Raise ValueError, with the old result's name, if the two are of different machines."""
    if differences := machine_differences(old, new):
        raise ValueError(
            f"{name} is of another machine ({'; '.join(differences)}); the times of two machines "
            "say nothing of a regression"
        )


def check_threshold(threshold: float) -> None:
    if not 0 <= threshold < 10:
        raise ValueError(f"threshold: got {threshold}, expected a fraction such as 0.05")


def sides_of(result: Mapping[str, Any]) -> dict[tuple[Any, ...], set[str]]:
    """fastpref's sides that were measured and are not wrong, by `key_of` of their cell."""
    return {
        key: {v["variant"] for v in cell["variants"] if v["ours"] and _is_measured(v)}
        for key, cell in _cells(result)
    }


def key_of(size: Mapping[str, Any], dtype: str, mode: str, threads: int | None) -> tuple[Any, ...]:
    """What two cells must have in common to be compared."""
    return size["n"], size["h"], size["v"], size.get("softcap"), dtype, mode, threads


def _cells(result: Mapping[str, Any]) -> Iterator[tuple[tuple[Any, ...], dict[str, Any]]]:
    """The cells of a file with their keys. A file of a GPU has them among its results."""
    for cell in [*result.get("cells", ()), *result.get("results", ())]:
        if cell.get("kind", "cell") == "cell" and "variants" in cell:
            size = cell.get("size") or {k.lower(): n for k, n in cell["shape"].items()}
            key = key_of(size, cell["dtype"], cell["mode"], cell.get("threads"))
            yield key, cell


def _changes(then: dict[str, Any], now: dict[str, Any], threshold: float) -> Iterator[Change]:
    canaries = [cell.get("canary") for cell in (now, then)]
    canary = None
    if all(canaries):
        canary = canaries[0]["median_ms"] / canaries[1]["median_ms"]  # type: ignore[index]
    olds = {row["variant"]: row for row in then["variants"]}
    for new in now["variants"]:
        old = olds.pop(new["variant"], None)
        if old is None or not _is_measured(old):
            continue  # no time to compare with
        yield _change(now["id"], old, new, canary, threshold)
    for name, old in olds.items():  # sides that only the old result has
        if _is_measured(old):
            was = old["time"]["median_ms"]
            yield Change(now["id"], name, was, None, None, None, None, canary, "gone", False)


def _is_measured(row: Mapping[str, Any]) -> bool:
    return "time" in row and not row.get("wrong")


def _change(
    case: str, old: dict[str, Any], new: dict[str, Any], canary: float | None, threshold: float
) -> Change:
    old_ms = old["time"]["median_ms"]
    if "time" not in new or "missing" in new:
        gone = "gone", bool(new["ours"]) and not new.get("dropped")
        return Change(case, new["variant"], old_ms, None, None, None, None, canary, *gone)
    new_ms = new["time"]["median_ms"]
    low, high = (
        new["time"]["quartiles_ms"][i] / old["time"]["quartiles_ms"][1 - i] for i in (0, 1)
    )
    ratio, bound = new_ms / old_ms, 1 + threshold
    corrected = ratio / (canary or 1.0)  # without the change of the machine's own speed
    verdict = "same"
    if new.get("wrong"):
        verdict = "wrong"
    elif min(ratio, corrected) > bound and low > 1:
        verdict = "slower"
    elif _worse(old, new, "errors", "sum_max", 2.0, _NATS):
        verdict = "less exact"
    elif _worse(old, new, "memory", "extra", 1.1, _BYTES):
        verdict = "more memory"
    elif max(ratio, corrected) < 1 / bound and high < 1:
        verdict = "faster"
    worse = bool(new["ours"]) and verdict not in ("same", "faster")
    side = new["variant"]
    if verdict == "wrong":  # the time of a wrong result means nothing
        return Change(case, side, old_ms, None, None, None, None, canary, verdict, worse)
    ratio, low, high = (round(x, 4) for x in (ratio, low, high))
    return Change(case, side, old_ms, new_ms, ratio, low, high, canary, verdict, worse)


def _worse(
    old: dict[str, Any], new: dict[str, Any], group: str, key: str, factor: float, slack: float
) -> bool:
    """Whether row[group][key] grew by more than the factor and the slack."""
    before, after = ((row.get(group) or {}).get(key) for row in (old, new))
    if before is None or after is None:
        return False
    return bool(after > max(before, 0) * factor + slack)
