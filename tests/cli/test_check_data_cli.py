"""`fastpref check-data`: the tables, the JSON, the exit status and the fixed file."""

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("typer")
pytest.importorskip("transformers")

from typer.testing import CliRunner

from fastpref import cli
from fastpref.cli.demo import ASSETS


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    lines = (ASSETS / "train.jsonl").read_text().splitlines()[:150]
    row = json.loads(lines[4])
    lines[7] = json.dumps({**row, "rejected": row["chosen"]})
    path = tmp_path_factory.mktemp("check") / "pairs.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


def invoke(*arguments):
    return CliRunner().invoke(cli.app, ["check-data", *map(str, arguments)])


def test_a_fault_is_shown_with_its_rows_and_the_status_is_6(pairs):
    result = invoke(pairs, "--model", ASSETS)
    assert result.exit_code == 6, result.output
    assert "error identical: 1 of 150 rows (0.7 %) have identical answers" in result.stdout
    assert "    rows 7" in result.stdout and "padding in batches" in result.stdout
    assert invoke(pairs, "--fail-on", "never").exit_code == 0


def test_json_has_the_rows_and_fix_writes_a_file_beside_the_data(pairs):
    result = invoke(pairs, "--json", "--fix")
    out = json.loads(result.stdout)
    rows = {f["check"]: f["rows"] for f in out["findings"]}
    assert rows["identical"] == [7] and out["rows"] == {"train": 150}
    assert out["fixed"]["path"] == str(pairs.with_name("pairs.clean.jsonl"))
    kept = pairs.with_name("pairs.clean.jsonl").read_text().splitlines()
    assert len(kept) == 150 - out["fixed"]["dropped"]
    again = invoke(pairs, "--fix")
    assert again.exit_code == 2 and "exists already" in again.stderr


def test_data_that_cannot_be_read_is_one_sentence(tmp_path):
    result = invoke(tmp_path / "none.jsonl")
    assert result.exit_code == 2 and result.stderr.count("\n") == 1
    assert "does not exist" in result.stderr


def test_the_report_has_findings_and_lengths(pairs, tmp_path):
    page = tmp_path / "report.html"
    plot = tmp_path / "new" / "lengths.PNG"
    given = ("--model", ASSETS, "--report", page, "--plot", plot, "--fail-on", "never")
    result = invoke(pairs, *given)
    assert result.exit_code == 0 and f"Report: {page}" in result.stdout
    assert f"Plot: {plot}" in result.stdout and plot.read_bytes().startswith(b"\x89PNG")
    assert "the longer answer: the chosen one in" in result.stdout
    text = page.read_text("utf-8")
    assert "1 of 150 rows (0.7 %) have identical answers (rows 7)" in text
    assert text.count("data:image/png;base64,") == 1 and "padding in batches" in text


def test_bad_input_is_one_sentence_and_no_file_is_lost(pairs, tmp_path):
    before = pairs.read_bytes()
    answers = tmp_path / "answers.jsonl"
    answers.write_text('{"prompt": "a", "completion": "b", "label": true}\n')
    (tmp_path / "empty.jsonl").write_text("")
    for arguments, message in (
        ((pairs, "--model", tmp_path), "is a directory without config.json"),
        ((pairs, "--model", "./nowhere"), "--model ./nowhere is not a directory"),
        ((pairs, "--report", pairs), "is no HTML page, so it stays"),
        ((pairs, "--plot", tmp_path / "a.png"), "--plot shows numbers of tokens; pass --model"),
        ((pairs, "--max-length", 10**20), f"--max-length is {10**20}; expected at most 2147483647"),
        ((answers,), "is single answers; the checks read pairs"),
        ((tmp_path / "empty.jsonl",), "is empty"),
        ((tmp_path / "absent.jsonl",), "does not exist"),
    ):
        result = invoke(*arguments, "--json")
        assert result.exit_code == 2 and message in result.stderr, result.output
        assert not result.stdout
    assert pairs.read_bytes() == before


@pytest.mark.parametrize("options", [(), ("--json",)])
def test_a_reader_that_is_gone_and_an_encoding_without_a_word(pairs, tmp_path, options):
    words = [
        {"prompt": f"a {i}", "chosen": f"b {i} \u6f22", "rejected": f"c {i}"} for i in range(120)
    ]
    data = tmp_path / "words.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in words))
    command = [sys.executable, "-m", "fastpref", "check-data", str(data), *options]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "COLUMNS": "200"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "env": environment}
    done = subprocess.run(command, **pipes)
    assert done.returncode == 0 and b"\\u6f22" in done.stdout, done.stderr
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(command, **{**pipes, "stdout": write})
    os.close(write)
    assert done.returncode == 0 and b"fastpref:" not in done.stderr, done.stderr


def test_a_tokenizer_without_a_model_is_enough(pairs, tmp_path):
    from transformers import AutoTokenizer

    AutoTokenizer.from_pretrained(ASSETS).save_pretrained(tmp_path)
    out = json.loads(invoke(pairs, "--model", tmp_path, "--sample", 5, "--json").stdout)
    assert out["sampled"] == 5
