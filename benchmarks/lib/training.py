"""Trainers in processes of their own that take turns: what train.py and step.py measure with."""

from __future__ import annotations

import argparse
import gzip
import json
import math
import os
import statistics
import sys
from pathlib import Path
from typing import Any

from fastpref.bench import runner

OFFLINE = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "TQDM_DISABLE": "1"}


def parser_of(description: str | None) -> argparse.ArgumentParser:
    """A parser with the options that name a model and its data."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawTextHelpFormatter
    )
    add = parser.add_argument
    add("--model", required=True, help="directory of a causal model with its tokenizer")
    add("--data", required=True, help="preference pairs, JSON lines; .gz is fine")
    return parser


def is_worker(argv: list[str] | None) -> bool:
    """Whether a script was started as a worker, whose requests have then been answered."""
    if "--worker" not in (sys.argv[1:] if argv is None else argv):
        return False
    from . import train_worker

    runner.serve(train_worker.answer)
    return True


def read_pairs(path: str) -> list[dict]:
    """The pairs of a file of JSON lines; .gz is fine."""
    opened = gzip.open(path, "rt") if path.endswith(".gz") else open(path)
    with opened as lines:
        return [json.loads(line) for line in lines if line.strip()]


def write_lines(path: Path, pairs: list[dict]) -> str:
    path.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    return os.fspath(path)


class Run:
    """A worker process of a script. `turn` lets it work until it pauses or ends."""

    def __init__(self, script: str, name: str, request: dict[str, Any]) -> None:
        self.name, self.request = name, request
        self.result: dict[str, Any] | None = None
        self.child = runner.Child(script, request, OFFLINE, loud=False)

    def turn(self) -> None:
        while (message := self.child.hear()) is not None:
            if "paused" in message:
                return
            if "result" in message:
                self.result = message["result"]
                self.child.stop()
                return
            if "failed" in message:
                self.child.stop()
                raise RuntimeError(f"{self.name}: {message['failed']}")
            doing = message.get("stage")
            if doing is None:
                steps = self.request["steps"]
                doing = f"step {message['step']}/{steps}, {message['seconds']:.2f} s"
            print(f"  {self.name}: {doing}", file=sys.stderr)
        raise RuntimeError(f"{self.name}: {self.child.ending()}")

    def finish(self) -> dict[str, Any]:
        while self.result is None:
            self.turn()
            if self.result is None:
                self.child.tell()
        return self.result


def request(args: argparse.Namespace, **changes: Any) -> dict[str, Any]:
    """What a worker is told: the options, and what is said of this run."""
    asked = vars(args) | {"trainer": "fastpref", "loss": "sigmoid", "precompute": True}
    asked |= {"segment": None, "held_out": None, "keep_data": None, "fastpref_options": {}}
    asked |= {"lora": 0, "rounded_d": False, "keep_weights": None, "before": True}
    asked |= changes
    return asked | {"warmup_steps": math.ceil(asked["steps"] / 10)}


def take_turns(script: str, wanted: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The results of some runs, of which one works at a time.

    Each gains `median_step_s`, without the first step, which allocates the optimiser's states, and
    `step_s_with_reference`, which adds a step's share of the log-probs computed ahead.

    Raises:
        RuntimeError: a run has failed.
    """
    runs: list[Run] = []
    try:
        for name, what in wanted.items():  # one after the other up to the first step
            runs.append(Run(script, name, what))
            runs[-1].turn()
        while any(run.result is None for run in runs):
            for run in runs:
                if run.result is None:
                    run.child.tell()
                    run.turn()
    except RuntimeError:
        for run in runs:
            run.child.stop()
        raise
    found = {}
    for run in runs:
        assert run.result is not None
        result = found[run.name] = run.result
        step = statistics.median(result["step_s"][1:] or result["step_s"])
        result["median_step_s"] = round(step, 3)
        ahead = result["reference_s"] / run.request["steps"]
        result["step_s_with_reference"] = round(step + ahead, 3)
    return found
