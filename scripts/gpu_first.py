"""The first quarter of an hour on a GPU: everything that a machine can tell in 9 minutes.

    make gpu-first OUT=DIR                  # or, where there is no make:
    python scripts/gpu_first.py --out DIR [--seconds 520] [--peers WHEELS]

It needs torch, triton, nvcc and pybind11, and pytest for the tests. It installs nothing and
downloads nothing. The steps, the most important first:

    build         fastpref._cuda for this GPU, in a folder of its own
    import        what works, and why the rest does not
    smoke triton  every kind of call, against float64
    smoke cuda
    head a, b, c  the head of a model, with a trainable and a frozen head and without gradients, by
    head d, e     each of fastpref's ways, eager, torch.compile, bare products, passes over tiles
    head logits   ready logits to log-probs and back
    peers         heads a, b and c by the peers whose wheels are in --peers
    tests         as many of the tests of kernels and log-probs as fit
    memcheck      the smoke run under compute-sanitizer, where that is installed

Each step is a process of its own with a time limit; one that fails, crashes or hangs ends there,
and the next one starts. DIR gets results.json and report.txt, rewritten after every step and while
a head is measured, and log.txt: a run that is cut short leaves what it has found.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gpu
import gpu_report
from gpu_steps import (
    ROOT,
    Outcome,
    Step,
    cut_by,
    heed_signals,
    read_json,
    run_step,
    text_since,
    write_json,
    write_text,
)

PYTHON = sys.executable
HEAD = str(ROOT / "benchmarks" / "head.py")
SHAPES = "a b c d e"
PEER_SHAPES = "a b c"
# Where a mistake in a kernel shows first. The rest of the suite is for machines without a GPU, too.
TESTS = ("tests/backends", "tests/logps", "tests/fused")
_READ_BYTES = 1 << 23


def _head(name: str, work: Path, options: Sequence[str], seconds: float, **about: Any) -> Step:
    command = [PYTHON, HEAD, "--no-plot", "--output", str(work / f"head {name}.json")]
    # The benchmark gives up what does not fit; the rest is for its start and for writing.
    command += ["--budget", "{seconds-10}", "--patience", "60", "--precision", "exact", *options]
    return Step(f"head {name}", command, seconds, grace=10, **about)


def _import_from(*folders: Path) -> dict[str, str]:
    """Before what PYTHONPATH names already."""
    others = filter(None, [os.environ.get("PYTHONPATH")])
    return {"PYTHONPATH": os.pathsep.join([*map(str, folders), *others])}


def plan(work: Path, peers: Path | None, emulate: bool = False) -> list[Step]:
    """The steps on a GPU; emulate: a few of each kind where there is none, for tests.

    work: a folder for what the steps share. Where a step's own time is not up, the later ones have
    the rest.
    """
    site = work / "site"
    build = str(ROOT / "scripts" / "gpu_build.py")
    env = _import_from(site)
    no_gpu = ["--no-cuda"] if emulate else []
    steps = [
        Step("build", [PYTHON, build, str(site), *no_gpu], 150),
        Step("import", [PYTHON, build, str(site), "--check", "--json", str(work / "machine.json")],
             45, env=env),
    ]  # fmt: skip
    smoke = [*gpu.SMOKE, "--few"]
    smoke += ["--emulate", "--most", "1"] if emulate else []
    limits = {"triton": 90.0, "cuda": 45.0}
    for backend, seconds in limits.items():
        needs = ("build",) if backend == "cuda" else ()
        command = [*smoke, "--backends", backend]
        seconds = 300.0 if emulate else seconds  # it may have to compile the emulation
        steps.append(Step(f"smoke {backend}", command, seconds, 15, needs=needs, env=env))
    if emulate:
        tiny = ["--device", "pretend", "--shapes", "16,8,64", "--backends", "native,eager"]
        tiny += ["--repeats", "2", "--peers", "", "--parts", "head,rows"]
        steps.append(_head("tiny", work, tiny, 300, env=env))
    else:
        common = ["--device", "cuda", "--backends", "triton,cuda", "--peers", "torch.compile"]
        common += ["--repeats", "8", "--seconds", "1"]
        for shape in SHAPES.split():
            # The first one compiles what all of them run.
            seconds = 90.0 if shape == "a" else 60.0
            options = [*common, "--shapes", shape, "--parts", "head,rows"]
            steps.append(_head(shape, work, options, seconds, least=20, env=env))
        options = [*common, "--shapes", SHAPES, "--parts", "logits"]
        steps.append(_head("logits", work, options, 45, least=15, env=env))
    if peers is not None:
        there = _import_from(site, work / "peers")
        wheels = sorted(map(str, peers.glob("*.whl")))
        options = ["--quiet", "--no-index", "--no-deps", "--no-compile", "--upgrade"]
        options += ["--target", str(work / "peers"), *wheels]
        steps.append(Step("install peers", [PYTHON, "-m", "pip", "install", *options], 60, 10))
        arguments = ["--device", "cuda", "--shapes", PEER_SHAPES, "--modes", "trainable,frozen"]
        arguments += ["--backends", "triton,cuda", "--repeats", "6", "--seconds", "1"]
        arguments += ["--parts", "head"]
        needs = ("install peers",)
        steps.append(_head("peers", work, arguments, 120, least=30, needs=needs, env=there))
    steps.append(_tests(env, emulate))
    if gpu.toolkit_program("compute-sanitizer", "SANITIZER") is not None:
        memcheck = [PYTHON, str(ROOT / "scripts" / "gpu.py"), "memcheck"]
        steps.append(Step("memcheck", memcheck, 90, 45, env=env))
    return steps


def _tests(env: dict[str, str], emulate: bool) -> Step:
    """pytest would import the tree's own package before that of PYTHONPATH, which has the module
    that was built: python -m puts the current folder first."""
    run = "import sys; sys.path.pop(0); import pytest; sys.exit(pytest.main(sys.argv[1:]))"
    options = ["-m", "not slow", "-vv", *TESTS]
    if emulate:
        options = ["-vv", "tests/test_constraints.py"]
    python, _, _, *common = gpu.pytest_command(options)
    command = [python, "-c", run, *common]
    return Step("tests", command, 300, 40, grace=15, env={**env, **gpu.PYTEST_ENV})


class First:
    """Runs the steps, and keeps what they found on disk."""

    def __init__(self, out: Path, work: Path, seconds: float):
        self._out, self._work = out, work
        self._begun = time.monotonic()
        self._end = self._begun + seconds
        self._written: dict[Path, float] = {}  # when the files of heads were last read
        self.results: dict[str, Any] = {
            "state": "running",
            "wall_s": 0.0,
            "commit": os.environ.get("COMMIT"),
            "machine": None,
            "steps": [],
            "smoke": {},
            "tests": None,
            "heads": {},
        }
        for folder in (out, work):
            folder.mkdir(parents=True, exist_ok=True)
        for old in [*work.glob("head *.json"), work / "machine.json", out / "log.txt"]:
            old.unlink(missing_ok=True)
        self._log = out / "log.txt"

    def run(self, steps: Sequence[Step]) -> None:
        for i, step in enumerate(steps):
            later = sum(s.least for s in steps[i + 1 :])
            left = self._end - time.monotonic()
            limit = min(step.seconds, left - later)
            outcome = self._left_out(step, max(limit, min(step.least, left)))
            if outcome is None:
                outcome = self._run(step, max(limit, min(step.least, left)))
            self.results["steps"].append(outcome.to_json())
            self._read(step)
            self.write()
            print(f"{outcome.name}: {outcome.state}, {outcome.seconds:.0f} s {outcome.why}")
            sys.stdout.flush()
        number = cut_by()
        self.results["state"] = "complete" if number is None else "cut"
        self.write()

    def _left_out(self, step: Step, limit: float) -> Outcome | None:
        passed = {s["name"] for s in self.results["steps"] if s["state"] == "passed"}
        missing = [name for name in step.needs if name not in passed]
        if cut_by() is not None:
            why = "the run was cut"
        elif missing:
            why = f"{' and '.join(missing)} did not pass"
        elif limit < step.least:
            why = f"{max(limit, 0.0):.0f} s were left, it needs {step.least:.0f}"
        else:
            return None
        return Outcome(step.name, "left out", why=why)

    def _run(self, step: Step, limit: float) -> Outcome:
        self._start = self._log.stat().st_size if self._log.exists() else 0
        with open(self._log, "a", encoding="utf-8") as log:
            at = time.monotonic() - self._begun
            log.write(f"\n==== {step.name}, {at:.0f} s after the start, limit {limit:.0f} s\n")
        return run_step(step, limit, log=self._log, tick=lambda: self._peek(step, limit))

    def _peek(self, step: Step, limit: float) -> None:
        """Keep what a running step has found."""
        if self._read(step):
            running = Outcome(step.name, "running", limit=round(limit, 1)).to_json()
            self.results["steps"].append(running)
            self.write()
            self.results["steps"].pop()

    def _read(self, step: Step) -> bool:
        """Take over what a step left. Whether there was a new file."""
        kind, _, name = step.name.partition(" ")
        if kind == "import":
            self.results["machine"] = read_json(self._work / "machine.json")
        elif kind == "smoke":
            self.results["smoke"][name] = gpu_report.read_smoke(self._text())
        elif kind == "tests":
            self.results["tests"] = gpu_report.read_tests(self._text())
        elif kind == "head":
            path = self._work / f"{step.name}.json"
            changed = path.stat().st_mtime if path.exists() else None
            if changed is not None and changed != self._written.get(path):
                found = read_json(path)
                if found is not None:
                    self._written[path] = changed
                    self.results["heads"][name] = found
                    return True
        return False

    def _text(self) -> str:
        return text_since(self._log, self._start, _READ_BYTES)

    def write(self) -> None:
        results = self.results
        results["wall_s"] = round(time.monotonic() - self._begun, 1)
        write_json(self._out / "results.json", results)  # before anything can go wrong with it
        try:
            heads = dict(results["heads"])
            peers = {"peers": heads.pop("peers")} if "peers" in heads else {}
            results["cells"] = gpu_report.cells(heads)
            results["peer_cells"] = gpu_report.cells(peers)
            results["verdict"] = gpu_report.verdict(results["cells"], results["smoke"])
            text = gpu_report.report(results)
        except Exception as error:  # a report that fails must not cost the steps to come
            print(f"no report: {type(error).__name__}: {error}", file=sys.stderr)
            return
        write_json(self._out / "results.json", results)
        write_text(self._out / "report.txt", text)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "gpu-first")
    parser.add_argument("--seconds", type=float, default=520.0, help="for everything")
    parser.add_argument("--peers", type=Path, default=None, help="a folder with wheels")
    parser.add_argument("--work", type=Path, default=None, help="for what is built on the way")
    parser.add_argument("--emulate", action="store_true", help="without a GPU, for tests")
    args = parser.parse_args(argv)
    peers = None if args.peers is None else args.peers.resolve()
    if peers is not None and not list(peers.glob("*.whl")):
        parser.error(f"--peers: {args.peers} has no wheels")
    work = (args.work or ROOT / "build" / "gpu-first-work").resolve()
    if not args.emulate and gpu.architecture() is None:
        raise SystemExit("torch finds no GPU")
    heed_signals()
    first = First(args.out.resolve(), work, args.seconds)
    first.run(plan(work, peers, args.emulate))
    report = args.out / "report.txt"
    if report.exists():
        print(report.read_text(encoding="utf-8"))
    number = cut_by()
    if number is not None:
        raise SystemExit(128 + number)
    bad = [s["name"] for s in first.results["steps"] if s["state"] != "passed"]
    if bad:
        raise SystemExit(f"not passed: {', '.join(bad)}")


if __name__ == "__main__":
    main()
