"""`fastpref doctor`, and commands without the packages that they need."""

import json
import subprocess
import sys

import pytest
import torch
from test_cli import invoke


def test_doctor():
    facts = json.loads(invoke("doctor", "--json").stdout)
    assert facts["packages"]["torch"] == torch.__version__
    assert {"native", "eager"} <= {b["name"] for b in facts["backends"]}
    assert facts["active"]["cpu"] in ("native", "eager")
    text = invoke("doctor").stdout
    for heading in ("Versions", "CPU", "Backends", "Active"):
        assert heading in text
    for backend in facts["backends"]:
        assert backend["reason"] in text


def test_doctor_reports_a_forced_backend_that_cannot_run(monkeypatch):
    monkeypatch.setenv("FASTPREF_BACKEND", "abacus")
    facts = json.loads(invoke("doctor", "--json", code=1).stdout)
    assert "none: FASTPREF_BACKEND" in invoke("doctor", code=1).stdout
    assert facts["active"]["cpu"].startswith("none: FASTPREF_BACKEND")
    assert facts["environment"]["FASTPREF_BACKEND"] == "abacus"


HIDE = """
import sys
for name in {names!r}:
    sys.modules[name] = None
sys.argv = ["fastpref"] + {arguments!r}
from fastpref.cli import main
main()
"""


@pytest.mark.parametrize("arguments", [["train", "--model", "x"], ["demo"], []])
def test_missing_extra_is_one_sentence(arguments):
    script = HIDE.format(names=["typer", "rich", "matplotlib", "transformers"], arguments=arguments)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 2
    assert "pip install 'fastpref[train]'" in done.stderr and done.stderr.count("\n") == 1


def test_doctor_needs_torch_alone():
    names = ["typer", "rich", "matplotlib", "transformers", "datasets", "accelerate", "peft"]
    script = HIDE.format(names=names, arguments=["doctor"])
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Backends" in done.stdout and "eager" in done.stdout
