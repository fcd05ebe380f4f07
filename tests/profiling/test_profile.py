"""A profile of a small model: its parts add up to what the system measured."""

from __future__ import annotations

import datetime
import json
import os

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("datasets")
pytest.importorskip("typer")

from support import tiny
from typer.testing import CliRunner

from fastpref import cli
from fastpref.profiling import processes, profile, profile_training, sides
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
        (["--sides", ","], "sides: got none, expected some of"),
        (["--plot", "memory.txt"], "--plot memory.txt: expected a name that ends in"),
        (["--batch-size", "32"], "24 usable pairs; expected at least the 32 of a step"),
        (["--model", "./nowhere"], "--model ./nowhere is not a directory"),
        (["--loss", "kto"], "--loss kto: profile reads losses of pairs"),
        (["--reference", "adapter"], "reference: got 'adapter' without an adapter"),
        (["--reference", "base"], "reference: got 'base', expected one of auto, precompute"),
        (["--dtype", "float8"], "dtype: got 'float8', expected one of float32, bfloat16"),
        (["--steps", "20000"], "steps: got 20000, expected at most 10000"),
        pytest.param(
            ["--snapshots", "histories"],
            "snapshots: got a directory, but training is on a cpu",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
        (["--data", "./nowhere.jsonl"], "data file ./nowhere.jsonl does not exist"),
    ],
)
def test_bad_options_are_one_sentence(files, options, message):
    given = ["--model", str(files / "model"), "--data", str(files / "pairs.jsonl"), *options]
    result = CliRunner().invoke(cli.app, ["profile", *given])
    assert result.exit_code == 2 and message in result.stderr


def test_sides_that_are_not_installed_are_the_inputs_fault(files, monkeypatch):
    monkeypatch.setattr(sides, "find_spec", lambda name: None)
    given = ["--model", str(files / "model"), "--data", str(files / "pairs.jsonl")]
    result = CliRunner().invoke(cli.app, ["profile", *given, "--sides", "trl,liger"])
    assert result.exit_code == 2 and "trl and liger_kernel not installed" in result.stderr


class Worker:
    """Instead of a process. answer: its message, or an error while it is heard."""

    answer: object = None
    seen: list

    def __init__(self, command, request, env, loud):
        self.seen.append(request)

    def hear(self):
        if isinstance(self.answer, BaseException):
            raise self.answer
        return self.answer

    def stop(self):
        self.seen.append("stopped")


@pytest.fixture
def worker(monkeypatch):
    monkeypatch.setattr(profile, "Child", Worker)
    Worker.seen = []
    return Worker


def measure(files, **options):
    data = [{**row, "at": datetime.date(2026, 1, 2)} for row in tiny.rows(6)]
    return profile_training(str(files / "model"), data, sides=["eager"], **options)


@pytest.mark.parametrize("of_input, kind", [(True, ValueError), (False, RuntimeError)])
def test_a_side_that_fails_says_whose_fault_it_is(files, worker, of_input, kind):
    worker.answer = {"failed": "OSError: no weights", "input": of_input}
    with pytest.raises(kind, match="nothing could be measured: eager: OSError: no weights"):
        measure(files)
    request, end = worker.seen
    assert request["rows"][0]["at"].startswith("2026-01-02") and end == "stopped"


def test_ctrl_c_ends_the_worker_and_removes_its_files(files, worker):
    worker.answer = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        measure(files)
    request, end = worker.seen
    assert end == "stopped" and not os.path.exists(request["folder"])


def test_a_worker_ends_with_its_parent(monkeypatch):
    parents, ended = iter([5, 5, 1]), []
    monkeypatch.setattr(processes.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(processes.os, "getppid", lambda: next(parents))
    monkeypatch.setattr(processes.os, "_exit", ended.append)
    processes._end_with(5)
    assert ended == [1]


def test_ctrl_c_while_a_request_is_written_ends_the_worker(monkeypatch):
    started = []

    def interrupted(child, line):
        started.append(child)
        raise KeyboardInterrupt

    monkeypatch.setattr(processes.Child, "tell", interrupted)
    with pytest.raises(KeyboardInterrupt):
        processes.Child(["sleep", "60"], {})
    assert started[0]._process.returncode is not None
