"""What the Makefile's gpu-* targets run, on a machine with a GPU; nothing is downloaded.

    python scripts/gpu.py install    # the package, and fastpref._cuda for the GPU that is here
    python scripts/gpu.py test       # the backends, a small run, the tests, memcheck and racecheck
    python scripts/gpu.py sanitize   # the sanitizer's other two tools: synccheck and initcheck
    python scripts/gpu.py memcheck   # that tool alone
    python scripts/gpu.py profile    # what a call's kernels move, in benchmarks/results/ncu.csv

Every step of a command runs, whatever the ones before it gave. Variables of the environment:

    GPU_TEST_SECONDS    how long the tests may take (190)
    GPU_TEST_PROCESSES  how many at a time, where pytest-xdist is installed (8)
    PYTEST_ARGS         more options of pytest
    SANITIZER, NCU      compute-sanitizer and ncu, where they are not on the PATH or in CUDA_HOME
"""

from __future__ import annotations

import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence

from gpu_steps import ROOT, Step, cut_by, heed_signals, run_step

PYTHON = sys.executable
SMOKE = [PYTHON, str(ROOT / "tests" / "support" / "gpu_smoke.py")]
NO_CACHE = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # the sanitizer sees the ends of tensors
METRICS = (
    "gpu__time_duration.sum",
    "dram__bytes_read.sum",
    "dram__bytes_write.sum",
    "launch__registers_per_thread",
)


def toolkit_program(name: str, variable: str) -> str | None:
    """A program of the CUDA toolkit: named by the variable, on the PATH, or in CUDA_HOME."""
    folder = os.path.join(os.environ.get("CUDA_HOME") or "/usr/local/cuda", "bin")
    return os.environ.get(variable) or shutil.which(name) or shutil.which(name, path=folder)


def architecture() -> str | None:
    """The current GPU's, as FASTPREF_CUDA_ARCH has it, such as "90"; None where there is none. A
    process of its own asks, so that this one holds no memory of the GPU."""
    ask = 'import torch; print("%d%d" % torch.cuda.get_device_capability())'
    done = subprocess.run([PYTHON, "-c", ask], capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else None


def pytest_command(arguments: Sequence[str] = ()) -> list[str]:
    """Without the plugins that happen to be installed, but for xdist."""
    command = [PYTHON, "-m", "pytest", "--continue-on-collection-errors", "--durations=5", "-rfE"]
    if importlib.util.find_spec("xdist") is not None:
        command += ["-p", "xdist.plugin", "-n", os.environ.get("GPU_TEST_PROCESSES") or "8"]
    return [*command, *shlex.split(os.environ.get("PYTEST_ARGS", "")), *arguments]


PYTEST_ENV = {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}


def say(what: str) -> None:
    print(f"\n== {what}", flush=True)


class Run:
    """Runs steps one after the other and remembers which failed."""

    def __init__(self) -> None:
        self.failed: list[str] = []

    def step(self, step: Step) -> None:
        say(step.name)
        outcome = run_step(step)
        if not outcome.passed:
            print(f"{step.name}: {outcome.state}: {outcome.why}", flush=True)
            self.failed.append(step.name)
        self.stop_if_cut()

    def stop_if_cut(self) -> None:
        number = cut_by()
        if number is not None:
            raise SystemExit(128 + number)

    def close(self) -> None:
        if self.failed:
            say(f"failed: {', '.join(self.failed)}")
            raise SystemExit(1)
        say("all passed")


# ---- the sanitizer -----------------------------------------------------------------------------


def filters() -> list[str]:
    """Its options for fastpref's kernels and no library's."""
    done = subprocess.run([*SMOKE, "--filters"], stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise RuntimeError("gpu_smoke.py --filters failed")
    return done.stdout.split()


def sanitizer_step(sanitizer: str, tool: str, only: Sequence[str], seconds: float) -> Step:
    command = [sanitizer, "--tool", tool, "--error-exitcode", "9"]
    if tool != "racecheck":
        command += ["--report-api-errors", "no"]
    env = NO_CACHE if tool != "racecheck" else {}
    return Step(tool, [*command, *only, *SMOKE, "--few"], seconds, env=env)


def sanitizer_problem(sanitizer: str | None) -> str | None:
    """Why it cannot watch a program here, or None: some machines refuse it."""
    if sanitizer is None:
        return "compute-sanitizer is not installed"
    tiny = 'import torch; torch.ones(1, device="cuda").sum().item()'
    if not run_step(Step("sanitizer", [sanitizer, PYTHON, "-c", tiny], 45)).passed:
        return "compute-sanitizer refuses this machine (above)"
    return None


def sanitize(run: Run, tools: Sequence[str], seconds: float) -> str | None:
    """Run the small run under these tools. Why they cannot run here, or None."""
    sanitizer = toolkit_program("compute-sanitizer", "SANITIZER")
    problem = sanitizer_problem(sanitizer)
    if sanitizer is None or problem is not None:
        return f"{problem}: {' and '.join(tools)} did not run"
    try:
        only = filters()
    except RuntimeError as error:
        print(error, flush=True)
        run.failed.append("filters")
        only = []
    for tool in tools:
        # initcheck watches every kernel, as it has to see what torch's write.
        chosen = [] if tool == "initcheck" else only
        run.step(sanitizer_step(sanitizer, tool, chosen, seconds))
    return None


# ---- the commands ------------------------------------------------------------------------------


def install() -> None:
    env = {}
    if "FASTPREF_CUDA_ARCH" not in os.environ:
        env["FASTPREF_CUDA_ARCH"] = architecture() or ""
    options = ["--quiet", "--no-index", "--no-deps", "--no-build-isolation", "-e", "."]
    command = [PYTHON, "-m", "pip", "install", *options]
    raise SystemExit(subprocess.run(command, cwd=ROOT, env={**os.environ, **env}).returncode)


def test() -> None:
    if architecture() is None:
        raise SystemExit("torch finds no GPU")
    run = Run()
    wanted = (
        'import sys; sys.path.insert(0, "csrc/cuda"); import nvcc_build; '
        "from fastpref.backends import cuda; "
        "sys.exit(nvcc_build.wanted() and cuda.problem() or 0)"
    )
    run.step(Step("the cuda backend", [PYTHON, "-c", wanted], 60))
    run.step(Step("a small run", [*SMOKE, "--few"], 90))
    seconds = float(os.environ.get("GPU_TEST_SECONDS") or 190)
    run.step(Step("the tests", pytest_command(), seconds, grace=30, env=PYTEST_ENV))
    problem = sanitize(run, ("memcheck", "racecheck"), 70)
    if problem is not None:
        say(problem)
    run.close()


def watched(*tools: str) -> None:
    run = Run()
    problem = sanitize(run, tools, 220)
    if problem is not None:
        raise SystemExit(problem)
    run.close()


def profile() -> None:
    """The clocks stay as they are."""
    ncu = toolkit_program("ncu", "NCU")
    if ncu is None:
        raise SystemExit("ncu was not found; NCU=... names it")
    log = ROOT / "benchmarks" / "results" / "ncu.csv"
    options = ["--profile-from-start", "off", "--clock-control", "none", "--csv"]
    options += ["--log-file", str(log), "--metrics", ",".join(METRICS)]
    command = [ncu, *options, PYTHON, "benchmarks/gpu_profile.py", "b"]
    raise SystemExit(subprocess.run(command, cwd=ROOT).returncode)


COMMANDS = {
    "install": install,
    "test": test,
    "sanitize": lambda: watched("synccheck", "initcheck"),
    "memcheck": lambda: watched("memcheck"),
    "profile": profile,
}


def main(argv: list[str] | None = None) -> None:
    given = sys.argv[1:] if argv is None else argv
    if len(given) != 1 or given[0] not in COMMANDS:
        raise SystemExit(f"{__doc__}\nexpected one of {', '.join(COMMANDS)}, got {given}")
    if given[0] not in ("install", "profile"):
        heed_signals()
    COMMANDS[given[0]]()


if __name__ == "__main__":
    main()
