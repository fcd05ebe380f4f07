"""scripts/gpu_first.py where there is no GPU: whatever a step does, the others run, and what was
found is on disk."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import machine
import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ROOT / "scripts"
sys.path.append(str(SCRIPTS))

import gpu_first  # noqa: E402
import gpu_report  # noqa: E402
from gpu_steps import Step, run_step  # noqa: E402

HEAD = {
    "results": [
        {
            "id": "a trainable", "kind": "cell", "shape": "a", "mode": "trainable",
            "size": {"n": 8192, "h": 4096, "v": 128256, "softcap": None},
            "roofline_ms": 32.0,
            "products": {"X W^T": {"median_ms": 11.0, "tflop_per_s": 780.0}},
            "variants": [
                {"variant": "fastpref triton exact, stash, tiles", "ours": True,
                 "backend": "triton", "precision": "exact", "products": 3, "wrong": False,
                 "time": {"median_ms": 36.0}, "roofline_fraction": 0.89, "speed_over_eager": 1.25,
                 "same_bits_twice": True,
                 "errors": {"sum_max": 1e-4, "dhidden": 3e-3, "dweight": 2e-3}},
            ],
        }
    ]
}  # fmt: skip


def python(name: str, code: str, seconds: float = 30.0, **about) -> Step:
    command = [sys.executable, "-c", textwrap.dedent(code)]
    return Step(name, command, seconds, least=0.0, **{"grace": 0.5, **about})


def first(tmp_path, steps, seconds: float = 60.0):
    run = gpu_first.First(tmp_path / "out", tmp_path / "work", seconds)
    run.run(steps)
    return on_disk(tmp_path)


def on_disk(tmp_path):
    """The results and the report, with the steps by their names."""
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    results["steps"] = {step["name"]: step for step in results["steps"]}
    return results, (tmp_path / "out" / "report.txt").read_text()


def leaves_head(tmp_path) -> str:
    path = tmp_path / "work" / "head a.json"
    return f"import json; open({str(path)!r}, 'w').write({json.dumps(HEAD)!r}); "


# ---- steps that go wrong -----------------------------------------------------------------------


def test_a_step_that_crashes_or_hangs_does_not_stop_the_rest(tmp_path):
    hang = """
        import signal, subprocess, sys, time
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
        print("child", child.pid, flush=True)
        time.sleep(60)
    """
    steps = [
        python("build", "print('illegal memory access'); import os; os.kill(os.getpid(), 11)"),
        python("import", "", needs=("build",)),
        python("smoke triton", "print('FAILED one: off'); print('6 passed, 1 failed'); exit(1)"),
        python("smoke cuda", hang, seconds=1.5),
        Step("nothing", ["/no/such/program"], 5.0),
        python("head a", leaves_head(tmp_path)),
    ]
    results, report = first(tmp_path, steps)
    told = {name: step["state"] for name, step in results["steps"].items()}
    assert told == {
        "build": "failed",
        "import": "left out",
        "smoke triton": "failed",
        "smoke cuda": "timed out",
        "nothing": "failed",
        "head a": "passed",
    }
    build, hung = results["steps"]["build"], results["steps"]["smoke cuda"]
    assert build["why"] == "ended by SIGSEGV" and build["tail"] == ["illegal memory access"]
    assert results["steps"]["import"]["why"] == "build did not pass"
    assert hung["seconds"] < 20 and hung["status"] == -9
    (child,) = re.findall(r"child (\d+)", "\n".join(hung["tail"]))
    assert not running(int(child))
    assert results["smoke"]["triton"]["failed"] == 1 and results["state"] == "complete"
    assert "FAILED one" in (tmp_path / "out" / "log.txt").read_text()
    # What was found is judged all the same, and triton's small run was not right.
    assert results["verdict"]["rejected"] == {"triton": "its small run failed"}
    for part in ("illegal memory access", "longer than 2 s", "6 passed, 1 failed", "36.000"):
        assert part in report


def running(process: int) -> bool:
    """Killed ones may be waiting for a parent who asks for their status."""
    try:
        state = Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return False
    return state not in "ZX"


def test_the_time_is_shared(tmp_path):
    """An early step leaves the later ones what they need least; what is left is too little for the
    last one."""
    steps = [
        python("tests", "import time; time.sleep(30)", seconds=100),
        Step("memcheck", [sys.executable, "-c", ""], 30, least=3.0),
        Step("late", [sys.executable, "-c", ""], 30, least=60.0),
    ]
    results, report = first(tmp_path, steps[:2], seconds=6.0)
    assert results["steps"]["tests"]["state"] == "timed out"
    assert results["steps"]["tests"]["limit"] < 3.5
    results, report = first(tmp_path, steps[2:], seconds=6.0)
    assert results["steps"]["late"]["state"] == "left out"
    assert "it needs 60" in report


def test_a_command_is_told_its_limit():
    code = "import sys; sys.exit(0 if sys.argv[1:] == ['25', '15'] else 1)"
    command = [sys.executable, "-c", code, "{seconds}", "{seconds-10}"]
    assert run_step(Step("told", command, 30.0), 25.0).passed


RUN = """
import sys
sys.path[:0] = [{scripts!r}]
from pathlib import Path
import gpu_first
from gpu_steps import Step, cut_by, heed_signals
heed_signals()
head = [sys.executable, "-c", {code!r}]
steps = [Step("head a", head, 100.0, grace=1.0), Step("tests", ["true"], 9.0)]
run = gpu_first.First(Path({out!r}), Path({work!r}), 200.0)
run.run(steps)
raise SystemExit(128 + cut_by() if cut_by() else 0)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_run_that_is_cut_has_told_what_it_found(tmp_path, number):
    code = leaves_head(tmp_path) + "print('measured', flush=True); import time; time.sleep(60)"
    out, work = tmp_path / "out", tmp_path / "work"
    script = RUN.format(scripts=str(SCRIPTS), code=code, out=str(out), work=str(work))
    run = subprocess.Popen([sys.executable, "-c", script], start_new_session=True)
    try:
        end = time.monotonic() + 60
        while time.monotonic() < end:  # it takes over what a step has left while that goes on
            if (out / "report.txt").exists() and on_disk(tmp_path)[0]["heads"]:
                break
            time.sleep(0.1)
        os.kill(run.pid, number)
        status = run.wait(30)
    finally:
        run.kill()
        run.wait()
    results, report = on_disk(tmp_path)
    assert results["heads"]["a"] == HEAD and "36.000" in report
    assert "Default backend by these figures: triton" in report
    if number == signal.SIGKILL:  # nothing could be said of it
        assert status == -9 and results["state"] == "running"
        return
    assert status == 128 + number and results["state"] == "cut"
    assert results["steps"]["head a"]["why"] == f"the run was cut by {number.name}"
    assert results["steps"]["tests"]["state"] == "left out"
    assert "measured" in (out / "log.txt").read_text()


# ---- end to end --------------------------------------------------------------------------------


@pytest.mark.slow
def test_end_to_end_in_emulation(tmp_path):
    """The real steps but for nvcc, on the CPU: Triton interpreted, CUDA emulated."""
    for backend in ("triton", "cuda"):
        if machine.HAS_GPU or machine.why_not(backend) is not None:
            pytest.skip(machine.why_not(backend) or "this is for CPUs")
    command = [sys.executable, str(SCRIPTS / "gpu_first.py"), "--emulate"]
    command += ["--out", str(tmp_path / "out"), "--work", str(tmp_path / "work")]
    command += ["--seconds", "900"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "SANITIZER": "", "GPU_TEST_PROCESSES": "0"}
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=900)
    results, report = on_disk(tmp_path)
    told = {name: step["state"] for name, step in results["steps"].items()}
    assert set(told.values()) == {"passed"} and done.returncode == 0, (told, done.stdout[-3000:])
    wanted = ["build", "import", "smoke triton", "smoke cuda", "head tiny", "tests"]
    assert [name for name in told if name != "memcheck"] == wanted
    assert results["machine"]["fastpref"] == str(tmp_path / "work" / "site")
    assert results["smoke"]["triton"]["passed"] == results["smoke"]["cuda"]["passed"] == 1
    modes = {cell["mode"] for cell in results["cells"]}
    assert modes == {"trainable", "frozen", "forward-only"}
    assert results["tests"]["counts"]["passed"] >= 4
    assert results["verdict"]["default"] in ("native", "eager")
    assert report in done.stdout.replace("\r", "")
    # What a runner that hands back few files asks for.
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        "results.json", "report.txt", "log.txt",
    }  # fmt: skip


def test_the_plan_on_a_gpu(tmp_path, monkeypatch):
    """Its commands are ones that the benchmark takes, and the important ones come first."""
    from fastpref.bench.arguments import arguments

    monkeypatch.setenv("SANITIZER", "/opt/compute-sanitizer")
    monkeypatch.setenv("PYTHONPATH", "/own")
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    (wheels / "peer-1-py3-none-any.whl").touch()
    steps = gpu_first.plan(tmp_path / "work", wheels)
    names = [step.name for step in steps]
    heads = [*(f"head {shape}" for shape in "abcde"), "head logits"]
    assert names == [
        "build", "import", "smoke triton", "smoke cuda", *heads, "install peers", "head peers",
        "tests", "memcheck",
    ]  # fmt: skip
    assert sum(step.least for step in steps) < 300
    parsed = []
    for step in steps:
        if step.name.startswith("head "):
            options = [part.replace("{seconds-10}", "50") for part in step.command[2:]]
            parsed.append(arguments(options))
            assert parsed[-1].device == "cuda" and parsed[-1].budget == 50
    assert [" ".join(given.shapes) for given in parsed[:2]] == ["a", "b"] and len(parsed) == 7
    site = str(tmp_path / "work" / "site")
    peers = next(s for s in steps if s.name == "head peers")
    assert peers.env["PYTHONPATH"] == os.pathsep.join(
        [site, str(tmp_path / "work" / "peers"), "/own"]
    )
    others = [s for s in steps if s.name.startswith(("head", "smoke", "tests")) and s is not peers]
    assert all(s.env["PYTHONPATH"] == os.pathsep.join([site, "/own"]) for s in others)
    assert not any("peers" in n for n in (s.name for s in gpu_first.plan(tmp_path, None)))


# ---- the report --------------------------------------------------------------------------------


def row(backend, name, ms, **changes):
    base = HEAD["results"][0]["variants"][0]
    named = {"variant": f"fastpref {backend} exact, {name}", "backend": backend}
    return {**base, **named, "time": {"median_ms": ms}, **changes}


def heads(**rows_by_shape):
    """One head per shape, with a trainable cell of these rows."""
    base = HEAD["results"][0]
    return {
        shape: {"results": [{**base, "shape": shape, "variants": rows}]}
        for shape, rows in rows_by_shape.items()
    }


def test_which_backend_should_be_the_default():
    fast, slow = row("cuda", "stash", 33.0), row("triton", "stash, tiles", 36.0)
    found = gpu_report.cells(heads(a=[fast, slow], b=[fast, slow]))
    verdict = gpu_report.verdict(found, {})
    assert verdict["default"] == "cuda"
    assert verdict["fastest"] == {
        "a trainable": "cuda logit-free",
        "b trainable": "cuda logit-free",
    }
    assert verdict["backends"]["triton"] == {"score": round(33 / 36, 4), "cells": 2}
    # A small run that failed, and results that are wrong, imprecise or vary, count for nothing.
    assert gpu_report.verdict(found, {"cuda": {"failed": 1}})["default"] == "triton"
    for fault in (
        {"wrong": True},
        {"same_bits_twice": False},
        {"errors": {"sum_max": 5e-3, "dhidden": 1e-3, "dweight": 1e-3}},
        {"missing": "out of memory"},
    ):
        found = gpu_report.cells(heads(a=[{**fast, **fault}, slow]))
        verdict = gpu_report.verdict(found, {})
        assert verdict["default"] == "triton" and len(verdict["unusable"]) == 1
    # Who has no figure in half of the cells is not the default, however fast in the other half.
    found = gpu_report.cells(heads(a=[fast, slow], b=[slow]))
    assert gpu_report.verdict(found, {})["default"] == "triton"
    assert "default" not in gpu_report.verdict([], {})


def test_predictions():
    """From assumed rates: what docs/gpu.md and docs/cuda.md expect of head a, in milliseconds. From
    the rates of the run: its own products and copy."""
    rows = [row("triton", "stash, tiles", 36.0), row("cuda", "stash", 33.0)]
    found = heads(a=rows)
    copy = {"kind": "rows", "shape": "a", "copy": {"gb_per_s": 4000.0}, "kernels": []}
    found["a"]["results"].append(copy)
    (cell,) = gpu_report.cells(found)
    tiles, own = cell["rows"]
    assert tiles["assumed_ms"] == pytest.approx(34.7, rel=0.05)
    assert own["assumed_ms"] == pytest.approx(33.5, rel=0.02)
    moved = 8192 * 128256 * 12 / (0.88 * 4e12) * 1e3
    assert tiles["model_ms"] == pytest.approx(32.0 + moved)
    assert own["model_ms"] == pytest.approx(21.0 + 11.0 / 0.93)


def test_what_steps_print_is_read():
    smoke = "FAILED x: AssertionError: off\nlargest error of cuda in dhidden: 2.5e-03\n"
    found = gpu_report.read_smoke(smoke + "9 passed, 1 failed: cuda on a GPU\n")
    assert found["failed"] == 1 and found["failures"] == ["x: AssertionError: off"]
    assert found["errors"] == {"cuda in dhidden": "2.5e-03"}
    assert "passed" not in gpu_report.read_smoke("Segmentation fault")
    lines = """
        tests/a/test_x.py::test_one[a b] PASSED                        [ 10%]
        tests/a/test_x.py::test_two FAILED [ 20%]
        [gw3] [ 30%] PASSED tests/b/test_y.py::test_three[1]
        [gw11] [100%] SKIPPED tests/b/test_y.py::test_four[x, y]
        ERROR tests/b/test_z.py
        FAILED tests/a/test_x.py::test_two - assert False
    """
    found = gpu_report.read_tests(textwrap.dedent(lines))
    assert found["counts"] == {"passed": 2, "failed": 1, "skipped": 1}
    assert found["failed"] == ["tests/a/test_x.py::test_two"]
    assert found["not collected"] == ["tests/b/test_z.py"]
