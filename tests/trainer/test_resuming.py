"""Which checkpoint is the newest, what a run deletes, and which runs a checkpoint does not fit."""

import os
import shutil
import signal
import threading
from pathlib import Path

import pytest
import tiny
from saved_runs import flip, start
from transformers import AutoModelForCausalLM

from fastpref.trainer import PreferenceTrainer, manifest
from fastpref.trainer.ending import Terminated
from fastpref.trainer.processes import _travels

BEST = {
    "eval_strategy": "steps",
    "eval_steps": 2,
    "load_best_model_at_end": True,
    "metric_for_best_model": "eval_loss",
    "greater_is_better": True,  # so that the best checkpoint is the first
    "save_total_limit": 1,
}


def names(path):
    return sorted(p.name for p in (path / "out").iterdir() if not p.name.startswith((".", "run.")))


class End(tiny.TrainerCallback):
    """Sends SIGTERM after a step."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGTERM)


# ---- the newest one ----


def test_rotation_keeps_the_one_just_saved_and_not_a_damaged_one_of_a_later_step(run):
    flip(run / "out/checkpoint-4/optimizer.pt")
    start(run, save_total_limit=1, save_steps=3, max_steps=3).train(resume_from_checkpoint=True)
    assert names(run) == ["checkpoint-3"]
    assert manifest.problem_with(run / "out/checkpoint-3") is None


def test_the_newest_is_the_one_saved_last(run):
    again = start(run, max_steps=3, save_steps=3, learning_rate=1e-4, resume_anyway=True)
    again.train(resume_from_checkpoint=str(run / "out/checkpoint-2"))
    assert names(run) == ["checkpoint-2", "checkpoint-3", "checkpoint-4"]
    assert manifest.newest_complete(run / "out") == (run / "out/checkpoint-3", [])


@pytest.mark.parametrize("at", [0.2, 0.5, 0.9])
def test_a_flipped_byte_of_a_manifest_is_seen(run, at):
    path = run / "out/checkpoint-4/manifest.json"
    data = bytearray(path.read_bytes())
    data[int(len(data) * at)] ^= 1
    path.write_bytes(data)
    found, (sentence,) = manifest.newest_complete(run / "out")
    assert found == run / "out/checkpoint-2" and "manifest.json" in sentence


def test_a_link_names_a_checkpoint(run):
    (run / "latest").symlink_to(run / "out/checkpoint-4")
    t = start(run, max_steps=6)
    t.train(resume_from_checkpoint=str(run / "latest"))
    assert t.state.global_step == 6 and "checkpoint-6" in names(run)


def test_a_run_that_is_ended_keeps_its_last_checkpoint_besides_the_best(tmp_path):
    options = {**BEST, "eval_dataset": tiny.rows(6, seed=9), "max_steps": 8}
    with pytest.raises(Terminated, match="checkpoint-5 is saved"):
        start(tmp_path, callbacks=[End(5)], **options).train()
    assert names(tmp_path) == ["checkpoint-2", "checkpoint-5"]
    t = start(tmp_path, **options)
    t.train(resume_from_checkpoint=True)
    assert t.args.save_total_limit == 1 and names(tmp_path) == ["checkpoint-2", "checkpoint-8"]


def test_the_best_checkpoint_is_found_where_the_directory_is_now(tmp_path):
    options = {**BEST, "eval_dataset": tiny.rows(6, seed=9)}
    start(tmp_path / "a", **options).train()
    (tmp_path / "b").mkdir()
    shutil.move(tmp_path / "a/out", tmp_path / "b/out")
    t = start(tmp_path / "b", max_steps=6, **options)
    t.train(resume_from_checkpoint=True)
    assert t.state.best_model_checkpoint == str(tmp_path / "b/out/checkpoint-2")
    assert names(tmp_path / "b") == ["checkpoint-2", "checkpoint-6"]


def test_a_changed_working_directory_does_not_move_the_run(tmp_path, monkeypatch):
    class Change(tiny.TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            os.chdir(tmp_path / "other")

    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path)
    start(Path("."), callbacks=[Change()]).train()
    assert names(tmp_path) == ["checkpoint-2", "checkpoint-4"]
    assert list((tmp_path / "other").iterdir()) == []


# ---- what is deleted ----


def test_of_a_link_to_a_checkpoint_the_link_alone_is_deleted(run):
    shutil.move(run / "out/checkpoint-2", run / "elsewhere")
    (run / "out/checkpoint-2").symlink_to(run / "elsewhere")
    start(run, max_steps=6, save_total_limit=1).train(resume_from_checkpoint=True)
    assert names(run) == ["checkpoint-6"]
    assert manifest.problem_with(run / "elsewhere") is None


def test_the_checkpoints_of_another_program_stay(run, caplog):
    (run / "out/checkpoint-1").mkdir()
    (run / "out/checkpoint-1/weights").write_text("mine")
    start(run, max_steps=6, save_total_limit=1).train(resume_from_checkpoint=True)
    assert names(run) == ["checkpoint-1", "checkpoint-6"]


def test_overwriting_leaves_files_that_only_look_like_weights(run):
    (run / "out/model-before-merge.safetensors").write_text("mine")
    start(run, overwrite_output_dir=True, max_steps=2).train()
    assert names(run) == ["checkpoint-2", "model-before-merge.safetensors"]


@pytest.mark.parametrize("source", ["out", "out/checkpoint-4"])
def test_overwriting_does_not_remove_the_model_that_is_trained(run, source):
    tiny.model().save_pretrained(run / "out")
    policy = AutoModelForCausalLM.from_pretrained(run / source)
    with pytest.raises(ValueError, match="holds the model .* that is to be trained"):
        start(run, policy, overwrite_output_dir=True).train()
    assert {"checkpoint-4", "checkpoint-2", "model.safetensors"} <= set(names(run))


def test_an_adapter_is_saved_beside_its_base_and_a_whole_model_in_an_adapters_place(tmp_path):
    t = start(tmp_path / "lora", peft_config=tiny.lora())
    base = tmp_path / "base"
    tiny.model().save_pretrained(base)
    (base / "model-old.safetensors").write_text("mine")
    t.save_model(str(base))
    assert {"model.safetensors", "model-old.safetensors", "adapter_config.json"} <= {
        p.name for p in base.iterdir()
    }
    t.save_model(str(tmp_path / "place"))
    start(tmp_path / "full").save_model(str(tmp_path / "place"))
    assert not list((tmp_path / "place").glob("adapter*"))
    AutoModelForCausalLM.from_pretrained(tmp_path / "place")


# ---- runs that a checkpoint is not of ----


def test_the_reference_is_the_model_that_the_run_began_with(run):
    trained = AutoModelForCausalLM.from_pretrained(run / "out/checkpoint-2")
    with pytest.raises(ValueError, match="the reference's weights are others"):
        start(run, trained, max_steps=6).train(resume_from_checkpoint=True)
    with_reference = {"ref_model": tiny.model(), "max_steps": 6}
    t = start(run, trained, **with_reference)
    t.train(resume_from_checkpoint=True)
    assert t.state.global_step == 6


def test_an_adapter_goes_on_with_its_base(tmp_path):
    start(tmp_path, peft_config=tiny.lora()).train()
    other = {"peft_config": tiny.lora(), "max_steps": 6}
    with pytest.raises(ValueError, match="the base's weights are others"):
        start(tmp_path, tiny.model(seed=3), **other).train(resume_from_checkpoint=True)
    t = start(tmp_path, **other)
    t.train(resume_from_checkpoint=True)
    assert t.train(resume_from_checkpoint=True).global_step == 6


NEVER = {
    "adapter": ({"peft_config": tiny.lora()}, "trains all weights, and this one trains a LoRA"),
    "model": ({"policy": tiny.model(hidden_size=16)}, "model's parameters 14160 instead of 31392"),
    "optimiser": ({"optim": "adafactor"}, "optim adafactor instead of adamw"),
}


@pytest.mark.parametrize("case", NEVER)
def test_what_does_not_fit_is_refused_in_any_case(run, case):
    options, message = NEVER[case]
    with pytest.raises(ValueError, match=f"{message}.*not even with resume_anyway"):
        start(run, resume_anyway=True, **options).train(resume_from_checkpoint=True)


def test_losses_of_two_kinds_differ_by_what_both_have():
    from fastpref.trainer.identity import differences

    runs = [{"loss": {"loss_type": a, "beta": 0.1, b: 1}} for a, b in (("kto", "w"), ("ipo", "f"))]
    assert differences(*runs) == ["loss option loss_type ipo instead of kto"]


# ---- signals, threads, processes ----


def test_a_signal_of_an_earlier_training_does_not_end_one_in_a_thread(tmp_path):
    t = start(tmp_path, callbacks=[end := End(2)])
    with pytest.raises(Terminated):
        t.train()
    t.remove_callback(end)
    results = []
    thread = threading.Thread(
        target=lambda: results.append(t.train(resume_from_checkpoint=True).global_step)
    )
    thread.start()
    thread.join()
    assert results == [4]


def test_an_ignored_signal_stays_ignored(tmp_path):
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        assert start(tmp_path, callbacks=[End(2)]).train().global_step == 4
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, before)


def test_an_error_that_cannot_be_sent_is_known():
    class Local(Exception):
        pass

    assert _travels(ValueError("one")) and not _travels(Local("two"))


def test_a_path_names_a_model(tmp_path):
    tiny.model().save_pretrained(tmp_path / "model")
    tiny.tokenizer().save_pretrained(tmp_path / "model")
    t = PreferenceTrainer(
        model=tmp_path / "model",
        ref_model=tmp_path / "model",
        args=tiny.config(tmp_path, max_steps=1),
        train_dataset=tiny.rows(),
    )
    assert t.train().global_step == 1
