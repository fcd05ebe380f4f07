"""The figures of docs/profile.md, from what benchmarks/training_profile.py wrote."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

NAMES = {"fastpref": "fastpref", "eager": "eager logits", "trl": "TRL", "liger": "TRL with Liger"}
_MEMORY = (
    "weights", "reference", "optimiser", "gradients", "activations", "head", "other", "malloc",
    "libraries",
)  # fmt: skip


def _table(first: str, sides: list[dict[str, Any]], rows: list[tuple[str, list[str]]]) -> str:
    head = [first, *(NAMES[side["name"]] for side in sides)]
    lines = [head, ["---", *("---:" for _ in sides)], *([name, *cells] for name, cells in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def tables(found: dict[str, Any]) -> str:
    """Memory at the peak and seconds of a step, of each side that was measured."""
    sides = [side for side in found["sides"] if side["missing"] is None]

    def row(name: str, value: Callable[[dict[str, Any]], float], form: str) -> Any:
        return name, [format(value(side), form) for side in sides]

    memory = [
        row(name, lambda side, name=name: side["components"].get(name, 0) / 1e6, ",.0f")
        for name in _MEMORY
        if any(side["components"].get(name, 0) >= 5e5 for side in sides)
    ]
    memory += [
        row(text, lambda side, key=key: (side[key] or 0) / 1e6, ",.0f")
        for text, key in (
            ("unaccounted", "unaccounted_bytes"),
            ("measured peak", "peak_bytes"),
            ("tensors alone", "tensor_bytes"),
        )
    ]
    phases = dict.fromkeys(name for side in sides for name in side["phases"])
    seconds = [
        row(name, lambda side, name=name: side["phases"].get(name, 0.0), ".3f")
        for name in phases
        if any(side["phases"].get(name, 0.0) >= 0.05 for side in sides)
    ]
    seconds.append(row("step", lambda side: side["step_seconds"], ".3f"))
    settings, machine, minutes = found["settings"], found["machine"], found["wall_s"] / 60
    return (
        f"This is {settings['model']} in fp32: {settings['batch_size']} pairs of at most "
        f"{settings['max_length']} tokens, gradient checkpointing,\nreference log-probs ahead. "
        f"{machine['cpu']}, {machine['threads']} threads; it took {minutes:.1f} minutes.\n\n"
        + _table("memory at the peak, MB", sides, memory)
        + "\n"
        + _table("seconds", sides, seconds)
    )
