"""The stages that rlhf.py measures, each in a process of its own that does one job at a time.

The first line on stdin has the settings, each further one a job; the answer is {"result": ...}.

    judge    pairs from the starting model; what the weights that a run has kept get
    reward   TRL's RewardTrainer on a classifier made of the starting model
    rloo     TRL's RLOOTrainer with that reward model
    dpo ipo  fastpref's PreferenceTrainer, with the reference's log-probs computed ahead
"""

from __future__ import annotations

import contextlib
import gc
import json
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import (
    FlopCounterMode,
    sdpa_backward_flop_count,
    sdpa_flop_count,
)
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from fastpref.backends.host_memory import release_memory
from fastpref.bench.device import peak_resident_bytes, resident_bytes
from fastpref.body.attach import choose_layers

from . import rlhf_task
from .training import write_lines

Settings = dict[str, Any]
LOSSES = {"dpo": "sigmoid", "ipo": "ipo"}
_COUNTED_STEPS = 2


class Stopwatch:
    """Adds up wall time, and CPU time of all threads, which other processes do not lengthen."""

    def __init__(self) -> None:
        self.seconds = self.cpu = 0.0
        self._at = 0.0, 0.0

    def start(self) -> None:
        self._at = time.perf_counter(), time.process_time()

    def stop(self) -> None:
        self.seconds += time.perf_counter() - self._at[0]
        self.cpu += time.process_time() - self._at[1]

    def to_json(self) -> dict[str, float]:
        return {"seconds": round(self.seconds, 3), "cpu_s": round(self.cpu, 3)}


class Watch(TrainerCallback):
    """Keeps the policy's weights at some steps, outside of the time, and the models alive."""

    def __init__(self, keep: str | None = None, at: list[int] | None = None) -> None:
        self.keep, self.at = keep, at or []
        self.kept: list[dict[str, Any]] = []
        self.time = Stopwatch()
        self.copies: dict[str, int] = {}

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.time.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.keep is None or state.global_step not in self.at:
            return
        self.time.stop()
        self.copies = model_copies()
        path = f"{self.keep}-{state.global_step}.pt"
        torch.save(kwargs["model"].state_dict(), path)
        self.kept.append({"step": state.global_step, "path": path, **self.time.to_json()})
        self.time.start()

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        self.time.stop()


def model_copies() -> dict[str, int]:
    """The whole models that this process holds, by the class's last word."""
    names = (type(found).__name__ for found in gc.get_objects())
    ends = "ForCausalLM", "ForSequenceClassification"
    return dict(Counter(end for name in names for end in ends if name.endswith(end)))


class FlopCounter:
    """Adds up the FLOPs of products, and of attention, for whose CPU operator torch has no rule."""

    def __init__(self) -> None:
        self.flops = 0
        self._mode: FlopCounterMode | None = None

    def start(self) -> None:
        def forward(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
            return sdpa_flop_count(query, key, value)

        def backward(grad: Any, query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
            return sdpa_backward_flop_count(grad, query, key, value)

        aten = torch.ops.aten
        rules = {
            aten._scaled_dot_product_flash_attention_for_cpu: forward,
            aten._scaled_dot_product_flash_attention_for_cpu_backward: backward,
        }
        self._mode = FlopCounterMode(display=False, custom_mapping=rules)
        self._mode.__enter__()

    def stop(self) -> None:
        assert self._mode is not None
        self._mode.__exit__(None, None, None)
        self.flops += self._mode.get_total_flops()


def common(settings: Settings, folder: str, seed: int, steps: int, rate: float) -> dict[str, Any]:
    """The options that all trainers are given; the rest is each one's default."""
    return {
        "output_dir": folder,
        "max_steps": steps,
        "per_device_train_batch_size": settings["batch"],
        "learning_rate": rate,
        "lr_scheduler_type": "linear",
        "warmup_steps": steps // 10,
        "seed": seed,
        "bf16": False,
        "gradient_checkpointing": False,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "use_cpu": True,
    }


def rows(path: str, *names: str) -> Any:
    from datasets import Dataset

    found = [json.loads(line) for line in Path(path).read_text().splitlines()]
    return Dataset.from_list([{name: row[name] for name in names} for row in found])


# ---- the trainers ------------------------------------------------------------------------------


def reward_trainer(settings: Settings, job: dict[str, Any], given: dict[str, Any]) -> Any:
    from trl import RewardConfig, RewardTrainer

    return RewardTrainer(
        model=settings["model"],
        args=RewardConfig(**given, max_length=None, model_init_kwargs={"dtype": "float32"}),
        train_dataset=rows(job["pairs"], "prompt", "chosen", "rejected"),
    )


def rloo_trainer(settings: Settings, job: dict[str, Any], given: dict[str, Any]) -> Any:
    from trl import RLOOConfig, RLOOTrainer

    given["per_device_train_batch_size"] *= settings["generations"]
    return RLOOTrainer(
        model=settings["model"],
        reward_funcs=job["reward_model"],
        args=RLOOConfig(
            **given,
            beta=job["beta"],
            num_generations=settings["generations"],
            max_completion_length=settings["tokens"],
            model_init_kwargs={"dtype": "float32"},
        ),
        train_dataset=rows(job["pairs"], "prompt"),
    )


def preference_trainer(settings: Settings, job: dict[str, Any], given: dict[str, Any]) -> Any:
    from fastpref import PreferenceConfig, PreferenceTrainer

    return PreferenceTrainer(
        model=settings["model"],
        args=PreferenceConfig(
            **given,
            loss_type=LOSSES[settings["stage"]],
            beta=job["beta"],
            precompute_ref_log_probs=True,
        ),
        train_dataset=rows(job["pairs"], "prompt", "chosen", "rejected"),
    )


def make_trainer(settings: Settings, job: dict[str, Any], folder: str, steps: int) -> Any:
    stage = settings["stage"]
    rate = settings["learning_rates"][stage]
    given = common(settings, folder, job["seed"], steps, rate)
    if stage == "reward":
        return reward_trainer(settings, job, given)
    if stage == "rloo":
        return rloo_trainer(settings, job, given)
    return preference_trainer(settings, job, given | job.get("options", {}))


# ---- jobs --------------------------------------------------------------------------------------


def train(settings: Settings, job: dict[str, Any]) -> dict[str, Any]:
    """One training run.

    Returns:
        seconds, cpu_s: of training and of what is computed ahead, which is also in `ahead_s`.
            Loading the models, tokenising and keeping weights are left out.
        peak_bytes: the peak resident memory up to its end; only a process's first run counts.
        libraries_bytes: what was resident before any model was.
        kept: the steps, times and files of the kept weights.
    """
    watch, ahead = Watch(job.get("keep"), job.get("keep_at")), Stopwatch()
    with tempfile.TemporaryDirectory() as folder, around_precompute(ahead.start, ahead.stop):
        _import(settings["stage"])
        libraries = resident_bytes()
        trainer = make_trainer(settings, job, folder, job["steps"])
        trainer.add_callback(watch)
        trainer.train()
        found = {
            "seconds": round(watch.time.seconds + ahead.seconds, 3),
            "cpu_s": round(watch.time.cpu + ahead.cpu, 3),
            "ahead_s": round(ahead.seconds, 3),
            "peak_bytes": peak_resident_bytes(),
            "libraries_bytes": libraries,
            "models": watch.copies or model_copies(),
            "kept": watch.kept,
        }
        log = [entry for entry in trainer.state.log_history if "loss" in entry]
        found["loss"] = [log[0]["loss"], log[-1]["loss"]]
        if settings["stage"] == "rloo":
            found["model_reward"] = [log[0]["reward"], log[-1]["reward"]]
        if settings["stage"] == "reward":
            found["accuracy"] = {
                name: reward_accuracy(trainer.model, trainer.processing_class, job[name])
                for name in ("pairs", "held_out_pairs")
            }
            trainer.save_model(job["output"])
    del trainer
    release_memory()
    return found


def count(settings: Settings, job: dict[str, Any]) -> dict[str, float]:
    """FLOPs of a training step, and of what is computed ahead of all.

    fastpref's own kernels do the products of its eager backend, whose FLOPs torch can count.
    """
    options = {}
    if settings["stage"] in LOSSES:
        options = {"options": {"backend": "eager", "cpu_linear": "torch"}}
    ahead = FlopCounter()
    with tempfile.TemporaryDirectory() as folder:
        with around_precompute(ahead.start, ahead.stop):
            trainer = make_trainer(settings, job | options, folder, _COUNTED_STEPS)
        total = FlopCounter()
        total.start()
        trainer.train()
        total.stop()
    del trainer
    release_memory()
    return {"step": total.flops / _COUNTED_STEPS, "ahead": float(ahead.flops)}


@torch.no_grad()
def reward_accuracy(model: Any, tokenizer: Any, path: str) -> dict[str, float]:
    """How often the reward model prefers the chosen answer (`labels`), and the one with the higher
    true reward (`truth`, of pairs in which they differ)."""
    model.eval()
    found: list[tuple[float, float]] = []
    for line in Path(path).read_text().splitlines():
        pair = json.loads(line)
        texts = [
            tokenizer.apply_chat_template(pair["prompt"] + pair[name], tokenize=False)
            for name in ("chosen", "rejected")
        ]
        inputs = tokenizer(
            texts,
            padding=True,
            padding_side="right",
            add_special_tokens=False,
            return_tensors="pt",
        )
        scores = model(
            input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]
        ).logits[:, 0]
        found.append((float(scores[0] - scores[1]), pair["true_chosen"] - pair["true_rejected"]))
    differ = [(said, true) for said, true in found if true]
    return {
        "labels": sum(said > 0 for said, _ in found) / max(len(found), 1),
        "truth": sum((said > 0) == (true > 0) for said, true in differ) / max(len(differ), 1),
    }


@contextlib.contextmanager
def around_precompute(start: Callable[[], None], stop: Callable[[], None]) -> Iterator[None]:
    """Calls both where fastpref's trainer computes the reference's log-probs, before it trains."""
    import fastpref.reference

    before = fastpref.reference.precompute

    def watched(*args: Any, **kwargs: Any) -> Any:
        start()
        try:
            return before(*args, **kwargs)
        finally:
            stop()

    fastpref.reference.precompute = watched
    try:
        yield
    finally:
        fastpref.reference.precompute = before


def _import(stage: str) -> None:
    """What a trainer needs, so that libraries count as such."""
    if stage in LOSSES:
        import datasets  # noqa: F401

        import fastpref.trainer  # noqa: F401
    else:
        from trl import RewardTrainer, RLOOTrainer  # noqa: F401


class Judge:
    """The starting model, which samples the pairs and is what policies are compared to."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.tokenizer = AutoTokenizer.from_pretrained(settings["model"])
        load = AutoModelForCausalLM.from_pretrained
        self.start = load(settings["model"], dtype=torch.float32).eval()
        self.policy = load(settings["model"], dtype=torch.float32).eval()
        models = self.start, self.policy
        heads = [model.get_output_embeddings() for model in models]
        self.products = choose_layers(models, heads=heads)  # judging is no part of what is timed
        tasks = rlhf_task.read_tasks
        self.tasks, self.held_out = tasks(settings["train"]), tasks(settings["held_out"])

    def pairs(self, job: dict[str, Any]) -> dict[str, Any]:
        """Pairs of the training prompts and of the held-out ones, in files of a folder."""
        found: dict[str, Any] = {}
        tokens = self.settings["tokens"]
        for name, tasks in (("pairs", self.tasks), ("held_out_pairs", self.held_out)):
            seed = job["seed"] + (10_000 if name == "held_out_pairs" else 0)
            made, found[name] = rlhf_task.make_pairs(
                self.start, self.tokenizer, tasks, tokens=tokens, seed=seed
            )
            found[name]["path"] = write_lines(Path(job["folder"]) / f"{name}.jsonl", made)
        return found

    def count(self) -> float:
        """FLOPs of sampling one pair, measured on some of the prompts."""
        few, total = self.tasks[:32], FlopCounter()
        total.start()
        rlhf_task.sample(self.start, self.tokenizer, few, tokens=self.settings["tokens"], copies=2)
        total.stop()
        return total.flops / len(few)

    def judge(self, job: dict[str, Any]) -> dict[str, float]:
        """The policy of a file of weights; of none, the starting model."""
        if job["path"] is not None:
            self.policy.load_state_dict(torch.load(job["path"], weights_only=True))
            Path(job["path"]).unlink()
        torch.manual_seed(job["seed"])
        policy = self.start if job["path"] is None else self.policy
        options = {"tokens": self.settings["tokens"], "copies": self.settings["answers"]}
        with self.products.attached():
            return rlhf_task.judge(policy, self.start, self.tokenizer, self.held_out, **options)


def answer(settings: Settings, say: Callable[[dict[str, Any]], None]) -> None:
    """The whole worker: job after job, until stdin ends."""
    if settings["threads"]:
        torch.set_num_threads(settings["threads"])
    if settings["stage"] == "judge":
        judge = Judge(settings)
        jobs: dict[str, Callable[[dict[str, Any]], Any]] = {
            "pairs": judge.pairs,
            "judge": judge.judge,
            "count": lambda job: judge.count(),
        }
    else:
        jobs = {
            "train": lambda job: train(settings, job),
            "count": lambda job: count(settings, job),
        }
    for line in sys.stdin:
        if not line.strip():
            return
        job = json.loads(line)
        say({"result": jobs[job["job"]](job)})
