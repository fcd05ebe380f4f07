"""Tables and figures of a page in Markdown."""

from __future__ import annotations

MODES = {"trainable": "trains", "frozen": "frozen"}  # whether the head trains, as the pages say it


def two_digits(x: float) -> str:
    """Two digits, or five decimals; without an exponent."""
    return f"{x:.5f}" if x < 1e-3 else f"{x:.2g}"


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines).replace("|  |", "| |")
