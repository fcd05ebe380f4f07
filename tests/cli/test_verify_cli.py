"""`fastpref verify`: the tables, the JSON, the exit status and the page."""

import json

import pytest

pytest.importorskip("typer")
pytest.importorskip("transformers")

from typer.testing import CliRunner

from fastpref import cli
from fastpref.cli import verify
from fastpref.cli.demo import ASSETS
from fastpref.quality import Verification


def invoke(*arguments):
    options = ("--model", ASSETS, "--rows", 4, "--compared", 2, "--fp32", *arguments)
    return CliRunner().invoke(cli.app, ["verify", *map(str, options)])


def test_a_sound_model_passes_and_has_a_page(tmp_path):
    page = tmp_path / "report.html"
    plot = tmp_path / "errors.svg"
    result = invoke("--data", ASSETS / "train.jsonl", "--report", page, "--plot", plot)
    assert result.exit_code == 0, result.output
    assert "(2 pairs in float32, against float64)" in result.stdout
    assert "ok    the first loss (sigmoid): 0.693147" in result.stdout
    assert "highest CHES, likelihood displacement: rows " in result.stdout
    assert "nothing found" in result.stdout and f"Report: {page}" in result.stdout
    assert f"Plot: {plot}" in result.stdout and "<svg" in plot.read_text()
    text = page.read_text("utf-8")
    assert "Nothing found." in text and text.count("data:image/png;base64,") == 1


def test_a_reference_of_another_model_is_status_6(tmp_path):
    rows = [json.loads(line) for line in (ASSETS / "train.jsonl").read_text().splitlines()[:4]]
    columns = {"ref_chosen_logps": -90.0, "ref_rejected_logps": -1.0}
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps({**row, **columns}) + "\n" for row in rows))
    result = invoke("--data", path, "--json")
    assert result.exit_code == 6
    out = json.loads(result.stdout)
    assert [finding["check"] for finding in out["findings"]][0] == "step_zero"
    assert set(out["errors"]) >= {"fastpref", "eager (float32)"}


def test_weights_that_are_not_finite_are_found_and_json_has_no_nan(tmp_path):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(ASSETS, dtype=torch.float32)
    with torch.no_grad():
        next(model.parameters())[:] = float("nan")
    model.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(ASSETS).save_pretrained(tmp_path)
    given = ("--model", tmp_path, "--data", ASSETS / "train.jsonl", "--json")
    result = invoke(*given, "--report", tmp_path / "page.html")

    def refuse(name):
        raise AssertionError(name)

    out = json.loads(result.stdout, parse_constant=refuse)
    assert result.exit_code == 6 and out["errors"]["fastpref"]["max_nats"] is None
    assert {"inexact", "step_zero"} <= {finding["check"] for finding in out["findings"]}


def test_reasons_of_libraries_are_no_markup(capsys):
    found = Verification("float32", "float64", left_out={"TRL": "no [/bold] [x] here"})
    found.figures = dict.fromkeys(("nll_chosen", "nll_rejected", "ranking_accuracy"), 0.5)
    verify._show(found)
    assert "TRL: no [/bold] [x] here" in capsys.readouterr().out


def test_single_answers_are_one_sentence(tmp_path):
    path = tmp_path / "answers.jsonl"
    path.write_text('{"prompt": "a", "completion": "b", "label": true}\n')
    result = invoke("--data", path, "--json")
    assert result.exit_code == 2 and not result.stdout and "chosen" in result.stderr


@pytest.mark.parametrize(
    "options, message",
    [
        (("--ref-model", "./nowhere"), "--ref-model ./nowhere is not a directory"),
        (
            ("--loss", "orpo", "--loss-option", "nll_on_prompt=true"),
            "--loss-option nll_on_prompt would do nothing",
        ),
    ],
)
def test_options_that_cannot_be_followed_are_one_sentence(options, message):
    result = invoke("--data", ASSETS / "train.jsonl", *options)
    assert result.exit_code == 2 and message in result.stderr
