"""A disk that fails at each write, rename and fsync in turn costs no more than one checkpoint."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
from pathlib import Path

import pytest
import reliability
import runs

pytest.importorskip("typer")
pytest.importorskip("transformers")

import failing_files  # noqa: E402
import forked  # noqa: E402

pytestmark = pytest.mark.train

# A full disk stays full until somebody makes room; a sector that fails is one.
DISKS = {"full": (errno.ENOSPC, True), "failing": (errno.EIO, False)}


# Parts of a run: the newest checkpoint that is there when they fail, and what is then said.
PARTS = {
    "start": (0, r"output directory \S+ cannot be|run.json could not be written"),
    "checkpoint": (
        2,
        "checkpoint-4 could not be saved in .*-2 is complete|.* after .*-4 was saved",
    ),
    "model": (4, "the model could not be saved in"),
    "log": (4, "the model is saved in .* but its log and plot could not be"),
}
CASES = [(part, disk) for part in PARTS for disk in DISKS]
SHORT = [("start", "failing"), ("checkpoint", "full")]
OPTIONS = ("--max-steps", 4, "--quiet")
LIMIT_S = 600


def fail_each_call(
    part: str, output: str, found: str, error: int, stays: bool, stride: int
) -> None:
    """Have this process come to a part of its run, and go on from there in a fork for each call.

    Args:
        part: of PARTS; "checkpoint" is the second one, after step 4, and "model" the final one.
        stride: 1 for every call, 2 for every second one.
        found: a directory for what each fork has left: its output directory, log and exit status.
    """
    import torch

    from fastpref.cli import train_run
    from fastpref.trainer.output_directory import OutputDirectory
    from fastpref.trainer.preference import PreferenceTrainer

    owner, name = {
        "start": (OutputDirectory, "hold"),
        "checkpoint": (PreferenceTrainer, "_save_checkpoint"),
        "model": (PreferenceTrainer, "save_model"),
        "log": (train_run, "write_results"),
    }[part]
    original, folder, results = getattr(owner, name), Path(output), Path(found)
    todo = {name}

    def fork(go_on, first):
        if folder.exists():
            shutil.copytree(folder, results / "before")
        child = os.fork()
        if child == 0:
            # After a fork torch makes its pool of threads anew at its first use. Two threads at
            # once, as those that load a model, find none there: "Invalid thread pool" (2.13).
            torch.set_num_threads(1)
            log = os.open(results / f"log-{first}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(log, 1)
            os.dup2(log, 2)
            failing_files.arm(folder, first, error, stays)
            try:
                go_on()
            finally:
                note = {"calls": failing_files.calls(), "failed": failing_files.failed()}
                (results / f"note-{first}.json").write_text(json.dumps(note))
            return True
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        note = json.loads((results / f"note-{first}.json").read_text())
        (results / f"note-{first}.json").write_text(json.dumps({**note, "status": status}))
        if folder.exists():
            os.rename(folder, results / f"output-{first}")
        if (results / "before").exists():
            os.rename(results / "before", folder)
        return False

    def in_turn(trainer, *args, **kwargs):
        def go_on():
            original(trainer, *args, **kwargs)

        inside = kwargs.get("_internal_call") or args[1:] == (True,)
        early = part == "checkpoint" and trainer.state.global_step != 4
        if inside or early or name not in todo:
            return go_on()
        todo.clear()
        if fork(go_on, 0):
            return None
        calls = json.loads((results / "note-0.json").read_text())["calls"]
        for first in range(1, calls + 1, stride):
            if fork(go_on, first):
                return None
        os._exit(0)

    setattr(owner, name, in_turn)


def contents(folder: Path) -> str:
    """A digest of the names and contents of a directory's files."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        digest.update(path.relative_to(folder).as_posix().encode())
        if path.is_file() and path.name not in ("run.json", ".run.lock"):
            digest.update(path.read_bytes())
    return digest.hexdigest()


def fault(status: int, said: str, left: Path, part: str) -> str | None:
    """What is wrong with the end of a run whose disk failed, or None."""
    from fastpref.trainer.manifest import newest_complete, problem_with

    newest, _ = newest_complete(left)
    wanted, words = PARTS[part]
    if (0 if newest is None else int(newest.name[11:])) < wanted:
        return f"the newest complete checkpoint is {newest}"
    if status == 0:  # what failed was not needed
        return problem_with(left / "checkpoint-4")
    if status != 4:
        return f"exit status {status}"
    if not re.match(f"fastpref: .*({words})", said) or "\n" in said:
        return "not the one sentence that was expected"
    return None


@pytest.fixture(scope="module")
def truth(tmp_path_factory):
    """The data and the trajectory of a run on a good disk."""
    folder = tmp_path_factory.mktemp("good")
    data = runs.write_pairs(folder)
    process = forked.start(runs.command(data, folder / "out", *OPTIONS), folder / "log")
    process.join(LIMIT_S)
    assert process.exitcode == 0, (folder / "log").read_text()
    return data, runs.trajectory(folder / "out")


@pytest.mark.parametrize("part, disk", reliability.sized(CASES, SHORT))
def test_a_call_that_fails_is_a_sentence_and_the_run_goes_on(tmp_path, truth, part, disk):
    library, reason = failing_files.library()
    if library is None:
        pytest.skip(reason)
    data, trajectory = truth
    output, found = tmp_path / "out", tmp_path / "found"
    found.mkdir()
    arguments = (part, str(output), str(found), *DISKS[disk], reliability.sized(1, 8))
    command = runs.command(data, output, *OPTIONS)
    process = forked.start(command, tmp_path / "log", fail_each_call, arguments)
    process.join(LIMIT_S)
    assert process.exitcode == 0, (tmp_path / "log").read_text()
    notes = {int(p.stem[5:]): json.loads(p.read_text()) for p in found.glob("note-*.json")}
    assert notes.pop(0)["status"] == 0 and notes, (found / "log-0").read_text()
    states: dict[str, int] = {}
    faults, harmless = [], 0
    for first, note in sorted(notes.items()):
        left = found / f"output-{first}"
        said = (found / f"log-{first}").read_text().strip()
        problem = fault(note["status"], said, left, part)
        if problem:
            faults.append(f"{problem}: call {first} ({note['failed']}): {said}")
        harmless += note["status"] == 0
        states.setdefault(contents(left), first)
    assert not faults, f"{len(faults)} faults:\n" + "\n".join(faults[:5])
    for first in states.values():
        if output.exists():
            shutil.rmtree(output)
        if (found / f"output-{first}").exists():
            os.rename(found / f"output-{first}", output)
        log = tmp_path / f"resumed-{first}"
        process = forked.start([*command, "--resume", "auto"], log)
        process.join(LIMIT_S)
        case = f"resumed after {notes[first]['failed']}: {log.read_text()}"
        assert process.exitcode == 0 and runs.trajectory(output) == trajectory, case
    reliability.record(
        f"disk, {part}, {disk}", calls=len(notes), harmless=harmless, states=len(states)
    )
