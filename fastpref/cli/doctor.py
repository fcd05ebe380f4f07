"""`fastpref doctor`: this machine's hardware, packages and backends. It needs only torch."""

from __future__ import annotations

import json
import os
import platform
import sys
from importlib import metadata
from typing import Any

import torch

from fastpref import backends
from fastpref.backends import processor, rates
from fastpref.backends.huge_pages import TORCH_SETTING

PACKAGES = (
    "torch",
    "triton",
    "transformers",
    "accelerate",
    "datasets",
    "peft",
    "safetensors",
    "trl",
    "liger-kernel",
    "cut-cross-entropy",
    "typer",
    "rich",
    "matplotlib",
)
VARIABLES = (
    "FASTPREF_BACKEND",
    "FASTPREF_DEBUG",
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    TORCH_SETTING,
    "CUDA_VISIBLE_DEVICES",
)


def collect() -> dict[str, Any]:
    """All facts that doctor reports, as values for JSON."""
    return {
        "fastpref": version("fastpref"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: version(name) for name in PACKAGES},
        "cpu": cpu(),
        "products": rates.product_rates(),
        "devices": devices(),
        "backends": [
            {"name": b.name, "works": b.works, "reason": b.reason, "devices": list(b.devices)}
            for b in backends.report()
        ],
        "active": active(),
        "environment": {name: os.environ[name] for name in VARIABLES if name in os.environ},
    }


def version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def cpu() -> dict[str, Any]:
    """The CPU's model, features, missing features and threads.

    Features are None if the system does not list them.
    """
    model, features = processor.read_processor()
    usable = getattr(os, "sched_getaffinity", lambda _: range(os.cpu_count() or 1))
    return {
        "model": model,
        "features": features,
        "lacks": processor.lacking(features),
        "cores": len(usable(0)),
        "torch_threads": torch.get_num_threads(),
        "torch_isa": torch.backends.cpu.get_cpu_capability(),
        "native_isa": native_isa(),
    }


def native_isa() -> str | None:
    """The instruction set that the compiled CPU module uses; None if there is no module."""
    try:
        from fastpref import _cpu
    except ImportError:
        return None
    return _cpu.isa()


def devices() -> list[dict[str, Any]]:
    """The CPU and every accelerator that torch sees."""
    devices_here: list[dict[str, Any]] = [{"device": "cpu", "name": cpu()["model"]}]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        devices_here.append(
            {
                "device": f"cuda:{index}",
                "name": properties.name,
                "memory_bytes": properties.total_memory,
                "capability": f"{properties.major}.{properties.minor}",
            }
        )
    if torch.backends.mps.is_available():
        devices_here.append({"device": "mps", "name": "Apple GPU"})
    if hasattr(torch, "xpu"):
        for index in range(torch.xpu.device_count()):
            devices_here.append(
                {"device": f"xpu:{index}", "name": torch.xpu.get_device_name(index)}
            )
    return devices_here


def active() -> dict[str, str]:
    """The backend of each kind of device; or "none: REASON" if a forced one cannot run there."""
    chosen = {}
    for device in dict.fromkeys(d["device"].split(":")[0] for d in devices()):
        try:
            chosen[device] = backends.active(device)
        except (ValueError, RuntimeError) as error:
            chosen[device] = f"none: {error}"
    return chosen


def lines(facts: dict[str, Any]) -> list[tuple[str, list[tuple[str, str]]]]:
    """The report as headed sections of (name, text)."""
    features = facts["cpu"]["features"]
    if features is None:
        present = "not listed by this system"
    else:
        present = ", ".join(name for name, has in features.items() if has) or "none of interest"
    missing = [name for name, found in facts["packages"].items() if found is None]
    packages = [(name, found) for name, found in facts["packages"].items() if found is not None]
    if missing:
        packages.append(("not installed", ", ".join(missing)))
    accelerators = [
        (
            d["device"],
            ", ".join(
                [
                    d["name"],
                    *([f"{d['memory_bytes'] / 2**30:.0f} GiB"] if "memory_bytes" in d else []),
                    *([f"capability {d['capability']}"] if "capability" in d else []),
                ]
            ),
        )
        for d in facts["devices"]
        if d["device"] != "cpu"
    ]
    return [
        (
            "Versions",
            [
                ("fastpref", facts["fastpref"] or "not installed (running from a source tree)"),
                ("python", f"{facts['python']} on {facts['platform']}"),
                *packages,
            ],
        ),
        (
            "CPU",
            [
                ("model", facts["cpu"]["model"]),
                ("features", present),
                *(("lacks", line) for line in facts["cpu"]["lacks"]),
                (
                    "threads",
                    f"{facts['cpu']['torch_threads']} used by torch, "
                    f"{facts['cpu']['cores']} cores usable",
                ),
                (
                    "code in use",
                    f"native {facts['cpu']['native_isa'] or 'not built'}, "
                    f"torch {facts['cpu']['torch_isa']}",
                ),
            ],
        ),
        ("Matrix products", rates.what_follows(facts["products"])),
        ("Accelerators", accelerators or [("none", "torch sees no GPU")]),
        (
            "Backends",
            [
                (
                    b["name"],
                    ("works" if b["works"] else "does not work")
                    + f": {b['reason']}"
                    + f" (devices: {', '.join(b['devices'])})",
                )
                for b in facts["backends"]
            ],
        ),
        ("Active", list(facts["active"].items())),
        *([("Environment", list(facts["environment"].items()))] if facts["environment"] else []),
    ]


def run(as_json: bool = False) -> None:
    """Print the report; exit with code 1 if a forced backend cannot run on a device."""
    facts = collect()
    if as_json:
        print(json.dumps(facts, indent=2))
    else:
        show(lines(facts))
    if any(name.startswith("none:") for name in facts["active"].values()):
        sys.exit(1)


def show(sections: list[tuple[str, list[tuple[str, str]]]]) -> None:
    try:
        from rich.console import Console
        from rich.text import Text
    except ImportError:
        for heading, rows in sections:
            print(heading)
            for name, text in rows:
                print(f"  {name:<18} {text}")
        return
    console = Console(highlight=False, soft_wrap=True)
    for heading, rows in sections:
        console.print(Text(heading, style="bold"))
        for name, text in rows:
            style = "red" if text.startswith(("does not work", "none:")) else ""
            console.print(Text(f"  {name:<18} ", style="dim") + Text(text, style=style))
