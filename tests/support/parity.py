"""What runs that are held to TRL's have in common: the numbers that are compared, and options."""

from __future__ import annotations

import tiny

KEYS = [
    "loss", "grad_norm", "learning_rate", "num_tokens", "entropy", "mean_token_accuracy",
    "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies",
    "logps/chosen", "logps/rejected", "logits/chosen", "logits/rejected",
]  # fmt: skip


def options(tmp_path, **kwargs):
    return {
        "output_dir": str(tmp_path),
        "max_steps": 20,
        "logging_steps": 1,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-3,
        "bf16": False,
        "use_cpu": True,
        "max_length": 20,
        **tiny.checkpointing(False),
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        **kwargs,
    }
