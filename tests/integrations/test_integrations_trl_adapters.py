"""fastpref.patch_trl: adapters on the output layer, which TRL alone refuses."""

from __future__ import annotations

import math
import threading

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("trl")

import tiny  # noqa: E402
from trl.trainer import utils  # noqa: E402
from trl_runs import trained  # noqa: E402

import fastpref  # noqa: E402

pytestmark = [pytest.mark.train, pytest.mark.usefixtures("unpatched")]


HEAD_LORA = {"target_modules": ["q_proj", "lm_head"], "lora_alpha": 16}
ADAPTERS = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "bias": {"lora_bias": True},
    "dora": {"use_dora": True},
}


def adapted(**kwargs):
    peft = pytest.importorskip("peft")
    config = tiny.lora(**{**HEAD_LORA, **kwargs})
    model = peft.get_peft_model(tiny.model(), config)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.1)
        if "magnitude" in name:
            p.data *= torch.rand_like(p) + 0.5
    return model


def fused_and_own(model, labels):
    """The label's log-probs and their gradients from the fused head and from the model's logits."""
    ids = labels.clamp(min=1)
    fused = model(input_ids=ids, labels=labels, fused_lm_head=True).log_probs
    logps = model(input_ids=ids).logits[:, :-1].log_softmax(-1)
    own = logps.gather(-1, ids[:, 1:, None])[..., 0].masked_fill(labels[:, 1:] == -100, 0.0)
    out = []
    for t in (fused, own) if fused.requires_grad else ():
        model.zero_grad()
        t.square().sum().backward()
        out.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    return (fused, own), out


@pytest.mark.parametrize("kind", ADAPTERS)
def test_adapter_on_the_output_layer(kind):
    model = adapted(**ADAPTERS[kind]).eval()
    labels = torch.randint(3, 200, (3, 9))
    labels[0, :5] = -100
    with fastpref.patch_trl():
        utils.add_fused_lm_head(model.get_base_model())
        (fused, own), (mine, theirs) = fused_and_own(model, labels)
        torch.testing.assert_close(fused, own, rtol=1e-5, atol=1e-5)
        assert set(mine) == set(theirs) and any("lm_head" in name for name in mine)
        for name in mine:
            torch.testing.assert_close(mine[name], theirs[name], rtol=1e-4, atol=1e-4, msg=name)
        with model.disable_adapter():
            (fused, own), _ = fused_and_own(model, labels)
            torch.testing.assert_close(fused, own, rtol=1e-5, atol=1e-5)
        if kind == "lora":
            model.add_adapter("second", tiny.lora(**HEAD_LORA))
            model.base_model.set_adapter(["default", "second"])
            (fused, own), _ = fused_and_own(model, labels)
            torch.testing.assert_close(fused, own, rtol=1e-5, atol=1e-5)
    with pytest.raises(RuntimeError, match="patch_trl"):
        model(input_ids=labels.clamp(min=1), labels=labels, fused_lm_head=True)


def test_adapter_dropout_is_applied_in_training():
    model = adapted(lora_dropout=0.5)
    labels = torch.randint(3, 200, (3, 9))
    with fastpref.patch_trl():
        utils.add_fused_lm_head(model.get_base_model())
        given = [
            model.train(mode)(input_ids=labels, labels=labels, fused_lm_head=True).log_probs
            for mode in (True, True, False, False)
        ]
    assert not torch.equal(given[0], given[1]) and torch.equal(given[2], given[3])


@pytest.mark.parametrize("name", ["dpo", "kto", "sft"])
def test_trainer_with_an_adapter_on_the_output_layer(name, tmp_path):
    with pytest.raises(ValueError, match="lm_head"):  # TRL alone
        trained(name, tmp_path, peft=tiny.lora(**HEAD_LORA))
    model = tiny.model()
    with fastpref.patch_trl():
        logs = trained(name, tmp_path, model=model, peft=tiny.lora(**HEAD_LORA))
    moved = [n for n, p in model.named_parameters() if "lm_head.lora_B" in n and p.any()]
    assert len(moved) == 1
    if name == "dpo":
        assert math.isclose(logs[0]["loss"], math.log(2), rel_tol=1e-6)
        assert logs[0]["rewards/margins"] == 0


def test_adapters_that_cannot_be_fused_stay_refused(tmp_path):
    peft = pytest.importorskip("peft")
    with fastpref.patch_trl():
        with pytest.raises(ValueError, match="lm_head"):
            config = peft.IA3Config(target_modules=["lm_head"], feedforward_modules=[])
            trained("dpo", tmp_path, peft=config)
        with pytest.raises(ValueError, match="cast_lm_head_to_fp32"):
            trained("grpo", tmp_path, peft=tiny.lora(**HEAD_LORA), cast_lm_head_to_fp32=True)
        model = adapted(use_dora=True, lora_dropout=0.5)
        utils.add_fused_lm_head(model.get_base_model())
        with pytest.raises(ValueError, match="DoRA adapter with dropout"):
            fused_and_own(model, torch.randint(3, 200, (3, 9)))


def test_an_adapter_that_comes_later_and_goes():
    """TRL says to add its head before the model is wrapped with PEFT."""
    peft = pytest.importorskip("peft")
    labels = torch.randint(3, 200, (3, 9))
    with fastpref.patch_trl():
        base = tiny.model().eval()
        utils.add_fused_lm_head(base)
        model = peft.get_peft_model(base, tiny.lora(**HEAD_LORA, init_lora_weights=False))
        (fused, own), (mine, theirs) = fused_and_own(model, labels)
        torch.testing.assert_close(fused, own, rtol=1e-5, atol=1e-5)
        assert set(mine) == set(theirs) and any("lm_head" in name for name in mine)
        merged = model.merge_and_unload()
        (fused, own), _ = fused_and_own(merged, labels)
        torch.testing.assert_close(fused, own, rtol=1e-5, atol=1e-5)
    (fused, own), _ = fused_and_own(merged, labels)  # there is nothing left that TRL would ignore
    torch.testing.assert_close(fused, own, rtol=1e-5, atol=1e-5)


def test_two_models_in_two_threads():
    """One is in the middle of its forward pass while the other one's runs."""
    labels = torch.randint(3, 200, (3, 9))
    inside, go_on = threading.Event(), threading.Event()
    found = {}

    def run(name, model):
        with torch.no_grad():
            found[name] = fused_and_own(model, labels)[0]

    with fastpref.patch_trl():
        plain, other = tiny.model().eval(), adapted().eval()
        utils.add_fused_lm_head(plain)
        utils.add_fused_lm_head(other.get_base_model())
        thread = threading.Thread(target=run, args=("adapted", other))

        def wait_inside(*_):
            inside.set()
            assert go_on.wait(60)

        def start_the_other(*_):
            if not thread.ident:
                thread.start()
                assert inside.wait(60)

        other.get_base_model().model.norm.register_forward_hook(wait_inside)
        plain.model.norm.register_forward_hook(start_the_other)
        run("plain", plain)
        go_on.set()
        thread.join()
    for fused, own in found.values():
        torch.testing.assert_close(fused, own, rtol=1e-5, atol=1e-5)
    assert len(found) == 2
