"""Trainings that launched.py runs with DeepSpeed on two processes, and test_launch.py on one."""

from pathlib import Path

import tiny
import torch
from safetensors.torch import load_file

FIGURES = ("loss", "grad_norm", "rewards/margins")


def figures(t):
    return [[line[key] for key in FIGURES] for line in tiny.history(t)]


def adapter(folder: Path, processes: int):
    """A LoRA adapter, on the head too, with accumulation, an evaluation and the best checkpoint."""
    found = {}
    for name, checkpoint in (("whole", None), ("resumed", folder / "out" / "checkpoint-2")):
        t = tiny.trainer(
            folder, str(folder / "model"), train=tiny.rows(24),
            peft_config=tiny.lora(
                target_modules=["q_proj", "lm_head"], init_lora_weights=False
            ),
            per_device_train_batch_size=2 // processes, gradient_accumulation_steps=2,
            optim="adamw_torch", max_steps=3, max_grad_norm=0.5,
            save_strategy="steps", save_steps=2, eval_dataset=tiny.rows(3, seed=2),
            eval_strategy="steps", eval_steps=2, per_device_eval_batch_size=2,
            load_best_model_at_end=True,
        )  # fmt: skip
        t.train(resume_from_checkpoint=checkpoint and str(checkpoint))
        found[name] = figures(t)
        found[f"{name} evaluated"] = [line["eval_loss"] for line in tiny.history(t, "eval_loss")]
    t.save_model(str(folder / "adapter"))
    return found


def saved_adapters(folder: Path):
    """The sums of the trained adapter's weights and of the reference's, as PEFT reads them."""
    files = ("adapter_model.safetensors", "ref/adapter_model.safetensors")
    each = [load_file(folder / "adapter" / file) for file in files]
    return [{k: float(v.double().sum()) for k, v in weights.items()} for weights in each]


def half(folder: Path):
    """The margins of a first step in bf16, with a reference in the step and with one ahead."""
    found = []
    for ahead in (False, True):
        t = tiny.trainer(
            folder / str(ahead), str(folder / "model"), train=tiny.rows(8), max_steps=1, bf16=True,
            optim="adamw_torch", precompute_ref_log_probs=ahead,
        )  # fmt: skip
        t.train()
        found.append([line["rewards/margins"] for line in tiny.history(t)])
        assert {p.dtype for p in t.model.parameters()} == {torch.bfloat16}
    return found
