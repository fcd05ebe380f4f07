"""`accelerate launch` with the configurations of examples/accelerate, on two processes of a CPU."""

import json
import math
import shutil
import time
from pathlib import Path

import launching
import numpy as np
import pytest
from paths import ROOT

pytest.importorskip("transformers")

import deepspeed_cases  # noqa: E402
import tiny  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402

SCRIPT = Path(__file__).with_name("launched.py")
CONFIGURATIONS = ROOT / "examples" / "accelerate"


def launch(configuration, folder, end):
    tiny.model().save_pretrained(folder / "model")
    return launching.accelerate(CONFIGURATIONS / configuration, SCRIPT, folder, end)


def launch_forked(configuration, folder, end):
    tiny.model().save_pretrained(folder / "model")
    path = CONFIGURATIONS / configuration
    return launching.forked_accelerate(folder, path, SCRIPT, folder, end)


def check_training(folder, kind):
    found = json.loads((folder / "found.json").read_text())
    assert found["processes"] == 2
    assert found["kind"].endswith(kind)
    assert math.isclose(found["losses"][0], math.log(2), rel_tol=1e-5)
    assert len(found["losses"]) == 3 and found["losses"][2] != found["losses"][0]
    AutoModelForCausalLM.from_pretrained(folder / "trained")


def test_fsdp2s_configuration_trains(tmp_path):
    run = launch_forked("fsdp2.yaml", tmp_path, "trains")
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-6000:]
    check_training(tmp_path, "FSDP")


@pytest.mark.parametrize("name", ["zero2", "zero3"])
def test_deepspeeds_configurations_train_as_one_process_does(name, tmp_path):
    """A full training; an adapter with accumulation and a checkpoint; and bf16."""
    pytest.importorskip("deepspeed")
    run = launch(f"{name}.yaml", tmp_path, "trains")
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-6000:]
    check_training(tmp_path, "DEEPSPEED")
    one = tmp_path / "one"
    shutil.copytree(tmp_path / "model", one / "model")
    expected, found = (
        deepspeed_cases.adapter(one, 1),
        json.loads((tmp_path / "found.json").read_text()),
    )
    for key, rows in expected.items():
        assert np.allclose(found["adapter"][key], rows, rtol=1e-4, atol=1e-5), key
    adapters = deepspeed_cases.saved_adapters(one), deepspeed_cases.saved_adapters(tmp_path)
    for whole, divided in zip(*adapters, strict=True):
        assert divided == pytest.approx(whole, abs=1e-5)
    assert found["half"] == [[0.0], [0.0]]


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
