"""verify: log-probs against float64, and each fault of a start with its likely cause."""

from __future__ import annotations

import json

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("datasets")

import oracle
from support import tiny

from fastpref.data.collate import PreferenceCollator
from fastpref.quality import logp_paths, verify

ROWS = 24


@pytest.fixture(autouse=True)
def quiet():
    from datasets import disable_progress_bars

    disable_progress_bars()


@pytest.fixture(scope="module")
def tokenizer():
    return tiny.tokenizer()


def run(model=None, data=None, **options):
    options = {"rows": ROWS, "max_length": 64, **options}
    model = tiny.model() if model is None else model
    return verify(model, tiny.rows(ROWS) if data is None else data, tiny.tokenizer(), **options)


def found(result):
    return {finding.check: finding for finding in result.findings}


def test_a_sound_model_and_sound_pairs_have_no_findings():
    result = run()
    assert result.findings == [] and result.exact == "float64" and result.pairs == ROWS
    assert [check.passed for check in result.checks] == [True] * 5
    ours, eager = result.errors["fastpref"], result.errors["eager (float32)"]
    assert 0 < ours.max_nats <= max(2 * eager.max_nats, 1e-4)
    assert result.figures["loss"] == pytest.approx(0.693147, abs=1e-6)
    assert json.dumps(result.as_dict())


def test_the_exact_log_probs_are_those_of_float64(tokenizer):
    model = tiny.model()
    result = PreferenceCollator(0, 64)(
        [{"prompt_ids": [6, 7], "chosen_ids": [8, 9, 10], "rejected_ids": [11]}]
    )
    wide, name = logp_paths.widened(model)
    assert name == "float64"
    with logp_paths.computing_in(name), torch.no_grad():
        exact = logp_paths.plain_logps(wide, result)
        hidden = wide.model(result["input_ids"][:1]).last_hidden_state[0]
        weight = wide.lm_head.weight
    expected = oracle.linear_logps(hidden[1:4], weight.detach(), torch.tensor([8, 9, 10]))
    assert exact.dtype == torch.float64
    assert exact[0] == pytest.approx(float(expected.sum()), abs=1e-10)


@pytest.mark.parametrize("loss, expected", [("ipo", 1.0), ("simpo", None)])
def test_the_first_loss_is_that_of_equal_log_probs(loss, expected):
    result = run(loss_type=loss, beta=0.5)
    assert result.findings == [] and result.figures.get("expected_loss") == expected


def test_trl_is_computed_by_its_own_head():
    pytest.importorskip("trl")
    model = tiny.model()
    before = model.forward
    result = run(model)
    assert result.errors["TRL"].max_nats < 1e-3
    assert model.forward.__func__ is not before and "forward" in model.__dict__  # fastpref's


def test_a_patched_trl_is_left_out():
    pytest.importorskip("trl")
    import fastpref

    fastpref.patch_trl()
    try:
        assert "patch_trl() is active" in run(rows=4).left_out["TRL"]
    finally:
        fastpref.unpatch_trl()


def test_columns_of_another_model_are_named_as_the_cause():
    other = tiny.model(seed=5)
    rows = [{**row, "ref_chosen_logps": -30.0, "ref_rejected_logps": -9.0} for row in tiny.rows(8)]
    finding = found(run(data=rows))["step_zero"]
    assert finding.level == "error" and "probably those of another model" in finding.advice
    assert found(run(ref_model=other, rows=4))["step_zero"].level == "note"


def test_an_adapter_is_compared_with_its_frozen_copy():
    from peft import get_peft_model

    model = get_peft_model(tiny.model(), tiny.lora(init_lora_weights=False))
    result = run(model, rows=8)
    assert result.findings == []
    assert run(peft_config=tiny.lora(), rows=8).findings == []


def shifted(examples):
    batch = PreferenceCollator(0, 64)(examples)
    batch["labels"] = batch["labels"].roll(1, 1)
    batch["token_indices"] = (batch["labels"].flatten() != -100).nonzero().flatten()
    return batch


def test_labels_that_are_shifted_are_found():
    finding = found(run(data_collator=shifted, rows=8))["labels"]
    assert finding.level == "error" and len(finding.rows) == 8


def test_log_probs_that_depend_on_padding_are_found():
    def stretched(module, args, inputs):
        count, width = inputs["input_ids"].shape
        inputs["position_ids"] = (torch.arange(width) * width)[None].expand(count, -1)
        return args, inputs

    model = tiny.model()
    model.model.register_forward_pre_hook(stretched, with_kwargs=True)
    assert "inexact" in found(run(model, rows=8))
