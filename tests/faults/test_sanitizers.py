"""The kernels of csrc/ with eight threads under ThreadSanitizer, AddressSanitizer and UBSan."""

from __future__ import annotations

import shutil
import subprocess
import sys

import outcomes
import pytest
import reliability
from paths import ROOT, TESTS

from fastpref.backends.processor import read_processor

SOURCES = [TESTS / "support" / "sanitized_main.cpp"]
SOURCES += [path for path in sorted((ROOT / "csrc").glob("*.cpp")) if path.name != "bind.cpp"]
SANITIZERS = reliability.sized(["thread", "address,undefined"], ["thread"])


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="of gcc on Linux")
@pytest.mark.parametrize("sanitizer", SANITIZERS)
def test_eight_threads(tmp_path, sanitizer):
    """Without OpenMP, whose libgomp ThreadSanitizer does not understand: with std::threads. The
    program is compiled once for the same sources, and runs each time."""
    compiler, program = shutil.which("g++"), tmp_path / "program"
    if compiler is None:
        pytest.skip("no g++")
    command = [
        compiler, "-std=c++17", reliability.sized("-O1", "-O0"), "-g", f"-fsanitize={sanitizer}",
        "-fno-sanitize-recover=undefined", "-pthread",
        f"-I{ROOT / 'csrc'}", *map(str, SOURCES),
    ]  # fmt: skip
    said = []

    def build(path):
        done = subprocess.run([*command, "-o", str(path)], capture_output=True, text=True)
        said.append(done.stderr)
        path.touch()
        return done.returncode == 0

    version = subprocess.run([compiler, "--version"], capture_output=True, text=True).stdout
    headers = [*(ROOT / "csrc").glob("*.h"), *(TESTS / "support").glob("*.h")]
    inputs = [command, version, read_processor(), *SOURCES, *sorted(headers)]
    with outcomes.kept(f"sanitized {sanitizer}", "program", inputs, build) as path:
        shutil.copy(path, program)  # with its permissions
    failed = program.stat().st_size == 0
    if failed and "cannot find" in said[0]:
        pytest.skip(f"g++ has no {sanitizer} sanitizer here")
    assert not failed, said[0][-3000:]
    # Its shadow memory has fixed places, which random addresses may take.
    fixed = [shutil.which("setarch"), "-R"] if shutil.which("setarch") else []
    done = subprocess.run([*fixed, str(program)], capture_output=True, text=True)
    assert done.returncode == 0, (done.stdout + done.stderr)[-5000:]
    assert done.stdout.startswith("0 results differ") and "Sanitizer" not in done.stderr
    reliability.record(f"sanitizer, {sanitizer}", threads=8, reports=0)
