"""Builds fastpref._cuda with nvcc, which setup.py asks for where it is found. No GPU is needed.

Every source is compiled once for all architectures, by ninja where there is one, which also sees
what is up to date, and otherwise by the same commands in as many processes.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
SOURCES = (
    "bind.cpp",
    "fold_f32.cu",
    "fold_bf16.cu",
    "fold_f16.cu",
    "rows.cu",
    "forward.cu",
    "pair_loss.cu",
)  # the ones that take longest first
# Code for 8.0 runs on 8.6 and 8.9 as well, that for 10.0 on 10.3, for 12.0 on 12.1; later ones
# compile what they need from the last one's PTX when they load it.
ARCHITECTURES = ("80", "90", "100", "120+PTX")
# No fma but where it is written: z - max has to be exactly 0 at the maximum.
FLAGS = ("-O3", "-std=c++17", "-fmad=false", "-Xcompiler=-fPIC,-fvisibility=hidden")
# Whose nvcc has a name like "sm_90a" for what only that one GPU runs, and takes it in a list.
_ARCHITECTURE = re.compile(r"(\d{2,3}[af]?)(\+PTX)?")


def find_nvcc() -> str | None:
    """The compiler of CUDA_HOME, of the PATH or of the usual place; None if there is none."""
    places = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    folders = [os.path.join(place, "bin") for place in places if place]
    folders += [os.environ.get("PATH", os.defpath), "/usr/local/cuda/bin"]
    return shutil.which("nvcc", path=os.pathsep.join(folders))


def wanted() -> bool:
    """Whether setup.py should build it: FASTPREF_CUDA=0 says no, 1 says yes, nvcc or not."""
    given = os.environ.get("FASTPREF_CUDA", "auto")
    if given not in ("0", "1", "auto", ""):
        raise ValueError(f"FASTPREF_CUDA: got {given!r}, expected 0, 1 or auto")
    if given in ("0", "1"):
        return given == "1"
    return sys.platform == "linux" and find_nvcc() is not None


def architectures(nvcc: str) -> list[str]:
    """Those of FASTPREF_CUDA_ARCH, such as "90;80" or "90a"; else what nvcc knows of the default.

    "+PTX" adds a form that later GPUs compile for themselves.
    """
    given = os.environ.get("FASTPREF_CUDA_ARCH", "")
    if given:
        names = [name.removeprefix("sm_") for name in re.split(r"[;, ]+", given.strip()) if name]
        for name in names:
            if not _ARCHITECTURE.fullmatch(name):
                raise ValueError(
                    f"FASTPREF_CUDA_ARCH: got {name!r}, expected architectures such as 90a;80+PTX"
                )
        return names
    known = set(re.findall(r"compute_(\d+[af]?)", _run([nvcc, "--list-gpu-arch"])))
    chosen = [name for name in ARCHITECTURES if name.removesuffix("+PTX") in known]
    if not chosen:
        raise RuntimeError(f"{nvcc} knows none of {', '.join(ARCHITECTURES)}")
    if not chosen[-1].endswith("+PTX"):  # an older nvcc: the newest that it has
        chosen[-1] += "+PTX"
    return chosen


def architectures_of(source: str, names: list[str]) -> list[str]:
    """Of these, what a source is compiled for: forward.cu is for Hopper alone, with instructions
    that no other GPU has, and empty elsewhere."""
    hopper = source == "forward.cu" and any(name.startswith("90") for name in names)
    return ["90a"] if hopper else names


def gencode(names: list[str]) -> list[str]:
    """nvcc's options for these architectures."""
    flags = []
    for name in names:
        number, ptx = _ARCHITECTURE.fullmatch(name).groups()  # type: ignore[union-attr]
        code = f"[sm_{number},compute_{number}]" if ptx else f"sm_{number}"
        flags.append(f"-gencode=arch=compute_{number},code={code}")
    return flags


def compile_command(nvcc: str, source: str, out: Path, flags: list[str]) -> list[str]:
    """Compile csrc/cuda/`source` to an object file; which files it read is left in `out`.d."""
    return [nvcc, "-c", os.fspath(HERE / source), "-o", os.fspath(out), "-MD", "-MF", f"{out}.d",
            *FLAGS, f"-I{HERE}", f"-I{HERE.parent}", *flags]  # fmt: skip


def build(out: Path, scratch: Path, include_dirs: list[str], jobs: int) -> None:
    """Build the module at `out`. Raises RuntimeError with the compiler's words, or why not."""
    nvcc = find_nvcc()
    if nvcc is None:
        raise RuntimeError("nvcc was not found")
    out, scratch = out.absolute(), scratch.absolute()
    for folder in (out.parent, scratch):
        folder.mkdir(parents=True, exist_ok=True)
    names = architectures(nvcc)
    host = ["-DMODULE=_cuda", *(f"-I{folder}" for folder in include_dirs)]
    commands = {}
    for source in SOURCES:
        flags = host if source.endswith(".cpp") else gencode(architectures_of(source, names))
        built = scratch / f"{Path(source).stem}.o"
        commands[built] = compile_command(nvcc, source, built, flags)
    # nvcc links cudart statically unless told otherwise, and knows where it lies.
    link = [nvcc, "-shared", "-cudart=static", *map(os.fspath, commands), "-o", os.fspath(out)]
    ninja = shutil.which("ninja")
    if ninja is None:
        with ThreadPoolExecutor(max(jobs, 1)) as pool:
            list(pool.map(_run, commands.values()))
        _run(link)
        return
    (scratch / "build.ninja").write_text(_ninja_file(commands, link, out))
    _run([ninja, "-C", os.fspath(scratch), f"-j{max(jobs, 1)}"])


def _ninja_file(commands: dict[Path, list[str]], link: list[str], out: Path) -> str:
    def escaped(path: object) -> str:
        return re.sub(r"([$ :])", r"$\1", str(path))

    def line(command: list[str]) -> str:
        return shlex.join(command).replace("$", "$$")

    rules = [
        "rule compile\n  command = $line\n  depfile = $out.d\n  deps = gcc",
        "rule link\n  command = $line",
    ]
    for (built, command), source in zip(commands.items(), SOURCES, strict=True):
        rules.append(f"build {escaped(built)}: compile {escaped(HERE / source)}")
        rules.append(f"  line = {line(command)}")
    rules.append(f"build {escaped(out)}: link {' '.join(map(escaped, commands))}")
    rules.append(f"  line = {line(link)}")
    return "\n".join(rules) + "\n"


def _run(command: list[str]) -> str:
    try:
        run = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    except OSError as error:
        raise RuntimeError(f"{command[0]}: {error}") from None
    if run.returncode:
        raise RuntimeError(f"{Path(command[0]).name} failed:\n{run.stdout[-4000:]}")
    return run.stdout
