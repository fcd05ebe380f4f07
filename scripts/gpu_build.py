"""Builds fastpref._cuda for the GPU that is here, into a folder to import the package from.

    python scripts/gpu_build.py FOLDER          # then PYTHONPATH=FOLDER
    python scripts/gpu_build.py FOLDER --check  # imports it from there, and says what works

Nothing is installed: FOLDER/fastpref is made of links to the sources of this tree. It needs nvcc
and pybind11, and neither pip nor setuptools.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import sysconfig
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "csrc" / "cuda"))
PACKAGES = ("torch", "triton", "transformers", "pytest", "pytest-xdist", "pybind11", "ninja")


def link_package(folder: Path) -> Path:
    """FOLDER/fastpref, made of links; fastpref.kernels lies elsewhere in the tree."""
    package = folder / "fastpref"
    package.mkdir(parents=True, exist_ok=True)
    sources = {p.name: p for p in (ROOT / "fastpref").iterdir() if not p.name.startswith("_cuda")}
    sources["kernels"] = ROOT / "kernels"
    sources.pop("__pycache__", None)
    for name, source in sources.items():
        link = package / name
        link.unlink(missing_ok=True)
        link.symlink_to(source)
    return package


def build(package: Path, scratch: Path) -> None:
    import gpu
    import nvcc_build
    import pybind11

    architecture = gpu.architecture()
    if architecture is None:
        raise SystemExit("torch finds no GPU")
    os.environ.setdefault("FASTPREF_CUDA_ARCH", architecture)
    jobs = int(os.environ.get("FASTPREF_BUILD_JOBS") or os.cpu_count() or 1)
    out = package / f"_cuda{sysconfig.get_config_var('EXT_SUFFIX')}"
    include = [pybind11.get_include(), sysconfig.get_path("include")]
    begun = time.perf_counter()
    try:
        nvcc_build.build(out, scratch, include, jobs)
    except Exception:
        out.unlink(missing_ok=True)  # of other sources
        raise
    seconds = time.perf_counter() - begun
    print(f"built fastpref._cuda for sm_{os.environ['FASTPREF_CUDA_ARCH']} in {seconds:.0f} s")


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _nvcc() -> str | None:
    import nvcc_build

    path = nvcc_build.find_nvcc()
    if path is None:
        return None
    lines = subprocess.run([path, "--version"], capture_output=True, text=True).stdout.split("\n")
    return next((line.strip() for line in lines if "release" in line), None)


def check() -> dict[str, Any]:
    """What is imported from where, and which backends work."""
    import torch

    import fastpref
    from fastpref import backends

    about: dict[str, Any] = {
        "python": platform.python_version(),
        "processors": os.cpu_count(),
        "packages": {name: _version(name) for name in PACKAGES},
        "nvcc": _nvcc(),
        "fastpref": str(Path(fastpref.__file__).parent.parent),
        "backends": {s.name: {"works": s.works, "reason": s.reason} for s in backends.report()},
    }
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        about["gpu"] = properties.name
        about["capability"] = f"{properties.major}.{properties.minor}"
        about["multiprocessors"] = properties.multi_processor_count
        about["gpu_memory_gib"] = round(properties.total_memory / 2**30, 1)
        about["cuda"] = torch.version.cuda
        about["default_backend"] = backends.active("cuda", torch.bfloat16)
    return about


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--json", type=Path, help="where --check leaves what it found")
    parser.add_argument("--no-cuda", action="store_true", help="the links alone")
    args = parser.parse_args()
    if not args.check:
        package = link_package(args.folder)
        if not args.no_cuda:
            build(package, args.folder / ".objects")
        return
    about = check()
    print(json.dumps(about, indent=1))
    if args.json is not None:
        args.json.write_text(json.dumps(about), encoding="utf-8")
    if about.get("gpu"):
        cuda = about["backends"]["cuda"]
        if not cuda["works"]:
            raise SystemExit(f"the cuda backend: {cuda['reason']}")


if __name__ == "__main__":
    main()
