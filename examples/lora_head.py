"""LoRA on the output layer too, inside the fused head. TRL alone refuses it.

python examples/lora_head.py                           # the tiny model that fastpref ships
python examples/lora_head.py --model NAME_OR_DIR --data pairs.jsonl --output out
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from datasets import load_dataset
from peft import LoraConfig
from trl import DPOConfig, DPOTrainer

import fastpref

DEMO = Path(fastpref.__file__).parent / "assets" / "demo"


def main(argv: list[str] | None = None) -> list[float]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=str(DEMO))
    parser.add_argument("--data", default=str(DEMO / "train.jsonl"))
    parser.add_argument("--output", default=tempfile.gettempdir() + "/fastpref-lora-head")
    parser.add_argument("--steps", type=int, default=20)
    options = parser.parse_args(argv)

    fastpref.patch_trl()  # before the trainer, which would refuse the adapter otherwise
    trainer = DPOTrainer(
        model=options.model,
        args=DPOConfig(
            output_dir=options.output,
            max_steps=options.steps,
            per_device_train_batch_size=4,
            learning_rate=5e-3,
            logging_steps=1,
            bf16=torch.cuda.is_available(),
            save_strategy="no",
            report_to="none",
        ),
        train_dataset=load_dataset("json", data_files=options.data, split="train"),
        peft_config=LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj", "lm_head"]),
    )
    trainer.train()
    for name, parameter in trainer.model.named_parameters():
        if "lm_head" in name and parameter.requires_grad:
            print(f"{name}: norm {parameter.norm():.3f}")
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


if __name__ == "__main__":
    main()
