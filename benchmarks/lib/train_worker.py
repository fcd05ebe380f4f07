"""One training run in a process of its own, for train.py: fastpref's trainer or TRL's.

Reads a request as a line of JSON on stdin and answers in lines of JSON on stdout. Between segments
of steps it says {"paused": step} and waits for a line, so that two runs can take turns.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from fastpref.bench.device import peak_resident_bytes, resident_bytes

Say = Callable[[dict[str, Any]], None]


class Turns(TrainerCallback):
    """Times every optimiser step, and hands over to the other run before every segment."""

    def __init__(self, segment: int | None, say: Say) -> None:
        self.segment, self.say = segment, say
        self.seconds: list[float] = []
        self.peaks: list[int] = []
        self.start = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.segment and state.global_step % self.segment == 0:
            self.say({"paused": state.global_step})
            sys.stdin.readline()
        self.start = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seconds.append(time.perf_counter() - self.start)
        self.peaks.append(peak_resident_bytes())
        self.say({"step": state.global_step, "seconds": self.seconds[-1]})


def options(request: dict[str, Any], output_dir: str) -> dict[str, Any]:
    """What both trainers are given; the rest is each one's default, and these are the same."""
    return dict(
        output_dir=output_dir,
        model_init_kwargs={"dtype": request["dtype"]},
        loss_type=request["loss"],
        beta=request["beta"],
        max_length=request["max_length"],
        max_steps=request["steps"],
        per_device_train_batch_size=request["batch"],
        per_device_eval_batch_size=request["batch"],
        learning_rate=request["learning_rate"],
        lr_scheduler_type="linear",
        warmup_steps=request["warmup_steps"],
        gradient_checkpointing=not request["no_checkpointing"],
        bf16=not request["no_autocast"],
        seed=request["seed"],
        precompute_ref_log_probs=request["precompute"],
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        use_cpu=True,
    )


def rows(path: str) -> Any:
    from datasets import Dataset, load_from_disk

    if Path(path).is_dir():
        return load_from_disk(path)
    return Dataset.from_list([json.loads(line) for line in Path(path).read_text().splitlines()])


def adapter(rank: int) -> Any:
    """LoRA on all linear layers of the body; None for rank 0."""
    if not rank:
        return None
    from peft import LoraConfig

    return LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear")


def round_derivatives() -> str:
    """The name of a backend whose derivatives of the logits are rounded to bf16."""
    from fastpref.backends import eager

    project, outer = eager.project, eager.outer
    eager.project = lambda d, weight, out: project(d.bfloat16().to(d.dtype), weight, out)
    eager.outer = lambda d, x, out: outer(d.bfloat16().to(d.dtype), x, out)
    return eager.NAME


def make_trainer(request: dict[str, Any], output_dir: str, turns: Turns) -> tuple[Any, float, int]:
    """The trainer, the seconds that it spent on the reference's log-probs, and the bytes of the
    libraries, the policy's weights and the optimiser's states."""
    spent = [0.0]

    def watched(function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                spent[0] += time.perf_counter() - start

        return call

    given = options(request, output_dir)
    if request["trainer"] == "fastpref":
        import fastpref.reference
        from fastpref import PreferenceConfig, PreferenceTrainer

        fastpref.reference.precompute = watched(fastpref.reference.precompute)
        given |= {"precision": request["precision"], **request["fastpref_options"]}
        if request["rounded_d"]:
            given["backend"] = round_derivatives()
        config = PreferenceConfig(**given)
        make: Any = PreferenceTrainer
    else:
        from trl import DPOConfig, DPOTrainer

        DPOTrainer._precompute_ref_logps = watched(DPOTrainer._precompute_ref_logps)
        config = DPOConfig(**given)
        make = DPOTrainer
    libraries = resident_bytes()
    trainer = make(
        model=request["model"],
        args=config,
        train_dataset=rows(request["train"]),
        eval_dataset=rows(request["held_out"]) if request["held_out"] else None,
        callbacks=[turns],
        peft_config=adapter(request["lora"]),
    )
    floor = libraries
    for parameter in trainer.model.parameters():
        floor += (
            (3 if parameter.requires_grad else 1) * parameter.numel() * parameter.element_size()
        )
    return trainer, spent[0], floor


def keep_weights(model: Any, path: str) -> None:
    """Save the trained weights by name; one that two layers share, once."""
    from safetensors.torch import save_file

    trained = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    save_file({name: p.contiguous() for name, p in trained.items()}, path)


def evaluate(trainer: Any) -> dict[str, float]:
    metrics = trainer.evaluate()
    names = ("loss", "rewards/accuracies", "rewards/margins", "rewards/chosen", "rewards/rejected")
    return {name: metrics[f"eval_{name}"] for name in names} | {
        "logps/chosen": metrics["eval_logps/chosen"],
        "logps/rejected": metrics["eval_logps/rejected"],
        "seconds": round(metrics["eval_runtime"], 2),
    }


def answer(request: dict[str, Any], say: Say) -> None:
    turns = Turns(request["segment"], say)
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        trainer, reference, found["floor_bytes"] = make_trainer(request, folder, turns)
        found["setup_s"] = round(time.perf_counter() - start - reference, 2)
        found["reference_s"] = round(reference, 2)
        found["peak_bytes_after_setup"] = peak_resident_bytes()
        if request["keep_data"]:
            for name, dataset in (
                ("train", trainer.train_dataset),
                ("held_out", trainer.eval_dataset),
            ):
                dataset.save_to_disk(os.path.join(request["keep_data"], name))
        if request["held_out"] and request["before"]:
            say({"stage": "held-out pairs before training"})
            found["held_out_before"] = evaluate(trainer)
        if request["keep_weights"]:
            keep_weights(trainer.model, request["keep_weights"] + ".before")
        say({"stage": "training"})
        trainer.train()
        found["step_s"] = [round(s, 4) for s in turns.seconds]
        found["peak_bytes"] = turns.peaks[-1]
        if request["held_out"]:
            say({"stage": "held-out pairs after training"})
            found["held_out_after"] = evaluate(trainer)
        if request["keep_weights"]:
            keep_weights(trainer.model, request["keep_weights"])
        keys = ("step", "loss", "rewards/margins", "rewards/accuracies", "grad_norm", "num_tokens")
        log = [entry for entry in trainer.state.log_history if "loss" in entry]
        found["log"] = [{k: entry[k] for k in keys if k in entry} for entry in log]
        found["pairs"] = len(trainer.train_dataset)
    say({"result": found})
