"""The reference store: one directory for every loss, extended by what is missing, and whole."""

from __future__ import annotations

import json
import logging
import os
import signal
import threading
import time

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")

import tiny  # noqa: E402
from store_runs import stored, values  # noqa: E402
from tiny import history, lora, same, trainer  # noqa: E402

from fastpref import UnpairedPreferenceConfig, UnpairedPreferenceTrainer  # noqa: E402
from fastpref.data.segments import SegmentCollator  # noqa: E402
from fastpref.reference import ReferenceStore, part_writer  # noqa: E402
from fastpref.reference import store as stores  # noqa: E402
from fastpref.reference.keys import KEY, sequence_keys  # noqa: E402
from fastpref.trainer import stored_references  # noqa: E402
from fastpref.trainer.ending import Terminated  # noqa: E402

# ---- what is computed ----


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


# ---- files ----


def test_a_damaged_part_is_computed_again(tmp_path, calls, caplog, monkeypatch):
    monkeypatch.setattr(part_writer, "FLUSH_SECONDS", 0.0)
    wanted = values(stored(tmp_path))
    parts = sorted((tmp_path / "store" / "parts").iterdir())
    assert len(parts) == 20
    text = bytearray(parts[7].read_bytes())
    text[len(text) // 2] ^= 1
    parts[7].write_bytes(bytes(text))
    parts[9].write_bytes(parts[9].read_bytes()[:-50])
    parts[11].unlink()
    calls.clear()
    np.testing.assert_allclose(values(stored(tmp_path)), wanted, rtol=1e-5)
    assert sum(calls) == 12 + 6
    assert "its contents are not those that were written; its sequences are com" in caplog.text
    assert len(list((tmp_path / "store" / "damaged").iterdir())) == 2
    calls.clear()
    stored(tmp_path)
    assert sum(calls) == 6


def test_a_damaged_description(tmp_path):
    stored(tmp_path, train=tiny.rows(4))
    file = tmp_path / "store" / "store.json"
    value = json.loads(file.read_text())
    file.write_text(json.dumps({**value, "identity": {**value["identity"], "model": "Other"}}))
    with pytest.raises(ValueError, match="store.json is damaged: its checksum is another"):
        stored(tmp_path, train=tiny.rows(4))
    file.write_text("{")
    with pytest.raises(ValueError, match="store.json is damaged"):
        stored(tmp_path, train=tiny.rows(4))
    file.write_text(json.dumps({**value, "version": 9}))
    with pytest.raises(ValueError, match="has version 9, and this fastpref reads 1"):
        stored(tmp_path, train=tiny.rows(4))


def filled(path, keys, counts, logps):
    s = ReferenceStore(path, {"model": "M"})
    s.create()
    with s.writer() as writer:
        writer.add(keys, counts, logps)
    s.refresh()
    return s


def test_sequences_of_every_length_in_every_order(tmp_path, monkeypatch):
    monkeypatch.setattr(stores, "READ_ROWS", 7)
    draw = np.random.default_rng(0)
    keys = np.frombuffer(draw.bytes(16 * 60), KEY)
    counts = draw.integers(0, 5, 60).astype(np.int32)
    logps = -draw.random(counts.sum()).astype(np.float32)
    pieces = np.split(logps, np.cumsum(counts)[:-1])
    s = filled(tmp_path, keys[:40], counts[:40], np.concatenate(pieces[:40]))
    with s.writer() as writer:  # some of them again
        writer.add(keys[30:], counts[30:], np.concatenate(pieces[30:]))
    assert s.missing(keys).tolist() == [False] * 40 + [True] * 20
    s.refresh()
    assert not s.missing(keys).any() and s.sequences == 60
    chosen = draw.integers(0, 60, 100)
    for found, i in zip(s.token_logps(keys[chosen]), chosen, strict=True):
        assert (found == pieces[i]).all() and len(found) == counts[i]
    sums = [pieces[i].sum() for i in chosen]
    np.testing.assert_allclose(s.sums(keys[chosen]), sums, rtol=1e-6)
    shared = draw.integers(0, 5, 100)
    weighed = [
        pieces[i][:n].sum() + 0.25 * pieces[i][n:].sum()
        for i, n in zip(chosen, shared, strict=True)
    ]
    np.testing.assert_allclose(s.sums(keys[chosen], shared, 0.25), weighed, rtol=1e-5, atol=1e-7)
    with pytest.raises(ValueError, match="lacks 1 of 2 sequences"):
        s.sums(np.concatenate([keys[:1], np.frombuffer(b"x" * 16, KEY)]))


def test_parts_of_another_store_are_left_out(tmp_path):
    keys, counts = np.frombuffer(b"k" * 16, KEY), np.array([1], np.int32)
    s = filled(tmp_path / "a", keys, counts, np.array([-1.0], np.float32))
    (part,) = s.parts.iterdir()
    other = ReferenceStore(tmp_path / "b", {"model": "N"})
    other.create()
    (other.parts / part.name).write_bytes(part.read_bytes())
    assert other.refresh() == {part.name: "it is of another reference"}
    assert other.missing(keys).all()


def test_a_signal_leaves_what_is_computed(tmp_path, calls):
    collator, batches = trainer(tmp_path, prefix_sharing=False).data_collator, []

    def signalling(rows):
        batches.append(len(rows))
        if batches.count(2) == 5:  # rows are looked up in batches of another size
            os.kill(os.getpid(), signal.SIGTERM)
        return collator(rows)

    with pytest.raises(Terminated, match="store keeps: the same command goes on"):
        stored(tmp_path, data_collator=signalling)
    done = sum(calls)
    assert 8 <= done < 80
    calls.clear()
    stored(tmp_path)
    assert sum(calls) == 80 - done + 6


# ---- several runs ----


def test_a_run_waits_for_another_that_writes(tmp_path, calls, caplog, monkeypatch):
    monkeypatch.setattr(stored_references, "WAIT_SECONDS", 0.01)
    caplog.set_level(logging.WARNING, "fastpref")
    other = ReferenceStore(tmp_path / "store", {})
    assert other.try_lock() and not ReferenceStore(tmp_path / "store", {}).try_lock()
    found = []
    run = threading.Thread(target=lambda: found.append(stored(tmp_path, train=tiny.rows(4))))
    run.start()
    deadline = time.monotonic() + 60
    while "whose end this run waits for" not in caplog.text:
        assert time.monotonic() < deadline and run.is_alive()
        time.sleep(0.01)
    assert not calls
    other.release()
    run.join(60)
    assert found and sum(calls) == 8


def test_two_runs_that_write_at_once(tmp_path, monkeypatch):
    """As where a file system has no locks: every part is whole, and each sequence is read once."""
    monkeypatch.setattr(ReferenceStore, "try_lock", lambda self: True)
    monkeypatch.setattr(ReferenceStore, "tidy", lambda self, damaged: None)
    monkeypatch.setattr(part_writer, "FLUSH_SECONDS", 0.0)
    found, errors = [], []

    policies = {name: tiny.model() for name in "ab"}  # not in a thread: they share the seed

    def run(name):
        try:
            store = str(tmp_path / "store")
            t = trainer(tmp_path / name, policies[name], reference_store=store)
            found.append(values(t))
        except Exception as error:  # of a thread, for the assertion below
            errors.append(error)

    threads = [threading.Thread(target=run, args=(name,)) for name in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert not errors and len(found) == 2
    np.testing.assert_allclose(found[0], found[1], rtol=1e-5)
