"""The kernels of csrc/ with eight threads under ThreadSanitizer, AddressSanitizer and UBSan."""

from __future__ import annotations

import platform
import shutil
import subprocess
import sys

import pytest
import reliability
from paths import ROOT, TESTS

SOURCES = [TESTS / "support" / "sanitized_main.cpp"]
SOURCES += [path for path in sorted((ROOT / "csrc").glob("*.cpp")) if path.name != "bind.cpp"]
SANITIZERS = reliability.sized(["thread", "address,undefined"], ["thread"])


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="of gcc on Linux")
@pytest.mark.parametrize("sanitizer", SANITIZERS)
def test_eight_threads(tmp_path, sanitizer):
    """Without OpenMP, whose libgomp ThreadSanitizer does not understand: with std::threads."""
    compiler, program = shutil.which("g++"), tmp_path / "program"
    if compiler is None:
        pytest.skip("no g++")
    arch = ["-march=native"] * (platform.machine() == "x86_64")
    command = [
        compiler, "-std=c++17", reliability.sized("-O1", "-O0"), "-g", f"-fsanitize={sanitizer}",
        "-fno-sanitize-recover=undefined", "-DFASTPREF_NO_CLONES", *arch, "-pthread",
        f"-I{ROOT / 'csrc'}", *map(str, SOURCES), "-o", str(program),
    ]  # fmt: skip
    built = subprocess.run(command, capture_output=True, text=True)
    if built.returncode and "cannot find" in built.stderr:
        pytest.skip(f"g++ has no {sanitizer} sanitizer here")
    assert built.returncode == 0, built.stderr[-3000:]
    # Its shadow memory has fixed places, which random addresses may take.
    fixed = [shutil.which("setarch"), "-R"] if shutil.which("setarch") else []
    done = subprocess.run([*fixed, str(program)], capture_output=True, text=True)
    assert done.returncode == 0, (done.stdout + done.stderr)[-5000:]
    assert done.stdout.startswith("0 results differ") and "Sanitizer" not in done.stderr
    reliability.record(f"sanitizer, {sanitizer}", threads=8, reports=0)
