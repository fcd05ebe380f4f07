"""The reference store's files: what is damaged, what is cut short, and several runs that write."""

from __future__ import annotations

import json
import logging
import os
import signal
import threading
import time

import numpy as np
import pytest

pytest.importorskip("transformers")

import tiny  # noqa: E402
from store_runs import stored, values  # noqa: E402
from tiny import trainer  # noqa: E402

from fastpref.reference import ReferenceStore, part_writer  # noqa: E402
from fastpref.reference import store as stores  # noqa: E402
from fastpref.reference.keys import KEY  # noqa: E402
from fastpref.trainer import stored_references  # noqa: E402
from fastpref.trainer.ending import Terminated  # noqa: E402


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

    # Not in a thread: models share the seed, and arguments replace accelerate's state.
    policies = {name: tiny.model() for name in "ab"}
    options = {"reference_store": str(tmp_path / "store")}
    args = {name: tiny.config(tmp_path / name, **options) for name in "ab"}

    def run(name):
        try:
            t = trainer(tmp_path / name, policies[name], args=args[name])
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
