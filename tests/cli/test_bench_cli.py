"""`fastpref bench`: what it says before and after, its files, and the exit status."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("typer")
pytest.importorskip("transformers")

from typer.testing import CliRunner

from fastpref import cli
from fastpref.bench import run as runs
from fastpref.bench.results import machine
from fastpref.bench.run import BenchResult, describe


def _row(name, ms, **more):
    row = {"variant": name, "ours": name != "eager", "precision": None, "other_function": False}
    if row["ours"]:
        row["precision"] = "exact"
    row |= {"wrong": False, "errors": {"sum_max": 1e-5, "dhidden": 1e-6, "dweight": None}}
    row["time"] = {"median_ms": ms, "quartiles_ms": [ms, ms], "repeats": 3}
    return row | {"speed_over_eager": round(4.0 / ms, 3), "roofline_fraction": 0.5} | more


def _plant(monkeypatch, *rows):
    """Let the command measure these rows."""

    def run_tasks(options, **_):
        size = {"n": 16, "h": 8, "v": 64, "softcap": None, "model": ""}
        cell = {"id": "16,8,64 frozen fp32", "kind": "cell", "shape": "16,8,64", "dtype": "fp32"}
        cell |= {"mode": "frozen", "size": size, "products": {}, "canary": None, "targets": []}
        cell["variants"] = list(rows)
        given = {"results": [cell], "missing_peers": options.missing_peers, "wall_s": 1.0}
        return BenchResult(machine(), describe(options), **given)

    monkeypatch.setattr(runs, "run_tasks", run_tasks)


def invoke(*arguments):
    given = ["bench", "16,8,64", "--frozen", "--dtype", "fp32", "--peers", "none"]
    return CliRunner().invoke(cli.app, [*given, *map(str, arguments)], env={"COLUMNS": "160"})


def test_a_real_run(tmp_path):
    page, plot, old = tmp_path / "page.html", tmp_path / "plot.png", tmp_path / "new" / "old.json"
    given = ("--no-memory", "--repeats", 2, "--report", page, "--plot", plot, "--save", old)
    result = invoke(*given)
    assert result.exit_code == 0, result.output
    assert "head 16,8,64, fp32: frozen" in result.stdout
    assert "sides: fastpref exact, eager" in result.stdout and "at most 120 s" in result.stdout
    assert "fp32: a bare product reaches" in result.stderr
    assert "x eager" in result.stdout and f"Report: {page}" in result.stdout
    assert plot.stat().st_size > 1000 and page.read_text("utf-8").count("data:image/png") == 1
    assert json.loads(old.read_text())["cells"][0]["shape"] == {"N": 16, "H": 8, "V": 64}


def test_a_regression_is_status_6(monkeypatch, tmp_path):
    old = tmp_path / "old.json"
    _plant(monkeypatch, _row("fastpref exact", 2.0), _row("eager", 4.0))
    assert invoke("--save", old).exit_code == 0
    same = invoke("--compare", old)
    assert same.exit_code == 0 and "no regression" in same.stdout, same.output
    _plant(monkeypatch, _row("fastpref exact", 3.0), _row("eager", 4.0))
    worse = invoke("--compare", old, "--report", tmp_path / "page.html")
    assert worse.exit_code == 6 and "1 of 2 are regressions" in worse.stdout, worse.output
    assert "slower (regression)" in worse.stdout and "1.50" in worse.stdout
    assert "slower (regression)" in (tmp_path / "page.html").read_text("utf-8")
    as_json = invoke("--compare", old, "--json")
    assert as_json.exit_code == 6
    assert [c["regression"] for c in json.loads(as_json.stdout)["changes"]] == [True, False]
    assert invoke("--compare", old, "--threshold", 1.0).exit_code == 0


def test_a_wrong_result_is_status_6_and_has_no_speed(monkeypatch):
    why = {"wrong": True, "wrong_because": "token log-probs are off by 0.5"}
    row = _row("fastpref exact", 1.0, **why)
    del row["speed_over_eager"]
    _plant(monkeypatch, row, _row("eager", 4.0))
    result = invoke()
    assert result.exit_code == 6 and "WRONG" in result.stdout
    assert "fastpref exact is wrong: token log-probs are off by 0.5" in result.stdout
    assert "4.00" not in result.stdout.split("eager  ")[0]


def test_a_missing_peer_is_one_line(monkeypatch):
    from fastpref.bench import peers

    find = peers.find_spec
    monkeypatch.setattr(peers, "find_spec", lambda name: None if name == "trl" else find(name))
    _plant(monkeypatch, _row("fastpref exact", 2.0))
    result = invoke("--peers", "trl")
    assert result.exit_code == 0
    assert "TRL chunked is left out: trl is not installed" in result.stdout


def test_an_old_result_without_the_ways_that_are_measured(monkeypatch, tmp_path):
    """Nothing of fastpref could be compared, which is not "no regression"."""
    _plant(monkeypatch, _row("fastpref fast", 2.0), _row("eager", 4.0))
    old = tmp_path / "old.json"
    assert invoke("--precision", "fast", "--save", old).exit_code == 0
    result = invoke("--precision", "exact", "--compare", old)
    assert result.exit_code == 2 and "none of fastpref's ways" in result.stderr.replace("\n", " ")
    found = json.loads(old.read_text())
    found["cells"][0]["variants"][1]["time"]["median_ms"] = 0
    old.write_text(json.dumps(found))
    result = invoke("--precision", "fast", "--compare", old)
    assert result.exit_code == 2 and "no measured cells" in result.stderr.replace("\n", " ")


@pytest.mark.parametrize(
    "given, message",
    [
        (("--threshold", "-3"), "threshold"),
        (("--threshold", "0.1"), "--compare"),
        (("--strategy", "stash"), "--trained"),
    ],
)
def test_options_without_effect(given, message):
    result = invoke(*given)
    assert result.exit_code == 2 and message in result.stderr and not result.stdout


def test_both_names_of_an_option_in_one_word(monkeypatch):
    _plant(monkeypatch, _row("fastpref exact", 2.0))
    result = invoke("--precision", "both", "--dtype", "both", "--trained", "--strategy", "both")
    assert result.exit_code == 0, result.output
    for side in ("exact, stash", "exact, recompute", "fast, stash", "fast, recompute"):
        assert f"fastpref {side}" in result.stdout
    assert "bf16" in result.stdout and "fp32" in result.stdout


def test_an_old_result_of_another_machine(monkeypatch, tmp_path):
    _plant(monkeypatch, _row("fastpref exact", 2.0))
    old = tmp_path / "old.json"
    assert invoke("--save", old).exit_code == 0
    found = json.loads(old.read_text())
    found["machine"]["cpu"] = "Another Processor"
    old.write_text(json.dumps(found))
    result = invoke("--compare", old)
    assert result.exit_code == 2 and "another machine (processor Another" in result.stderr
    found["machine"] = machine()
    found["cells"][0]["size"]["v"] = 65
    old.write_text(json.dumps(found))
    result = invoke("--compare", old)
    assert result.exit_code == 2 and "none of the cases" in result.stderr


def test_odd_input_is_one_sentence(tmp_path):
    data = tmp_path / "pairs.json"
    data.write_text('{"prompt": "a"}\n')
    broken = tmp_path / "model"
    broken.mkdir()
    (broken / "config.json").write_text('{"model_type": "llama", "hidden_size": null}')
    for given, said in (
        (("--compare", tmp_path / "none.json"), "none.json could not be read"),
        (("--compare", data), "is no result of fastpref bench"),
        (("--save", data), "so it stays"),
        (("--save", tmp_path), "expected a file"),
        (("--trained", "--strategy", "x"), "strategies"),
        (("--seconds", -1), "seconds"),
        (("--", "-4,8,64"), "sizes of at least 1"),
        (("8,64",), "expected N,H,V or N,H,V,softcap"),
        ((broken,), "expected int, got NoneType"),
    ):
        result = invoke(*given)
        assert result.exit_code == 2 and said in result.stderr, (given, result.output)
        assert not isinstance(result.exception, ValueError)
    assert data.read_text() == '{"prompt": "a"}\n'
