"""constraints.txt: whole, in agreement with pyproject.toml, and used by every install."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

requirements = pytest.importorskip("packaging.requirements")

ROOT = Path(__file__).resolve().parent.parent
PYTHONS = ("3.10", "3.11", "3.12", "3.13")


def lines() -> list:
    text = (ROOT / "constraints.txt").read_text()
    found = [line for line in text.splitlines() if line and not line.startswith("#")]
    return [requirements.Requirement(line) for line in found]


def pins(python: str) -> dict[str, str]:
    out: dict[str, str] = {}
    for line in lines():
        if line.marker is None or line.marker.evaluate({"python_version": python}):
            assert line.name not in out, f"two versions of {line.name} for Python {python}"
            (specifier,) = line.specifier
            assert specifier.operator == "=="
            out[line.name] = specifier.version
    return out


def declared() -> list:
    """What pyproject.toml asks for: Python 3.10 has no reader of TOML."""
    text = (ROOT / "pyproject.toml").read_text()
    found = re.findall(r'"((?:[a-z0-9-]+)[>=][^"\[]*)"', text)
    return [requirements.Requirement(line) for line in found if "python" not in line.split(">")[0]]


@pytest.mark.parametrize("python", PYTHONS)
def test_every_requirement_has_a_version_that_it_allows(python):
    known, wanted = pins(python), declared()
    assert {"torch", "transformers", "trl", "pytest", "pybind11"} <= {r.name for r in wanted}
    for r in wanted:
        if r.marker is None or r.marker.evaluate({"python_version": python}):
            assert r.specifier.contains(known[r.name]), f"{r} but {known[r.name]}"
    assert {"numpy", "triton", "tokenizers", "huggingface-hub", "pip"} <= set(known)


def test_every_install_of_the_makefile_uses_them():
    text = (ROOT / "Makefile").read_text()
    installs = [line for line in text.splitlines() if "pip install" in line and line[0] != "#"]
    # pip's own update has its constraint by itself; the CPU index and gpu-install take no others.
    for line in installs:
        free = "--no-deps" in line or "--constraint" in line
        assert free, line
    assert text.count("$(PIP)") >= 6 and "--build-constraint" in text
