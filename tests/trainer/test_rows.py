"""Prefix sharing and packing leave losses, metrics and weights as they are."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import tiny
import torch
import torch.nn.functional as F
from tiny import history, trainer

from fastpref.data.segments import SegmentCollator
from fastpref.trainer import PreferenceConfig, PreferenceTrainer

ROWS = {
    "shared": {"prefix_sharing": True},
    "packed": {"prefix_sharing": False, "packing": True},
    "both": {"prefix_sharing": True, "packing": True},
}
TIMES = ("runtime", "per_second", "flos")


def own(pairs):
    """A loss of one's own, which compares the pairs of a batch and reads their lengths."""
    gain = pairs.beta * (pairs.chosen - pairs.rejected)
    longer = pairs.chosen_lengths / (pairs.chosen_lengths + pairs.rejected_lengths)
    return F.softplus(gain.mean().detach() - gain) * longer


LOSSES = {
    "dpo": {},
    "ipo": {"loss_type": "ipo"},
    "token": {"loss_type": "simpo"},
    "ld": {"ld_alpha": 0.3},
    "wpo": {"use_weighting": True},
    "own": {"loss_function": own},
    "nll": {"loss_type": "orpo", "nll_on_prompt": True},
    "precompute": {"precompute_ref_log_probs": True},
    "truncated": {"max_length": 14, "truncation_mode": "keep_end"},
    "checkpointing": {"gradient_checkpointing": True, "gradient_accumulation_steps": 2},
}


def outcome(tmp_path, name, make=trainer, rows=tiny.rows, **options):
    """The figures of a run of 8 steps with evaluations, its weights, and predictions.

    With Adam's usual epsilon, weights whose gradient is rounding alone take steps of full length.
    """
    options = {"adam_epsilon": 1e-6, **options}
    t = make(
        tmp_path / name, max_steps=8, eval_dataset=rows(10, seed=3), eval_strategy="steps",
        eval_steps=4, **options,
    )  # fmt: skip
    t.train()
    figures = [
        {k: v for k, v in line.items() if not any(part in k for part in TIMES)}
        for line in t.state.log_history
        if "train_loss" not in line
    ]
    weights = {k: v.detach() for k, v in t.model.state_dict().items()}
    rewards = np.zeros(1)
    if not t.precompute:  # there is no reference for other rows
        rewards = t.predict(rows(6, seed=4)).predictions
    return figures, weights, rewards, t


def same(expected, found):
    assert len(expected[0]) == len(found[0])
    for a, b in zip(expected[0], found[0], strict=True):
        assert a.keys() == b.keys()
        for key, value in a.items():
            assert b[key] == pytest.approx(value, rel=1e-5, abs=1e-5), key
    for key, value in expected[1].items():
        torch.testing.assert_close(found[1][key], value, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(found[2], expected[2], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("loss", LOSSES)
def test_the_training_is_the_same(tmp_path, loss):
    options = LOSSES[loss]
    expected = outcome(tmp_path, "separate", prefix_sharing=False, **options)
    # Each kind of rows with the plain loss, and both together with the others.
    for name in ROWS if loss == "dpo" else ["both"]:
        found = outcome(tmp_path, name, **ROWS[name], **options)
        assert isinstance(found[3].data_collator, SegmentCollator)
        same(expected, found)
    if loss == "dpo":
        assert found[0][0]["rewards/margins"] == 0
        parts = outcome(tmp_path, "parts", **ROWS["both"], tokens_per_batch=30, **options)
        same(expected, parts)


def test_an_adapter(tmp_path):
    runs = [
        outcome(tmp_path, str(i), peft_config=tiny.lora(), learning_rate=1e-2, **rows)
        for i, rows in enumerate(({"prefix_sharing": False}, ROWS["both"]))
    ]
    same(*runs)


def test_sharing_is_chosen_by_the_data(tmp_path, caplog):
    caplog.set_level(logging.INFO, "fastpref")
    long = [{**row, "prompt": " ".join(tiny.WORDS[:40]) + " "} for row in tiny.rows()]
    t = trainer(tmp_path, train=long, max_steps=1)
    assert t.data_collator.sharing and not t.data_collator.packing
    assert "leaves out 4" in caplog.text
    short = [{**row, "prompt": "w1 "} for row in tiny.rows()]
    assert not isinstance(trainer(tmp_path, train=short).data_collator, SegmentCollator)
    t.train()
    assert t.model.config._attn_implementation == "sdpa" and history(t)


def test_what_does_not_go_together_is_said(tmp_path, caplog):
    caplog.set_level(logging.INFO, "fastpref")
    with pytest.raises(ValueError, match="^prefix_sharing: got True, expected False: NEFTune"):
        trainer(tmp_path, prefix_sharing=True, neftune_noise_alpha=5.0)
    with pytest.raises(ValueError, match="^packing: got True, expected False: dropout"):
        trainer(tmp_path, packing=True, disable_dropout=False)
    with pytest.raises(ValueError, match="^tokens_per_batch is 64 with packing=False; expected"):
        trainer(tmp_path, tokens_per_batch=64)
    for options in ({"loss_type": "aot"}, {"nll_weight": 0.5}):
        with pytest.raises(ValueError, match="tokens_per_batch, the loss must be a mean over p"):
            trainer(tmp_path, packing=True, tokens_per_batch=64, **options)
    with pytest.raises(ValueError, match="data_collator is one of your own"):
        trainer(tmp_path, packing=True, data_collator=lambda rows: {})
    t = trainer(tmp_path, disable_dropout=False)
    assert not isinstance(t.data_collator, SegmentCollator)
    assert "prefix sharing is off: dropout" in caplog.text
    with pytest.raises(ValueError, match="^prefix_sharing is 'no'; expected 'auto', True or False"):
        PreferenceConfig(output_dir=str(tmp_path), prefix_sharing="no")


def test_a_batch_in_parts(tmp_path):
    t = trainer(tmp_path, packing=True, tokens_per_batch=40, per_device_train_batch_size=8)
    batches = list(t.get_train_dataloader())
    for batch in batches:
        assert sum(batch["shares"]) == pytest.approx(1)
        assert all(part["input_ids"].shape[1] <= 80 for part in batch["parts"])
        assert sum(len(part["rows"]) for part in batch["parts"]) == 8
    t.args.include_num_input_tokens_seen = "non_padding"
    t.train()
    assert history(t)[0]["rewards/margins"] == 0
    assert t.state.num_input_tokens_seen == sum(
        int(part["attention_mask"].sum()) for batch in batches[:4] for part in batch["parts"]
    )
    with pytest.raises(ValueError, match="weights cannot move in each backward pass"):
        trainer(tmp_path, packing=True, tokens_per_batch=40, optim="lomo")


def test_options_on_a_command_line(tmp_path):
    from transformers import HfArgumentParser

    parser = HfArgumentParser(PreferenceConfig)
    given = ["--output_dir", str(tmp_path), "--prefix_sharing", "false", "--packing", "true"]
    (args,) = parser.parse_args_into_dataclasses(given)
    assert args.prefix_sharing is False and args.packing is True


LONG = [{**row, "prompt": " ".join(tiny.WORDS[:40]) + " "} for row in tiny.rows()]


def test_a_subclass_that_reads_batches_gets_a_row_for_each_answer(tmp_path, caplog):
    class Mine(PreferenceTrainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            assert len(inputs["input_ids"]) == 2 * len(inputs["rows"])
            return super().compute_loss(model, inputs, *args, **kwargs)

    def mine(**options):
        return Mine(
            tiny.model(),
            args=tiny.config(tmp_path, max_steps=1, **options),
            train_dataset=LONG,
            processing_class=tiny.tokenizer(),
        )

    mine().train()
    assert "prefix sharing is off: Mine has a compute_loss of its own" in caplog.text
    assert isinstance(mine(prefix_sharing=True).data_collator, SegmentCollator)


def test_models_that_change_tokens_by_rows_are_not_shared(tmp_path, caplog):
    """Compiled ones would be compiled for every batch."""
    compiled, noisy = tiny.model(), tiny.model()
    layer = compiled.model.layers[0]
    layer._compiled_call_impl = layer._call_impl  # as layer.compile() sets it
    noisy.model.layers[0].router_jitter_noise = 0.1
    for policy, reason in ((compiled, "torch_compile"), (noisy, "router_jitter_noise=0.1 would")):
        caplog.clear()
        t = trainer(tmp_path, policy, train=LONG)
        assert not isinstance(t.data_collator, SegmentCollator)
        assert f"prefix sharing is off: {reason}" in caplog.text


def test_the_pair_that_is_compared_has_a_prompt_and_two_answers(tmp_path):
    """A first pair with equal answers would show nothing."""
    equal = {**LONG[0], "prompt": "w1 ", "rejected": LONG[0]["chosen"]}
    t = trainer(tmp_path, train=[equal, *LONG])
    (row,) = t._examples(1)
    assert len(row["prompt_ids"]) > 20 and row["chosen_ids"] != row["rejected_ids"]


def test_a_reference_of_another_class_is_compared(tmp_path, monkeypatch):
    from fastpref.trainer import rows

    class Other(type(tiny.model())):
        pass

    compared = []
    original = rows.check_attention

    def check(model, *args):
        compared.append(type(model))
        return original(model, *args)

    monkeypatch.setattr(rows, "check_attention", check)
    copied = tiny.model()
    trainer(tmp_path, copied, prefix_sharing=True)  # its reference is a copy
    other = tiny.model(seed=1)
    other.__class__ = Other
    trainer(tmp_path, copied, ref_model=other, prefix_sharing=True)
    assert [c.__name__ for c in compared] == ["LlamaForCausalLM"] * 2 + ["Other"]
