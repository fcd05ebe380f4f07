"""Reading output heads, and calling models without logits."""

import ast
import re

import pytest
import torch

pytest.importorskip("transformers")

import families  # noqa: E402
import tiny  # noqa: E402
from transformers import (  # noqa: E402
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoModelForCausalLM,
    BertConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
)
from transformers.modeling_outputs import CausalLMOutput  # noqa: E402

from fastpref.heads import (  # noqa: E402
    Head,
    batch_labels,
    check_head,
    disable_dropout,
    hidden_states,
    install_head_forward,
    read_head,
)

# peft reads an attribute that transformers has renamed.
SMALL = {
    "vocab_size": 60, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8, "initializer_range": 0.3,
    "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 1,
}  # fmt: skip


def build(config):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


def batch(seed=0):
    torch.manual_seed(seed)
    ids = torch.randint(2, 60, (2, 9))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def test_scale_and_softcap_come_from_the_config():
    head = read_head(tiny.model())
    assert (head.scale, head.softcap, head.bias) == (1.0, None, None)
    assert (head.vocab_size, head.tied, head.padding, head.adapters) == (200, False, 0, ())
    keys = ["logit_scale", "output_multiplier", "lm_head_multiplier", "logits_scaling"]
    while keys:  # TRL's order: the first that is there counts
        model = tiny.model()
        for i, key in enumerate(keys):
            setattr(model.config, key, 0.25 + i)
        assert read_head(model).scale == (0.25 if len(keys) > 1 else 4.0)
        keys.pop(0)
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
    with pytest.raises(ValueError, match="BertLMHeadModel changes its backbone's hidden states"):
        check_head(build(config))
    model = tiny.model()
    install_head_forward(model)
    model.config.logit_scale = 0.5  # which its forward knows nothing about
    with pytest.raises(ValueError, match="scale 0.5 and softcap None"):
        check_head(model)
    check_head(model.to("meta"))  # nothing to compare


class Unusual(LlamaForCausalLM):
    """A model that does something to its hidden states or logits which no config key shows."""

    def __init__(self, config, before=lambda h: h, after=lambda z: z, layer=None):
        super().__init__(config)
        self.before, self.after = before, after
        if layer is not None:
            layer.weight = self.lm_head.weight
            self.lm_head = layer

    def forward(self, input_ids=None, attention_mask=None, **kwargs):
        out = self.model(input_ids=input_ids, attention_mask=attention_mask, **kwargs)
        logits = self.after(self.lm_head(self.before(out.last_hidden_state)))
        return CausalLMOutput(logits=logits)


class NormalisedHead(torch.nn.Linear):
    def forward(self, x):
        return torch.nn.functional.linear(x, torch.nn.functional.normalize(self.weight))


def squared(z):
    return z * z.abs()


HIDDEN_TRANSFORMS = {
    "scale": {"after": lambda z: 0.125 * z},
    "softcap": {"after": lambda z: 7.0 * torch.tanh(z / 7.0)},
    "both": {"after": lambda z: 5.0 * torch.tanh(0.3 * z / 5.0)},
    "scaled hidden states": {"before": lambda h: h / 3.0},
    "scaled everywhere": {"before": lambda h: h * 2.0, "after": lambda z: z / 8.0},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", HIDDEN_TRANSFORMS)
def test_a_transform_that_no_config_key_shows_is_found_and_can_be_given(kind, dtype):
    torch.manual_seed(0)
    model = Unusual(LlamaConfig(**SMALL), **HIDDEN_TRANSFORMS[kind]).to(dtype)
    with pytest.raises(ValueError, match="its forward was seen to use transform=") as error:
        install_head_forward(model)
    assert "head_fn" not in model.__dict__ and "_forward_without_head_fn" not in model.__dict__
    seen = re.search(r"transform=(\{.*\})", str(error.value))
    transform = ast.literal_eval(seen[1])
    install_head_forward(model, transform=transform)
    head = read_head(model)
    assert {"scale": head.scale, "softcap": head.softcap} == transform
    if dtype == torch.float32:
        families.assert_same(model, families.batch())
    check_head(model)
    with pytest.raises(ValueError, match="is what its config tells|not those of a linear"):
        install_head_forward(model, transform={"scale": 33.0, "softcap": None})
    assert read_head(model).scale == transform["scale"]


REFUSED = {
    "a further layer": ({"before": torch.nn.Tanh()}, "changes its backbone's hidden states"),
    "another function": ({"after": squared}, "nor with any other scale and softcap"),
    "masked logits": (
        {"after": lambda z: z.index_fill(-1, torch.tensor([3, 4]), -1e9)},
        "nor with any other scale and softcap",
    ),
    "fewer logits": ({"after": lambda z: z[..., :50]}, "returns 50 logits for each token and its"),
    "flat logits": ({"after": lambda z: z.flatten()}, "more than the output of that layer"),
    "cut": ({"before": lambda h: h[:, -1:]}, r"with shape \(1, 1, 16\) where the backbone"),
    "an error": ({"after": lambda z: z.view(7, 7, 7)}, "could not be run by itself"),
    "another layer": ({"layer": NormalisedHead(16, 60, bias=False)}, "is a NormalisedHead, which"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_any_other_head_is_refused(kind):
    torch.manual_seed(0)
    options, why = REFUSED[kind]
    model = Unusual(LlamaConfig(**SMALL), **options)
    with pytest.raises(ValueError, match=why) as error:
        install_head_forward(model)
    assert "Give linear_token_logps what the model's last layer" in str(error.value)
    assert model.training and "forward" not in model.__dict__


def test_a_layer_that_is_not_called_or_twice():
    class Unused(Unusual):
        def forward(self, input_ids=None, attention_mask=None, **kwargs):
            hidden = self.model(input_ids=input_ids, attention_mask=attention_mask)[0]
            return CausalLMOutput(logits=hidden @ self.lm_head.weight.T)

    with pytest.raises(ValueError, match="calls the layer that .* 0 times, not once"):
        install_head_forward(Unused(LlamaConfig(**SMALL)))
    twice = Unusual(LlamaConfig(**SMALL))
    twice.after = lambda z: z + twice.lm_head(torch.zeros(1, 3, 16))
    with pytest.raises(ValueError, match="calls the layer that .* 2 times, not once"):
        install_head_forward(twice)


class Body(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Embedding(60, 16)
        self.layer = torch.nn.Linear(16, 16)

    def forward(self, input_ids, attention_mask=None):
        return (torch.tanh(self.layer(self.embed(input_ids))).cumsum(1),)


class Plain(torch.nn.Module):
    """A model that is not transformers', with tuples and without further keywords."""

    def __init__(self):
        super().__init__()
        self.model, self.head = Body(), torch.nn.Linear(16, 60)

    def get_output_embeddings(self):
        return self.head

    def forward(self, input_ids, labels=None):
        return (self.head(self.model(input_ids)[0]),)


def test_a_model_of_another_library():
    model = Plain()
    ids, labels = families.batch()["input_ids"], families.labels_of(families.batch())
    own = model(ids)[0]
    install_head_forward(model)
    got, plain = model(ids, head_fn=families.fused, head_inputs={"labels": labels})
    torch.testing.assert_close(plain, own)
    torch.testing.assert_close(got, families.log_probs(own, labels))
    assert not read_head(model).tied


@pytest.mark.parametrize("transform", [{}, {"scale": 1.0}, {"scale": 1, "softcap": 2, "x": 3}])
def test_transform_has_two_keys(transform):
    with pytest.raises(ValueError, match="transform: got .*, expected the keys 'scale' and 'soft"):
        install_head_forward(tiny.model(), transform=transform)


def test_padded_vocabularies():
    model = tiny.model()
    model.resize_token_embeddings(201, pad_to_multiple_of=64)
    head = families.assert_same(model, families.batch())  # the model's own logits count them
    assert (head.vocab_size, head.padding) == (256, 0)
    model = tiny.model(tie_word_embeddings=True)
    assert read_head(model).tied
    model.config.unpadded_vocab_size = 190
    head = read_head(model)
    assert (head.vocab_size, head.padding, head.tied) == (190, 10, True)
    assert head.weight.data_ptr() == model.lm_head.weight.data_ptr()


class Frozen4bit(torch.nn.Module):
    """Stands for a layer with packed weights, such as bitsandbytes' Linear4bit."""

    def __init__(self, linear, attribute="weight"):
        super().__init__()
        self.shape, self.bias = linear.weight.shape, linear.bias
        size = linear.weight.abs().max()
        packed = ((linear.weight / size).clamp(-1, 1) * 7).round().to(torch.int8) + 8
        packed = torch.nn.Parameter(packed.to(torch.uint8).reshape(-1, 1), requires_grad=False)
        setattr(self, attribute, packed)
        self.packed, self.size = attribute, size.detach()

    def forward(self, x):
        weight = (getattr(self, self.packed).reshape(self.shape).to(x) - 8) / 7 * self.size
        return torch.nn.functional.linear(x, weight, self.bias)


@pytest.mark.parametrize("attribute", ["weight", "qweight"])
def test_a_plain_head_on_a_quantised_body_works_and_a_quantised_head_is_refused(attribute):
    model = tiny.model()
    for module in model.model.layers.modules():
        for name, child in list(module.named_children()):
            if isinstance(child, torch.nn.Linear):
                setattr(module, name, Frozen4bit(child, attribute))
    families.assert_same(model, families.batch())
    check_head(model)
    model.lm_head = Frozen4bit(model.lm_head, attribute)
    why = "dtype uint8" if attribute == "weight" else "is quantised .it keeps 'qweight'"
    with pytest.raises(ValueError, match=f"{why}.*llm_int8_skip_modules"):
        read_head(model)
    model = tiny.model()
    model.lm_head.weight = torch.nn.Parameter(
        model.lm_head.weight.detach().to(torch.float8_e4m3fn), requires_grad=False
    )
    with pytest.raises(ValueError, match="dtype float8_e4m3fn; expected .*llm_int8_skip_modules"):
        read_head(model)


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
    install_head_forward(model)
    handle = model.model.register_forward_hook(lambda *_: seen.update(backbone=True))
    head_calls = model.lm_head.register_forward_hook(lambda *_: seen.update(logits=True))

    def loss(hidden, head, aux_loss, *, factor):
        assert isinstance(head, Head) and head.weight is model.lm_head.weight and aux_loss is None
        return factor * hidden.sum()

    model(**batch(), head_fn=loss, head_inputs={"factor": 2.0}).backward()
    assert seen == {"backbone": True}
    assert all(p.grad is not None for p in model.model.parameters())
    handle.remove(), head_calls.remove()


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


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "falcon", "persimmon", "bart"])
def test_dropout_is_switched_off(name):
    drops = ("attention_dropout", "dropout", "embd_pdrop", "hidden_dropout", "activation_dropout")
    known = {k: 0.5 for k in drops if hasattr(families.config(name), k)}
    made = families.config(name, **known)
    model = families.build(MODEL_FOR_CAUSAL_LM_MAPPING[type(made)], made).train()
    inputs = batch()
    assert not torch.equal(hidden_states(model, **inputs), hidden_states(model, **inputs))
    disable_dropout(model)
    assert torch.equal(hidden_states(model, **inputs), hidden_states(model, **inputs))


def test_labels_of_a_foreign_collator():
    ids, mask = torch.tensor([[4, 5, 6]]), torch.tensor([[0, 1, 1]])
    labels = batch_labels({"input_ids": ids, "completion_mask": mask})
    assert labels.tolist() == [[5, 6, -100]]
    assert batch_labels({"labels": mask}) is mask
