"""Runs of the tiny model that save every second step, and what damages their files."""

from __future__ import annotations

import tiny

SAVES = {"save_strategy": "steps", "save_steps": 2}


def start(path, policy=None, **options):
    return tiny.trainer(path, policy, **{**SAVES, **options})


def flip(path):
    """Change a bit in the middle of a file."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
