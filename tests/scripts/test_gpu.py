"""scripts/gpu.py, with programs that only note how they were called: what runs in which order, and
what becomes of a step that fails."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "scripts"))

import gpu  # noqa: E402
import gpu_build  # noqa: E402

FAKE = """#!/bin/sh
echo "$0 $@" | tr '\\n' ' ' >>{log}
echo >>{log}
case "$*" in
  *get_device_capability*) echo 90 ;;
  *--filters*) echo "--kernel-name kns=fold --kernel-name kns=grad" ;;
esac
if [ -n "$FAIL" ]; then case "$*" in *"$FAIL"*) exit 9 ;; esac; fi
exit 0
"""


@pytest.fixture
def calls(tmp_path, monkeypatch):
    """The programs' calls so far, without the folder they are in."""
    log = tmp_path / "log"
    for name in ("python", "compute-sanitizer", "ncu"):
        (tmp_path / name).write_text(FAKE.format(log=log))
        (tmp_path / name).chmod(0o755)
    python = str(tmp_path / "python")
    monkeypatch.setattr(gpu, "PYTHON", python)
    monkeypatch.setattr(gpu, "SMOKE", [python, "gpu_smoke.py"])
    monkeypatch.setattr(gpu, "heed_signals", lambda: None)
    monkeypatch.setenv("SANITIZER", str(tmp_path / "compute-sanitizer"))
    monkeypatch.setenv("NCU", str(tmp_path / "ncu"))
    monkeypatch.setenv("PYTEST_ARGS", "-k 'not slow'")
    for name in ("FAIL", "FASTPREF_CUDA_ARCH", "GPU_TEST_SECONDS", "CUDA_HOME"):
        monkeypatch.delenv(name, raising=False)

    def made() -> list[str]:
        lines = log.read_text().splitlines()
        log.unlink()
        return [line.replace(f"{tmp_path}/", "").strip() for line in lines]

    return made


def test_every_step_of_the_tests(calls, capsys):
    gpu.main(["test"])
    asked, backend, smoke, tests, probe, filters, memcheck, racecheck = calls()
    assert "get_device_capability" in asked and "cuda.problem()" in backend
    assert smoke == "python gpu_smoke.py --few" and filters == "python gpu_smoke.py --filters"
    assert tests.startswith("python -m pytest --continue-on-collection-errors")
    assert tests.endswith("-k not slow")
    assert probe.startswith("compute-sanitizer python -c import torch")
    only = "--kernel-name kns=fold --kernel-name kns=grad python gpu_smoke.py --few"
    start = "compute-sanitizer --tool"
    assert memcheck == f"{start} memcheck --error-exitcode 9 --report-api-errors no {only}"
    assert racecheck == f"{start} racecheck --error-exitcode 9 {only}"
    assert "all passed" in capsys.readouterr().out


@pytest.mark.parametrize(
    "fail, failed, count",
    [
        ("-m pytest", "the tests", 8),
        ("--tool memcheck", "memcheck", 8),
        ("--filters", "filters", 8),
        ("gpu_smoke.py --few", "a small run, memcheck, racecheck", 8),
        ("torch.ones", None, 5),  # a machine that refuses the sanitizer
    ],
)
def test_a_step_that_fails(calls, capsys, monkeypatch, fail, failed, count):
    monkeypatch.setenv("FAIL", fail)
    if failed is None:
        gpu.main(["test"])
        assert "refuses this machine (above): memcheck and racecheck did not run" in (
            capsys.readouterr().out
        )
    else:
        with pytest.raises(SystemExit) as status:
            gpu.main(["test"])
        assert status.value.code == 1
        assert f"== failed: {failed}\n" in capsys.readouterr().out
    assert len(calls()) == count


def test_without_a_gpu_or_a_sanitizer(calls, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("FAIL", "get_device_capability")
    with pytest.raises(SystemExit, match="torch finds no GPU"):
        gpu.main(["test"])
    assert len(calls()) == 1
    monkeypatch.delenv("FAIL")
    monkeypatch.delenv("SANITIZER")
    monkeypatch.setattr(gpu, "toolkit_program", lambda name, variable: None)
    gpu.main(["test"])  # the rest passed
    assert "compute-sanitizer is not installed: memcheck" in capsys.readouterr().out
    for command in ("sanitize", "memcheck"):  # which is asked for by name
        with pytest.raises(SystemExit, match="is not installed"):
            gpu.main([command])
    with pytest.raises(SystemExit, match="ncu was not found"):
        gpu.main(["profile"])


def test_the_other_tools(calls):
    gpu.main(["sanitize"])
    _, _, sync, init = calls()
    assert "--tool synccheck" in sync and "kns=fold" in sync
    assert "--tool initcheck" in init and "kns=" not in init  # every kernel
    gpu.main(["memcheck"])
    assert "--tool memcheck" in calls()[-1]
    with pytest.raises(SystemExit) as status:
        gpu.main(["profile"])
    (profiled,) = calls()
    assert status.value.code == 0 and profiled.startswith("ncu --profile-from-start off")
    assert profiled.endswith("python benchmarks/gpu_profile.py b")
    with pytest.raises(SystemExit) as status:
        gpu.main(["install"])
    assert status.value.code == 0 and calls()[-1].startswith("python -m pip install --quiet")
    with pytest.raises(SystemExit, match="expected one of install, test"):
        gpu.main(["nothing"])


def test_the_time_of_the_tests(calls, monkeypatch):
    steps = []
    monkeypatch.setattr(gpu.Run, "step", lambda self, step: steps.append(step))
    monkeypatch.setattr(gpu, "toolkit_program", lambda name, variable: None)
    gpu.main(["test"])
    monkeypatch.setenv("GPU_TEST_SECONDS", "60")
    gpu.main(["test"])
    assert [s.seconds for s in steps if s.name == "the tests"] == [190, 60]


def test_programs_of_the_toolkit(tmp_path, monkeypatch):
    monkeypatch.delenv("SANITIZER", raising=False)
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert gpu.toolkit_program("compute-sanitizer", "SANITIZER") is None
    program = tmp_path / "bin" / "compute-sanitizer"
    program.parent.mkdir()
    program.touch(mode=0o755)
    assert gpu.toolkit_program("compute-sanitizer", "SANITIZER") == str(program)
    monkeypatch.setenv("SANITIZER", "/else/where")
    assert gpu.toolkit_program("compute-sanitizer", "SANITIZER") == "/else/where"


def test_a_package_made_of_links(tmp_path):
    """With fastpref.kernels, and without a module of CUDA that was built for something else."""
    for _ in range(2):
        package = gpu_build.link_package(tmp_path)
    assert (package / "kernels" / "rows.py").samefile(ROOT / "kernels" / "rows.py")
    assert not list(package.glob("_cuda*"))
    safe = "import sys; sys.path.insert(0, sys.argv[1]); import fastpref, importlib.util as u; "
    safe += "print(fastpref.__file__); print(u.find_spec('fastpref.kernels').origin)"
    done = subprocess.run(
        [sys.executable, "-c", safe, str(tmp_path)], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.stdout.splitlines() == [
        str(package / "__init__.py"),
        str(package / "kernels" / "__init__.py"),
    ], done.stderr


def test_the_module_is_built_for_this_gpu(tmp_path, monkeypatch):
    """With an nvcc that is none; one that fails leaves no module of other sources."""
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text(
        f'#!/bin/sh\necho "$@" >>{tmp_path}/log\n[ -z "$FAIL" ] || exit 2\n'
        "while [ $# -gt 0 ]; do\n"
        '  case "$1" in -o) : >"$2" ;; -MF) echo "x:" >"$2" ;; esac; shift\ndone\n'
    )
    nvcc.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setenv("FASTPREF_CUDA_ARCH", "")
    monkeypatch.delenv("FASTPREF_CUDA_ARCH")
    monkeypatch.setattr(gpu, "architecture", lambda: "90")
    package = gpu_build.link_package(tmp_path / "site")
    gpu_build.build(package, tmp_path / "site" / ".objects")
    (module,) = package.glob("_cuda*.so")
    commands = (tmp_path / "log").read_text()
    assert "arch=compute_90,code=sm_90" in commands and "arch=compute_90a" in commands
    monkeypatch.setenv("FAIL", "1")
    with pytest.raises(RuntimeError):
        gpu_build.build(package, tmp_path / "site" / ".again")
    assert not module.exists()
    monkeypatch.setattr(gpu, "architecture", lambda: None)
    with pytest.raises(SystemExit, match="torch finds no GPU"):
        gpu_build.build(package, tmp_path / "site" / ".objects")
