"""What a run of gpu_first.py found, as text: steps, measured beside predicted, and which backend
should be the default."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Any

from gpu_predict import assumed_ms, measured_ms, way

# Of the summed log-prob of 512 tokens, in nat: what precision="exact" promises.
_MOST_ERROR = 1e-3
_SMOKE = re.compile(r"^(\d+) passed, (\d+) failed", re.M)
# A line of pytest -v, from one process or from xdist's.
_TESTED = re.compile(
    r"^(?:(tests/\S+?\.py::.+?) (PASSED|FAILED|ERROR|SKIPPED|XFAIL)\b"
    r"|\[gw\d+\] \[ *\d+%\] (PASSED|FAILED|ERROR|SKIPPED|XFAIL) (tests/.+?) *$)",
    re.M,
)


# ---- reading what a step printed ---------------------------------------------------------------


def read_smoke(text: str) -> dict[str, Any]:
    counts = _SMOKE.findall(text)
    out: dict[str, Any] = {"failures": re.findall(r"^FAILED (.*)$", text, re.M)}
    if counts:
        out |= {"passed": int(counts[-1][0]), "failed": int(counts[-1][1])}
    out["errors"] = dict(re.findall(r"^largest error of (.*): (\S+)$", text, re.M))
    return out


def read_tests(text: str) -> dict[str, Any]:
    """Counted from the lines of the tests, which are there if pytest was killed, too."""
    state: dict[str, str] = {}
    for first, told, again, second in _TESTED.findall(text):
        state[first or second] = told or again
    counts: dict[str, int] = {}
    for each in state.values():
        counts[each.lower()] = counts.get(each.lower(), 0) + 1
    failed = sorted(name for name, each in state.items() if each in ("FAILED", "ERROR"))
    collecting = re.findall(r"^ERROR (tests/\S+\.py)(?: |$)", text, re.M)
    return {"counts": counts, "failed": failed, "not collected": sorted(set(collecting))}


# ---- the cells ---------------------------------------------------------------------------------


def results_of(heads: dict[str, Any], kind: str) -> Iterator[dict[str, Any]]:
    """The results of one kind, as benchmarks/head.py writes them; failed ones are left out."""
    for head in heads.values():
        for result in head.get("results", ()):
            if result.get("kind") == kind and "failed" not in result:
                yield result


def copy_rate(heads: dict[str, Any]) -> float | None:
    """Bytes per second of the fastest copy."""
    rates = [
        1e9 * result["copy"]["gb_per_s"]
        for kind in ("rows", "logits")
        for result in results_of(heads, kind)
    ]
    return max(rates, default=0.0) or None


def cells(heads: dict[str, Any]) -> list[dict[str, Any]]:
    """Every shape and mode with its rows: measured, predicted twice, and whether it can be used.

    heads: by name, what benchmarks/head.py wrote.
    """
    copy = copy_rate(heads)
    logits_ms = {
        result["shape"]: result["products"]["X W^T"]["median_ms"]
        for result in results_of(heads, "cell")
        if "X W^T" in result.get("products", {})
    }
    out = []
    for result in results_of(heads, "cell"):
        size, mode = result["size"], result["mode"]
        rows = []
        for row in result["variants"]:
            chosen = way(row)
            errors = row.get("errors") or {}
            line = {
                "variant": row["variant"],
                "ours": row["ours"],
                "backend": row["backend"],
                "way": chosen[1] if chosen and row["ours"] else None,
                "ms": row["time"]["median_ms"] if "time" in row else None,
                "assumed_ms": assumed_ms(row, mode, size),
                "model_ms": measured_ms(
                    row, mode, size, result["roofline_ms"], logits_ms.get(result["shape"]), copy
                ),
                "speed_over_eager": row.get("speed_over_eager"),
                "roofline": row.get("roofline_fraction"),
                "errors": {k: errors.get(k) for k in ("sum_max", "dhidden", "dweight")},
                "same_bits": row.get("same_bits_twice"),
            }
            line["problem"] = _problem(row, line)
            rows.append(line)
        out.append(
            {
                "shape": result["shape"],
                "mode": mode,
                "size": size,
                "roofline_ms": result["roofline_ms"],
                "products": result.get("products", {}),
                "rows": rows,
            }
        )
    return out


def _problem(row: dict[str, Any], line: dict[str, Any]) -> str | None:
    """Why a row cannot be a default, or None."""
    if "missing" in row or line["ms"] is None:
        return row.get("missing", "not measured")
    if row.get("wrong"):
        return "wrong"
    if row["ours"] and row["precision"] == "exact":
        error = line["errors"]["sum_max"]
        if error is not None and not error <= _MOST_ERROR:
            return f"a 512-token sum is off by {error:.1e} nat"
        if row.get("same_bits_twice") is False:
            return "not the same bits twice"
    return None


# ---- the default -------------------------------------------------------------------------------


def verdict(found: list[dict[str, Any]], smoke: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The default by these figures. smoke: by backend, what `read_smoke` gave.

    A candidate is a backend with a way, `tiles` or `logit-free`. Its score is the geometric mean,
    over the cells, of the fastest candidate's time over its own: 1 is the fastest everywhere.
    """
    times: dict[tuple[str, str], dict[tuple[str, str], float]] = {}  # cell -> candidate -> ms
    unusable: dict[str, str] = {}
    for cell in found:
        key = cell["shape"], cell["mode"]
        for row in cell["rows"]:
            if row["way"] not in ("tiles", "logit-free"):
                continue
            if row["problem"] is None:
                times.setdefault(key, {})[row["backend"], row["way"]] = row["ms"]
            else:
                unusable[f"{key[0]} {key[1]}, {row['variant']}"] = row["problem"]
    fastest = {
        f"{shape} {mode}": " ".join(min(each, key=lambda c: each[c]))  # noqa: B023
        for (shape, mode), each in times.items()
    }
    backends: dict[str, dict[tuple[str, str], float]] = {}
    ways: dict[str, dict[tuple[str, str], float]] = {}
    for cell_key, each in times.items():
        for (backend, kind), ms in each.items():
            of = backends.setdefault(backend, {})
            of[cell_key] = min(ms, of.get(cell_key, math.inf))
            ways.setdefault(f"{backend} {kind}", {})[cell_key] = ms
    scores = {name: _score(of, times) for name, of in backends.items()}
    out: dict[str, Any] = {
        "cells": len(times),
        "fastest": fastest,
        "backends": scores,
        "ways": {name: _score(of, times) for name, of in ways.items()},
        "unusable": unusable,
    }
    rejected = {
        name: "its small run failed" for name in scores if smoke.get(name, {}).get("failed", 0)
    }
    out["rejected"] = rejected
    allowed = {name: s for name, s in scores.items() if name not in rejected}
    if allowed:  # first who covers most cells, then who is faster there
        out["default"] = max(allowed, key=lambda n: (allowed[n]["cells"], allowed[n]["score"]))
    return out


def _score(of: dict[tuple[str, str], float], times: dict[Any, dict[Any, float]]) -> dict[str, Any]:
    logs = [math.log(min(times[cell].values()) / ms) for cell, ms in of.items()]
    return {"score": round(math.exp(sum(logs) / len(logs)), 4), "cells": len(of)}


# ---- the text ----------------------------------------------------------------------------------


def table(header: list[str], lines: list[list[str]]) -> str:
    """The first column to the left, the others to the right."""
    columns = list(zip(header, *lines, strict=True))
    widths = [max(map(len, column)) for column in columns]
    out = []
    for first, *others in [header, *lines]:
        cells = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        out.append("  ".join([first.ljust(widths[0]), *cells]).rstrip())
    return "\n".join(out)


def number(value: float | None, spec: str) -> str:
    return "-" if value is None else format(value, spec)


def _cell_text(cell: dict[str, Any]) -> str:
    header = ["", "ms", "predicted", "model", "ms/model", "x eager", "roofline"]
    header += ["sum, nat", "dhidden", "dweight", "bits"]
    lines, missing = [], []
    for row in cell["rows"]:
        if row["ms"] is None:
            missing.append(f"  {row['variant']}: {row['problem']}")
            continue
        ratio = row["ms"] / row["model_ms"] if row["model_ms"] else None
        bits = {None: "-", True: "same", False: "DIFFER"}[row["same_bits"]]
        name = row["variant"].removeprefix("fastpref ")
        figures = [number(row["ms"], ".3f"), number(row["assumed_ms"], ".2f")]
        figures += [number(row["model_ms"], ".2f"), number(ratio, ".2f")]
        figures += [number(row["speed_over_eager"], ".2f"), number(row["roofline"], ".2f")]
        errors = row["errors"]
        figures += [number(errors[k], ".0e") for k in ("sum_max", "dhidden", "dweight")]
        lines.append([name, *figures, bits])
        if row["problem"] is not None:
            missing.append(f"  {row['variant']}: {row['problem']}")
    size = cell["size"]
    rates = ", ".join(f"{k} {p['tflop_per_s']:.0f}" for k, p in cell["products"].items())
    head = f"{cell['shape']} {cell['mode']}: N={size['n']} H={size['h']} V={size['v']}"
    head += f", bare products {number(cell['roofline_ms'], '.3f')} ms"
    head += f"; TFLOP/s: {rates}" if rates else ""
    return "\n".join([head, table(header, lines), *missing])


def _passes_text(heads: dict[str, Any]) -> list[str]:
    lines = []
    for kind, title in (("rows", "passes over a tile"), ("logits", "ready logits")):
        for result in results_of(heads, kind):
            for k in result["kernels"]:
                name = f"{title}, {result['shape']}: {k['backend']} {k['precision']} {k['kernel']}"
                if "gb_per_s" in k:
                    share = number(k.get("of_copy"), ".2f")
                    lines.append([name, f"{k['gb_per_s']:.0f}", share])
                elif not k.get("peer"):
                    lines.append([f"{name}: {k['missing'][:60]}", "-", "-"])
    rate = copy_rate(heads)
    if rate is not None:
        lines.append(["a copy", f"{rate / 1e9:.0f}", "1.00"])
    return [table(["", "GB/s", "of a copy"], lines)] if lines else []


def _verdict_text(v: dict[str, Any]) -> list[str]:
    if "default" not in v:
        return ["Default backend: no figure allows a choice."]
    out = [f"Fastest in each cell: {', '.join(f'{c}: {who}' for c, who in v['fastest'].items())}"]
    header = ["of the fastest (geometric mean)", "score", "cells"]
    scores = {**v["backends"], **v["ways"]}
    lines = [
        [name, f"{s['score']:.3f}", f"{s['cells']}/{v['cells']}"] for name, s in scores.items()
    ]
    out.append(table(header, lines))
    out += [f"not counted: {which}: {why}" for which, why in v["unusable"].items()]
    out += [f"rejected: {name}: {why}" for name, why in v["rejected"].items()]
    out.append(f"Default backend by these figures: {v['default']}")
    return out


def report(results: dict[str, Any]) -> str:
    """The whole text; what decides comes last, where the end of a log is read."""
    out = [f"# First run on a GPU ({results['state']}, {results['wall_s']:.0f} s)"]
    about = results.get("machine") or {}
    if about:
        packages = " ".join(f"{k} {v}" for k, v in about["packages"].items() if v)
        out.append(f"{about.get('gpu', 'no GPU')}, {about['processors']} processors, {packages}")
        out += [f"  {name}: {b['reason']}" for name, b in about["backends"].items()]
    heads = results["heads"]
    for title, found in (("", results["cells"]), ("With peers:", results["peer_cells"])):
        if found:
            out += [title, *(f"{_cell_text(cell)}\n" for cell in found)]
    if results["cells"]:
        out.append(
            "predicted: from assumed rates; model: from the products and the copy of this run\n"
        )
    out += _passes_text(heads)
    lines = [[s["name"], s["state"], f"{s['seconds']:.0f}"] for s in results["steps"]]
    out += ["", table(["step", "", "s"], lines)]
    for step in results["steps"]:
        if step["state"] not in ("passed", "running"):
            out.append(f"{step['name']}: {step['state']}: {step['why']}")
            out += [f"    {line[:200]}" for line in step["tail"][-6:]]
    for name, found in results["smoke"].items():
        told = "no count" if "passed" not in found else "{passed} passed, {failed} failed"
        out.append(f"small run, {name}: {told.format(**found)}")
        out += [f"    {line[:200]}" for line in found["failures"][:10]]
        out += [f"    error of {which}: {error}" for which, error in found["errors"].items()]
    tests = results.get("tests")
    if tests:
        counts = ", ".join(f"{n} {what}" for what, n in sorted(tests["counts"].items()))
        out.append(f"tests: {counts or 'none was counted'}")
        out += [f"    failed: {name[:180]}" for name in tests["failed"][:20]]
        out += [f"    not collected: {name}" for name in tests["not collected"]]
    return "\n".join([*out, "", *_verdict_text(results["verdict"])]) + "\n"
