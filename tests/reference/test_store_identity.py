"""What does not fit a reference store: another model, adapter, dtype, config, or other options."""

from __future__ import annotations

import hashlib
import json

import pytest
import torch

pytest.importorskip("transformers")

import tiny  # noqa: E402
from store_runs import COLUMNS, stored, values  # noqa: E402
from tiny import lora, trainer  # noqa: E402

from fastpref.reference import store as stores  # noqa: E402
from fastpref.reference.identity import describe_reference, identity_differences  # noqa: E402


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda: (tiny.model(seed=1), {}), "of another reference: the model's weights are others"),
        (lambda: (tiny.model().half(), {}), "weights' dtype float16 instead of float32"),
        (lambda: (tiny.model(rope_parameters={"rope_type": "default", "rope_theta": 7.0}), {}),
         "another reference: config's rope_parameters.rope_theta 7.0 instead of 10000.0; run"),
        (lambda: (tiny.model(rms_norm_eps=1e-5), {}), "rms_norm_eps 1e-05 instead of 1e-06"),
    ],
    ids=["weights", "dtype", "positions", "norm"],
)  # fmt: skip
def test_another_model(tmp_path, change, message):
    stored(tmp_path)
    policy, options = change()
    with pytest.raises(ValueError, match=message):
        stored(tmp_path, policy, **options)


def test_another_adapter(tmp_path, calls):
    from peft import get_peft_model

    def trained(seed):
        base = tiny.model()
        torch.manual_seed(seed)
        return get_peft_model(base, lora(init_lora_weights=False))

    stored(tmp_path, trained(3))
    calls.clear()
    stored(tmp_path, trained(3))
    assert calls == [6]
    for policy in (trained(4), tiny.model()):
        with pytest.raises(ValueError, match="adapter"):
            stored(tmp_path, policy)


def test_what_else_a_reference_depends_on():
    """Buffers, as of quantised layers; an adapter's own options; whether it is on."""
    from peft import LoHaConfig, get_peft_model

    def described(model):
        return describe_reference(model, adapter=False, compute_dtype="none", precision="exact")

    plain, quantised = tiny.model(), tiny.model()
    scales = []
    for model, scale in ((plain, 1.0), (quantised, 2.0)):
        model.model.layers[0].register_buffer("scales", torch.tensor([scale]))
        model.model.layers[0].register_buffer("cached", torch.rand(3), persistent=False)
        scales.append(described(model))
    assert identity_differences(*scales) == ["the model's weights are others"]
    assert described(plain) == scales[0] == described(get_peft_model(plain, lora()))

    def adapted(config):
        torch.manual_seed(0)
        return get_peft_model(tiny.model(), config)

    def loha(**options):
        return adapted(LoHaConfig(r=2, init_weights=False, target_modules=["q_proj"], **options))

    first, other = described(loha(alpha=4)), described(loha(alpha=8))
    assert identity_differences(first, other) == ["the adapter's weights or options are others"]
    assert described(loha(alpha=4, module_dropout=0.1)) == first
    off = adapted(lora(init_lora_weights=False))
    off.base_model.disable_adapter_layers()
    assert described(off) == described(tiny.model())


def without_config(path):
    """Give the store the form that earlier versions have written."""
    file = path / "store" / "store.json"
    value = json.loads(file.read_text())
    del value["sha256"], value["identity"]["config"]
    file.write_text(json.dumps({**value, "sha256": stores._checksum(value)}))
    for part in (path / "store" / "parts").iterdir():
        table = stores.pq.read_table(part)
        meta = {**table.schema.metadata, b"reference": stores._mark(value["identity"]).encode()}
        stores.pq.write_table(table.replace_schema_metadata(meta), part)
        digest = hashlib.sha256(part.read_bytes()).hexdigest()
        part.rename(part.with_name(f"{digest}.parquet"))


def test_a_store_that_has_no_config(tmp_path, calls):
    """It is read and extended; the rows that are computed again show another config."""
    t = stored(tmp_path)
    expected, number = values(t), t.reference_store.sequences
    without_config(tmp_path)
    calls.clear()
    t = stored(tmp_path)
    assert (values(t) == expected).all() and calls == [6]
    t.evaluate(tiny.rows(2, seed=5))
    assert stored(tmp_path).reference_store.sequences == number + 4
    other = tiny.model(rope_parameters={"rope_type": "default", "rope_theta": 7.0})
    with pytest.raises(ValueError, match="does not fit this run: rows .* differ by .* a token"):
        stored(tmp_path, other)


def test_a_config_without_effect():
    def described(**options):
        model = tiny.model(**options)
        return describe_reference(model, adapter=False, compute_dtype="none", precision="exact")

    same = described(use_cache=False, attention_dropout=0.5, eos_token_id=3, name_or_path="other")
    assert same == described()
    newer = described()
    newer["config"]["a_key_of_another_version"] = 3
    newer["config"]["rope_parameters"]["a_key_of_another_version"] = 3
    assert not identity_differences(described(), newer)


def test_the_longest_row_is_checked(tmp_path):
    """A narrower window changes the log-probs of long rows alone."""
    from transformers import MistralConfig, MistralForCausalLM

    def policy(window):
        torch.manual_seed(0)
        config = MistralConfig(
            vocab_size=len(tiny.tokenizer()), hidden_size=32, intermediate_size=48,
            num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
            sliding_window=window, initializer_range=1.0,
        )  # fmt: skip
        return MistralForCausalLM(config)

    rows = tiny.rows(longest=4)
    rows[17]["chosen"] = " ".join(tiny.WORDS[:40])
    stored(tmp_path, policy(64), train=rows)
    without_config(tmp_path)
    with pytest.raises(ValueError, match="does not fit this run: rows .*17.* differ"):
        stored(tmp_path, policy(20), train=rows)


def test_a_model_that_has_changed_since_adds_nothing(tmp_path):
    t = stored(tmp_path)
    held = t.reference_store.sequences
    t.evaluate(tiny.rows(2, seed=5))
    assert t.reference_store.sequences == held + 4
    with torch.no_grad():
        t.model.lm_head.weight.mul_(2.0)
    with pytest.raises(ValueError, match="has changed since the trainer was made: the model's we"):
        t.evaluate(tiny.rows(2, seed=6))


def test_what_it_does_not_go_with(tmp_path):
    with pytest.raises(ValueError, match="reference_store is .* but the loss needs no reference"):
        stored(tmp_path, loss_type="simpo")
    with pytest.raises(ValueError, match="reference_store is set, whose log-probs would be"):
        stored(tmp_path, sync_ref_model=True)
    with pytest.raises(ValueError, match="reference_store needs data of known length"):
        stored(tmp_path, train=tiny.data().to_iterable_dataset())
    columns = [{**row, **dict.fromkeys(COLUMNS, -3.0)} for row in tiny.rows(4)]
    with pytest.raises(ValueError, match="the data has columns of reference log-probs"):
        stored(tmp_path, train=columns)
    (tmp_path / "store").mkdir(exist_ok=True)
    (tmp_path / "store" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"has no store.json and holds 'notes.txt'"):
        stored(tmp_path)


def test_reference_columns_are_log_probs(tmp_path):
    rows = [{**row, **dict.fromkeys(COLUMNS, 2.5)} for row in tiny.rows(4)]
    with pytest.raises(ValueError, match="row 0: ref_chosen_logps is 2.5; expected the sum of an"):
        trainer(tmp_path, train=rows)
