"""Several trainers in one process, which share what accelerate keeps for the whole process."""

from __future__ import annotations

import threading

import pytest
import tiny
from transformers import TrainerCallback

BOTH_WAIT = 60.0


def test_each_trainer_has_its_own_mixed_precision(tmp_path):
    t = tiny.trainer(tmp_path / "a", bf16=True)
    tiny.trainer(tmp_path / "b")
    seen = []

    class Looks(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            seen.append(t.accelerator.mixed_precision)
            tiny.trainer(tmp_path / f"c{state.global_step}", train=tiny.rows(2))

    t.add_callback(Looks())
    t.train()
    alone = tiny.trainer(tmp_path / "d", bf16=True)
    alone.train()
    assert seen == ["bf16"] * 4
    tiny.same(tiny.history(t), tiny.history(alone), tol=0)


class Meets(TrainerCallback):
    """Waits in each step until the other thread's training is in one of its own."""

    def __init__(self, barrier):
        self.barrier = barrier

    def on_step_begin(self, args, state, control, **kwargs):
        self.barrier.wait(BOTH_WAIT)


def train_beside(path, first, second):
    """Errors and losses of two trainings whose steps run at once."""
    barrier = threading.Barrier(2)
    trainers = [
        tiny.trainer(path / str(i), callbacks=[Meets(barrier)], **options)
        for i, options in enumerate((first, second))
    ]
    errors = []

    def train(t):
        try:
            t.train()
        except threading.BrokenBarrierError:  # the other one was refused
            pass
        except RuntimeError as error:
            errors.append(str(error))
            barrier.abort()

    threads = [threading.Thread(target=train, args=(t,)) for t in trainers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return errors, trainers


def test_two_threads_train_what_each_trains_alone(tmp_path):
    errors, both = train_beside(tmp_path / "both", {}, {"beta": 0.5})
    assert not errors
    for t, options in zip(both, ({}, {"beta": 0.5}), strict=True):
        alone = tiny.trainer(tmp_path / f"alone {len(options)}", **options)
        alone.train()
        tiny.same(tiny.history(t), tiny.history(alone), tol=1e-6)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"gradient_accumulation_steps": 2}, "gradient_accumulation_steps of one of the two is"),
        ({"bf16": True}, "another thread of this process trains, with another mixed precision"),
    ],
    ids=["accumulation", "precision"],
)
def test_two_threads_that_would_change_each_other_are_refused(tmp_path, options, message):
    errors, _ = train_beside(tmp_path, {}, options)
    assert len(errors) == 1 and message in errors[0]
