"""The figures of docs/columns.md, from what columns.py and columns_training.py wrote."""

from __future__ import annotations

from typing import Any

Rows = tuple[list[str], list[list[str]]]


def gains(results: dict[str, Any]) -> Rows:
    """Exact calls against calls with columns."""
    rows = [
        [
            name,
            f"{case['seconds']['exact']:.2f} s",
            f"{case['seconds']['columns']:.2f} s",
            f"{case['ratio']:.2f}x",
            f"{case['columns']:.0%}",
            f"{case['error of dX']:.1e}",
            f"{case['error of dW']:.1e}" if case["error of dW"] else "exact",
        ]
        for name, case in results["cases"].items()
    ]
    return ["", "exact", "columns", "ratio", "columns taken", "error of dX", "error of dW"], rows


def about_gains(results: dict[str, Any]) -> str:
    options, machine = results["options"], results["machine"]
    return (
        f"Forward and backward of {options['tokens']} tokens, tolerance {options['tolerance']}, "
        f"fp32, {machine['threads']} threads of {machine['cpu']}; medians of "
        f"{options['repeats']} calls.\nErrors are relative root mean squares; rounding D to bf16 "
        f"costs {results['bf16 D, error of u']:.1e} in dX.\n"
    )


def block_filter(results: dict[str, Any]) -> Rows:
    """What a filter of blocks multiplies of D, by threshold."""
    found = results["block filter"]
    rows = [[f["threshold"], f"{f['kept']:.0%}", f"{f['error of u']:.1e}"] for f in found]
    return ["threshold", "share of D multiplied", "error of dX"], rows


def training(results: dict[str, Any]) -> Rows:
    """Runs with columns and with a rounded D against runs with exact gradients."""
    rows = [
        [
            f"{case}, {kind}",
            f"{r['weights']['body']:.2%}",
            f"{r['largest difference of a training loss']:.1e}",
            f"{r['held-out margin']:.5f}",
            f"{r['held-out margin, exact']:.5f}",
            f"{r['held-out accuracy']:.1%}",
            f"{r['held-out accuracy, exact']:.1%}",
        ]
        for case, kinds in results["against exact"].items()
        for kind, r in kinds.items()
    ]
    head = ["", "distance of the body's weights", "largest difference of a training loss"]
    return [*head, "held-out margin", "exact", "held-out accuracy", "exact"], rows


def about_training(results: dict[str, Any]) -> str:
    settings = results["settings"]
    return (
        f"{settings['steps']} steps of {settings['batch']} pair{'s' * (settings['batch'] > 1)}, "
        f"{settings['max_length']} tokens at most, {settings['held_out']} held-out pairs, "
        f"tolerance {settings['tolerance']}, fp32. The distance is from the exact\nrun's weights, "
        "as a share of the distance that the exact run moved them.\n"
    )
