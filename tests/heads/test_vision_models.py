"""Vision-language models in the trainer: text works like a text model's, images are refused."""

from __future__ import annotations

import math

import pytest
import torch

pytest.importorskip("transformers")

import families  # noqa: E402
import oracle  # noqa: E402
import tiny  # noqa: E402
from test_head_adapters import own_sums  # noqa: E402
from test_heads_models import TINY_VISION, vision_language  # noqa: E402
from tiny import history, lora, trainer  # noqa: E402
from transformers import AutoModelForImageTextToText  # noqa: E402


def vision_model(name):
    """With the tokenizer's vocabulary, and without the softcap that Gemma 3's forward ignores."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(families.SMALL, "vocab_size", 200)
        patch.delitem(families.SMALL, "final_logit_softcapping")
        patch.setitem(TINY_VISION["llava"], "image_token_index", 199)
        return vision_language(name)


@pytest.fixture(autouse=True)
def quiet():
    from datasets import disable_progress_bars

    disable_progress_bars()


@pytest.mark.parametrize("name", TINY_VISION)
def test_a_step_on_text_equals_plain_torch(tmp_path, name):
    t = trainer(tmp_path, vision_model(name), prefix_sharing=False)
    with torch.no_grad():
        for parameter in t.model.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    batch = t._prepare_inputs(next(iter(t.get_train_dataloader())))
    t.model.train()
    loss = t.compute_loss(t.model, batch)
    loss.backward()
    found = families.gradients(t.model)
    with torch.no_grad():
        reference = own_sums(t.ref_model, batch)
    expected = oracle.dpo(*(own_sums(t.model, batch) - reference).chunk(2)).mean()
    expected.backward()
    wanted = families.gradients(t.model)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-5)
    names = [n for n, _ in t.model.named_parameters()]
    assert any("vision" in n or "visual" in n for n in names)
    assert set(found) == set(wanted) and len(found) > 10
    for key in wanted:
        size = max(float(wanted[key].abs().max()), 1)
        torch.testing.assert_close(found[key], wanted[key], rtol=0, atol=2e-5 * size)


@pytest.mark.parametrize("name", TINY_VISION)
def test_training_by_name_leaves_the_vision_tower(tmp_path, name):
    path = str(tmp_path / "model")
    vision_model(name).save_pretrained(path)
    t = trainer(tmp_path, path, max_steps=2)
    before = {n: p.clone() for n, p in t.model.named_parameters()}
    t.train()
    assert history(t)[0]["loss"] == pytest.approx(math.log(2))
    moved = {n for n, p in t.model.named_parameters() if not torch.equal(p, before[n])}
    assert any("lm_head" in n or "embed_tokens" in n for n in moved)
    assert not any("vision" in n or "visual" in n for n in moved)
    t.save_model(str(tmp_path / "trained"))
    again = AutoModelForImageTextToText.from_pretrained(str(tmp_path / "trained"))
    for (n, p), q in zip(t.model.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(p, q), n


def test_lora_on_the_text_side(tmp_path):
    t = trainer(tmp_path, vision_model("qwen3_vl"), peft_config=lora(), max_steps=2)
    t.train()
    assert history(t)[0]["rewards/margins"] == 0 and history(t)[1]["rewards/margins"] != 0


def test_images_and_processors_are_refused(tmp_path):
    rows = [{**row, "images": [None]} for row in tiny.rows(4)]
    with pytest.raises(ValueError, match="train data has images, which are not supported"):
        trainer(tmp_path, vision_model("llava"), train=rows)
    from transformers import ProcessorMixin

    from fastpref import PreferenceTrainer

    with pytest.raises(ValueError, match="is a multimodal processor; expected a tokenizer"):
        PreferenceTrainer(
            vision_model("llava"),
            args=tiny.config(tmp_path),
            train_dataset=tiny.rows(4),
            processing_class=ProcessorMixin.__new__(ProcessorMixin),
        )
