"""The parts of a results file: facts about the machine, targets; and tables for the terminal."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import platform
import subprocess
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from fastpref.storage import whole_file

PACKAGES = (
    "torch",
    "transformers",
    "trl",
    "liger_kernel",
    "cut-cross-entropy",
    "accelerate",
    "datasets",
    "peft",
    "triton",
    "quack-kernels",
    "nvidia-cutlass-dsl",
    "fastpref",
)


def _git(*args: str) -> str | None:
    """The output of a git command in this package's checkout; None for an installed package.

    An installed package may lie in the virtual environment of another project's checkout.
    """
    checkout = Path(__file__).resolve().parents[2]
    if not (checkout / "csrc").is_dir():
        return None
    command = ["git", *args]
    try:
        run = subprocess.run(command, cwd=checkout, capture_output=True, text=True, timeout=30)
    except OSError:
        return None
    return run.stdout.strip() if run.returncode == 0 else None


def machine() -> dict[str, Any]:
    """Device, versions, threads and commit; no host name and no path."""
    import fastpref.backends

    cpu, flags = platform.processor(), ""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                cpu = value.strip()
            elif key.strip() == "flags":
                flags = value
                break
    features = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")
    versions = {}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    sources = ("fastpref", "csrc", "kernels")
    dirty = _git("status", "--porcelain", "--untracked-files=no", "--", *sources)
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "cpu": cpu,
        "cpu_features": [f for f in features if f in flags.split()],
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        "packages": versions,
        "backend": fastpref.backends.active(),
        # COMMIT: for a copy of the tree that is no checkout.
        "commit": _git("rev-parse", "HEAD") or os.environ.get("COMMIT"),
        "uncommitted_changes": None if dirty is None else bool(dirty),
    }


def target(what: str, wanted: float, measured: float | None, *, most: bool = False) -> dict:
    """An aim and the figure that was measured. most: whether the aim is an upper bound."""
    met = None if measured is None else (measured <= wanted if most else measured >= wanted)
    rounded = None if measured is None else round(measured, 4)
    bound = "at most" if most else "at least"
    return {"target": what, "bound": bound, "wanted": wanted, "measured": rounded, "met": met}


def table(header: list[str], rows: list[list[str]]) -> str:
    """A text table. The first column is left-aligned, the others are right-aligned."""
    widths = [max(len(r[i]) for r in [header, *rows]) for i in range(len(header))]
    lines = []
    for row in [header, *rows]:
        first, *others = zip(row, widths, strict=True)
        cells = [first[0].ljust(first[1]), *(c.rjust(w) for c, w in others)]
        lines.append("  ".join(cells).rstrip())
    lines.insert(1, "  ".join("-" * w for w in widths))
    return "\n".join(lines)


def target_table(targets: list[dict]) -> str:
    marks = {True: "met", False: "MISSED", None: "not measured"}
    rows = [
        [
            t["target"],
            f"{'<=' if t['bound'] == 'at most' else '>='} {t['wanted']:.3g}",
            "-" if t["measured"] is None else f"{t['measured']:.3g}",
            marks[t["met"]],
        ]
        for t in targets
    ]
    return table(["target", "wanted", "measured", ""], rows)


def write_json(path: Path, results: dict[str, Any]) -> None:
    with whole_file(path) as beside:
        beside.write_text(json.dumps(results, indent=1) + "\n")
