"""The wheel and the sdist: built, installed and used outside of the tree."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import kept_compiler
import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ["pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE"]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        any(importlib.util.find_spec(name) is None for name in ("pip", "setuptools", "pybind11")),
        reason="needs pip, setuptools and pybind11",
    ),
]

USE = """
import sys, warnings
warnings.simplefilter("error")
# An editable install of the tree would lend the parts that this one lacks.
sys.meta_path[:] = [finder for finder in sys.meta_path if "ditable" not in repr(finder)]
import fastpref, torch
from pathlib import Path
assert Path(fastpref.__file__).is_relative_to(sys.argv[1]), fastpref.__file__
loaded = {"transformers", "triton", "datasets", "accelerate", "peft", "trl", "matplotlib", "typer"}
assert not loaded & set(sys.modules), loaded & set(sys.modules)
from fastpref import backends
if sys.argv[2] == "eager":  # it says that it fell back, once
    warnings.filterwarnings("ignore", "fastpref runs on plain torch", RuntimeWarning)
assert backends.active() == sys.argv[2], backends.report()
hidden = torch.randn(4, 6, 16, dtype=torch.bfloat16, requires_grad=True)
weight = torch.randn(50, 16, dtype=torch.bfloat16, requires_grad=True)
labels = torch.randint(50, (4, 6))
for loss in (fastpref.linear_dpo_loss, fastpref.linear_ipo_loss):
    out = loss(hidden, weight, labels, ref_hidden=hidden.detach())
    out.loss.backward()
    assert (out.chosen_rewards == 0).all() and weight.grad.isfinite().all()
print(*[s.reason for s in backends.report()], sep="\\n")
import importlib, importlib.util, pkgutil
warnings.simplefilter("ignore")
if sys.argv[2] == "native" and importlib.util.find_spec("transformers"):
    for module in pkgutil.walk_packages(fastpref.__path__, "fastpref."):
        if not module.name.startswith(("fastpref.kernels", "fastpref.integrations.trl")):
            importlib.import_module(module.name)
"""


def _run(*command: str, cwd: Path, **environment: str) -> str:
    env = {k: v for k, v in os.environ.items() if not k.startswith(("FASTPREF_", "PYTHON"))}
    run = subprocess.run(
        command, cwd=cwd, env={**env, **environment}, capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, f"{' '.join(command)}\n{run.stdout[-3000:]}\n{run.stderr[-3000:]}"
    return run.stdout


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    """A clean copy of what is built from: a build writes into its tree, and leaves old files."""
    tree = tmp_path_factory.mktemp("install") / "tree"
    tree.mkdir()
    for name in SOURCES:
        shutil.copy(ROOT / name, tree)
    leave = shutil.ignore_patterns("*.so", "*.pyd", "__pycache__", "*.egg-info")
    for name in ("fastpref", "csrc", "kernels", "tests", "benchmarks", "scripts"):
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, tree / name, ignore=leave)
    return tree


def _pip(command: str, *arguments: str, cwd: Path, **environment: str) -> None:
    options = ["--no-deps", "--no-index", "--quiet", "--disable-pip-version-check"]
    _run(sys.executable, "-m", "pip", command, *options, *arguments, cwd=cwd, **environment)


def _wheel(tree: Path, out: Path, **environment: str) -> Path:
    out.mkdir()
    build = ["--no-build-isolation", "-w", str(out), str(tree)]
    _pip("wheel", *build, cwd=out, **{"FASTPREF_CUDA": "0", **environment})
    (wheel,) = out.glob("fastpref-*.whl")
    return wheel


def _use(wheel: Path, target: Path, backend: str) -> str:
    """Install a wheel outside of the tree and train a step with it."""
    _pip("install", "--target", str(target), str(wheel), cwd=target.parent)
    safe = ["-P"] if sys.version_info >= (3, 11) else []
    command = [sys.executable, *safe, "-c", USE, str(target), backend]
    return _run(*command, cwd=target.parent, PYTHONPATH=str(target))


def _compiler() -> str | None:
    names = (os.environ.get("CXX", "c++"), "g++", "clang++")
    return next(filter(None, map(shutil.which, names)), None)


def test_wheel(tree, tmp_path):
    compiler = _compiler()
    if compiler is None:
        pytest.skip("no C++ compiler")
    kept = kept_compiler.script(tmp_path, compiler)
    wheel = _wheel(tree, tmp_path / "wheel", CC=kept, CXX=kept)
    names = zipfile.ZipFile(wheel).namelist()
    assert any(n.startswith("fastpref/_cpu.") for n in names)
    assert {"fastpref/py.typed", "fastpref/backends/native.py", "fastpref/kernels/__init__.py"} <= {
        *names
    }
    assert not [n for n in names if n.startswith(("tests/", "csrc/", "benchmarks/", "scripts/"))]
    for path in ROOT.glob("fastpref/**/*.py"):
        assert path.relative_to(ROOT).as_posix() in names
    for path in ROOT.glob("fastpref/assets/**/*"):
        assert path.is_dir() or path.relative_to(ROOT).as_posix() in names
    reasons = _use(wheel, tmp_path / "target", "native")
    assert "C++" in reasons


def test_without_a_compiler(tree, tmp_path):
    """The package installs all the same, runs on the eager backend, and says why."""
    copy = tmp_path / "tree"
    shutil.copytree(tree, copy, ignore=shutil.ignore_patterns("build", "*.egg-info"))
    none = str(tmp_path / "no-such-compiler")
    wheel = _wheel(copy, tmp_path / "wheel", CC=none, CXX=none)
    assert not any("_cpu." in n for n in zipfile.ZipFile(wheel).namelist())
    reasons = _use(wheel, tmp_path / "target", "eager")
    assert "_cpu is not built" in reasons and "compiler" in reasons


def test_with_an_nvcc_that_fails(tree, tmp_path):
    """As without one: the package installs, works, and says what it lacks."""
    copy, tools = tmp_path / "tree", tmp_path / "cuda" / "bin"
    shutil.copytree(tree, copy, ignore=shutil.ignore_patterns("build", "*.egg-info"))
    tools.mkdir(parents=True)
    (tools / "nvcc").write_text("#!/bin/sh\necho no luck; exit 1\n")
    (tools / "nvcc").chmod(0o755)
    none = str(tmp_path / "no-such-compiler")
    given = dict(CC=none, CXX=none, FASTPREF_CUDA="1", CUDA_HOME=str(tools.parent))
    wheel = _wheel(copy, tmp_path / "wheel", **given)
    assert not any("_cuda." in n for n in zipfile.ZipFile(wheel).namelist())
    reasons = _use(wheel, tmp_path / "target", "eager")
    assert "_cuda is not built" in reasons and "nvcc" in reasons


def test_sdist(tree, tmp_path):
    """Holds everything that a build needs."""
    out = tmp_path / "sdist"
    out.mkdir()
    code = f"from setuptools import build_meta; build_meta.build_sdist({str(out)!r})"
    _run(sys.executable, "-c", code, cwd=tree)
    (path,) = out.glob("fastpref-*.tar.gz")
    with tarfile.open(path) as archive:
        names = {n.split("/", 1)[-1] for n in archive.getnames()}
    needed = {p.relative_to(ROOT).as_posix() for p in (ROOT / "csrc").iterdir() if p.is_file()}
    needed |= {p.relative_to(ROOT).as_posix() for p in ROOT.glob("fastpref/**/*.py")}
    needed |= {p.relative_to(ROOT).as_posix() for p in (ROOT / "csrc" / "cuda").glob("*.*")}
    needed |= {*SOURCES, "kernels/__init__.py", "fastpref/py.typed"}
    assert needed <= names, needed - names
    assert not [n for n in names if n.endswith((".so", ".pyc"))]
