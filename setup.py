"""Builds fastpref._cpu. Needs a C++17 compiler and pybind11; torch is neither included nor linked.

The extension is optional: without a working compiler the package installs all the same, runs on
the eager backend, and `fastpref doctor` says so.
"""

import os
import sys

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension
from setuptools import setup

FLAGS, LINK = [], []
if sys.platform != "win32":
    # Without these two gcc keeps the scalar errno and trap semantics and does not vectorise exp.
    # Never -ffast-math: it deletes the rounding by a magic number that exp is built on.
    FLAGS += ["-O3", "-fno-math-errno", "-fno-trapping-math"]
if sys.platform == "linux":
    # Linked plainly: the loader binds to the libgomp that torch has loaded, one pool for both.
    FLAGS += ["-fopenmp"]
    LINK += ["-fopenmp"]
if os.environ.get("FASTPREF_SANITIZE") == "1":
    FLAGS += ["-g", "-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
    FLAGS += ["-fno-omit-frame-pointer"]
    LINK += ["-fsanitize=address,undefined"]


def native(module: str, sources: list[str]) -> Pybind11Extension:
    """One pybind11 module over the tile contract of csrc/tile.h; `_cuda` will be a second one."""
    return Pybind11Extension(
        f"fastpref.{module}",
        sources,
        include_dirs=["csrc"],
        depends=["csrc/tile.h", "csrc/parallel.h", "csrc/vec.h"],
        define_macros=[("MODULE", module)],
        extra_compile_args=FLAGS,
        extra_link_args=LINK,
        cxx_std=17,
        optional=True,
    )


ParallelCompile("FASTPREF_BUILD_JOBS", default=2).install()
setup(
    ext_modules=[
        native("_cpu", ["csrc/bind.cpp", "csrc/rows.cpp", "csrc/gemm.cpp", "csrc/pair_loss.cpp"])
    ]
)
