"""`accelerate launch` with the configurations of examples/accelerate, on two processes of a CPU."""

import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from paths import ROOT, search_path

pytest.importorskip("transformers")

import tiny  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402

SCRIPT = Path(__file__).with_name("launched.py")
CONFIGURATIONS = ROOT / "examples" / "accelerate"


def launch(configuration, folder, end):
    tiny.model().save_pretrained(folder / "model")
    command = [sys.executable, "-W", "ignore", "-m", "accelerate.commands.launch"]
    command += ["--config_file", str(CONFIGURATIONS / configuration), "--num_processes", "2"]
    command += ["--mixed_precision", "no", "--main_process_port", "0"]  # 0: any that is free
    command += [str(SCRIPT), str(folder), end]
    env = {**os.environ, "PYTHONPATH": search_path(), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)


def check_training(folder, kind):
    found = json.loads((folder / "found.json").read_text())
    assert found["processes"] == 2
    assert found["kind"].endswith(kind)
    assert math.isclose(found["losses"][0], math.log(2), rel_tol=1e-5)
    assert len(found["losses"]) == 3 and found["losses"][2] != found["losses"][0]
    AutoModelForCausalLM.from_pretrained(folder / "trained")


def test_fsdp2(tmp_path):
    run = launch("fsdp2.yaml", tmp_path, "trains")
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-6000:]
    check_training(tmp_path, "FSDP")


def test_ddp_and_a_process_that_fails_ends_the_others_with_its_message(tmp_path):
    """A training to its end and one in which a process fails, in one launch: its three interpreters
    take most of the time."""
    run = launch("ddp.yaml", tmp_path, "fails")
    assert (tmp_path / "failed").exists(), run.stdout[-2000:] + run.stderr[-6000:]
    seconds = time.time() - float((tmp_path / "failed").read_text())
    check_training(tmp_path, "MULTI_CPU")
    assert run.returncode != 0
    assert "ValueError: row 17 cannot be read" in run.stderr
    assert seconds < 30
    assert not (tmp_path / "failing").exists()
