"""`fastpref train` for operators and their scripts: exit statuses, events, signals, directories."""

import json
import os
import signal
import time

import forked
import launching
import pytest
import torch
from test_cli import ASSETS, complaint, demo, train, write

import fastpref.__main__

pytestmark = pytest.mark.train


@pytest.fixture(autouse=True)
def one_thread(threads):
    threads(1)


@pytest.fixture
def pairs(tmp_path):
    return write(tmp_path / "pairs.jsonl", demo.read_pairs("train.jsonl")[:12])


STEPS = ("--max-steps", 2, "--save-steps", 1)


def command(output, data, *options):
    return [
        "train", "--model", ASSETS, "--data", data, "--output", output, "--fp32",
        "--no-gradient-checkpointing", "--batch-size", 2, *options,
    ]  # fmt: skip


def _errors_to(path):
    os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), 2)


class Forked:
    """`fastpref train` in a process that is forked after the imports, at its first step."""

    def __init__(self, folder, data, *options):
        self._out, self._said = folder / "stdout", folder / "stderr"
        arguments = command(folder / "out", data, "--json", *options)
        self._process = forked.start(arguments, self._out, _errors_to, (str(self._said),))
        while not (self._out.exists() and '"event": "step"' in self._out.read_text()):
            assert self._process.is_alive(), self._said.read_text()
            time.sleep(0.005)

    def send_signal(self, number):
        os.kill(self._process.pid, number)

    def end(self):
        """The exit status, and what the process has written to stderr."""
        self._process.join(60)
        return self._process.exitcode, self._said.read_text()


def events_of(text):
    return [json.loads(line) for line in text.splitlines()]


def test_a_directory_belongs_to_one_run(tmp_path, pairs):
    out = tmp_path / "out"
    train(out, *STEPS, data=pairs)
    said = complaint(train(out, *STEPS, data=pairs, code=2))
    assert "holds another run's checkpoint-2, checkpoint-1, model.safetensors" in said
    assert "--resume latest" in said and "--overwrite" in said
    train(out, *STEPS, "--overwrite", data=pairs)
    said = complaint(train(out, *STEPS, "--resume", "latest", "--lora", data=pairs, code=2))
    assert "of a run that trains all weights, and this one trains a LoRA adapter" in said
    said = complaint(train(out, *STEPS, "--resume", "latest", "--seed", 1, data=pairs, code=2))
    assert "seed 1 instead of 42" in said and "--resume-anyway" in said
    result = train(out, "--max-steps", 3, "--resume", "latest", data=pairs)
    assert "continuing from" in result.stdout


def test_auto_starts_and_then_continues(tmp_path, pairs):
    result = train(tmp_path / "out", *STEPS, "--resume", "auto", data=pairs)
    assert "continuing" not in result.stdout
    result = train(tmp_path / "out", *STEPS, "--resume", "auto", data=pairs)
    assert "nothing left to train" in " ".join(result.stdout.split())


def test_events_are_lines_of_json(tmp_path, pairs):
    options = ("--eval-split", 0.2, "--json", "--report", tmp_path / "run.html")
    result = train(tmp_path / "out", *STEPS, *options, data=pairs)
    events = events_of(result.stdout)
    assert {"start", "step", "eval", "save", "end"} == {event["event"] for event in events}
    assert events[0]["steps"] == 2 and events[-1]["steps"] == 2
    step = next(event for event in events if event["event"] == "step")
    assert step["step"] == 1 and step["loss"] == pytest.approx(0.6931, abs=1e-3)
    saves = [event["checkpoint"] for event in events if event["event"] == "save"]
    assert saves == [str(tmp_path / "out" / f"checkpoint-{i}") for i in (1, 2)]
    page = (tmp_path / "run.html").read_text("utf-8")
    assert "No alarm." in page and "data:image/png;base64," in page and "[bold]" not in page
    assert json.loads((tmp_path / "out" / "training_log.json").read_text())["alarms"] == []


def test_quiet_prints_nothing(tmp_path, pairs):
    result = train(tmp_path / "out", *STEPS, "--quiet", data=pairs)
    assert result.stdout == "" and (tmp_path / "out" / "model.safetensors").is_file()


def test_a_full_disk_is_exit_status_4(tmp_path, pairs, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    said = complaint(train(tmp_path / "out", *STEPS, data=pairs, code=4))
    assert "checkpoint-1 could not be saved" in said and "no space left on the device" in said


@pytest.mark.parametrize("name, status", [("SIGTERM", 143), ("SIGINT", 130)])
def test_a_signal_saves_and_a_resumed_run_ends_as_if_there_had_been_none(
    tmp_path, pairs, name, status
):
    process = Forked(tmp_path, pairs, "--max-steps", 400, "--save-steps", 0)
    process.send_signal(getattr(signal, name))
    code, said = process.end()
    assert code == status, said
    assert "finishing the step" in said and "of 400 steps are done" in said
    (saved,) = (tmp_path / "out").glob("checkpoint-*")
    assert str(saved) in said and "--resume latest" in said


@pytest.mark.parametrize("when", ["references", "evaluation", "last evaluation"])
def test_a_signal_between_two_batches(tmp_path, pairs, monkeypatch, when):
    from fastpref.reference.model import Reference
    from fastpref.trainer.evaluation import EvaluatingTrainer

    owner, name = EvaluatingTrainer, "prediction_step"
    if when == "references":
        owner, name = Reference, "logps"
    original, calls = getattr(owner, name), []

    def signalled(*args, **kwargs):
        if when == "last evaluation" and args[0].is_in_train:
            return original(*args, **kwargs)
        calls.append(args)
        if when == "last evaluation":  # when signals do again what they do anywhere in Python
            os.kill(os.getpid(), signal.SIGINT)
        else:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, signalled)
    options = {
        "references": ("--reference", "precompute", "--batch-size", 2),
        "evaluation": ("--eval-split", 0.5, "--eval-steps", 1, "--batch-size", 2),
        "last evaluation": ("--eval-split", 0.5, "--eval-steps", 100),
    }[when]
    out, status = tmp_path / "out", 130 if when == "last evaluation" else 143
    said = complaint(train(out, *STEPS, *options, data=pairs, code=status))
    assert len(calls) == 1
    if when == "references":
        assert "SIGTERM ended the run while it computed the reference's log-probs" in said
    elif when == "evaluation":
        assert "1 of 2 steps are done" in said and "checkpoint-1 is saved" in said
    else:
        assert (out / "model.safetensors").is_file()  # which was saved before


def test_a_second_signal_ends_at_once(tmp_path, pairs):
    process = Forked(tmp_path, pairs, "--max-steps", 4000, "--save-steps", 0)
    process.send_signal(signal.SIGSTOP)  # so that both arrive within one step
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGCONT)
    time.sleep(0.001)
    process.send_signal(signal.SIGTERM)
    assert process.end()[0] in (-signal.SIGTERM, 143)


def test_code_of_a_model_runs_only_if_it_is_trusted(tmp_path, pairs):
    import shutil

    folder = tmp_path / "model"
    shutil.copytree(ASSETS, folder)
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "code.Model", "AutoConfig": "code.Config"}
    config["model_type"] = "unheard_of"
    (folder / "config.json").write_text(json.dumps(config))
    mark = tmp_path / "it ran"
    (folder / "code.py").write_text(f"open({str(mark)!r}, 'w').close()\n")
    said = complaint(train(tmp_path / "out", *STEPS, data=pairs, model=folder, code=2))
    assert "runs only with --trust-remote-code" in said and not mark.exists()


TORCHRUN = ("--standalone", "--nproc-per-node", "2")


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch has no processes")
def test_two_processes_end_together(tmp_path, pairs):
    given = command(
        tmp_path / "out", pairs, "--max-steps", 4000, "--save-steps", 0, "--json",
        "--eval-split", 0.3, "--reference", "model",
    )  # fmt: skip
    out, err = tmp_path / "stdout", tmp_path / "stderr"
    program = [*TORCHRUN, fastpref.__main__.__file__, *given]
    process = launching.start_forked("torch.distributed.run", program, out, err)
    while not (out.exists() and '"event": "step"' in out.read_text()):
        assert process.is_alive(), err.read_text()
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGTERM)  # which torchrun passes on
    process.join(90)
    said = err.read_text()
    assert process.exitcode not in (0, None) and "of 4000 steps are done" in said, said
    assert [event["event"] for event in events_of(out.read_text())].count("start") == 1
    assert len(list((tmp_path / "out").glob("checkpoint-*/manifest.json"))) == 1


@pytest.mark.parametrize("option", ["--json", "--seed=42"])
def test_a_run_outlives_the_reader_of_its_output(tmp_path, pairs, option):
    os.mkfifo(tmp_path / "pipe")
    steps = ("--max-steps", 8, "--logging-steps", 1, option)
    errors = _errors_to, (str(tmp_path / "stderr"),)
    run = forked.start(command(tmp_path / "out", pairs, *steps), tmp_path / "pipe", *errors)
    with open(tmp_path / "pipe") as reader:
        assert reader.readline()
    run.join(120)
    assert run.exitcode == 0, (tmp_path / "stderr").read_text()
    assert (tmp_path / "out/training_log.json").is_file()


def test_the_home_directory_of_an_output_is_expanded(tmp_path, pairs, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    train("~/run", *STEPS, data=pairs)
    assert (tmp_path / "run/model.safetensors").is_file()
    assert (tmp_path / "run/checkpoint-2").is_dir() and not os.path.exists("~")


def test_overwriting_does_not_remove_the_model(tmp_path, pairs):
    out = tmp_path / "out"
    train(out, *STEPS, data=pairs)
    for model in (out, out / "checkpoint-2"):
        said = complaint(train(out, "--overwrite", "--model", model, data=pairs, code=2))
        assert "that is to be trained, which overwriting would remove" in said
    assert (out / "model.safetensors").is_file() and (out / "checkpoint-2").is_dir()
