"""Reading output heads, and calling models without logits."""

import copy

import pytest
import torch

pytest.importorskip("transformers")

import tiny  # noqa: E402
from transformers import (  # noqa: E402
    AutoModelForCausalLM,
    BertConfig,
    Cohere2Config,
    FalconH1Config,
    Gemma2Config,
    GPT2Config,
    GraniteConfig,
    LlamaConfig,
    LlamaModel,
    MixtralConfig,
    OPTConfig,
)

from fastpref.heads import (  # noqa: E402
    Head,
    batch_labels,
    check_head,
    disable_dropout,
    hidden_states,
    install_head_forward,
    read_head,
    unwrap,
)
from fastpref.logps import linear_token_logps  # noqa: E402

# peft reads an attribute that transformers has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")

SMALL = {
    "vocab_size": 60, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8, "initializer_range": 0.3,
    "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 1,
}  # fmt: skip
MODELS = {
    "llama": LlamaConfig(**SMALL),
    "gemma2": Gemma2Config(**SMALL, final_logit_softcapping=2.0, query_pre_attn_scalar=8),
    "cohere2": Cohere2Config(**SMALL, logit_scale=0.5),
    "granite": GraniteConfig(**SMALL, logits_scaling=4.0),
    "falcon_h1": FalconH1Config(
        **SMALL, lm_head_multiplier=0.3, mamba_d_ssm=16, mamba_n_heads=2, mamba_d_head=8,
        mamba_d_state=4, mamba_n_groups=1,
    ),
    "gpt2": GPT2Config(vocab_size=60, n_embd=16, n_layer=2, n_head=2, bos_token_id=1),
    "opt": OPTConfig(
        vocab_size=60, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, ffn_dim=32,
        word_embed_proj_dim=8,
    ),
    "mixtral": MixtralConfig(**SMALL, num_local_experts=2, num_experts_per_tok=1),
}  # fmt: skip


def build(config):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


def batch(seed=0):
    torch.manual_seed(seed)
    ids = torch.randint(2, 60, (2, 9))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.filterwarnings("ignore")  # model families have their own
def test_head_and_hidden_states_give_the_models_own_log_probs(name):
    model, inputs = build(MODELS[name]), batch()
    with torch.no_grad():
        logits = model(**inputs).logits.float()
        labels = inputs["input_ids"].roll(-1, 1)
        expected = logits.log_softmax(-1).gather(2, labels[..., None])[..., 0]
        hidden, head = hidden_states(model, **inputs), read_head(model)
        got = linear_token_logps(hidden, head.weight, labels, **head.options())
        again = model(**inputs).logits  # without head_fn it is the model that it was
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(again.float(), logits)
    check_head(model.train())
    assert all(module.training for module in model.modules())
    check_head(model.bfloat16())


def test_scale_and_softcap_come_from_the_config():
    assert read_head(build(MODELS["gemma2"])).softcap == 2.0
    assert read_head(build(MODELS["cohere2"])).scale == 0.5
    assert read_head(build(MODELS["granite"])).scale == 0.25
    assert read_head(build(MODELS["falcon_h1"])).scale == 0.3
    head = read_head(tiny.model())
    assert (head.scale, head.softcap, head.bias) == (1.0, None, None)
    model = tiny.model()
    model.config.model_type, model.config.logits_scaling = "hyperclovax", 4.0
    assert read_head(model).scale == 4.0
    for key in ("logits_soft_cap", "output_logit_soft_cap"):  # RecurrentGemma, xLSTM
        model = tiny.model()
        setattr(model.config, key, 30)
        assert read_head(model).softcap == 30.0


def test_a_head_that_is_not_linear_is_found():
    config = BertConfig(
        vocab_size=60, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, is_decoder=True,
    )  # fmt: skip
    with pytest.raises(ValueError, match="log-probs of BertLMHeadModel differ by up to"):
        check_head(build(config))
    model = tiny.model()
    model.config.logit_scale = 0.5  # which its forward knows nothing about
    with pytest.raises(ValueError, match="scale 0.5 and softcap None"):
        check_head(model)
    check_head(model.to("meta"))  # nothing to compare


def test_a_sharded_head_is_refused():
    distributed = pytest.importorskip("torch.distributed")
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        model = tiny.model()
        mesh = init_device_mesh("cpu", (1,))
        whole = model.lm_head.weight.detach()
        model.lm_head.weight = torch.nn.Parameter(distribute_tensor(whole, mesh, [Shard(0)]))
        with pytest.raises(ValueError, match="sharded among processes"):
            read_head(model)
    finally:
        distributed.destroy_process_group()


def test_the_loss_runs_inside_the_forward_and_gradients_reach_the_backbone():
    model, seen = tiny.model(), {}
    handle = model.model.register_forward_hook(lambda *_: seen.update(backbone=True))
    head_calls = model.lm_head.register_forward_hook(lambda *_: seen.update(logits=True))
    install_head_forward(model)

    def loss(hidden, head, aux_loss, *, factor):
        assert isinstance(head, Head) and head.weight is model.lm_head.weight and aux_loss is None
        return factor * hidden.sum()

    model(**batch(), head_fn=loss, head_inputs={"factor": 2.0}).backward()
    assert seen == {"backbone": True}
    assert all(p.grad is not None for p in model.model.parameters())
    handle.remove(), head_calls.remove()


def test_installing_twice_copying_and_generating():
    model = tiny.model()
    install_head_forward(model)
    forward = model.forward
    install_head_forward(model)
    assert model.forward == forward
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for p in twin.parameters():
            p.zero_()
        assert hidden_states(model, **batch()).abs().sum() > 0  # the copy calls the copy
        assert hidden_states(twin, **batch()).abs().sum() == 0
    out = model.generate(**batch(), max_new_tokens=2, do_sample=False)
    assert out.shape == (2, 11)


def test_wrappers_are_seen_through():
    from peft import LoraConfig, get_peft_model

    model = tiny.model()
    lora = get_peft_model(model, LoraConfig(target_modules=["q_proj"]))
    assert unwrap(lora) is model and unwrap(torch.nn.DataParallel(lora)) is model
    assert read_head(lora).weight is model.lm_head.weight
    assert hidden_states(lora, **batch()).shape == (2, 9, 32)


def test_a_trained_copy_of_the_head_is_the_head():
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"])
    lora = get_peft_model(tiny.model(), config)
    assert read_head(lora).weight.requires_grad
    with lora.disable_adapter():
        assert not read_head(lora).weight.requires_grad


def test_models_that_cannot_be_used():
    from peft import LoraConfig, get_peft_model

    lora = get_peft_model(tiny.model(), LoraConfig(target_modules=["lm_head"]))
    with pytest.raises(ValueError, match="output head carries a PEFT adapter"):
        read_head(lora)
    with pytest.raises(ValueError, match="LlamaModel has no output head"):
        read_head(LlamaModel(LlamaConfig(**SMALL)))
    with pytest.raises(ValueError, match="Linear has no output head"):
        install_head_forward(torch.nn.Linear(2, 2))
    model = tiny.model()
    model.lm_head.weight = torch.nn.Parameter(torch.empty(0))
    with pytest.raises(ValueError, match="expected a whole"):
        read_head(model)


def test_load_balancing_loss():
    model, inputs = build(MODELS["mixtral"]), batch()
    install_head_forward(model)
    with torch.no_grad():
        expected = model(**inputs, output_router_logits=True).aux_loss
        got = model(**inputs, output_router_logits=True, head_fn=lambda h, head, aux: aux)
    torch.testing.assert_close(got, expected)


def test_dropout_is_switched_off():
    config = GPT2Config(
        vocab_size=60, n_embd=16, n_layer=1, n_head=2, embd_pdrop=0.5, bos_token_id=1
    )
    model = build(config).train()
    llama = tiny.model(attention_dropout=0.5).train()
    for m in (model, llama):
        disable_dropout(m)
        first, second = hidden_states(m, **batch()), hidden_states(m, **batch())
        assert torch.equal(first, second)


def test_labels_of_a_foreign_collator():
    ids, mask = torch.tensor([[4, 5, 6]]), torch.tensor([[0, 1, 1]])
    labels = batch_labels({"input_ids": ids, "completion_mask": mask})
    assert labels.tolist() == [[5, 6, -100]]
    assert batch_labels({"labels": mask}) is mask
