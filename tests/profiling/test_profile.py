"""A profile of a small model: its parts add up to what the system measured."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("transformers")
pytest.importorskip("datasets")
pytest.importorskip("typer")

from support import tiny
from typer.testing import CliRunner

from fastpref import cli
from fastpref.profiling.account import PHASES

VOCAB = 16_000


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("profile")
    tiny.model(vocab_size=VOCAB, hidden_size=64).save_pretrained(folder / "model")
    tiny.tokenizer().save_pretrained(folder / "model")
    rows = tiny.rows(24, longest=200)
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def profiled(files):
    """Of a command that writes everything it can write."""
    arguments = [
        "--model", files / "model", "--data", files / "pairs.jsonl", "--sides", "fastpref,eager",
        "--steps", 1, "--fp32", "--json", "--plot", files / "memory.png",
        "--report", files / "profile.html",
    ]  # fmt: skip
    result = CliRunner().invoke(cli.app, ["profile", *map(str, arguments)])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def side(profiled, name):
    return next(side for side in profiled["sides"] if side["name"] == name)


@pytest.mark.parametrize("name", ["fastpref", "eager"])
def test_the_components_add_up_to_the_measured_peak(profiled, name):
    found = side(profiled, name)
    assert found["missing"] is None
    total = sum(found["components"].values())
    assert abs(total - found["peak_bytes"]) <= 0.05 * found["peak_bytes"]
    assert found["unaccounted_bytes"] == found["peak_bytes"] - total
    # Weights, and AdamW's two states of each.
    sizes = found["components"]
    assert sizes["optimiser"] == pytest.approx(2 * sizes["weights"], rel=0.01)
    tensors = [sum(point.values()) for _, point in found["timeline"]]
    assert max(tensors) == found["tensor_bytes"]


def test_only_the_eager_side_holds_logits(profiled):
    batch = profiled["batches"]["longest"][0]
    logits = 2 * batch["pairs"] * batch["padded_length"] * VOCAB * 4
    heads = {name: side(profiled, name)["components"]["head"] for name in ("fastpref", "eager")}
    assert heads["eager"] >= 2 * logits > 100e6
    assert heads["fastpref"] <= logits


def test_the_phases_are_the_step(profiled):
    for name in ("fastpref", "eager"):
        found = side(profiled, name)
        assert set(found["phases"]) == set(PHASES)
        assert all(found["phases"][p] > 0 for p in PHASES if p != "reference")
        assert sum(found["phases"].values()) == pytest.approx(found["step_seconds"], rel=0.1)


def test_plot_and_report_are_written(profiled, files):
    assert (files / "memory.png").read_bytes().startswith(b"\x89PNG")
    text = (files / "profile.html").read_text()
    assert "measured peak" in text and "data:image/png" in text


@pytest.mark.parametrize(
    "options, message",
    [
        (["--sides", "other"], "sides: got other, expected some of"),
        (["--loss", "kto"], "--loss kto: profile reads losses of pairs"),
        (["--reference", "adapter"], "reference: got 'adapter' without an adapter"),
    ],
)
def test_bad_options_are_one_sentence(files, options, message):
    given = ["--model", str(files / "model"), "--data", str(files / "pairs.jsonl"), *options]
    result = CliRunner().invoke(cli.app, ["profile", *given])
    assert result.exit_code == 2 and message in result.stderr
