"""The micro-kernels for processors other than this one, emulated."""

from __future__ import annotations

import platform
import shutil
import subprocess

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


def _check(build: list[object], run: list[object]) -> str:
    subprocess.run([str(part) for part in build], check=True)
    done = subprocess.run([str(part) for part in run], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_avx512(tmp_path):
    """csrc/micro_avx512.cpp, whose vectors are arrays."""
    program = tmp_path / "program"
    _check([_compiler(), *FLAGS, "-O1", SUPPORT / "avx512_emulated.cpp", "-o", program], [program])


@pytest.mark.slow
def test_amx(tmp_path):
    """The product with csrc/micro_amx.cpp, whose tiles are arrays and differ between threads."""
    program = tmp_path / "program"
    others = [path for path in MICRO if path.name != "micro_amx.cpp"]
    sources = [SUPPORT / "amx_emulated.cpp", CSRC / "product.cpp", *others]
    _check([_compiler(), *FLAGS, "-O1", *sources, "-o", program], [program])


@pytest.mark.slow
def test_neon(tmp_path):
    """csrc/ compiles for aarch64, where its products are right in every kernel and dtype."""
    compiler, emulator = map(shutil.which, ("aarch64-linux-gnu-g++", "qemu-aarch64-static"))
    if compiler is None:
        pytest.skip("no aarch64-linux-gnu-g++")
    if emulator is None:
        pytest.skip("no qemu-aarch64-static")
    program = tmp_path / "program"
    sources = [path for path in CSRC.glob("*.cpp") if path.name != "bind.cpp"]
    build = [compiler, *FLAGS, "-O2", "-static", "-fno-math-errno", "-fno-trapping-math"]
    build += [*sources, SUPPORT / "product_main.cpp", "-o", program]
    said = _check(build, [emulator, program])
    assert said.count("neon, ") == said.count("portable, ") == 3
