"""The CUDA kernels where there is no GPU: csrc/cuda as plain C++, with cuda_emulate/emulate.h in
the place of the GPU, as a module with the functions of fastpref._cuda.

`install()` builds it, once for the same sources, and gives it to the cuda backend, which then takes
tensors on the CPU. It needs a C++ compiler and pybind11.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import outcomes

ROOT = Path(__file__).resolve().parents[2]
HERE = ROOT / "tests" / "support" / "cuda_emulate"
CSRC = ROOT / "csrc"
FLAGS = ("-O2", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off")

sys.path.append(str(CSRC / "cuda"))
import nvcc_build  # noqa: E402


def _compiler() -> str | None:
    names = (os.environ.get("CXX", "c++"), "g++", "clang++")
    return next(filter(None, map(shutil.which, names)), None)


@contextlib.contextmanager
def build() -> Iterator[Path]:
    """The module's file, as long as the context lasts. Raises RuntimeError with the compiler's
    words."""
    import pybind11

    folders = [CSRC, CSRC / "cuda", HERE, pybind11.get_include(), sysconfig.get_path("include")]
    include = [f"-I{folder}" for folder in folders]
    compiler = _compiler()
    assert compiler is not None
    command = [compiler, *FLAGS, "-DFASTPREF_EMULATE", "-DMODULE=_cuda", *include]

    def write(out: Path) -> bool:
        with tempfile.TemporaryDirectory() as scratch:

            def compiled(source: str) -> str:
                built = f"{scratch}/{source}.o"
                _run([*command, "-x", "c++", "-c", str(CSRC / "cuda" / source), "-o", built])
                return built

            with ThreadPoolExecutor(2) as pool:
                parts = list(pool.map(compiled, nvcc_build.SOURCES))
            _run([compiler, "-shared", *parts, "-o", str(out)])
        return True

    version = subprocess.run([compiler, "--version"], capture_output=True, text=True).stdout
    inputs = [command, version, pybind11.__version__, sys.version]
    for folder in (CSRC, CSRC / "cuda", HERE):
        inputs += sorted(p for p in folder.iterdir() if p.suffix in (".h", ".cu", ".cpp"))
    with outcomes.kept("cuda emulated", "so", inputs, write) as path:
        yield path


def _run(command: list[str]) -> None:
    run = subprocess.run(command, capture_output=True, text=True)
    if run.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{run.stderr[-6000:]}")


@functools.cache
def install() -> str | None:
    """Let the cuda backend run on the CPU. Why it cannot, or None; errors of the compiler raise."""
    if not sys.platform.startswith("linux"):
        return "the emulation of CUDA needs Linux"
    if importlib.util.find_spec("pybind11") is None or _compiler() is None:
        return "the emulation of CUDA needs a C++ compiler and pybind11"
    from fastpref.backends import cuda_module

    with build() as path:
        spec = importlib.util.spec_from_file_location("_cuda", path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    cuda_module.MODULE, cuda_module.PROBLEM = module, None
    cuda_module.ready.cache_clear()
    cuda_module.clusters_of.cache_clear()
    cuda_module.forward_works.cache_clear()
    return None
