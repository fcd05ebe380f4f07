"""Progress as lines in a log file: their text, when there are any, and where."""

from __future__ import annotations

import io
import re
import sys
import threading

import pytest
import tiny

from fastpref import progress
from fastpref.data import prepare_dataset
from fastpref.progress import ProgressLines, counting, duration, lines_to, silenced, watched


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def lines(stream):
    return stream.getvalue().splitlines()


def test_a_line_every_so_often_with_rate_and_time_left():
    clock, out = Clock(), io.StringIO()
    work = ProgressLines("Reading", "rows", 6000, out, interval=30, clock=clock)
    for _ in range(70):
        clock.now += 1
        work.add(20)
    assert lines(out) == [
        "Reading: 600 of 6,000 rows (10%), 20 rows/s, 4 min left",
        "Reading: 1,200 of 6,000 rows (20%), 20 rows/s, 4 min left",
    ]
    work.close()
    assert lines(out)[2:] == ["Reading: 1,400 rows done, in 70 s"]


def test_what_was_done_before_counts_for_the_rate_and_the_total_may_be_unknown():
    clock, out = Clock(), io.StringIO()
    work = ProgressLines("Training", "steps", 110, out, start=100, interval=30, clock=clock)
    clock.now = 40
    work.update(102)
    ProgressLines("Evaluating", "batches", None, out, interval=0, clock=lambda: clock.now).add(3)
    assert lines(out) == [
        "Training: 102 of 110 steps (92%), 0.05 steps/s, 3 min left",
        "Evaluating: 3 batches, 0 batches/s",
    ]


def test_short_work_says_nothing():
    clock, out = Clock(), io.StringIO()
    work = ProgressLines("Reading", "rows", 10, out, clock=clock)
    clock.now = 29
    work.add(10)
    work.close()
    assert out.getvalue() == ""


def test_durations():
    seconds = (0.4, 99, 100, 3540, 3600, 12345)
    said = ["0 s", "99 s", "2 min", "59 min", "1 h 0 min", "3 h 26 min"]
    assert [duration(s) for s in seconds] == said


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_lines_go_to_stderr_unless_it_is_a_terminal_or_nothing_is_wanted(monkeypatch):
    log = io.StringIO()
    monkeypatch.setattr(sys, "stderr", log)
    assert progress.stream_for_lines() is log and progress.stream_for_lines(True) is None
    with silenced(True):
        assert progress.stream_for_lines() is None
    with silenced(False):
        assert progress.stream_for_lines() is log
    monkeypatch.setattr(sys, "stderr", Terminal())
    assert progress.stream_for_lines() is None
    with lines_to(log), silenced(True):
        assert progress.stream_for_lines(True) is log
    monkeypatch.setattr(sys, "stderr", log)
    monkeypatch.setitem(sys.modules, "ipykernel", object())
    assert progress.stream_for_lines() is None


def test_threads_do_not_share_what_is_silenced(monkeypatch):
    """Two trainers tokenise at once; the one that began first ends first."""
    log = io.StringIO()
    monkeypatch.setattr(sys, "stderr", log)
    with silenced(True):
        found = []
        thread = threading.Thread(target=lambda: found.append(progress.stream_for_lines()))
        thread.start()
        thread.join()
    assert found == [log]
    inside, go_on = threading.Event(), threading.Event()

    def second():
        with silenced(True):
            inside.set()
            go_on.wait(60)

    with silenced(True):
        thread = threading.Thread(target=second)
        thread.start()
        inside.wait(60)
    go_on.set()
    thread.join()
    assert progress.stream_for_lines() is log


def test_watched_work_is_not_changed(monkeypatch):
    monkeypatch.setattr(progress, "INTERVAL", 0.0)
    out = io.StringIO()
    with lines_to(out):
        assert list(watched(range(3), "Work", "rows", 5, 2, True)) == [0, 1, 2]
    assert [line.split(" rows")[0] for line in lines(out)] == [
        "Work: 2 of 5", "Work: 4 of 5", "Work: 5 of 5", "Work: 5",
    ]  # fmt: skip
    assert list(watched(range(3), "Work", "rows", 5, 2, True)) == [0, 1, 2]


@pytest.mark.parametrize("num_proc", [None, 2])
def test_tokenising(monkeypatch, tmp_path, num_proc):
    import datasets

    monkeypatch.setattr(progress, "INTERVAL", 0.0)
    datasets.enable_progress_bars()
    with open(tmp_path / "log", "w") as out, lines_to(out):
        prepare_dataset(tiny.data(5), tiny.tokenizer(), name="held-out", num_proc=num_proc)
        assert not datasets.are_progress_bars_disabled()
    said = (tmp_path / "log").read_text().splitlines()
    ways = [line.split(",")[0] for line in said]
    assert sorted(ways[:5]) == [
        f"Tokenising held-out data: {n} of 5 rows ({20 * n}%)" for n in range(1, 6)
    ]
    assert said[5].startswith("Tokenising held-out data: 5 rows done, in ")


def test_counting_without_lines_counts_nothing():
    with counting("Work", "rows", 3, disabled=True, shared=False) as work:
        assert work is None
        progress.count()


KINDS = ("Tokenising train data", "Reference log-probs of train data", "Training", "Evaluating")


def test_a_trainer_that_writes_to_a_log(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(progress, "INTERVAL", 0.0)
    options = dict(max_steps=2, eval_dataset=tiny.rows(6), precompute_ref_log_probs=True)
    for disabled in (False, True):
        t = tiny.trainer(tmp_path, train=tiny.rows(6), disable_tqdm=disabled, **options)
        t.train()
        t.evaluate()
        out, err = capsys.readouterr()
        assert "'loss'" in out  # as transformers prints it
        for kind in KINDS:
            assert bool(re.search(rf"^{kind}: \d+ of \d+ \w+ \(", err, re.M)) != disabled, err
        if not disabled:
            assert "Training: 1 of 2 steps (50%), " in err and "Training: 2 steps done, in" in err
            assert "\r" not in err and "it/s" not in err  # no bars beside them
