"""A model's attention is switched for a step: checkpointing, adapters, autocast, what stays."""

from __future__ import annotations

import contextlib
import json
import threading

import pytest
import torch

pytest.importorskip("transformers")

import families  # noqa: E402
import tiny  # noqa: E402
from test_families import logits_and_gradients, make, pairs  # noqa: E402
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS  # noqa: E402

from fastpref.attention import (  # noqa: E402
    UnsupportedAttention,
    check_attention,
    unsupported_reason,
)
from fastpref.attention.switch import FUNCTION, MASK, NAME, SegmentAttention  # noqa: E402
from fastpref.data import PreferenceCollator  # noqa: E402
from fastpref.data.batches import model_inputs  # noqa: E402
from fastpref.data.segments import SegmentCollator  # noqa: E402
from fastpref.heads import install_head_forward  # noqa: E402

BATCH = SegmentCollator(0, packing=True)


def close(expected, found, logits=2e-5, gradients=1e-5):
    assert (expected[0] - found[0]).abs().max().item() < logits
    assert (expected[1] - found[1]).norm().item() < gradients * expected[1].norm().item()


@pytest.mark.parametrize("way", [FUNCTION, MASK])
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(way, reentrant):
    model = make("qwen2", torch.float32, use_sliding_window=True, max_window_layers=1).train()
    expected = logits_and_gradients(model, PreferenceCollator(0)(pairs()), None)
    model.enable_input_require_grads()
    families.enable_checkpointing(model, reentrant)
    close(expected, logits_and_gradients(model, BATCH(pairs()), SegmentAttention(model, way)))


@pytest.mark.parametrize("reentrant", [False, True])
def test_lora(reentrant):
    from peft import get_peft_model

    model = get_peft_model(make("llama", torch.float32), tiny.lora(init_lora_weights=False))
    expected = logits_and_gradients(model, PreferenceCollator(0)(pairs()), None)
    model.train()
    model.enable_input_require_grads()
    families.enable_checkpointing(model, reentrant)
    close(expected, logits_and_gradients(model, BATCH(pairs()), SegmentAttention(model)))


def test_bf16_autocast():
    model = make("llama", torch.float32)
    install_head_forward(model)

    def autocast():
        return torch.autocast("cpu", torch.bfloat16)

    check_attention(model, pairs(), PreferenceCollator(0), BATCH, autocast)
    exact = logits_and_gradients(model, PreferenceCollator(0)(pairs()), None)
    with autocast():
        plain = logits_and_gradients(model, PreferenceCollator(0)(pairs()), None)
        found = logits_and_gradients(model, BATCH(pairs()), SegmentAttention(model))
    error, own = ((exact[1] - each[1]).norm().item() for each in (found, plain))
    assert error < 1.5 * own


@pytest.mark.parametrize("way", [FUNCTION, MASK])
def test_nothing_stays(way, tmp_path):
    model = make("gemma3_text", torch.float32)
    before = model.config._attn_implementation
    masks = {name: ALL_MASK_ATTENTION_FUNCTIONS[name] for name in ("sdpa", "eager")}
    attention, batch = SegmentAttention(model, way), BATCH(pairs())
    with attention.rows_of(batch), attention.rows_of(batch):
        model(**model_inputs(batch), use_cache=False)
        model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text("utf-8"))
    assert NAME not in json.dumps(saved)
    assert model.config._attn_implementation == before
    assert all(ALL_MASK_ATTENTION_FUNCTIONS[name] is masks[name] for name in masks)
    ids = torch.arange(2, 12)[None]
    assert model.generate(ids, max_new_tokens=2, do_sample=False).shape == (1, 12)
    with pytest.raises(ZeroDivisionError), attention.rows_of(batch):
        raise ZeroDivisionError
    assert model.config._attn_implementation == before


@pytest.mark.parametrize("way", [FUNCTION, MASK])
def test_two_models_compute_rows_at_once(way):
    """Two trainers in two threads: each model has the plan of its own rows."""
    masks = {name: ALL_MASK_ATTENTION_FUNCTIONS[name] for name in ("sdpa", "eager")}
    models = [make("gemma3_text", torch.float32) for _ in range(2)]
    batches = [BATCH(pairs()), BATCH(pairs()[:1])]
    other = make("gemma3_text", torch.float32)  # has no rows of segments
    plain = other(torch.arange(2, 12)[None]).logits

    def logits(i):
        return models[i](**model_inputs(batches[i]), use_cache=False).logits

    def alone(i):
        with SegmentAttention(models[i], way).rows_of(batches[i]):
            return logits(i)

    expected = [alone(0), alone(1)]
    # The first ends before the second.
    with contextlib.ExitStack() as first, contextlib.ExitStack() as second:
        first.enter_context(SegmentAttention(models[0], way).rows_of(batches[0]))
        second.enter_context(SegmentAttention(models[1], way).rows_of(batches[1]))
        assert torch.equal(logits(0), expected[0])
        assert torch.equal(other(torch.arange(2, 12)[None]).logits, plain)
        first.close()
        assert torch.equal(logits(1), expected[1])
    assert all(ALL_MASK_ATTENTION_FUNCTIONS[name] is masks[name] for name in masks)


def test_two_threads_whose_models_share_a_config_are_refused():
    model, batch, errors = make("llama", torch.float32), BATCH(pairs()), []

    def second():
        try:
            with SegmentAttention(model).rows_of(batch):
                pass
        except RuntimeError as error:
            errors.append(str(error))

    with SegmentAttention(model).rows_of(batch):
        thread = threading.Thread(target=second)
        thread.start()
        thread.join()
        assert model.config._attn_implementation == NAME
    assert len(errors) == 1 and "share one config train at once in two threads" in errors[0]
    second()
    assert len(errors) == 1


def test_other_batches_are_left_alone():
    model = make("llama", torch.float32)
    batch = PreferenceCollator(0)(pairs())
    with SegmentAttention(model).rows_of(batch):
        assert model.config._attn_implementation != NAME


def test_masks_that_are_not_causal_are_refused(monkeypatch):
    """A prefix seen in both directions, and a window that is wider than the first pair."""
    model = make("llama", torch.float32)
    install_head_forward(model)
    import transformers.models.llama.modeling_llama as llama
    from transformers.masking_utils import create_causal_mask

    def prefix(*args, **kwargs):
        def both(b, h, q, kv):
            return kv < 100

        return create_causal_mask(*args, **kwargs, or_mask_function=both)

    monkeypatch.setattr(llama, "create_causal_mask", prefix)
    with pytest.raises(UnsupportedAttention, match="neither causal nor a sliding window"):
        check_attention(model, pairs(), PreferenceCollator(0), BATCH)


def test_attention_dropout_is_refused():
    model = make("llama", torch.float32, attention_dropout=0.5).train()
    for module in model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.5
    batch = BATCH(pairs())
    with (
        pytest.raises(UnsupportedAttention, match="dropout of 0.5"),
        SegmentAttention(model).rows_of(batch),
    ):
        model(**model_inputs(batch), use_cache=False)


def test_another_attention_than_the_checked_one_is_refused():
    """A dense mask reaches no other attention, and a window that masks do not have no query."""
    model = make("falcon", torch.float32)
    attention = SegmentAttention(model, MASK)
    model.config._attn_implementation_internal = "flash_attention_2"
    with (
        pytest.raises(UnsupportedAttention, match="a dense mask does not serve flash_attention_2"),
        attention.on(BATCH(pairs())["segments"]),
    ):
        pass
    model = make("qwen2", torch.float32, use_sliding_window=True, max_window_layers=1)
    model.model.layers[1].self_attn.sliding_window = 3
    batch = BATCH(pairs())
    with (
        pytest.raises(UnsupportedAttention, match="a sliding window of 3 and masks of"),
        SegmentAttention(model).rows_of(batch),
    ):
        model(**model_inputs(batch), use_cache=False)


def test_adapters_that_read_rows_are_refused():
    """A new adapter changes nothing yet, so that a comparison would not show what it reads."""
    from peft import PromptTuningConfig, get_peft_model

    def reason(config):
        return unsupported_reason(get_peft_model(make("llama", torch.float32), config))

    assert reason(tiny.lora()) is None
    called = tiny.lora(alora_invocation_tokens=[3], task_type="CAUSAL_LM")
    assert "once in a row" in reason(called)
    prompt = PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")
    assert "virtual tokens" in reason(prompt)
    other = get_peft_model(make("llama", torch.float32), tiny.lora())
    other.peft_config["default"].peft_type = "LILY"  # its router's means are over all tokens
    assert "LILY is not known to treat every token by itself" in unsupported_reason(other)


def test_a_comparison_that_fails_is_a_reason():
    model = make("llama", torch.float32)
    install_head_forward(model)
    model.get_input_embeddings().forward = None  # whatever raises
    with pytest.raises(UnsupportedAttention, match="cannot be compared with rows of segments: Ty"):
        check_attention(model, pairs(), PreferenceCollator(0), BATCH)
