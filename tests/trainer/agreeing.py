"""Run by two_processes.py in each of two processes: an evaluation before the training."""

from pathlib import Path

import tiny

WAYS = {
    "copy": {},
    "precomputed": {"precompute_ref_log_probs": True},
    "model": {"ref_model": "a model"},
    "adapter": {"peft_config": "an adapter"},
    "best checkpoint loaded": {
        "eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2,
        "load_best_model_at_end": True,
    },
}  # fmt: skip


def agreed(path: Path) -> dict[str, list[float]]:
    """For every way in which a reference can be had, the sums of the weights after the training."""
    found = {}
    for way, options in WAYS.items():
        options = dict(options)
        if "ref_model" in options:
            options["ref_model"] = tiny.model(seed=5)
        if "peft_config" in options:
            options["peft_config"] = tiny.lora()
        t = tiny.trainer(path / way, eval_dataset=tiny.rows(3, seed=2), max_steps=3, **options)
        t.evaluate()
        t.train()  # which compares the weights of the processes at its end
        found[way] = [float(p.double().sum()) for p in t.model.parameters() if p.requires_grad]
    return found
