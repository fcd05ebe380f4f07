"""`fastpref train --loss` for every loss, and `--loss-option`."""

import json

import pytest

pytest.importorskip("typer")
pytest.importorskip("transformers")

from test_cli import complaint, train, undo_global_settings, write  # noqa: E402, F401

from fastpref.cli import (
    demo,  # noqa: E402
    report,  # noqa: E402
)
from fastpref.cli.losses import choose_loss  # noqa: E402
from fastpref.losses import LOSS_TYPES  # noqa: E402

OWN = {"exo_pair": ["label_smoothing=0.01"], "alphapo": ["alpha=0.25"]}


@pytest.mark.parametrize("name", ["dpo", *LOSS_TYPES])
def test_every_loss_is_known(name):
    chosen = choose_loss(name, 0.2, OWN.get(name, []))
    assert chosen.settings["loss_type"] == ["sigmoid" if name == "dpo" else name]
    assert chosen.settings["beta"] == 0.2 and chosen.title == name.upper()


def test_options():
    chosen = choose_loss("dpo+SFT", 0.1, ["loss-weights=[1, 0.2]", "ld_alpha=0.5"])
    assert chosen.settings == {
        "loss_type": ["sigmoid", "sft"], "loss_weights": [1, 0.2], "ld_alpha": 0.5, "beta": 0.1
    }  # fmt: skip
    assert chosen.title == "DPO + SFT" and chosen.reference == "required"
    assert choose_loss("ipo", 0.1, ["ipo_normalization=sum"]).reference == "required"
    assert choose_loss("dpo", 0.1, ["reference_free=true"]).reference == "none"
    assert choose_loss("simpo", 2.0, ["simpo_gamma=1.6"]).reference == "none"


def run(tmp_path, loss, *options, data):
    result = train(tmp_path, "--loss", loss, "--max-steps", 2, *options, data=data)
    return result.stdout, json.loads((tmp_path / "training_log.json").read_text("utf-8"))


def test_training(tmp_path):
    data = write(tmp_path / "pairs.jsonl", demo.read_pairs("train.jsonl")[:12])
    text, log = run(tmp_path / "a", "orpo", "--loss-option", "nll_on_prompt=true", data=data)
    assert "ORPO on" in text and "reference: none" in text
    assert log["history"][0]["nll_loss"] > 0 and log["options"]["nll_on_prompt"]
    text, log = run(
        tmp_path / "b", "dpo+sft", "--loss-option", "loss_weights=[1, 0.5]", "--lora",
        "--loss-option", "f_divergence_type=js_divergence", data=data,
    )  # fmt: skip
    assert "DPO + SFT on" in text and "reference: adapter" in text
    first = log["history"][0]
    assert report.series(log["history"], "loss")[1][0] == pytest.approx(
        0.6931 + 0.5 * first["nll_loss"], rel=1e-3
    )


@pytest.mark.parametrize(
    "options, expected",
    [
        (("--loss", "dppo"), "--loss dppo: expected dpo, sigmoid, ipo"),
        (("--loss", "exo_pair"), "label_smoothing: got 0 with loss_type 'exo_pair'"),
        (("--loss-option", "gamma=1"), "--loss-option gamma=1: expected NAME=VALUE, NAME one of"),
        (("--loss-option", "ld_alpha"), "--loss-option ld_alpha: expected NAME=VALUE"),
        (("--loss-option", "ld_alpha=1", "--loss-option", "ld_alpha=0"), "ld_alpha is given twice"),
        (("--loss-option", "ld_alpha=half"), "ld_alpha: got 'half', expected a number"),
        (("--loss", "simpo", "--reference", "model"), "--reference model would not be used"),
    ],
)
def test_bad_options(tmp_path, options, expected):
    assert expected in complaint(train(tmp_path / "out", *options, code=2))


@pytest.mark.parametrize("pairs", [False, True], ids=["answers", "pairs"])
def test_answers(tmp_path, pairs):
    found = demo.read_pairs("train.jsonl")[:12]
    if not pairs:
        found = [
            {"prompt": p["prompt"], "completion": p[key], "label": key == "chosen"}
            for p in found for key in ("chosen", "rejected")
        ]  # fmt: skip
    data = write(tmp_path / "data.jsonl", found)
    result = train(
        tmp_path / "out", "--loss", "kto", "--loss-option", "desirable_weight=1.2",
        "--max-steps", 3, "--eval-split", 0.25, data=data,
    )  # fmt: skip
    assert "KTO on" in result.stdout and "reference: precompute" in result.stdout
    assert "answers" in result.stdout and "reward accuracy" not in result.stdout
    log = json.loads((tmp_path / "out" / "training_log.json").read_text("utf-8"))
    first = log["history"][0]
    assert first["kl"] == 0 and log["options"]["desirable_weight"] == 1.2
    assert {"eval_kl", "eval_rewards/margins"} <= {key for h in log["history"] for key in h}
    text = complaint(train(tmp_path / "b", "--loss", "kto+sft", data=data, code=2))
    assert "kto or apo_zero_unpaired alone" in text
    text = complaint(
        train(tmp_path / "b", "--loss", "kto", "--loss-option", "ld_alpha=1", data=data, code=2)
    )
    assert "NAME one of desirable_weight, undesirable_weight" in text


def test_gradients_from_columns(tmp_path):
    data = write(tmp_path / "pairs.jsonl", demo.read_pairs("train.jsonl")[:12])
    tolerances = "--gradient-tolerance", 0.3, "--head-gradient-tolerance", 0.2
    _, log = run(tmp_path, "dpo", *tolerances, data=data)
    assert log["options"]["gradient_tolerance"] == 0.3
    assert log["options"]["head_gradient_tolerance"] == 0.2
    assert 0 < log["history"][0]["head/columns"] < 1
