"""The micro-kernels for processors other than this one, emulated."""

from __future__ import annotations

import platform
import shutil
import subprocess
import tempfile
from collections.abc import Sequence

import outcomes
import pytest
from paths import ROOT, TESTS

from fastpref.backends.processor import read_processor

CSRC, SUPPORT = ROOT / "csrc", TESTS / "support"
FLAGS = ["-std=c++17", "-Wall", f"-I{CSRC}", f"-I{SUPPORT}", "-pthread"]
MICRO = sorted(CSRC.glob("micro_*.cpp"))


def _compiler() -> str:
    """g++ on a processor with AVX2, which the emulations pack with."""
    compiler, features = shutil.which("g++"), read_processor()[1] or {}
    if compiler is None or platform.machine() != "x86_64" or not features.get("avx2"):
        pytest.skip("no g++, or no processor with AVX2")
    return compiler


def _check(name: str, build: list[object], run: Sequence[str] = ()) -> str:
    """What the program says that `build` makes. It runs once for the same sources, compiler and
    processor."""
    command = [str(part) for part in build]
    version = subprocess.run([command[0], "--version"], capture_output=True, text=True).stdout
    inputs = [command, run, version, read_processor()]
    for folder in (CSRC, SUPPORT):
        inputs += sorted(p for p in folder.iterdir() if p.suffix in (".h", ".cpp"))

    def make() -> list[object]:
        with tempfile.TemporaryDirectory() as scratch:
            program = f"{scratch}/program"
            subprocess.run([*command, "-o", program], check=True)
            done = subprocess.run([*run, program], capture_output=True, text=True)
        return [done.returncode, done.stdout, done.stderr]

    code, out, err = outcomes.once(name, inputs, make, failed=lambda found: found[0] != 0)
    assert code == 0, out + err
    return out


@pytest.mark.slow
def test_avx512():
    """csrc/micro_avx512.cpp, whose vectors are arrays."""
    _check("avx512", [_compiler(), *FLAGS, "-O1", SUPPORT / "avx512_emulated.cpp"])


@pytest.mark.slow
def test_amx():
    """The product with csrc/micro_amx.cpp, whose tiles are arrays and differ between threads."""
    others = [path for path in MICRO if path.name != "micro_amx.cpp"]
    sources = [SUPPORT / "amx_emulated.cpp", CSRC / "product.cpp", *others]
    _check("amx", [_compiler(), *FLAGS, "-O1", *sources])


@pytest.mark.slow
def test_neon():
    """csrc/ compiles for aarch64, where its products are right in every kernel and dtype."""
    compiler, emulator = map(shutil.which, ("aarch64-linux-gnu-g++", "qemu-aarch64-static"))
    if compiler is None:
        pytest.skip("no aarch64-linux-gnu-g++")
    if emulator is None:
        pytest.skip("no qemu-aarch64-static")
    sources = sorted(path for path in CSRC.glob("*.cpp") if path.name != "bind.cpp")
    build = [compiler, *FLAGS, "-O2", "-static", "-fno-math-errno", "-fno-trapping-math"]
    build += [*sources, SUPPORT / "product_main.cpp"]
    said = _check("neon", build, [emulator])
    assert said.count("neon, ") == said.count("portable, ") == 3
