"""The probe of the first step: silent where the policy is its reference, else the likely cause."""

from __future__ import annotations

import pytest

pytest.importorskip("transformers")

import tiny  # noqa: E402
from tiny import lora, trainer  # noqa: E402

TEXT = "before any weight moved"
COLUMNS = ("ref_chosen_logps", "ref_rejected_logps")


@pytest.fixture(autouse=True)
def quiet():
    from datasets import disable_progress_bars

    disable_progress_bars()


def columns(tmp_path, shift=0.0, factor=1.0):
    t = trainer(tmp_path, precompute_ref_log_probs=True)
    return [
        {**row, **{c: computed[c] * factor + shift for c in COLUMNS}}
        for row, computed in zip(tiny.rows(), t.train_dataset.to_list(), strict=True)
    ]


@pytest.mark.parametrize(
    "options",
    [
        {"max_steps": 2, "gradient_accumulation_steps": 2},
        {"precompute_ref_log_probs": True, "loss_type": "ipo"},
        {"loss_type": "sigmoid", "f_divergence_type": "js_divergence"},
        {"loss_type": ["sigmoid", "aot", "sppo_hard", "discopop"], "ld_alpha": 0.5},
        {"loss_type": "simpo"},
        {"bf16": True, "precompute_ref_log_probs": True},
        {"ref_model": "another"},  # which need not be what the policy starts as
    ],
)
def test_no_warning(tmp_path, options, caplog):
    options = {"max_steps": 1, **options}
    if "ref_model" in options:
        options["ref_model"] = tiny.model(seed=2)
    trainer(tmp_path, **options).train()
    assert TEXT not in caplog.text


def test_dropout(tmp_path, caplog):
    adapter = lora(lora_dropout=0.5, init_lora_weights=False)
    t = trainer(tmp_path, peft_config=adapter, disable_dropout=False, max_steps=2)
    t.train()
    assert caplog.text.count(TEXT) == 1
    assert "dropout is active (base_model" in caplog.text and "p=0.5; disable_" in caplog.text


def test_noise(tmp_path, caplog):
    trainer(tmp_path, neftune_noise_alpha=20.0, max_steps=1).train()
    assert "neftune_noise_alpha=20 adds noise to the embeddings" in caplog.text


def test_columns(tmp_path, caplog):
    trainer(tmp_path, train=columns(tmp_path), max_steps=1).train()
    assert TEXT not in caplog.text
    trainer(tmp_path, train=columns(tmp_path, shift=-0.1), max_steps=1).train()
    assert "were probably computed in another dtype" in caplog.text
    caplog.clear()
    trainer(tmp_path, train=columns(tmp_path, factor=0.1), max_steps=1).train()
    assert "of another chat template or tokenisation, or means instead of sums" in caplog.text


def test_a_resumed_run_is_not_probed(tmp_path, caplog):
    rows = columns(tmp_path, factor=0.1)
    options = {"train": rows, "save_strategy": "steps", "save_steps": 2}
    trainer(tmp_path, **options).train()
    assert TEXT in caplog.text
    caplog.clear()
    checkpoint = str(tmp_path / "out" / "checkpoint-2")
    trainer(tmp_path, **options).train(resume_from_checkpoint=checkpoint)
    assert TEXT not in caplog.text
