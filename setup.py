"""Builds fastpref._cpu, and fastpref._cuda where nvcc is found. Needs a C++17 compiler and
pybind11; torch is neither included nor linked.

The extensions are optional: without a working compiler the package installs all the same, runs on
the other backends, and `fastpref doctor` says so.

FASTPREF_CUDA=0 leaves _cuda out. FASTPREF_CUDA_ARCH, such as "90;80+PTX", says for which GPUs it
is.
"""

import os
import sys
import tempfile
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
# What gcc alone gets. It follows exp's bounds into branches, which cost ten masks and blends once
# vectorised; clang does not, nor does it know the flag.
GCC_FLAGS, GCC_LINK = ["-fno-thread-jumps"], []
if sys.platform == "linux":
    # Linked plainly: the loader binds to the libgomp that torch has loaded, one pool for both.
    # clang's own library would be a second pool; without OpenMP the kernels start threads.
    GCC_FLAGS += ["-fopenmp"]
    GCC_LINK += ["-fopenmp"]
SANITIZE = os.environ.get("FASTPREF_SANITIZE")
if SANITIZE == "1":
    FLAGS += ["-g", "-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
    FLAGS += ["-fno-omit-frame-pointer"]
    LINK += ["-fsanitize=address,undefined"]
elif SANITIZE == "thread":
    # ThreadSanitizer does not see how libgomp synchronises.
    FLAGS += ["-g", "-O1", "-fsanitize=thread"]
    LINK += ["-fsanitize=thread"]
    GCC_FLAGS, GCC_LINK = GCC_FLAGS[:1], []


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


def is_gcc(compiler) -> bool:
    """Whether a compiler of setuptools is gcc, and not clang under any name or another one."""
    if compiler.compiler_type != "unix":
        return False
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "is_gcc.cpp"
        source.write_text(
            "#if !defined(__GNUC__) || defined(__clang__)\n#error not gcc, which is fine\n#endif\n"
        )
        try:
            compiler.compile([str(source)], output_dir=folder)
        except CompileError:
            return False
    return True


class BuildExt(build_ext):
    """Gives gcc its flags, and hands fastpref._cuda to nvcc."""

    def build_extension(self, ext):
        if ext.name != "fastpref._cuda":
            if is_gcc(self.compiler):
                ext.extra_compile_args = [*ext.extra_compile_args, *GCC_FLAGS]
                ext.extra_link_args = [*ext.extra_link_args, *GCC_LINK]
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
