"""Rows of segments in tiny models of many families: exact, or refused."""

from __future__ import annotations

import random

import pytest
import torch

pytest.importorskip("transformers")

import families  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402

from fastpref.attention import UnsupportedAttention, check_attention  # noqa: E402
from fastpref.attention.switch import FUNCTION, MASK, SegmentAttention  # noqa: E402
from fastpref.data import PreferenceCollator  # noqa: E402
from fastpref.data.batches import model_inputs  # noqa: E402
from fastpref.data.segments import PLAN, SegmentCollator  # noqa: E402
from fastpref.heads import disable_dropout, install_head_forward  # noqa: E402

# Name -> options of the config. The windows are shorter than the first pair.
EXACT = {
    "llama": {},
    "qwen2": {"use_sliding_window": True, "max_window_layers": 1},
    "qwen3": {},
    "mistral": {},
    "gemma2": {},
    "gemma3_text": {},
    "phi3": {},
    "gpt2": {},
    "gpt_neox": {},
    "opt": {},
    "falcon": {},
    "gpt_oss": {},
}
DENSE = {"falcon"}  # their layers do not ask the registry of attentions
REFUSED = {
    "bloom": "it takes no position_ids",
    "mamba": "linear_attention",
    "jamba": "linear_attention",
    "bamba": "linear_attention",
    "llama4_text": "chunked_attention",
}
LENGTHS = ((13, 9, 5), (6, 3, 8), (1, 4, 5))


def pairs() -> list[dict[str, list[int]]]:
    draw = random.Random(0)

    def tokens(count: int) -> list[int]:
        return [draw.randrange(2, 60) for _ in range(count)]

    keys = ("prompt_ids", "chosen_ids", "rejected_ids")
    return [dict(zip(keys, map(tokens, sizes), strict=True)) for sizes in LENGTHS]


def make(name: str, dtype: torch.dtype = torch.float64, **options):
    torch.manual_seed(0)
    config = families.config(name, **options)
    # The other experts of gpt-oss have no float64.
    experts = {"experts_implementation": "eager"} if name == "gpt_oss" else {}
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, **experts).to(dtype)
    disable_dropout(model)
    return model.eval()


def logits_and_gradients(model, batch, attention):
    """The logits of the labelled tokens, and every weight's gradient of a loss of them."""
    model.zero_grad()
    if attention is None:  # each sequence alone, without padding
        rows = zip(batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True)
        parts = [
            model(input_ids=ids[:n][None], use_cache=False).logits[0][labels[:n] != -100]
            for ids, mask, labels in rows
            for n in [int(mask.sum())]
        ]
        logits = torch.cat(parts)
        loss = (logits.tanh() * torch.linspace(-1, 1, logits.numel()).view_as(logits)).sum()
        loss.backward()
    else:
        with attention.rows_of(batch):
            out = model(**model_inputs(batch), use_cache=False).logits
            logits = out.flatten(0, 1)[batch["hidden_indices"]]
            loss = (logits.tanh() * torch.linspace(-1, 1, logits.numel()).view_as(logits)).sum()
            loss.backward()
    found = [p.grad.flatten().double() for p in model.parameters() if p.grad is not None]
    return logits.detach(), torch.cat(found)


@pytest.mark.parametrize("name", EXACT)
def test_a_family_is_exact(name, monkeypatch):
    softmax = torch.nn.functional.softmax

    def wide(scores, dim=-1, dtype=None, **options):
        """Eager attentions and routers round to fp32 in a float64 model; here they do not."""
        return softmax(scores, dim, dtype=None if scores.dtype == torch.float64 else dtype)

    monkeypatch.setattr(torch.nn.functional, "softmax", wide)
    for dtype in (torch.float64, torch.float32):
        model = make(name, dtype, **EXACT[name])
        expected = logits_and_gradients(model, PreferenceCollator(0)(pairs()), None)
        way = MASK if name in DENSE else FUNCTION
        for sharing, packing in ((True, True), (True, False), (False, True)):
            batch = SegmentCollator(0, sharing=sharing, packing=packing)(pairs())
            found = logits_and_gradients(model, batch, SegmentAttention(model, way))
            gap = (expected[0] - found[0]).abs().max().item()
            assert gap < (1e-10 if dtype == torch.float64 else 2e-5)
            norm = expected[1].norm().item()
            assert (expected[1] - found[1]).norm().item() < 1e-5 * norm


@pytest.mark.parametrize("name", EXACT)
def test_the_check_finds_the_way(name):
    model = make(name, torch.float32, **EXACT[name])
    install_head_forward(model)
    before = model.config._attn_implementation
    collators = PreferenceCollator(0), SegmentCollator(0, packing=True)
    attention = check_attention(model, pairs(), *collators)
    assert attention.checked and attention.implementation == (MASK if name in DENSE else FUNCTION)
    assert model.config._attn_implementation == before


@pytest.mark.parametrize("name", REFUSED)
def test_a_family_is_refused(name):
    model = make(name, torch.float32)
    install_head_forward(model)
    collators = PreferenceCollator(0), SegmentCollator(0)
    with pytest.raises(UnsupportedAttention, match=f"ForCausalLM cannot .*{REFUSED[name]}"):
        check_attention(model, pairs(), *collators)


@pytest.mark.parametrize("way", [FUNCTION, MASK])
def test_the_check_finds_a_leak(way, monkeypatch):
    """An attention that lets answers see each other is not taken."""
    model = make("llama", torch.float32)
    install_head_forward(model)

    class Leaking(SegmentCollator):
        def __call__(self, examples):
            batch = super().__call__(examples)
            plan = batch[PLAN]
            for tensor in plan.tensors("cpu")[1:2]:
                tensor.zero_()
            plan.rows = tuple((row[0]._replace(stop=row[-1].stop),) for row in plan.rows)
            return batch

    with pytest.raises(UnsupportedAttention, match="log-probs differ by .* nats"):
        check_attention(model, pairs(), PreferenceCollator(0), Leaking(0))
