"""csrc/micro_avx512.cpp with emulated vectors, for processors without AVX-512."""

from __future__ import annotations

import platform
import shutil
import subprocess

import pytest
from paths import ROOT, TESTS

from fastpref.backends.processor import read_processor


@pytest.mark.slow
def test_micro_kernels(tmp_path):
    compiler, program = shutil.which("g++"), tmp_path / "program"
    features = read_processor()[1] or {}
    if compiler is None or platform.machine() != "x86_64" or not features.get("avx2"):
        pytest.skip("no g++, or no processor with AVX2")
    source = TESTS / "support" / "avx512_emulated.cpp"
    flags = ["-std=c++17", "-O1", "-Wall", f"-I{ROOT / 'csrc'}"]
    subprocess.run([compiler, *flags, str(source), "-o", str(program)], check=True)
    done = subprocess.run([str(program)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
