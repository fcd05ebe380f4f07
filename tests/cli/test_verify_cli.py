"""`fastpref verify`: the tables, the JSON, the exit status and the page."""

import json

import pytest

pytest.importorskip("typer")
pytest.importorskip("transformers")

from typer.testing import CliRunner

from fastpref import cli
from fastpref.cli.demo import ASSETS


def invoke(*arguments):
    options = ("--model", ASSETS, "--rows", 4, "--compared", 2, "--fp32", *arguments)
    return CliRunner().invoke(cli.app, ["verify", *map(str, options)])


def test_a_sound_model_passes_and_has_a_page(tmp_path):
    page = tmp_path / "report.html"
    result = invoke("--data", ASSETS / "train.jsonl", "--report", page)
    assert result.exit_code == 0, result.output
    assert "(2 pairs in float32, against float64)" in result.stdout
    assert "ok    the first loss (sigmoid): 0.693147" in result.stdout
    assert "nothing found" in result.stdout and f"Report: {page}" in result.stdout
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
