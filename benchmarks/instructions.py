"""How many instructions the CPU kernels take per multiply-add and per logit, as callgrind counts
them: a regression shows on any machine, however busy.

    python benchmarks/instructions.py

One thread. Needs g++ and valgrind, which runs AVX2 and nothing wider. Writes
results/instructions.json.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from lib.results import machine, results_path, table, write_json

ROOT = Path(__file__).resolve().parents[1]
CSRC = ROOT / "csrc"
PROGRAM = Path(__file__).resolve().parent / "lib" / "instructions.cpp"
SOURCES = (*sorted(p for p in CSRC.glob("*.cpp") if p.name != "bind.cpp"), PROGRAM)
# Those of setup.py.
FLAGS = (
    *("-std=c++17", "-DNDEBUG", "-fwrapv", "-O3"),
    *("-fno-math-errno", "-fno-trapping-math", "-fno-thread-jumps"),
)
# Tokens, vocab, hidden. The small one is for the test that measures again.
SHAPES = {"large": (256, 4096, 512), "small": (48, 1024, 128)}


def missing() -> str | None:
    """Why nothing can be counted here, or None."""
    for program in ("g++", "valgrind"):
        if shutil.which(program) is None:
            return f"no {program}"
    header = subprocess.run(
        ["g++", "-E", "-x", "c++", "-"], input="#include <valgrind/callgrind.h>", **_QUIET
    )
    return None if header.returncode == 0 else "no valgrind/callgrind.h"


_QUIET: dict[str, Any] = {"capture_output": True, "text": True}


def compiler() -> str:
    """The compiler with its version."""
    run = subprocess.run(["g++", "--version"], check=True, **_QUIET)
    return run.stdout.splitlines()[0]


def build(folder: Path) -> Path:
    """The program that is counted."""
    program = folder / "program"
    sources = [str(source) for source in SOURCES]
    command = ["g++", *FLAGS, f"-I{CSRC}", *sources, "-pthread", "-o", str(program)]
    subprocess.run(command, check=True)
    return program


def count(program: Path, shape: tuple[int, int, int]) -> list[dict[str, Any]]:
    """The counts of every kernel for tokens, vocab and hidden."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        command = ["valgrind", "--tool=callgrind", f"--callgrind-out-file={out}", str(program)]
        run = subprocess.run([*command, *map(str, shape)], check=True, **_QUIET)
        found = {}
        for path in Path(folder).glob("out.*"):
            text = path.read_text()
            name = re.search(r"^desc: Trigger: Client Request: (.*)$", text, re.M)
            total = re.search(r"^(?:totals|summary): (\d+)", text, re.M)
            if name and total:
                found[name[1]] = int(total[1])
    counts = []
    for line in run.stdout.splitlines():
        name, units = line.split("\t")
        kernel, dtype, of, per = name.split("|")
        each = {"kernel": kernel, "dtype": dtype, "of": of, "shape": list(shape)}
        instructions = found[name]
        ratio = round(instructions / int(units), 5)
        counts.append({**each, "instructions": instructions, "per": per, "ratio": ratio})
    return counts


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", default="instructions")
    parser.add_argument("--shapes", default=",".join(SHAPES), help=f"of {', '.join(SHAPES)}")
    args = parser.parse_args(argv)
    shapes = [name for name in args.shapes.split(",") if name]
    if unknown := set(shapes) - set(SHAPES):
        parser.error(f"--shapes: got {', '.join(unknown)}, expected some of {', '.join(SHAPES)}")
    reason = missing()
    if reason is not None:
        raise SystemExit(f"instructions: {reason}")
    with tempfile.TemporaryDirectory() as folder:
        program = build(Path(folder))
        counts = [c for name in shapes for c in count(program, SHAPES[name])]
    valgrind = subprocess.run(["valgrind", "--version"], check=True, **_QUIET).stdout.strip()
    results = {
        "benchmark": "instructions of the CPU kernels, one thread, as callgrind counts them",
        "machine": machine(),
        "compiler": compiler(),
        "valgrind": valgrind,
        "flags": list(FLAGS),
        "counts": counts,
    }
    write_json(results_path(args.output), results)
    rows = [
        [
            c["kernel"],
            c["dtype"],
            c["of"],
            "x".join(map(str, c["shape"])),
            f"{c['ratio']:.4f}",
            c["per"],
        ]
        for c in counts
    ]
    print(table(["kernel", "dtype", "of", "shape", "instructions", "per"], rows))


if __name__ == "__main__":
    main()
