"""A C++ compiler for a build of the package: what it makes of csrc/ is kept (outcomes.py).

kept_compiler.py COMPILER ARGUMENT ...
"""

from __future__ import annotations

import platform
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import outcomes


def script(folder: Path, compiler: str) -> str:
    """The path of a program for CC and CXX."""
    path = folder / "kept-compiler"
    path.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{__file__}" "{compiler}" "$@"\n')
    path.chmod(0o755)
    return str(path)


def main(compiler: str, arguments: list[str]) -> int:
    """Compile, or link, as the compiler does in this folder; its exit status."""
    sources = [Path(word) for word in arguments if word.startswith("csrc/")]
    if "-c" not in arguments or len(sources) != 1:  # linking, or a try whether a flag is known
        return subprocess.run([compiler, *arguments]).returncode
    at = arguments.index("-o") + 1
    code = 0

    def write(path: Path) -> bool:
        nonlocal code
        command = [compiler, *arguments[:at], str(path), *arguments[at + 1 :]]
        code = subprocess.run(command).returncode
        path.touch()
        return code == 0

    said = subprocess.run([compiler, "--version"], capture_output=True, text=True).stdout
    command = [compiler, *arguments[:at], *arguments[at + 1 :]]
    inputs = [command, said, sys.version, version("pybind11"), platform.machine()]
    inputs += [*sources, *sorted(Path("csrc").glob("*.h"))]
    with outcomes.kept(f"object {sources[0].name}", "o", inputs, write) as path:
        shutil.copy(path, arguments[at])
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
