"""Checkpoints are complete or passed over; a run goes on as what it was or says what differs."""

import errno
import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import tiny
import torch
from saved_runs import flip, start

from fastpref import storage
from fastpref.storage import StorageError
from fastpref.trainer import checkpointing, manifest
from fastpref.trainer.ending import Interrupted, Terminated


def out(path):
    return path / "out"


def weights(t):
    return [p.detach().clone() for p in t.model.parameters()]


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path):
    path.write_bytes(b"")


DAMAGE = {"empty": empty, "cut": cut, "flipped": flip, "missing": lambda path: path.unlink()}
FILES = (
    "model.safetensors",
    "optimizer.pt",
    "scheduler.pt",
    "rng_state.pth",
    "trainer_state.json",
    "manifest.json",
)


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("file", FILES)
def test_a_damaged_checkpoint_is_passed_over_and_named(run, file, damage, caplog):
    newest = out(run) / "checkpoint-4"
    DAMAGE[damage](newest / file)
    found, passed_over = manifest.newest_complete(out(run))
    assert found == out(run) / "checkpoint-2"
    assert len(passed_over) == 1 and "checkpoint-4 was passed over: " in passed_over[0]
    assert file in passed_over[0]
    problem = manifest.problem_with(newest)
    assert problem is not None and file in problem


def test_a_resumed_run_says_what_it_passed_over_and_goes_on_from_the_one_before(run, caplog):
    flip(out(run) / "checkpoint-4" / "optimizer.pt")
    whole = start(run / "whole")
    whole.train()
    t = start(run)
    t.train(resume_from_checkpoint=True)
    assert "checkpoint-4 was passed over: optimizer.pt is damaged" in caplog.text
    assert all(torch.equal(p, q) for p, q in zip(weights(t), weights(whole), strict=True))
    assert manifest.problem_with(out(run) / "checkpoint-4") is None  # written again


def test_a_damaged_checkpoint_by_name_is_an_error_that_names_a_complete_one(run):
    empty(out(run) / "checkpoint-4" / "trainer_state.json")
    with pytest.raises(ValueError, match="trainer_state.json has 0 bytes.*checkpoint-2 is complet"):
        start(run).train(resume_from_checkpoint=str(out(run) / "checkpoint-4"))


def test_without_a_complete_checkpoint_latest_is_an_error_and_auto_starts(tmp_path):
    with pytest.raises(ValueError, match="there is no complete checkpoint in"):
        start(tmp_path).train(resume_from_checkpoint=True)
    with pytest.raises(ValueError, match="it is not a directory"):
        start(tmp_path).train(resume_from_checkpoint=str(tmp_path / "nothing"))
    t = start(tmp_path)
    t.train(resume_from_checkpoint="auto")
    assert t.state.global_step == 4


def test_a_finished_run_does_nothing_when_it_is_resumed(run, caplog):
    before = (out(run) / "checkpoint-4" / "manifest.json").read_bytes()
    t = start(run)
    result = t.train(resume_from_checkpoint=True)
    assert result.global_step == 4 and "nothing left to train" in caplog.text
    assert (out(run) / "checkpoint-4" / "manifest.json").read_bytes() == before


def test_the_loss_of_a_resumed_run_is_that_of_all_its_steps(tmp_path):
    whole = start(tmp_path / "whole", logging_steps=2).train()
    with pytest.raises(Terminated):
        start(tmp_path, logging_steps=2, callbacks=[Signal(signal.SIGTERM)]).train()
    t = start(tmp_path, logging_steps=2)
    resumed = t.train(resume_from_checkpoint=True)
    assert resumed.training_loss == pytest.approx(whole.training_loss, rel=1e-6)
    assert t.state.log_history[-1]["train_loss"] == resumed.training_loss


def test_tied_weights_are_not_said_to_be_missing(tmp_path, caplog):
    def tied(**options):
        return start(tmp_path, tiny.model(tie_word_embeddings=True), **options)

    import logging

    logging.getLogger("transformers").addHandler(caplog.handler)
    try:
        tied(max_steps=2).train()
        tied().train(resume_from_checkpoint=True)
    finally:
        logging.getLogger("transformers").removeHandler(caplog.handler)
    assert "missing keys" not in caplog.text


# ---- other runs ----

OTHERS = {
    "seed": ({"seed": 7}, "seed 7 instead of 42"),
    "loss": ({"loss_type": "ipo"}, "loss option loss_type ipo instead of sigmoid"),
    "beta": ({"beta": 0.5}, "loss option beta 0.5 instead of 0.1"),
    "learning rate": ({"learning_rate": 1e-4}, "learning_rate 0.0001 instead of 0.001"),
    "rows": ({"train": tiny.rows(39)}, "39 training rows instead of 40"),
    "data": ({"train": tiny.rows(seed=5)}, "training data whose contents are others"),
    "batch": ({"gradient_accumulation_steps": 2}, "rows per step 4 instead of 2"),
    "adapter": ({"peft_config": tiny.lora()}, "of a run that trains all weights.*a LoRA adapter"),
}


@pytest.mark.parametrize("other", OTHERS)
def test_another_run_does_not_continue_a_checkpoint(run, other):
    options, message = OTHERS[other]
    with pytest.raises(ValueError, match=f"saved by another run: .*{message}"):
        start(run, **options).train(resume_from_checkpoint=True)


def test_the_rank_of_an_adapter(tmp_path):
    start(tmp_path, peft_config=tiny.lora()).train()
    with pytest.raises(ValueError, match="adapter 'default': r 8 instead of 4"):
        start(tmp_path, peft_config=tiny.lora(r=8)).train(resume_from_checkpoint=True)


def test_another_run_continues_if_it_is_told_to(run, caplog):
    t = start(run, max_steps=6, learning_rate=1e-4, resume_anyway=True)
    t.train(resume_from_checkpoint=True)
    assert t.state.global_step == 6 and "continuing all the same" in caplog.text


def test_a_saved_model_is_not_a_run(tmp_path):
    start(tmp_path, save_only_model=True).train()
    with pytest.raises(ValueError, match="it has no optimizer.pt.*save_only_model=True"):
        start(tmp_path).train(resume_from_checkpoint=True)


# ---- the directory ----


def test_a_new_run_does_not_write_over_another_one(run):
    with pytest.raises(ValueError, match="holds another run's checkpoint-4, checkpoint-2; cont"):
        start(run).train()
    assert manifest.newest_complete(out(run))[0] == out(run) / "checkpoint-4"


def test_a_new_run_over_another_one_says_what_it_removes(run, caplog):
    (out(run) / "notes.txt").write_text("mine")
    start(run, overwrite_output_dir=True, max_steps=2).train()
    assert "removed another run's checkpoint-4, checkpoint-2" in caplog.text
    assert not (out(run) / "checkpoint-4").exists() and (out(run) / "notes.txt").exists()


def test_a_trainer_trains_twice_in_its_directory(tmp_path):
    t = start(tmp_path, max_steps=2)
    t.train()
    t.train()
    assert manifest.problem_with(out(tmp_path) / "checkpoint-2") is None


def test_two_runs_at_once(tmp_path):
    t = start(tmp_path)
    with t.output_directory.held():
        with pytest.raises(ValueError, match=f"in use by another run.*process {os.getpid()} on"):
            start(tmp_path).train()


def test_room_for_a_checkpoint(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(StorageError, match="has 1 kB free, but a checkpoint takes about 1.* MB"):
        start(tmp_path).train()
    start(tmp_path, save_strategy="no").train()


def test_a_directory_that_cannot_be_written(tmp_path):
    t = start(tmp_path)
    out(tmp_path).rmdir()
    out(tmp_path).write_text("a file")
    with pytest.raises(StorageError, match="cannot be written: "):
        t.train()


# ---- a disk that fails ----


def full(*args, **kwargs):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("what", ["save", "write_manifest", "rename"])
def test_a_full_disk_leaves_the_checkpoint_before(tmp_path, monkeypatch, what):
    class Fill(tiny.TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 2:
                place = {"save": torch, "write_manifest": checkpointing, "rename": os}[what]
                monkeypatch.setattr(place, what, full)

    t = start(tmp_path, callbacks=[Fill()])
    message = "checkpoint-4 could not be saved.*no space left.*checkpoint-2 is complete; --resume"
    with pytest.raises(StorageError, match=message):
        t.train()
    assert sorted(p.name for p in out(tmp_path).iterdir() if p.is_dir()) == ["checkpoint-2"]
    monkeypatch.undo()
    again = start(tmp_path)
    again.train(resume_from_checkpoint=True)
    assert manifest.problem_with(out(tmp_path) / "checkpoint-4") is None


def test_a_full_disk_leaves_the_old_model(run, monkeypatch):
    t = start(run, save_strategy="no")
    t.save_model()
    before = {p.name: p.read_bytes() for p in out(run).iterdir() if p.is_file()}
    with torch.no_grad():
        for p in t.model.parameters():
            p += 1
    monkeypatch.setattr(storage, "sync_file", full)
    with pytest.raises(StorageError, match="no space left.*what was there before has not been"):
        t.save_model()
    assert {p.name: p.read_bytes() for p in out(run).iterdir() if p.is_file()} == before
    monkeypatch.undo()
    t.save_model()
    assert (out(run) / "model.safetensors").read_bytes() != before["model.safetensors"]


def test_weights_of_a_model_in_parts_do_not_stay_beside_one_in_a_file(tmp_path):
    t = start(tmp_path)
    t.model.save_pretrained(out(tmp_path), max_shard_size="20KB")
    assert (out(tmp_path) / "model.safetensors.index.json").exists()
    t.save_model()
    assert [p.name for p in out(tmp_path).glob("model*")] == ["model.safetensors"]


def test_push_to_hub_finds_the_model_in_the_output_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    t = start(tmp_path)
    t.save_model(_internal_call=True)  # as push_to_hub calls it
    assert (out(tmp_path) / "model.safetensors").exists() and not Path("None").exists()


def test_the_best_checkpoint_is_known_by_its_name(tmp_path):
    t = start(
        tmp_path, eval_dataset=tiny.rows(4, seed=3), eval_strategy="steps", eval_steps=2,
        load_best_model_at_end=True, metric_for_best_model="loss", save_total_limit=1,
    )  # fmt: skip
    t.train()
    best = t.state.best_model_checkpoint
    assert best in {str(out(tmp_path) / f"checkpoint-{step}") for step in (2, 4)}
    state = json.loads((Path(best) / "trainer_state.json").read_text())
    assert state["best_model_checkpoint"] == best
    assert manifest.problem_with(Path(best)) is None


# ---- signals ----


class Signal(tiny.TrainerCallback):
    def __init__(self, number, step=3):
        self.number, self.step = number, step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step - 1:
            os.kill(os.getpid(), self.number)


@pytest.mark.parametrize(
    "number, error", [(signal.SIGTERM, Terminated), (signal.SIGINT, Interrupted)]
)
def test_a_signal_ends_a_run_that_then_goes_on(tmp_path, number, error):
    whole = start(tmp_path / "whole")
    whole.train()
    before = signal.getsignal(number)
    t = start(tmp_path, callbacks=[Signal(number)])
    with pytest.raises(error, match="3 of 4 steps are done and .*checkpoint-3 is saved; resume"):
        t.train()
    assert signal.getsignal(number) == before
    resumed = start(tmp_path)
    resumed.train(resume_from_checkpoint=True)
    tiny.same(tiny.history(whole), tiny.history(resumed), tol=0)
    assert all(torch.equal(p, q) for p, q in zip(weights(resumed), weights(whole), strict=True))
    if error is Terminated:
        with pytest.raises(SystemExit) as exit:
            start(tmp_path / "c", callbacks=[Signal(number)]).train()
        assert exit.value.code == 143


def test_sigusr1_saves_and_goes_on(tmp_path):
    start(tmp_path, callbacks=[Signal(signal.SIGUSR1, step=1)]).train()
    names = sorted(p.name for p in out(tmp_path).glob("checkpoint-*"))
    assert names == ["checkpoint-1", "checkpoint-2", "checkpoint-4"]
