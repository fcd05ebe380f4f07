"""Heads of models with PEFT adapters: the model's own logits and gradients, or a clear refusal."""

import pytest
import torch

pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

import families  # noqa: E402
from peft import LoraConfig, get_peft_model  # noqa: E402
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING  # noqa: E402

from fastpref.heads import check_head, hidden_states, install_head_forward, read_head, unwrap  # noqa: E402
from fastpref.reference import add_reference_adapter, as_reference  # noqa: E402


def model(name="llama", **kwargs):
    made = families.config(name, **kwargs)
    return families.build(MODEL_FOR_CAUSAL_LM_MAPPING[type(made)], made)


def trained(adapted):
    """The adapter as it is after some training: far from its initial zeros."""
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return adapted.eval()


def lora(base=None, **kwargs):
    config = LoraConfig(
        **{"r": 4, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM", **kwargs}
    )
    return trained(get_peft_model(base or model(), config))


BODY = {
    "attention": {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]},
    "mlp": {"target_modules": ["gate_proj", "down_proj"]},
    "all": {"target_modules": "all-linear"},
    "embeddings": {"target_modules": ["embed_tokens", "q_proj"]},
    "dora": {"use_dora": True},
    "rslora": {"use_rslora": True, "lora_alpha": 3},
    "norm saved": {"modules_to_save": ["norm"]},
    "embeddings saved": {"modules_to_save": ["embed_tokens"]},
    "head saved": {"modules_to_save": ["lm_head"]},
    "both saved": {"modules_to_save": ["lm_head", "embed_tokens"]},
    "tokens": {"trainable_token_indices": [3, 5, 7]},
    "tokens of both": {"trainable_token_indices": {"embed_tokens": [3, 5], "lm_head": [5, 9]}},
}


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("kind", BODY)
def test_adapters_of_the_body_and_trained_parts_of_the_head(kind, tied):
    base = model(tie_word_embeddings=tied)
    before = families.own_logits(base, families.batch()).detach()
    adapted = lora(base, **BODY[kind])
    head = families.assert_same(adapted, families.batch("right"))
    families.assert_same(adapted, families.batch("left"))
    trains = "head" in kind or "both" in kind or (kind == "tokens" and tied)
    assert head.weight.requires_grad == trains
    with adapted.disable_adapter():
        families.assert_same(adapted, families.batch(), grads=False)
        assert torch.equal(families.own_logits(adapted, families.batch()), before)
    merged = adapted.merge_and_unload()
    families.assert_same(merged, families.batch(), grads=False)


def test_the_saved_head_is_read_and_trained_and_the_original_is_the_reference():
    adapted = lora(modules_to_save=["lm_head"])
    wrapper = adapted.base_model.model.lm_head
    assert read_head(adapted).weight is wrapper.modules_to_save["default"].weight
    install_head_forward(adapted)
    inputs = families.batch()
    call = dict(head_fn=families.fused, head_inputs={"labels": families.labels_of(inputs)})
    adapted(**inputs, **call)[0].sum().backward()
    assert wrapper.modules_to_save["default"].weight.grad.any()
    assert wrapper.original_module.weight.grad is None
    with adapted.disable_adapter():
        assert read_head(adapted).weight is wrapper.original_module.weight


def test_head_forward_may_be_installed_before_the_adapter():
    base = model()
    install_head_forward(base)
    adapted = lora(base, modules_to_save=["lm_head"])
    families.assert_same(adapted, families.batch())


def test_several_adapters_and_a_frozen_one_as_the_reference():
    adapted = lora(modules_to_save=["lm_head"])
    add_reference_adapter(adapted)
    adapted.add_adapter("other", LoraConfig(r=2, target_modules=["v_proj"], task_type="CAUSAL_LM"))
    first = families.own_logits(adapted, families.batch()).detach()
    trained(adapted)
    families.assert_same(adapted, families.batch())
    with as_reference(adapted):
        frozen = families.assert_same(adapted, families.batch(), grads=False)
        assert torch.equal(families.own_logits(adapted, families.batch()), first)
    assert not frozen.weight.requires_grad and read_head(adapted).weight.requires_grad
    adapted.set_adapter("other")  # which has no head of its own
    head = families.assert_same(adapted, families.batch())
    assert head.weight is unwrap(adapted).lm_head.original_module.weight
    adapted.base_model.set_adapter(["default", "other"])
    families.assert_same(adapted, families.batch(), grads=False)
    adapted.set_adapter("default")
    adapted.merge_adapter(["default"])
    families.assert_same(adapted, families.batch(), grads=False)


METHODS = {
    "prompt": lambda: peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
    "p": lambda: peft.PromptEncoderConfig(
        num_virtual_tokens=3, encoder_hidden_size=8, task_type="CAUSAL_LM"
    ),
    "prefix": lambda: peft.PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
    "ia3": lambda: peft.IA3Config(
        target_modules=["k_proj", "down_proj"],
        feedforward_modules=["down_proj"],
        task_type="CAUSAL_LM",
    ),
    "norms": lambda: peft.LNTuningConfig(task_type="CAUSAL_LM"),
    "vera": lambda: peft.VeraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"),
    "loha": lambda: peft.LoHaConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"),
    "oft": lambda: peft.OFTConfig(
        oft_block_size=4, target_modules=["q_proj"], task_type="CAUSAL_LM"
    ),
    "adaption prompt": lambda: peft.AdaptionPromptConfig(
        adapter_len=3, adapter_layers=1, task_type="CAUSAL_LM"
    ),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("padding", [None, "right", "left"])
def test_other_methods_among_them_virtual_tokens(method, padding):
    adapted = trained(get_peft_model(model(), METHODS[method]()))
    inputs = families.batch(padding)
    families.assert_same(adapted, inputs)
    hidden = hidden_states(adapted, **inputs)
    assert hidden.shape == (2, 9, 32)
    with adapted.disable_adapter():
        families.assert_same(adapted, inputs, grads=False)


def test_virtual_tokens_count_in_the_load_balancing_loss():
    inputs = families.batch()
    for method in ("prompt", "prefix"):
        adapted = trained(get_peft_model(model("mixtral"), METHODS[method]()))
        install_head_forward(adapted)
        call = dict(inputs, output_router_logits=True)
        aux = adapted(**call, head_fn=lambda hidden, head, aux: aux)
        if method == "prompt":  # with a prefix the model's own forward fails
            torch.testing.assert_close(aux, adapted(**call).aux_loss)
        aux.backward()


def test_experts():
    config = {"target_modules": [], "target_parameters": ["mlp.experts.gate_up_proj"]}
    base = model("qwen3_moe")
    if not any(n.endswith(config["target_parameters"][0]) for n, _ in base.named_parameters()):
        pytest.skip("this transformers keeps experts as modules")
    families.assert_same(lora(base, **config), families.batch())


ON_HEAD = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "bias": {"lora_bias": True},
    "pissa": {"init_lora_weights": "pissa"},
}


@pytest.mark.parametrize("kind", ON_HEAD)
@pytest.mark.parametrize("name", ["llama", "phi"])  # without and with a bias
def test_an_adapter_on_the_head(name, kind):
    adapted = lora(
        model(name), target_modules=["q_proj", "lm_head"], lora_alpha=6, **ON_HEAD[kind]
    ).double()
    with pytest.raises(ValueError, match="output head carries a PEFT adapter, which would never"):
        read_head(adapted)
    head = read_head(adapted, adapters=True)
    with pytest.raises(ValueError, match=r"expected them: head.options\(hidden\)"):
        head.options()
    for padding in ("right", "left"):
        inputs = families.batch(padding)
        families.assert_same(adapted, inputs, rtol=1e-9, atol=1e-9)
    check_head(adapted)
    with adapted.disable_adapter():
        assert read_head(adapted).adapters == ()
        families.assert_same(adapted, inputs, rtol=1e-9, atol=1e-9, grads=False)
        check_head(adapted)
    if kind == "bias" and name == "llama":
        return  # peft itself cannot merge that
    adapted.merge_adapter()
    families.assert_same(adapted, inputs, rtol=1e-9, atol=1e-9, grads=False)
    with adapted.disable_adapter(), pytest.raises(ValueError, match="call unmerge_adapter"):
        read_head(adapted)


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_an_adapter_on_a_head_that_the_embeddings_share(kind):
    base = model(tie_word_embeddings=True)
    adapted = lora(base, target_modules=["q_proj", "lm_head"], **ON_HEAD[kind])
    head = families.assert_same(adapted, families.batch())
    assert head.tied and not head.weight.requires_grad
    base.model.embed_tokens.weight.requires_grad_(True)  # and with it the head
    assert families.assert_same(adapted, families.batch()).weight.requires_grad


@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("name", ["gemma2", "granite", "inkling_text"])  # a softcap, scales
def test_an_adapter_on_a_head_with_a_transform(name, kind):
    adapted = lora(model(name), target_modules=["lm_head"], **ON_HEAD[kind])
    families.assert_same(adapted, families.batch())
    check_head(adapted)


def test_two_adapters_on_the_head():
    adapted = lora(target_modules=["lm_head"], lora_dropout=0.25).double()
    adapted.add_adapter("other", LoraConfig(r=2, target_modules=["lm_head"], lora_alpha=5))
    adapted.base_model.set_adapter(["default", "other"])
    trained(adapted)
    head = families.assert_same(adapted, families.batch(), rtol=1e-9, atol=1e-9)
    assert [a.lora_A.shape[0] for a in head.adapters] == [4, 2]
    assert [a.dropout for a in head.adapters] == [0.25, 0.0]
    assert not any(a.training for a in head.adapters)
    hidden = torch.ones(1, 2, 32, dtype=torch.float64)
    assert torch.equal(head.logits(hidden), head.logits(hidden))
    head = read_head(adapted.train(), adapters=True)
    assert not torch.equal(head.logits(hidden), head.logits(hidden))


@pytest.mark.parametrize("method", ["ia3", "loha", "vera", "oft"])
def test_other_adapters_on_the_head_are_refused(method):
    config = METHODS[method]()
    config.target_modules, config.feedforward_modules = {"lm_head"}, set()
    adapted = get_peft_model(model(), config)
    with pytest.raises(ValueError, match="carries a PEFT adapter of kind .*expected LoRA, DoRA"):
        read_head(adapted, adapters=True)


def test_adapters_that_transformers_adds_by_itself(monkeypatch):
    # transformers 5.24 asks for a peft that came out after it.
    monkeypatch.setattr("transformers.integrations.peft.check_peft_version", lambda **_: None)
    base = model()
    base.add_adapter(LoraConfig(r=2, target_modules=["q_proj"]))
    families.assert_same(trained(base), families.batch())
    base.disable_adapters()
    families.assert_same(base, families.batch(), grads=False)


def test_a_head_with_an_adapter_takes_the_same_way_with_it_and_without():
    """The reference is the model without its adapter: margins are 0 as long as that is 0."""
    assert read_head(model()).fused is None
    adapted = lora(target_modules=["lm_head"])
    head = read_head(adapted, adapters=True)
    assert head.adapters and head.fused is False
    with adapted.disable_adapter():
        head = read_head(adapted, adapters=True)
    assert not head.adapters and head.fused is False
