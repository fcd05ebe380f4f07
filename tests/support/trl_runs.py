"""TRL's five trainers on a tiny model, for the tests that run them with and without the patch, and
the options of those that are held to another trainer."""

from __future__ import annotations

import math

import tiny
from datasets import Dataset
from trl import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    KTOConfig,
    KTOTrainer,
    RLOOConfig,
    RLOOTrainer,
    SFTConfig,
    SFTTrainer,
)


def options(tmp_path, **kwargs):
    """What every trainer is given, and PreferenceTrainer where it is held to one of them."""
    return {
        "output_dir": str(tmp_path),
        "max_steps": 2,
        "logging_steps": 1,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-3,
        "bf16": False,
        "use_cpu": True,
        **tiny.checkpointing(False),
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        **kwargs,
    }


def unpaired():
    rows = []
    for i, row in enumerate(tiny.rows(12)):
        rows.append({"prompt": row["prompt"], "completion": row["chosen"], "label": i % 2 == 0})
    return Dataset.from_list(rows)


def length_reward(completions, **_):
    return [float(len(set(text))) for text in completions]


def generated(**kwargs):
    return {"max_completion_length": 6, "num_generations": 2, "beta": 0.1, **kwargs}


TRAINERS = {
    "dpo": (DPOTrainer, DPOConfig, {"max_length": 20}, tiny.data),
    "dpo-all-outputs": (
        DPOTrainer,
        DPOConfig,
        {"loss_type": ["sigmoid", "ipo"], "loss_weights": [1.0, 0.3], "use_weighting": True},
        tiny.data,
    ),
    "kto": (KTOTrainer, KTOConfig, {"max_length": 20}, unpaired),
    "grpo": (
        GRPOTrainer,
        GRPOConfig,
        generated(top_entropy_quantile=0.5, temperature=0.7),
        lambda: Dataset.from_list([{"prompt": r["prompt"]} for r in tiny.rows(8)]),
    ),
    "rloo": (
        RLOOTrainer,
        RLOOConfig,
        generated(),
        lambda: Dataset.from_list([{"prompt": r["prompt"]} for r in tiny.rows(8)]),
    ),
    "sft": (
        SFTTrainer,
        SFTConfig,
        {"max_length": 20},
        lambda: Dataset.from_list(
            [{"prompt": r["prompt"], "completion": r["chosen"]} for r in tiny.rows(8)]
        ),
    ),
}
UNSTABLE = ("runtime", "per_second", "step_time", "epoch", "completions")


def trained(name, tmp_path, model=None, peft=None, **changed):
    trainer_class, config_class, settings, data = TRAINERS[name]
    path = tmp_path / "model"
    if model is None:
        if not path.exists():
            tiny.model().save_pretrained(str(path))
        model = str(path)
    more = (
        {} if name in ("dpo", "dpo-all-outputs", "kto", "sft") else {"reward_funcs": length_reward}
    )
    trainer = trainer_class(
        model=model,
        args=config_class(**options(tmp_path / "out", **{**settings, **changed})),
        train_dataset=data(),
        processing_class=tiny.tokenizer(),
        peft_config=peft,
        **more,
    )
    trainer.train()
    return [h for h in trainer.state.log_history if "loss" in h]


def assert_same(mine, theirs):
    assert len(mine) == len(theirs) == 2
    compared = 0
    for a, b in zip(mine, theirs, strict=True):
        assert set(a) == set(b)
        for key in a:
            if not any(word in key for word in UNSTABLE):
                assert math.isclose(a[key], b[key], rel_tol=1e-4, abs_tol=2e-5), (key, a, b)
                compared += 1
    assert compared >= 8
