"""The CUDA kernels where there is no GPU: csrc/cuda as plain C++, with cuda_emulate/emulate.h in
the place of the GPU, as a module with the functions of fastpref._cuda.

`install()` builds it, once for the same sources, and gives it to the cuda backend, which then takes
tensors on the CPU. It needs a C++ compiler and pybind11.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
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

ROOT = Path(__file__).resolve().parents[2]
HERE = ROOT / "tests" / "support" / "cuda_emulate"
CSRC = ROOT / "csrc"
FLAGS = ("-O2", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off")

sys.path.append(str(CSRC / "cuda"))
import nvcc_build  # noqa: E402


def _compiler() -> str | None:
    names = (os.environ.get("CXX", "c++"), "g++", "clang++")
    return next(filter(None, map(shutil.which, names)), None)


def _key(command: list[str]) -> str:
    digest = hashlib.sha256(repr((command, sys.version)).encode())
    for folder in (CSRC, CSRC / "cuda", HERE):
        for path in sorted(folder.iterdir()):
            if path.suffix in (".h", ".cu", ".cpp"):
                digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def build() -> Path:
    """The module's file. Raises RuntimeError with the compiler's words."""
    import pybind11

    folders = [CSRC, CSRC / "cuda", HERE, pybind11.get_include(), sysconfig.get_path("include")]
    include = [f"-I{folder}" for folder in folders]
    compiler = _compiler()
    assert compiler is not None
    command = [compiler, *FLAGS, "-DFASTPREF_EMULATE", "-DMODULE=_cuda", *include]
    out = ROOT / "build" / f"cuda_emulated-{_key(command)}.so"
    if out.exists():
        return out
    out.parent.mkdir(exist_ok=True)
    with _one_at_a_time(out.parent), tempfile.TemporaryDirectory(dir=out.parent) as scratch:
        if out.exists():
            return out

        def compiled(source: str) -> str:
            built = f"{scratch}/{source}.o"
            _run([*command, "-x", "c++", "-c", str(CSRC / "cuda" / source), "-o", built])
            return built

        with ThreadPoolExecutor(2) as pool:
            parts = list(pool.map(compiled, nvcc_build.SOURCES))
        _run([compiler, "-shared", *parts, "-o", f"{scratch}/module.so"])
        for old in out.parent.glob("cuda_emulated-*.so"):
            if old != out:  # of other sources
                old.unlink(missing_ok=True)
        os.replace(f"{scratch}/module.so", out)
    return out


@contextlib.contextmanager
def _one_at_a_time(folder: Path) -> Iterator[None]:
    """Among processes: the workers of one run of the tests wait for the first one's module."""
    import fcntl

    with open(folder / "cuda_emulated.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


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

    spec = importlib.util.spec_from_file_location("_cuda", build())
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    cuda_module.MODULE, cuda_module.PROBLEM = module, None
    cuda_module.ready.cache_clear()
    cuda_module.clusters_of.cache_clear()
    cuda_module.forward_works.cache_clear()
    return None
