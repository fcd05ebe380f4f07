"""Run by test_launch.py through `accelerate launch` on CPUs: a training, then one that fails."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import deepspeed_cases
import deepspeed_on_cpu
import fsdp_on_cpu
import launching
import tiny
import torch
from datasets import disable_progress_bars
from transformers import AutoModelForCausalLM

from fastpref import PreferenceConfig, PreferenceTrainer


class Failing(PreferenceTrainer):
    """Raises an error in the second step of the last process."""

    def training_step(self, *args, **kwargs):
        if self.state.global_step == 1 and self.args.process_index == self.args.world_size - 1:
            Path(sys.argv[1], "failed").write_text(str(time.time()))
            raise ValueError("row 17 cannot be read")
        return super().training_step(*args, **kwargs)


def train(kind: type[PreferenceTrainer], folder: Path, name: str) -> PreferenceTrainer:
    config = PreferenceConfig(
        str(folder / "out"), max_steps=3, per_device_train_batch_size=2, bf16=False, use_cpu=True,
        logging_steps=1, save_strategy="no", disable_tqdm=True, gradient_checkpointing=False,
        prefix_sharing=True,
    )  # fmt: skip
    # transformers divides what it loads for ZeRO-3, as the arguments are there.
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    t = kind(
        model, args=config, train_dataset=tiny.rows(12),
        processing_class=tiny.tokenizer(),
    )  # fmt: skip
    t.train()
    t.save_model(str(folder / name))
    return t


def main(folder: Path, fails: bool) -> None:
    launching.limit()
    torch.set_num_threads(1)
    disable_progress_bars()
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        fsdp_on_cpu.enable_launched()
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        deepspeed_on_cpu.enable_launched()
    t = train(PreferenceTrainer, folder, "trained")
    more = {}
    if t.is_deepspeed_enabled:
        more["adapter"] = deepspeed_cases.adapter(folder, t.args.world_size)
        more["half"] = deepspeed_cases.half(folder)
    if t.is_world_process_zero():
        found = {
            "losses": [line["loss"] for line in tiny.history(t)],
            "kind": str(t.accelerator.distributed_type),
            "processes": t.args.world_size,
            **more,
        }
        (folder / "found.json").write_text(json.dumps(found))
    if fails:
        train(Failing, folder, "failing")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2] == "fails")
