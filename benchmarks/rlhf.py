r"""Preference optimisation against RLHF with a reward model: what each costs, and what it reaches.

    python benchmarks/rlhf.py                               # the demo's model, minutes on two cores
    python benchmarks/rlhf.py --model DIR --data FILE --prompts 96 --held-out 64 \
        --prompt-words 30 --batch 16 --epochs 2 --tokens 48 --betas 0.1 --ipo-betas 0.1 \
        --learning-rate 3e-5 --output rlhf_smollm2   # SmolLM2-135M: 95 minutes on two cores

The claim is that preference optimisation without a reward model costs a sixth of RLHF and is as
good. A true reward in closed form (lib/rlhf_task.py) stands for people. It labels pairs of answers
that the starting model gives, and all methods get the same pairs and prompts:

    rlhf      TRL's RewardTrainer, then TRL's RLOOTrainer with that reward model
    dpo, ipo  fastpref's PreferenceTrainer

Each is run for some betas and seeds. Kept weights are judged by the true reward of answers to
held-out prompts and by the KL to the starting model. Every stage has a process of its own. Writes
a JSON and a PNG to benchmarks/results/.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from lib import results, rlhf_report, rlhf_task
from lib.training import OFFLINE

from fastpref.bench import runner

COMPARED = (
    "One policy of each method from the same labelled pairs, on the same number of prompts: "
    "RLHF trains a reward model and then a policy on answers that it samples; DPO and IPO train "
    "the policy on the pairs. Sampling the pairs, which all need, is counted apart. The ratios "
    "hold for this model, this reward, these settings and this machine, and for nothing else."
)
NOTES = {
    "seconds": "wall time; cpu_s is the CPU time of the same work, which other processes on the "
    "machine do not lengthen; both with the reference's log-probs computed ahead, and without "
    "loading, tokenising, keeping weights and judging",
    "flops": "of products and attention, counted on two steps, times the steps; fastpref on its "
    "eager backend, which does the same products",
    "peak_bytes": "peak resident memory of the stage's process in its first run; above_bytes is "
    "beyond what the libraries hold",
    "models": "whole models that the process holds while it trains",
    "kl": "mean over sampled answers of the summed log-ratio to the starting model, temperature 1",
    "best": "the highest mean reward over betas and steps, chosen on the prompts that judge it",
}


def numbers(text: str) -> list[float]:
    return [float(part) for part in text.split(",") if part]


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add = parser.add_argument
    add("--model", help="directory of a chat model with its tokenizer; the demo's by default")
    add("--data", help="JSON lines with prompts, .gz is fine; --model needs it")
    add("--methods", default="rlhf,dpo,ipo", help="of rlhf, dpo and ipo")
    add("--prompts", type=int, default=192, help="to train on")
    add("--held-out", type=int, default=96, help="prompts that judge")
    add("--prompt-words", type=int, help="prompts of --data with at most so many words")
    add("--epochs", type=int, default=3, help="passes over the pairs, and over the prompts")
    add("--batch", type=int, default=24, help="pairs or prompts a step")
    add("--generations", type=int, default=2, help="answers that RLOO samples to a prompt")
    add("--tokens", type=int, default=64, help="the most of an answer")
    add("--answers", type=int, default=2, help="to a held-out prompt, of each policy")
    add("--points", type=int, default=2, help="steps along a run whose weights are judged")
    add("--betas", type=numbers, default="0.05,0.2,0.8", help="of RLOO's KL and of DPO")
    add("--ipo-betas", type=numbers, default="0.05,0.2,0.8", help="of IPO")
    add("--seeds", type=int, default=3)
    add("--learning-rate", type=float, help="of DPO and IPO; 1e-3, with --model 1e-5")
    add("--rloo-learning-rate", type=float, help="of RLOO; the same by default")
    add("--reward-learning-rate", type=float, help="of the reward model; the same by default")
    add("--threads", type=int, default=0, help="of each process; torch's choice by default")
    add("--budget", type=float, help="seconds; seeds that do not fit any more are left out")
    add("--resume", action="store_true", help="keep the seeds that --output has already")
    add("--output", default="rlhf", help="name of the files in results/, or a path")
    args = parser.parse_args(argv)
    args.methods = [name for name in args.methods.split(",") if name]
    if unknown := set(args.methods) - set(rlhf_report.NAMES):
        parser.error(f"--methods: got {', '.join(unknown)}, expected rlhf, dpo or ipo")
    if (args.model is None) != (args.data is None):
        parser.error("--model and --data belong together")
    rate = args.learning_rate or (1e-5 if args.model else 1e-3)
    args.learning_rates = {
        "dpo": rate,
        "ipo": rate,
        "rloo": args.rloo_learning_rate or rate,
        "reward": args.reward_learning_rate or rate,
    }
    return args


class Stage:
    """The process of a stage, which does one job after the other. The first job starts it."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self.name, self._settings = settings["stage"], settings
        self._child: runner.Child | None = None

    def do(self, job: str, **given: Any) -> Any:
        """The result of a job. Raises RuntimeError if it fails."""
        begun = time.perf_counter()
        if self._child is None:
            self._child = runner.Child(__file__, self._settings, OFFLINE, loud=False)
        self._child.tell(json.dumps({"job": job, **given}))
        message = self._child.hear()
        if message is None or "failed" in message:
            why = message["failed"] if message else self._child.ending()
            raise RuntimeError(f"{self.name}: {why}")
        took = time.perf_counter() - begun
        what = " ".join(f"{key} {given[key]}" for key in ("seed", "beta") if key in given)
        print(f"  {self.name}: {job} {what}, {took:.0f} s", file=sys.stderr, flush=True)
        return message["result"]

    def stop(self) -> None:
        if self._child is not None:
            self._child.stop()


def steps_of(pairs: int, args: argparse.Namespace) -> tuple[int, list[int]]:
    """The steps of a run, and those whose weights are judged."""
    steps = math.ceil(pairs / args.batch) * args.epochs
    at = {max(1, round(steps * (i + 1) / args.points)) for i in range(args.points)}
    return steps, sorted(at)


def one_seed(
    seed: int, args: argparse.Namespace, stages: dict[str, Stage], folder: Path, found: Any
) -> None:
    """Pairs, then each method on them for all betas, into what was found."""
    judge = stages["judge"]
    pairs = judge.do("pairs", seed=seed, folder=str(folder))
    files = {name: pairs[name].pop("path") for name in pairs}
    steps, keep_at = steps_of(pairs["pairs"]["pairs"], args)
    common = {"seed": seed, "steps": steps, "keep_at": keep_at, **files}
    start = judge.do("judge", path=None, seed=seed)
    reward_model = str(folder / "reward_model")
    runs = []
    for stage in (name for name in stages if name != "judge"):
        betas = {"reward": [None], "ipo": args.ipo_betas}.get(stage, args.betas)
        for beta in betas:
            job = common | {"beta": beta, "output": reward_model, "reward_model": reward_model}
            keep = {} if stage == "reward" else {"keep": str(folder / f"{stage}-{beta}")}
            run = stages[stage].do("train", **job, **keep)
            runs.append({"stage": stage, "seed": seed, "steps": steps, "beta": beta, **run})
            points = runs[-1]["points"] = []
            for kept in runs[-1].pop("kept"):
                judged = judge.do("judge", path=kept.pop("path"), seed=seed)
                points.append(kept | judged)
    if "flops" not in found:
        job = common | {"beta": 0.1, "reward_model": reward_model}
        found["flops"] = {name: stages[name].do("count", **job) for name in stages}
    found["runs"] += runs
    found["pairs"].append({"seed": seed, **pairs})
    found["start"].append({"seed": seed, **start})


def measure(args: argparse.Namespace, folder: Path, found: dict[str, Any], path: Path) -> None:
    """All seeds that fit, the results written after each."""
    if args.model is None:
        from fastpref.cli.demo import ASSETS

        model, tasks = str(ASSETS), rlhf_task.demo_tasks(args.prompts, args.held_out)
    else:
        model = args.model
        # The first seed's split is everybody's, as the demo's is.
        tasks = rlhf_task.text_tasks(args.data, args.prompts, args.held_out, 0, args.prompt_words)
    settings = vars(args) | {"model": model}
    for name, some in zip(("train", "held_out"), tasks, strict=True):
        settings[name] = rlhf_task.write_tasks(folder / f"{name}_tasks.jsonl", some)
    wanted = [part for method in args.methods for part in rlhf_report.STAGES[method]]
    begun, longest, before = time.perf_counter(), 0.0, found.get("wall_s", 0.0)
    done = {pairs["seed"] for pairs in found["pairs"]}
    stages = {name: Stage(settings | {"stage": name}) for name in ("judge", *wanted)}
    try:
        for seed in (n for n in range(args.seeds) if n not in done):
            spent = time.perf_counter() - begun
            if args.budget and longest and spent + longest > args.budget:
                print(f"  seeds from {seed} on: no time left", file=sys.stderr)
                break
            one_seed(seed, args, stages, folder, found)
            longest = max(longest, time.perf_counter() - begun - spent)
            found["wall_s"] = round(before + time.perf_counter() - begun, 1)
            rlhf_report.summarise(found)
            results.write_json(path, found)
    finally:
        for stage in stages.values():
            stage.stop()


def resumed(earlier: dict[str, Any], found: dict[str, Any]) -> dict[str, Any]:
    """What an earlier run found, to which seeds are added.

    Exits if it had other settings, or another machine, package or commit.
    """
    free = {"seeds", "budget", "date", "backend", *NOTES}

    def facts(one: dict[str, Any]) -> dict[str, Any]:
        found = {"model": one["model"], **one["settings"], **one["machine"]}
        return {name: value for name, value in found.items() if name not in free}

    before, now = facts(earlier), json.loads(json.dumps(facts(found)))
    if other := sorted(k for k in {*before, *now} if before.get(k) != now.get(k)):
        raise SystemExit(f"--resume: the earlier run had another {', another '.join(other)}")
    for name in ("seeds", "budget"):
        earlier["settings"][name] = found["settings"][name]
    return earlier


def main(argv: list[str] | None = None) -> None:
    if "--worker" in (sys.argv[1:] if argv is None else argv):
        from lib import rlhf_worker

        runner.serve(rlhf_worker.answer)
        return
    args = arguments(argv)
    own = {"model", "data", "output", "resume"} | {
        f"{stage}learning_rate" for stage in ("", "rloo_", "reward_")
    }
    found: dict[str, Any] = {
        "benchmark": "rlhf: preference optimisation against a reward model and RLOO",
        "compared": COMPARED,
        "machine": results.machine() | {"threads": args.threads or results.machine()["threads"]},
        "model": "fastpref's demo model" if args.model is None else Path(args.model).name,
        "settings": {k: v for k, v in vars(args).items() if k not in own}
        | {"data": Path(args.data or "fastpref's demo").name, "reward": rlhf_task.CONSTANTS}
        | NOTES,
        "pairs": [],
        "start": [],
        "runs": [],
    }
    path = results.results_path(args.output)
    if args.resume and path.exists():
        found = resumed(json.loads(path.read_text()), found)
    with tempfile.TemporaryDirectory() as folder:
        measure(args, Path(folder), found, path)
    rlhf_report.plot(found, path.with_suffix(".png"))
    print(rlhf_report.text(found))
    print(f"{found['wall_s']:.0f} s in all; wrote {path.stem}.json and {path.stem}.png")


if __name__ == "__main__":
    main()
