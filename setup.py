"""Builds fastpref._cpu, and fastpref._cuda where nvcc is found. Needs a C++17 compiler and
pybind11; torch is neither included nor linked.

The extensions are optional: without a working compiler the package installs all the same, runs on
the other backends, and `fastpref doctor` says so.

FASTPREF_CUDA=0 leaves _cuda out. FASTPREF_CUDA_ARCH, such as "90;80+PTX", says for which GPUs it
is.
"""

import os
import platform
import sys
from pathlib import Path

import pybind11
from pybind11.setup_helpers import ParallelCompile, Pybind11Extension
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

sys.path.insert(0, str(Path(__file__).resolve().parent / "csrc" / "cuda"))
import nvcc_build  # noqa: E402

FLAGS, LINK = [], []
if sys.platform != "win32":
    # Without these two gcc keeps the scalar errno and trap semantics and does not vectorise exp.
    # Never -ffast-math: it deletes the rounding by a magic number that exp is built on.
    FLAGS += ["-O3", "-fno-math-errno", "-fno-trapping-math"]
    # gcc follows exp's bounds into branches, which cost ten masks and blends once vectorised.
    FLAGS += ["-fno-thread-jumps"]
if sys.platform == "linux":
    # Linked plainly: the loader binds to the libgomp that torch has loaded, one pool for both.
    FLAGS += ["-fopenmp"]
    LINK += ["-fopenmp"]
SANITIZE = os.environ.get("FASTPREF_SANITIZE")
if SANITIZE == "1":
    FLAGS += ["-g", "-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
    FLAGS += ["-fno-omit-frame-pointer"]
    LINK += ["-fsanitize=address,undefined"]
elif SANITIZE == "thread":
    # ThreadSanitizer does not see how libgomp synchronises; without OpenMP the kernels start
    # threads of their own. The instruction set is fixed, as the clones of vec.h are left out.
    FLAGS += ["-g", "-O1", "-fsanitize=thread", "-fno-openmp"]
    FLAGS += ["-march=x86-64-v3"] * (platform.machine() == "x86_64")
    LINK += ["-fsanitize=thread", "-fno-openmp"]


def native(module: str, sources: list[str]) -> Pybind11Extension:
    """One pybind11 module over the tile contract of csrc/tile.h."""
    return Pybind11Extension(
        f"fastpref.{module}",
        sources,
        include_dirs=["csrc"],
        depends=[str(header) for header in Path("csrc").glob("*.h")],
        define_macros=[("MODULE", module)],
        extra_compile_args=FLAGS,
        extra_link_args=LINK,
        cxx_std=17,
        optional=True,
    )


class BuildExt(build_ext):
    """Hands fastpref._cuda to nvcc."""

    def build_extension(self, ext):
        if ext.name != "fastpref._cuda":
            super().build_extension(ext)
            return
        out = Path(self.get_ext_fullpath(ext.name))
        scratch = Path(self.build_temp) / "cuda"
        jobs = int(os.environ.get("FASTPREF_BUILD_JOBS") or min(os.cpu_count() or 1, 8))
        try:
            nvcc_build.build(out, scratch, [*ext.include_dirs, *self.include_dirs], jobs)
        except (RuntimeError, ValueError, OSError) as error:
            raise CompileError(str(error)) from error


def extensions():
    out = [native("_cpu", sorted(str(source) for source in Path("csrc").glob("*.cpp")))]
    if nvcc_build.wanted() and SANITIZE not in ("1", "thread"):
        files = [f"csrc/cuda/{name}" for name in nvcc_build.SOURCES]
        include = [pybind11.get_include()]
        out.append(Extension("fastpref._cuda", files, include_dirs=include, optional=True))
    return out


ParallelCompile("FASTPREF_BUILD_JOBS", default=2).install()
setup(ext_modules=extensions(), cmdclass={"build_ext": BuildExt})
