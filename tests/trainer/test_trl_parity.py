"""The same run with TRL's DPOTrainer and with ours: every logged number, step by step."""

import math
import warnings

import pytest

pytest.importorskip("transformers")
trl = pytest.importorskip("trl")

import tiny  # noqa: E402
from parity import KEYS, options  # noqa: E402

from fastpref.trainer import PreferenceTrainer  # noqa: E402
from fastpref.trainer.config import PreferenceConfig  # noqa: E402


def lora():
    from peft import LoraConfig

    return LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], lora_dropout=0.1)


def run(trainer_class, config_class, model, data, tokenizer, evaluate, peft, settings):
    args = config_class(**settings)
    trainer = trainer_class(
        model=model,
        args=args,
        train_dataset=data,
        eval_dataset=evaluate,
        processing_class=tokenizer,
        peft_config=lora() if peft else None,
    )
    trainer.train()
    return [h for h in trainer.state.log_history if "loss" in h or "eval_loss" in h]


CASES = {
    "dpo": ({"loss_type": "sigmoid"}, False, {}),
    "ipo": ({"loss_type": "ipo"}, False, {}),
    "dpo-lora": ({"loss_type": "sigmoid"}, True, {"chat": True}),
    "ipo-lora": ({"loss_type": "ipo", "beta": 0.3}, True, {}),
    "dpo-precompute-accumulate": (
        {"loss_type": "sigmoid", "precompute_ref_log_probs": True, "max_steps": 6,
         "gradient_accumulation_steps": 2, "logging_steps": 3},
        False,
        {},
    ),
    "ipo-keep-end": ({"loss_type": "ipo", "truncation_mode": "keep_end", "max_length": 9,
                      "max_steps": 6}, False, {}),
}  # fmt: skip


# Every other loss and option of DPOTrainer, for three steps.
SHORT = {
    "hinge": {"loss_type": "hinge"},
    "exo": {"loss_type": "exo_pair", "label_smoothing": 0.01},
    "nca": {"loss_type": "nca_pair"},
    "robust": {"loss_type": "robust", "label_smoothing": 0.1},
    "bco": {"loss_type": "bco_pair"},
    "sppo": {"loss_type": "sppo_hard"},
    "aot": {"loss_type": "aot"},
    "aot-unpaired": {"loss_type": "aot_unpaired", "label_smoothing": 0.1},
    "apo-zero": {"loss_type": "apo_zero"},
    "apo-down": {"loss_type": "apo_down"},
    "discopop": {"loss_type": "discopop"},
    "sft": {"loss_type": "sft"},
    "sigmoid-norm": {"loss_type": "sigmoid_norm", "beta": 2.0},
    "mpo": {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]},
    "js": {"loss_type": "sigmoid", "f_divergence_type": "js_divergence"},
    "alpha": {"loss_type": "ipo", "f_divergence_type": "alpha_divergence"},
    "ld": {"loss_type": "sigmoid", "ld_alpha": 0.3, "precompute_ref_log_probs": True},
    "wpo": {"loss_type": "sigmoid", "use_weighting": True},
}
CASES.update({name: ({**case, "max_steps": 3}, False, {}) for name, case in SHORT.items()})


@pytest.mark.parametrize("name", CASES)
def test_trajectory_equals_trl(name, tmp_path):
    changed, peft, form = CASES[name]
    settings = options(tmp_path, **changed)
    evaluated = "max_steps" in changed and name not in SHORT
    if evaluated:
        settings.update(eval_strategy="steps", eval_steps=3)
    path = str(tmp_path / "model")
    tiny.model().save_pretrained(path)
    evaluate = tiny.data(7, seed=9, **form) if evaluated else None
    data, tokenizer = tiny.data(50, **form), tiny.tokenizer()
    common = (path, data, tokenizer, evaluate, peft, settings)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = run(trl.DPOTrainer, trl.DPOConfig, *common)
    ours = run(PreferenceTrainer, PreferenceConfig, *common)
    assert len(ours) == len(theirs)
    compared = 0
    for mine, his in zip(ours, theirs, strict=True):
        prefix = "eval_" if "eval_loss" in his else ""
        keys = [prefix + key for key in KEYS if prefix + key in his]
        if changed["loss_type"] == "sft":  # ours keeps no reference for it
            keys = [key for key in keys if "rewards" not in key]
        elif settings.get("precompute_ref_log_probs"):  # step 1's ties are broken by rounding
            keys.remove(prefix + "rewards/accuracies")
        for key in keys:
            # Rewards: beta times differences of sums of about 100 nats, which fp32 holds to 1e-5.
            rewards = 1e-5 * max(1.0, settings.get("beta", 0.1))
            absolute = rewards if "rewards" in key else 1e-6 if "logits" in key else 0
            assert math.isclose(mine[key], his[key], rel_tol=1e-4, abs_tol=absolute), (
                key, his["step"], mine[key], his[key],
            )  # fmt: skip
            compared += 1
        assert set(his) - set(mine) <= {"eval_runtime", "eval_model_preparation_time"}
        assert ("nll_loss" in mine) == ("sft" in changed["loss_type"])
    assert compared >= 10 * len(ours)
    if settings["logging_steps"] == 1 and changed["loss_type"] != "sft":
        assert ours[0]["rewards/chosen"] == ours[0]["rewards/rejected"] == 0
