"""Runs that are killed at random moments and continued end as a run that was left alone."""

from __future__ import annotations

import os
import random
import signal
import time
from collections import Counter
from multiprocessing.process import BaseProcess
from pathlib import Path

import launching
import pytest
import reliability
import runs

pytest.importorskip("typer")
pytest.importorskip("transformers")

import forked  # noqa: E402

pytestmark = pytest.mark.train

PHASES = ("precompute", "train", "save", "rotate", "evaluate")
SEED = 20
LIMIT_S = 120  # of one process; a run takes a few seconds


def mark_phases(marks: str) -> None:
    """Have this process write a line to a file whenever it enters or leaves a phase."""
    from fastpref.trainer import checkpointing
    from fastpref.trainer.preference import PreferenceTrainer

    descriptor = os.open(marks, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)

    def marked(owner, name, phase):
        original = getattr(owner, name)

        def call(*args, **kwargs):
            os.write(descriptor, f"{phase} {time.monotonic()}\n".encode())
            try:
                return original(*args, **kwargs)
            finally:
                os.write(descriptor, f"end {time.monotonic()}\n".encode())

        setattr(owner, name, call)

    marked(PreferenceTrainer, "training_step", "train")
    marked(PreferenceTrainer, "_save_checkpoint", "save")
    marked(PreferenceTrainer, "evaluate", "evaluate")
    marked(checkpointing, "rotate", "rotate")
    marked(PreferenceTrainer, "save_model", "save")
    marked(PreferenceTrainer, "_precompute", "precompute")


def lines(marks: Path) -> list[str]:
    return marks.read_text().splitlines() if marks.exists() else []


class Runs:
    """Starts runs in a directory, in one process or in two as torchrun starts them."""

    def __init__(self, folder: Path, processes: int) -> None:
        self.folder, self.processes = folder, processes
        self.data = runs.write_pairs(folder)

    def start(self, output: Path) -> list[BaseProcess]:
        arguments = runs.command(self.data, output, "--resume", "auto")
        port = launching.free_port()
        started = []
        for rank in range(self.processes):
            marks = self.marks(rank)
            marks.unlink(missing_ok=True)
            several = {
                "RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": self.processes,
                "LOCAL_WORLD_SIZE": self.processes, "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
            }  # fmt: skip
            environment = {k: str(v) for k, v in several.items()} if self.processes > 1 else {}
            log = self.folder / f"log-{rank}"
            log.unlink(missing_ok=True)
            started.append(forked.start(arguments, log, mark_phases, (str(marks),), environment))
        return started

    def marks(self, rank: int) -> Path:
        return self.folder / f"marks-{rank}"

    def said(self) -> str:
        return "\n".join(path.read_text() for path in sorted(self.folder.glob("log-*")))

    def finish(self, output: Path) -> dict:
        """Continue a run to its end, and return what it has left."""
        started = self.start(output)
        for process in started:
            process.join(LIMIT_S)
            assert process.exitcode == 0, self.said()
        return runs.trajectory(output)

    def seconds_of_phases(self) -> dict[str, float]:
        """The longest of each phase in the run that was the last."""
        open_phases, longest = [], dict.fromkeys(PHASES, 0.0)
        for line in lines(self.marks(0)):
            phase, moment = line.split()
            if phase == "end":
                name, began = open_phases.pop()
                longest[name] = max(longest[name], float(moment) - began)
            else:
                open_phases.append((phase, float(moment)))
        return longest

    def kill(self, output: Path, phase: str, nth: int, delay: float, victims: list[int]) -> str:
        """Start a run and kill processes of it in a phase.

        Returns:
            The phase that the first of them was in, or "" if the run was over before.
        """
        started = self.start(output)
        marks, deadline = self.marks(victims[0]), time.monotonic() + LIMIT_S
        while sum(line.startswith(phase) for line in lines(marks)) < nth:
            if not any(process.is_alive() for process in started):
                break
            assert time.monotonic() < deadline, self.said()
            time.sleep(0.0002)
        else:
            time.sleep(delay)
        for rank in victims:
            started[rank].kill()
        for rank, process in enumerate(started):
            process.join(LIMIT_S)  # one whose partner died ends by itself
            assert process.exitcode is not None, f"process {rank} waits for one that is dead"
            if process.exitcode not in (0, -signal.SIGKILL):
                assert "Traceback" not in self.said(), self.said()
        if started[victims[0]].exitcode != -signal.SIGKILL:
            assert started[victims[0]].exitcode == 0, self.said()
            return ""
        within: list[str] = []
        for line in lines(marks):
            entered = line.split()[0]
            within.pop() if entered == "end" else within.append(entered)
        return within[-1] if within else "between"


@pytest.mark.parametrize("processes", [1, 2])
def test_killed_runs_end_as_undisturbed_ones(tmp_path, processes):
    wanted = reliability.sized({1: 38, 2: 12}, {1: 3, 2: 1})[processes]
    draw, there = random.Random(SEED + processes), Runs(tmp_path, processes)
    truth = there.finish(tmp_path / "undisturbed")
    seconds = there.seconds_of_phases()
    assert all(seconds.values()), f"a phase that no run has: {seconds}"
    killed: Counter[str] = Counter()
    finished, chain, tries = 0, 0, 0
    while killed.total() < wanted:
        output, phase = tmp_path / f"run-{finished}", PHASES[tries % len(PHASES)]
        victims = draw.sample(range(processes), draw.randint(1, processes))
        delay = draw.random() * seconds[phase]
        moment = f"seed {SEED}, kill {tries}: {delay:.4f} s into {phase}, processes {victims}"
        tries += 1
        hit = there.kill(output, phase, draw.randint(1, 2), delay, victims)
        if hit:
            killed[hit] += 1
            chain += 1
        if not hit or chain == 6 or killed.total() == wanted:
            assert there.finish(output) == truth, moment
            finished, chain = finished + 1, 0
        assert tries < 4 * wanted + 8, f"too few kills hit a run: {killed}"
    reliability.record(
        f"kills, {processes} process{'es' * (processes > 1)}",
        kills=killed.total(), phases=dict(sorted(killed.items())), runs=finished, identical=True,
    )  # fmt: skip
