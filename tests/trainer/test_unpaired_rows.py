"""Packing of single answers leaves losses, the KL term, metrics and weights as they are."""

from __future__ import annotations

import pytest
import test_unpaired_trainer as unpaired
import tiny
from test_rows import outcome, same

from fastpref.data.collate import UnpairedCollator
from fastpref.data.packing import PARTS
from fastpref.data.segments import PLAN, UnpairedSegmentCollator
from fastpref.trainer import UnpairedPreferenceTrainer


def run(tmp_path, name, **options):
    options = {"learning_rate": 1e-3, "adam_epsilon": 1e-5, **options}  # gradients are small
    return outcome(tmp_path, name, unpaired.trainer, unpaired.rows, **options)


CASES = {
    "kto": ({}, {"tokens_per_batch": 40}),
    "precompute": (
        {"precompute_ref_log_probs": True, "gradient_accumulation_steps": 2, "max_length": 14,
         "desirable_weight": 1.3, "undesirable_weight": 0.4},
    ),
    "apo": (
        {"loss_type": "apo_zero_unpaired", "peft_config": tiny.lora(), "learning_rate": 1e-2,
         "gradient_checkpointing": True},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_the_training_is_the_same(tmp_path, case):
    options, *parts = CASES[case]
    expected = run(tmp_path, "separate", **options)
    assert type(expected[3].data_collator) is UnpairedCollator
    assert (max(line.get("kl", 0) for line in expected[0]) > 1e-3) == (case != "apo")
    for i, part in enumerate([{}, *parts]):
        found = run(tmp_path, str(i), packing=True, **options, **part)
        assert type(found[3].data_collator) is UnpairedSegmentCollator
        same(expected, found)


def test_rows_of_answers_and_of_mismatched_ones():
    data, _ = unpaired.prepared(unpaired.rows(4), mismatch=4)
    plain, batch = UnpairedCollator(0, 12)(data), UnpairedSegmentCollator(0, 12)(data)
    for prefix in ("", "KL_"):
        at = plain[f"{prefix}token_indices"]
        assert batch[f"{prefix}labels"].tolist() == plain[f"{prefix}labels"].flatten()[at].tolist()
        width = plain[f"{prefix}input_ids"].shape[1]
        assert batch[f"{prefix}sequence_ids"].tolist() == (at // width).tolist()
        row, size = batch[f"{prefix}input_ids"], int(plain[f"{prefix}attention_mask"].sum())
        assert row.shape == (1, size) and len(batch[f"{prefix}{PLAN}"].rows[0]) == 4
    collator = UnpairedSegmentCollator(0)
    for example in data:
        sizes = [len(example[f"{key}completion_ids"]) for key in ("", "KL_")]
        assert collator.tokens(example) == len(example["prompt_ids"]) + max(sizes)


def test_the_kl_term_is_asked_for_once_a_batch(tmp_path, monkeypatch):
    """Each part's two rows go through the reference once, and its mismatched row the policy."""
    asked = []
    original = UnpairedPreferenceTrainer._log_ratios

    def estimate(self, model, inputs):
        asked.append(len(inputs["label"]))
        return original(self, model, inputs)

    monkeypatch.setattr(UnpairedPreferenceTrainer, "_log_ratios", estimate)
    t = unpaired.trainer(
        tmp_path, packing=True, tokens_per_batch=40, per_device_train_batch_size=8, max_steps=1
    )
    (batch, *_) = t.get_train_dataloader()
    t.train()
    assert len(batch[PARTS]) > 1 and asked == [len(part["label"]) for part in batch[PARTS]]
    assert t._parts == () and t._part_index == 0
    with pytest.raises(ValueError, match="^packing: got True, expected False: data_collator is o"):
        UnpairedPreferenceTrainer(
            tiny.model(),
            args=unpaired.config(tmp_path, packing=True),
            train_dataset=unpaired.rows(),
            processing_class=tiny.tokenizer(),
            data_collator=lambda rows: {},
        )
