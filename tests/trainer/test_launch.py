"""`accelerate launch` with the configurations of examples/accelerate, on two processes of a CPU."""

import json
import math
import time
from pathlib import Path

import launching
import pytest
from paths import ROOT

pytest.importorskip("transformers")

import tiny  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402

SCRIPT = Path(__file__).with_name("launched.py")
CONFIGURATIONS = ROOT / "examples" / "accelerate"


def launch(configuration, folder, outcome):
    tiny.model().save_pretrained(folder / "model")
    return launching.accelerate(CONFIGURATIONS / configuration, SCRIPT, folder, outcome)


KINDS = {"ddp": "MULTI_CPU", "fsdp2": "FSDP", "zero2": "DEEPSPEED", "zero3": "DEEPSPEED"}


@pytest.mark.parametrize("name", KINDS)
def test_a_configuration_trains(name, tmp_path):
    if name.startswith("zero"):
        pytest.importorskip("deepspeed")
    run = launch(f"{name}.yaml", tmp_path, "trains")
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-6000:]
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["processes"] == 2
    assert found["kind"].endswith(KINDS[name])
    assert math.isclose(found["losses"][0], math.log(2), rel_tol=1e-5)
    assert len(found["losses"]) == 3 and found["losses"][2] != found["losses"][0]
    AutoModelForCausalLM.from_pretrained(tmp_path / "trained")


def test_a_process_that_fails_ends_the_others_with_its_message(tmp_path):
    run = launch("ddp.yaml", tmp_path, "fails")
    seconds = time.time() - float((tmp_path / "failed").read_text())
    assert run.returncode != 0
    assert "ValueError: row 17 cannot be read" in run.stderr
    assert seconds < 30
    assert not (tmp_path / "trained").exists()
