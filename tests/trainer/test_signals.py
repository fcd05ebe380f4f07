"""Signals during an evaluation, and while reference log-probs are computed."""

import os
import shutil
import signal

import process_group
import pytest
import tiny
import torch
from transformers import TrainerCallback

from fastpref.trainer.ending import Interrupted, Terminated

ENDS = [(signal.SIGTERM, Terminated), (signal.SIGINT, Interrupted)]
EVALUATES = {
    "eval_strategy": "steps",
    "eval_steps": 2,
    "save_strategy": "steps",
    "save_steps": 100,
    "per_device_eval_batch_size": 2,
}


EVAL = "eval_loss"


class InEvaluation(TrainerCallback):
    """Sends a signal to this process in the first batch of an evaluation, and counts batches."""

    def __init__(self, number=None, times=1):
        self.number, self.times, self.batches = number, times, 0

    def on_prediction_step(self, args, state, control, **kwargs):
        self.batches += 1
        if self.batches == 1 and self.number is not None:
            for _ in range(self.times):
                os.kill(os.getpid(), self.number)


def start(path, callback=None, **options):
    return tiny.trainer(
        path,
        eval_dataset=options.pop("eval_dataset", tiny.rows(8, seed=3)),
        callbacks=[] if callback is None else [callback],
        **{**EVALUATES, **options},
    )


@pytest.mark.parametrize("number, error", ENDS)
def test_a_signal_ends_an_evaluation_after_its_batch(tmp_path, number, error, capfd):
    whole = start(tmp_path / "whole")
    whole.train()
    before, callback = signal.getsignal(number), InEvaluation(number)
    t = start(tmp_path, callback)
    with pytest.raises(error, match="2 of 4 steps are done and .*checkpoint-2 is saved; resume"):
        t.train()
    assert callback.batches == 1 and t.state.global_step == 2
    assert signal.getsignal(number) == before
    assert "finishing the batch and saving a checkpoint; once more ends" in capfd.readouterr().err
    resumed = start(tmp_path)
    resumed.train(resume_from_checkpoint=True)
    tiny.same(tiny.history(whole), tiny.history(resumed), tol=0)
    tiny.same(tiny.history(whole, EVAL), tiny.history(resumed, EVAL), (EVAL, "step"), tol=1e-6)


@pytest.mark.parametrize(
    "options",
    [
        {"save_strategy": "best", "metric_for_best_model": "eval_loss"},
        {"metric_for_best_model": "loss", "lr_scheduler_type": "reduce_lr_on_plateau"},
        {"eval_strategy": "epoch", "save_strategy": "epoch", "num_train_epochs": 2},
        {"eval_dataset": {"one": tiny.rows(4, seed=3), "two": tiny.rows(4, seed=4)}},
    ],
    ids=["best", "plateau", "epoch", "two sets"],
)
def test_an_evaluation_that_something_waits_for(tmp_path, options):
    if "num_train_epochs" in options:
        options = {**options, "max_steps": -1, "per_device_train_batch_size": 20}
    callback = InEvaluation(signal.SIGTERM)
    t = start(tmp_path, callback, **options)
    with pytest.raises(Terminated, match="checkpoint-2 is saved"):
        t.train()
    assert callback.batches == 1
    t = start(tmp_path, **options)
    assert t.train(resume_from_checkpoint=True).global_step == 4
    key = "eval_one_loss" if "eval_dataset" in options else EVAL
    assert [line["step"] for line in tiny.history(t, key)] == [2, 4]
    if "metric_for_best_model" in options:
        losses = [line[EVAL] for line in tiny.history(t, EVAL)]
        assert t.state.best_metric == min(losses)
        best = 2 if losses[0] < losses[1] else 4
        assert t.state.best_model_checkpoint == str(tmp_path / "out" / f"checkpoint-{best}")


def test_a_signal_in_the_last_batch_ends_the_run_before_the_next_step(tmp_path):
    callback = InEvaluation(signal.SIGTERM)
    t = start(tmp_path, callback, eval_dataset=tiny.rows(2, seed=3))
    with pytest.raises(Terminated, match="2 of 4 steps are done and .*checkpoint-2 is saved"):
        t.train()
    assert len(tiny.history(t, "eval_loss")) == 1


def test_a_signal_in_the_step_before_an_evaluation_leaves_it_out(tmp_path):
    class InStep(InEvaluation):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 1:
                os.kill(os.getpid(), signal.SIGTERM)

    callback = InStep()
    t = start(tmp_path, callback)
    with pytest.raises(Terminated, match="checkpoint-2 is saved"):
        t.train()
    assert callback.batches == 0
    best = {"metric_for_best_model": "eval_loss", "resume_anyway": True}
    resumed = start(tmp_path, InEvaluation(signal.SIGTERM), **best)  # and so once more
    with pytest.raises(Terminated, match="2 of 4 steps are done and .*checkpoint-2 is saved"):
        resumed.train(resume_from_checkpoint=True)
    assert resumed.evaluation_is_due and resumed.state.best_model_checkpoint is None
    last = start(tmp_path, **best)
    last.train(resume_from_checkpoint=True)
    assert [line["step"] for line in tiny.history(last, EVAL)] == [2, 4]


def test_an_evaluation_on_start_is_not_due_later(tmp_path):
    """The run ends before its first step; each run makes its own evaluation on start."""
    start_options = {"eval_on_start": True, "eval_strategy": "no", "save_steps": 2}
    for rows in (8, 2):  # in one of several batches, and in the only one
        data = tiny.rows(rows, seed=3)
        t = start(tmp_path, InEvaluation(signal.SIGTERM), eval_dataset=data, **start_options)
        with pytest.raises(Terminated, match="0 of 4 steps are done$"):
            t.train()
        assert not t.evaluation_is_due
    start(tmp_path, max_steps=2, **start_options).train()
    t = start(tmp_path, InEvaluation(signal.SIGTERM), **start_options)
    with pytest.raises(Terminated, match="2 of 4 steps are done and .*checkpoint-2 is saved"):
        t.train(resume_from_checkpoint=True)
    t = start(tmp_path, **start_options)
    t.train(resume_from_checkpoint=True)
    assert [line["step"] for line in tiny.history(t, EVAL)] == [0, 2]


def test_a_due_evaluation_is_made_once_or_forgotten(tmp_path):
    with pytest.raises(Terminated):
        start(tmp_path, InEvaluation(signal.SIGTERM)).train()
    for name in ("both", "no"):
        shutil.copytree(tmp_path / "out", tmp_path / name / "out")
    t = start(tmp_path / "both", eval_on_start=True)
    t.train(resume_from_checkpoint=True)
    assert [line["step"] for line in tiny.history(t, EVAL)] == [2, 4]
    options = {"eval_strategy": "no", "save_steps": 1, "max_steps": 3, "resume_anyway": True}
    start(tmp_path / "no", **options).train(resume_from_checkpoint=True)
    t = start(tmp_path / "no", resume_anyway=True)
    t.train(resume_from_checkpoint=True)
    assert [line["step"] for line in tiny.history(t, EVAL)] == [4]


def test_sigusr1_in_an_evaluation_saves_and_goes_on(tmp_path):
    t = start(tmp_path, InEvaluation(signal.SIGUSR1))
    t.train()
    assert (tmp_path / "out" / "checkpoint-2").is_dir() and t.state.global_step == 4
    assert len(tiny.history(t, "eval_loss")) == 2


def test_an_evaluation_that_a_callback_starts(tmp_path):
    class Evaluates(InEvaluation):
        def on_step_end(self, args, state, control, **kwargs):
            self.trainer.evaluate(tiny.rows(8, seed=5))

    callback = Evaluates(signal.SIGTERM)
    t = callback.trainer = start(tmp_path, callback, eval_strategy="no")
    with pytest.raises(Terminated, match="1 of 4 steps are done"):
        t.train()
    assert callback.batches == 1


def test_an_evaluation_after_a_run_that_was_ended(tmp_path):
    t = start(tmp_path, InEvaluation(signal.SIGTERM))
    with pytest.raises(Terminated):
        t.train()
    assert t.evaluate()["eval_loss"] > 0
    with pytest.raises(KeyboardInterrupt) as error:  # as anywhere else in Python
        start(tmp_path / "b", InEvaluation(signal.SIGINT)).evaluate()
    assert not isinstance(error.value, Interrupted)


class Signalling:
    """A collator that sends a signal to this process with its second batch."""

    def __init__(self, collator, number):
        self.collator, self.number, self.batches = collator, number, 0

    def __call__(self, rows):
        self.batches += 1
        if self.batches == 2:
            os.kill(os.getpid(), self.number)
        return self.collator(rows)


def precomputing(path, collator, **options):
    return tiny.trainer(
        path,
        train=tiny.rows(40),
        data_collator=collator,
        precompute_ref_log_probs=True,
        **options,
    )


@pytest.mark.parametrize("number, error", ENDS)
def test_a_signal_ends_the_computation_of_references(tmp_path, number, error, capfd):
    collator = tiny.trainer(tmp_path).data_collator
    before, signalling = signal.getsignal(number), Signalling(collator, number)
    what = "the reference's log-probs of train data"
    message = f"ended the run while it computed {what}, which are not kept: the same command starts"
    with pytest.raises(error, match=message):
        precomputing(tmp_path, signalling)
    assert signalling.batches <= 4 and signal.getsignal(number) == before  # of 20
    assert "finishing the batch; once more ends at once" in capfd.readouterr().err


def test_signals_are_left_alone_if_they_are_not_to_be_handled(tmp_path):
    collator = Signalling(tiny.trainer(tmp_path).data_collator, signal.SIGINT)
    with pytest.raises(KeyboardInterrupt) as error:
        precomputing(tmp_path, collator, handle_signals=False)
    assert not isinstance(error.value, Interrupted)


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch has no processes")
def test_two_processes_end_after_the_same_batch(tmp_path):
    """One of them gets the signal; their numbers of batches differ."""
    import ending_together

    if not torch.distributed.is_gloo_available():
        pytest.skip("torch.distributed has no gloo")
    one, two = process_group.run(ending_together.found, 2, tmp_path / "group", str(tmp_path))
    assert one.keys() == two.keys() and len(one) == 5
    for name, expected in one.items():
        assert two[name]["said"] == expected["said"], name
    for name in ("even", "uneven", "late"):
        assert "2 of 4 steps are done" in one[name]["said"] and "checkpoint-2" in one[name]["said"]
    assert one["even"]["batches"] == two["even"]["batches"] == 1
    assert "computed the reference's log-probs" in one["references"]["said"]
    assert one["finished"]["said"] == "finished"
