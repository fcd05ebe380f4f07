"""A tiny model, tokenizer and preference data for the trainer's tests. Skips them where what it is
made with is not installed."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
import torch

for needed in ("transformers", "datasets", "accelerate", "peft"):
    pytest.importorskip(needed)

from datasets import Dataset  # noqa: E402
from tokenizers import Tokenizer, models, pre_tokenizers  # noqa: E402
from transformers import (  # noqa: E402
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    TrainerCallback,
    TrainingArguments,
)

from fastpref.trainer import PreferenceTrainer  # noqa: E402
from fastpref.trainer.config import PreferenceConfig  # noqa: E402

WORDS = [f"w{i}" for i in range(180)]
TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }} </s> {% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)


def tokenizer(**kwargs: Any) -> PreTrainedTokenizerFast:
    special = ["<pad>", "</s>", "<unk>", "<user>", "<assistant>", "<system>"]
    vocabulary = {word: i for i, word in enumerate(special + WORDS)}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.add_special_tokens(special)
    options = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>", **kwargs}
    return PreTrainedTokenizerFast(tokenizer_object=core, chat_template=TEMPLATE, **options)


def checkpointing(on: bool) -> dict[str, bool | None]:
    """The option of TRL's configs, under its new name where this transformers has renamed it."""
    if "activation_checkpointing" in TrainingArguments.__dataclass_fields__:
        return {"activation_checkpointing": on, "gradient_checkpointing": None}
    return {"gradient_checkpointing": on}


def model(seed: int = 0, **kwargs: Any) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    options = {
        "vocab_size": 200,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "initializer_range": 0.2,  # far from uniform, so that entropies and accuracies differ
        "pad_token_id": 0,
        "eos_token_id": 1,
        "bos_token_id": None,
        **kwargs,
    }
    return LlamaForCausalLM(LlamaConfig(**options))


def rows(n: int = 40, seed: int = 0, chat: bool = False, longest: int = 12) -> list[dict]:
    draw = random.Random(seed)

    def text() -> str:
        return " ".join(draw.choices(WORDS, k=draw.randint(2, longest)))

    out = []
    for _ in range(n):
        prompt, chosen, rejected = text(), text(), text()
        if chat:
            out.append(
                {
                    "prompt": [{"role": "user", "content": prompt}],
                    "chosen": [{"role": "assistant", "content": chosen}],
                    "rejected": [{"role": "assistant", "content": rejected}],
                }
            )
        else:
            out.append({"prompt": prompt + " ", "chosen": chosen, "rejected": rejected})
    return out


def data(n: int = 40, **kwargs: Any) -> Dataset:
    return Dataset.from_list(rows(n, **kwargs))


def config(tmp_path, **kwargs):
    options = {
        "output_dir": str(tmp_path / "out"),
        "max_steps": 4,
        "logging_steps": 1,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-3,
        "bf16": False,
        "use_cpu": True,
        "gradient_checkpointing": False,
        "save_strategy": "no",
        "disable_tqdm": True,
    }
    return PreferenceConfig(**{**options, **kwargs})


def trainer(tmp_path, policy=None, train=None, args=None, **kwargs):
    """A trainer; its own arguments and a PreferenceConfig's go in together, without `args`."""
    own = (
        "ref_model",
        "eval_dataset",
        "callbacks",
        "peft_config",
        "data_collator",
        "compute_metrics",
        "loss_function",
    )
    own = {key: kwargs.pop(key) for key in own if key in kwargs}
    return PreferenceTrainer(
        model=model() if policy is None else policy,
        args=config(tmp_path, **kwargs) if args is None else args,
        train_dataset=rows() if train is None else train,
        processing_class=tokenizer(),
        **own,
    )


def lora(**kwargs):
    from peft import LoraConfig

    return LoraConfig(**{"r": 4, "target_modules": ["q_proj", "v_proj"], **kwargs})


def history(t, key="loss"):
    return [h for h in t.state.log_history if key in h]


def same(a, b, keys=("loss", "grad_norm", "rewards/margins", "logps/chosen"), tol=1e-5):
    assert len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        for key in keys:
            assert math.isclose(x[key], y[key], rel_tol=tol, abs_tol=tol), (key, x[key], y[key])


class Kill(TrainerCallback):
    """Ends a run after a step, as Ctrl-C does."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt
