"""The reference store: one directory for every loss, extended by what is missing, and whole."""

from __future__ import annotations

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")

import tiny  # noqa: E402
from store_runs import stored, values  # noqa: E402
from tiny import history, lora, same, trainer  # noqa: E402

from fastpref import UnpairedPreferenceConfig, UnpairedPreferenceTrainer  # noqa: E402
from fastpref.data.segments import SegmentCollator  # noqa: E402
from fastpref.reference.keys import sequence_keys  # noqa: E402


def unpaired(tmp_path, **options):
    args = tiny.config(tmp_path, per_device_train_batch_size=4).to_dict()
    names = ("output_dir", "max_steps", "bf16", "use_cpu", "save_strategy", "disable_tqdm")
    args = {name: args[name] for name in (*names, "per_device_train_batch_size", "logging_steps")}
    config = UnpairedPreferenceConfig(**args, gradient_checkpointing=False, **options)
    return UnpairedPreferenceTrainer(
        tiny.model(), args=config, train_dataset=tiny.rows(), processing_class=tiny.tokenizer()
    )


def test_every_loss_reads_one_store(tmp_path, calls):
    ahead = trainer(tmp_path, precompute_ref_log_probs=True, prefix_sharing=False)
    ahead.train()
    first = stored(tmp_path, prefix_sharing=False)
    first.train()
    assert sum(calls) == 80 and first.ref_model is None
    same(history(ahead), history(first))
    assert (values(first) == values(ahead)).all()
    calls.clear()
    for options in (
        {"loss_type": "ipo", "learning_rate": 0.5},
        {"loss_type": "sigmoid", "ld_alpha": 0.3},
        {"peft_config": lora()},
    ):
        again = stored(tmp_path, **options)
        wanted = trainer(tmp_path, precompute_ref_log_probs=True, **options)
        np.testing.assert_allclose(values(again), values(wanted), rtol=1e-6)
    answers = unpaired(
        tmp_path, reference_store=str(tmp_path / "store"), loss_type="apo_zero_unpaired"
    )
    wanted = unpaired(tmp_path, precompute_ref_log_probs=True, loss_type="apo_zero_unpaired")
    columns = ["ref_logps"]
    np.testing.assert_allclose(values(answers, columns), values(wanted, columns), rtol=1e-6)
    assert calls == [6, 6, 6, 3]  # of each, three rows to see that the store fits


def test_rows_of_segments_fill_the_same_store(tmp_path, calls):
    rows = [{**row, "prompt": " ".join(tiny.WORDS[:40]) + " "} for row in tiny.rows(20)]
    found, asked = [], []
    for name, options in (
        ("separate", {"prefix_sharing": False}),
        ("shared", {"prefix_sharing": True}),
        ("packed", {"prefix_sharing": True, "packing": True, "ld_alpha": 0.3}),
    ):
        calls.clear()
        t = stored(tmp_path / name, train=rows, **options)
        asked.append(sum(calls))
        again = stored(tmp_path / name, train=rows, prefix_sharing=False)
        found.append(values(again))
        assert isinstance(t.data_collator, SegmentCollator) == (name != "separate")
    assert asked == [40] * 3
    for other in found[1:]:
        np.testing.assert_allclose(other, found[0], rtol=1e-5)


def test_kto_adds_its_mismatched_answers(tmp_path, calls):
    stored(tmp_path)
    calls.clear()
    columns = ("ref_logps", "ref_KL_logps")
    t = unpaired(tmp_path, reference_store=str(tmp_path / "store"))
    wanted = unpaired(tmp_path, precompute_ref_log_probs=True)
    np.testing.assert_allclose(values(t, columns), values(wanted, columns), rtol=1e-5)
    t.train()
    wanted.train()
    for ours, theirs in zip(history(t), history(wanted), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)


def test_what_is_new_is_computed_alone(tmp_path, calls, caplog):
    stored(tmp_path)
    calls.clear()
    added = [*tiny.rows(), tiny.rows(1, seed=9)[0]]
    t = stored(tmp_path, train=added)
    assert sorted(calls) == [2, 6]  # one row, and three that are checked
    assert "lacks sequences of 1 of 41 rows of train data" in caplog.text
    wanted = trainer(tmp_path, train=added, precompute_ref_log_probs=True)
    np.testing.assert_allclose(values(t), values(wanted), rtol=1e-5)
    calls.clear()
    stored(tmp_path, train=[*added, *added])  # rows that are there twice
    assert calls == [6]
    calls.clear()
    t = stored(tmp_path, max_length=6)  # which cuts an answer of each of these rows
    assert sum(calls) == 2 * len(t.train_dataset)
    calls.clear()
    changed = [{**row, "prompt": "w1 " + row["prompt"]} for row in tiny.rows()]
    stored(tmp_path, train=changed)
    assert sum(calls) == 80


def test_evaluation_data(tmp_path, calls):
    held_out = tiny.rows(6, seed=4)
    t = stored(tmp_path, eval_dataset=held_out)
    assert sum(calls) == 92
    t.train()
    wanted = trainer(tmp_path, eval_dataset=held_out, precompute_ref_log_probs=True)
    wanted.train()
    assert t.evaluate()["eval_loss"] == pytest.approx(wanted.evaluate()["eval_loss"], rel=1e-5)
    # The policy has moved: what the store has can be evaluated, and nothing else.
    assert t.evaluate(held_out)["eval_loss"] == pytest.approx(t.evaluate()["eval_loss"])
    with pytest.raises(ValueError, match="no reference model is kept"):
        t.evaluate(tiny.rows(2, seed=5))


def test_bf16(tmp_path):
    exact = stored(tmp_path)
    half = trainer(tmp_path, bf16=True, reference_store=str(tmp_path / "half"))
    difference = np.abs(values(half) - values(exact))
    assert 0 < difference.max() < 2
    again = trainer(tmp_path, bf16=True, reference_store=str(tmp_path / "half"))
    assert (values(again) == values(half)).all()
    with pytest.raises(ValueError, match="compute dtype bfloat16 instead of none"):
        stored(tmp_path, bf16=True)


def test_a_sequence_has_the_same_key_however_it_is_padded():
    batch = {
        "input_ids": torch.tensor([[5, 6, 7, 0], [5, 6, 8, 9]]),
        "attention_mask": torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]]),
        "completion_mask": torch.tensor([[0, 0, 1, 0], [0, 0, 1, 1]]),
    }
    left = {key: value[:1, [3, 0, 1, 2]] for key, value in batch.items()}
    keys, counts, lengths = sequence_keys(batch)
    assert sequence_keys(left)[0][0] == keys[0] != keys[1]
    assert counts.tolist() == [1, 2] and lengths.tolist() == [3, 4]
    longer = {**batch, "completion_mask": torch.tensor([[0, 1, 1, 0], [0, 0, 1, 1]])}
    assert sequence_keys(longer)[0][0] != keys[0]
    with pytest.raises(ValueError, match="the collator's pixels does not have a value for each"):
        sequence_keys({**batch, "pixels": torch.zeros(5)})
