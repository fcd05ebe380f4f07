"""Calling a model with `head_fn`: wrappers, inputs of every kind, and its ordinary life besides."""

import contextlib
import copy
import inspect

import pytest
import torch

pytest.importorskip("transformers")

import families  # noqa: E402
import tiny  # noqa: E402
from torch import nn  # noqa: E402
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, DynamicCache  # noqa: E402

from fastpref.heads import (  # noqa: E402
    hidden_states,
    install_head_forward,
    read_head,
    uninstall_head_forward,
    unwrap,
)

# peft reads an attribute that transformers has renamed.


def model(name="llama", **kwargs):
    made = families.config(name, **kwargs)
    return families.build(MODEL_FOR_CAUSAL_LM_MAPPING[type(made)], made)


def call(inputs, labels=None):
    labels = families.labels_of(inputs) if labels is None else labels
    return dict(inputs, head_fn=families.fused, head_inputs={"labels": labels})


def gradients_of(wrapped, inner, inputs):
    wrapped(**call(inputs))[0].sum().backward()
    return families.gradients(inner)


def assert_gradients(found, wanted, tol=1e-5):
    assert found.keys() == wanted.keys()
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name], rtol=tol, atol=tol)


# ---- wrappers ----


def test_wrappers_are_seen_through():
    from peft import LoraConfig, get_peft_model

    inner = model()
    lora = get_peft_model(inner, LoraConfig(target_modules=["q_proj"]))
    assert unwrap(lora) is inner and unwrap(nn.DataParallel(lora)) is inner
    assert unwrap(torch.compile(nn.DataParallel(lora))) is inner
    assert read_head(lora).weight is inner.lm_head.weight


def test_a_wrapper_that_keeps_head_fn_to_itself():
    class Deaf(nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

        def forward(self, input_ids, head_fn=None):
            return self.module(input_ids)

    with pytest.raises(ValueError, match="the Deaf around the language model keeps head_fn"):
        hidden_states(Deaf(model()), input_ids=families.batch()["input_ids"])


@pytest.fixture
def one_process():
    distributed = pytest.importorskip("torch.distributed")
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.mark.parametrize("unused", [False, True])
def test_ddp(one_process, unused):
    inner, inputs = model(), families.batch()
    install_head_forward(inner)
    wanted = gradients_of(inner, inner, inputs)
    wrapped = nn.parallel.DistributedDataParallel(inner, find_unused_parameters=unused)
    assert read_head(wrapped).weight is inner.lm_head.weight
    assert_gradients(gradients_of(wrapped, inner, inputs), wanted)
    assert hidden_states(wrapped, **inputs).shape == (2, 9, 32)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant):
    inner, inputs = model().train(), families.batch()
    install_head_forward(inner)
    wanted = gradients_of(inner, inner, inputs)
    families.enable_checkpointing(inner, reentrant)
    if reentrant:
        inner.enable_input_require_grads()
    assert_gradients(gradients_of(inner, inner, inputs), wanted, 0.0)


@pytest.mark.parametrize("name", ["llama", "gemma2", "qwen3_moe", "phi"])
def test_autocast(name):
    inner, inputs = model(name), families.batch()
    install_head_forward(inner)
    with torch.autocast("cpu", torch.bfloat16):
        families.assert_same(inner, inputs, rtol=0.05, atol=0.15, grads=False)
        assert hidden_states(inner, **inputs).dtype in (torch.bfloat16, torch.float32)
        found = gradients_of(inner, inner, inputs)
    assert all(g.dtype == torch.float32 for g in found.values())
    wanted = gradients_of(inner, inner, inputs)
    for name in found.keys() & {"lm_head.weight", "lm_head.bias", "model.embed_tokens.weight"}:
        pair = found[name].flatten(), wanted[name].flatten()
        assert torch.cosine_similarity(*pair, dim=0) > 0.98


def test_16_bit_models():
    for dtype in (torch.bfloat16, torch.float16):
        inner = model().to(dtype)
        families.assert_same(inner, families.batch(), rtol=0.05, atol=0.1, grads=False)
    # Its norm is float32 and its head is not: its own forward casts in between, so ours does.
    mixed = model("mamba").bfloat16()
    mixed.backbone.norm_f.float()
    families.assert_same(mixed, families.batch(None), rtol=0.05, atol=0.3, grads=False)


@pytest.mark.slow
@pytest.mark.parametrize("where", ["model", "layers"])
def test_torch_compile(where):
    inner, inputs = model(), families.batch()
    install_head_forward(inner)
    wanted = gradients_of(inner, inner, inputs)
    own = inner(**inputs).logits.detach()
    compiled = inner
    if where == "model":
        compiled = torch.compile(inner, backend="aot_eager")
    else:
        for i, layer in enumerate(inner.model.layers):
            inner.model.layers[i] = torch.compile(layer, backend="aot_eager")
        wanted = {k.replace(".0.", ".0._orig_mod.").replace(".1.", ".1._orig_mod."): g
                  for k, g in wanted.items()}  # fmt: skip
    assert_gradients(gradients_of(compiled, inner, inputs), wanted)
    torch.testing.assert_close(compiled(**inputs).logits.detach(), own)
    assert hidden_states(compiled, **inputs).shape == (2, 9, 32)


@pytest.mark.parametrize("first", [pytest.param("compile", marks=pytest.mark.slow), "install"])
def test_torch_compile_without_a_graph_break(first):
    inner, inputs = model(), families.batch(None)
    compiled = torch.compile(inner, backend="eager", fullgraph=True)
    if first == "compile":
        compiled(**inputs)
    install_head_forward(inner)
    wanted = hidden_states(inner, **inputs)
    got = compiled(**inputs, head_fn=lambda hidden, head, aux: hidden)
    torch.testing.assert_close(got, wanted)


# ---- inputs ----


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3"])
@pytest.mark.parametrize("padding", ["left", "right"])
def test_padding_changes_nothing_at_real_positions(name, padding):
    inner, inputs = model(name), families.batch(padding)
    mask = inputs["attention_mask"]
    if padding == "left":  # as the trainers and generate() give them
        inputs["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
    families.assert_same(inner, inputs)
    hidden = hidden_states(inner, **inputs)
    row = inputs["input_ids"][1][mask[1] == 1][None]
    alone = hidden_states(inner, input_ids=row)
    torch.testing.assert_close(hidden[1][mask[1] == 1][None], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2"])
def test_packed_rows(name):
    inner = model(name)
    rows = [families.batch(None, length)["input_ids"][:1] for length in (5, 9, 3)]
    packed = {
        "input_ids": torch.cat(rows, 1),
        "position_ids": torch.cat([torch.arange(r.shape[1]) for r in rows])[None],
    }
    labels = torch.cat([torch.cat([r[:, 1:], torch.tensor([[-100]])], 1) for r in rows], 1)
    families.assert_same(inner, packed, labels=labels)
    alone = torch.cat([hidden_states(inner, input_ids=r) for r in rows], 1)
    torch.testing.assert_close(hidden_states(inner, **packed), alone, rtol=1e-4, atol=1e-5)


def test_embeddings_positional_arguments_and_whatever_peft_passes_as_none():
    inner, inputs = model(), families.batch()
    wanted = hidden_states(inner, **inputs)
    embeddings = inner.get_input_embeddings()(inputs["input_ids"])
    got = hidden_states(inner, inputs_embeds=embeddings, attention_mask=inputs["attention_mask"])
    assert torch.equal(got, wanted)
    take = {"head_fn": lambda hidden, head, aux: hidden}
    assert torch.equal(inner(inputs["input_ids"], inputs["attention_mask"], **take), wanted)
    nothing = {"labels": None, "return_dict": None, "output_attentions": None, "logits_to_keep": 0}
    assert torch.equal(inner(**inputs, **nothing, **take), wanted)


@pytest.mark.parametrize(
    "given", [{"labels": torch.zeros(2, 9)}, {"logits_to_keep": 1}, {"num_items_in_batch": 3}]
)
def test_arguments_that_concern_the_logits_are_refused(given):
    inner = model()
    install_head_forward(inner)
    with pytest.raises(ValueError, match=f"{next(iter(given))}: got a .*together with head_fn"):
        inner(**families.batch(), **given, head_fn=families.fused)


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_a_cache_of_earlier_tokens(name):
    """Under its name of transformers 5.24 and under the one before, whichever is installed."""
    inner, inputs = model(), families.batch(None)
    wanted = hidden_states(inner, **inputs)
    cache = DynamicCache(config=inner.config)
    known = inspect.signature(inner.forward).parameters
    own = "cache" if "cache" in known else "past_key_values"
    with torch.no_grad():
        inner(input_ids=inputs["input_ids"][:, :4], **{own: cache}, use_cache=True)
    rest = {"input_ids": inputs["input_ids"][:, 4:], name: cache}
    torch.testing.assert_close(hidden_states(inner, **rest), wanted[:, 4:], rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="cache and past_key_values are given; expected one"):
        hidden_states(inner, **{**rest, "cache": cache, "past_key_values": cache})


# ---- the model besides ----


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral", "gemma2", "mamba"])
def test_the_model_lives_on_as_before(name):
    inner, inputs = model(name), families.batch("left")
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    signature = inspect.signature(inner.forward)
    wanted = inner.generate(**inputs, **options)
    own = inner(**inputs, output_hidden_states=True)
    for step in (install_head_forward, uninstall_head_forward):
        step(inner)
        step(inner)  # once more changes nothing
        assert torch.equal(inner.generate(**inputs, **options), wanted)
        got = inner(**inputs, output_hidden_states=True)
        assert got.keys() == own.keys() and torch.equal(got.logits, own.logits)
        assert inner(**inputs, labels=inputs["input_ids"]).loss > 0
        assert inspect.signature(inner.forward) == signature
    assert "forward" not in inner.__dict__ and not any("head" in k for k in inner.__dict__)
    inputs = call(families.batch())
    with contextlib.suppress(TypeError):  # once uninstalled, head_fn is not known
        assert not isinstance(inner(**inputs), tuple)


def test_copies_have_a_head_forward_of_their_own():
    first = model()
    install_head_forward(first, transform={"scale": 1.0, "softcap": None})
    twin = copy.deepcopy(first)
    with torch.no_grad():
        for p in twin.parameters():
            p.zero_()
        assert hidden_states(first, **families.batch()).abs().sum() > 0
        assert hidden_states(twin, **families.batch()).abs().sum() == 0
    uninstall_head_forward(twin)
    families.assert_same(first, families.batch())


def test_a_forward_that_was_replaced_before_comes_back_and_one_after_is_refused():
    inner = model()
    seen = []
    before = inner.forward

    def counting(*args, **kwargs):
        seen.append(1)
        return before(*args, **kwargs)

    inner.forward = counting
    install_head_forward(inner)
    families.assert_same(inner, families.batch())
    uninstall_head_forward(inner)
    assert inner.forward is counting
    install_head_forward(inner)
    inner.forward = before
    with pytest.raises(ValueError, match="has had its forward replaced after install_head_forward"):
        uninstall_head_forward(inner)


@pytest.fixture
def fresh_accelerate():
    """Its settings are the process's: other tests' trainers have theirs."""
    accelerate = pytest.importorskip("accelerate")
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    yield accelerate
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)


def test_accelerate_prepares_a_model_with_a_head_forward(fresh_accelerate):
    accelerate = fresh_accelerate
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision="bf16")
    inner, inputs = model(), families.batch()
    install_head_forward(inner)
    prepared = accelerator.prepare_model(inner)
    got, _ = prepared(**call(inputs))
    assert got.dtype == torch.float32
    expected = families.log_probs(prepared(**inputs).logits, families.labels_of(inputs))
    torch.testing.assert_close(got, expected, rtol=0.05, atol=0.15)
    with pytest.raises(ValueError, match="keep_fp32_wrapper=False"):
        uninstall_head_forward(prepared)
    uninstall_head_forward(accelerator.unwrap_model(prepared, keep_fp32_wrapper=False))


def test_an_offloaded_head_is_refused():
    accelerate = pytest.importorskip("accelerate")
    inner = tiny.model()
    install_head_forward(inner)
    accelerate.cpu_offload(inner.lm_head, execution_device="cpu")
    with pytest.raises(ValueError, match="on the meta device .offloaded"):
        hidden_states(inner, **families.batch())


@pytest.mark.parametrize("bits", ["load_in_4bit", "load_in_8bit"])
def test_a_bitsandbytes_body_with_a_plain_head(bits, tmp_path):
    pytest.importorskip("bitsandbytes")
    from peft import LoraConfig, get_peft_model
    from transformers import BitsAndBytesConfig, LlamaForCausalLM

    sizes = {"hidden_size": 64, "head_dim": 16, "num_key_value_heads": 4, "intermediate_size": 128}
    model(**sizes).save_pretrained(tmp_path)

    def load(**kwargs):
        config = BitsAndBytesConfig(**{bits: True}, **kwargs)
        options = {"quantization_config": config, "dtype": torch.float32, "device_map": "cpu"}
        return LlamaForCausalLM.from_pretrained(tmp_path, **options)

    families.assert_same(load(), families.batch(), grads=False)
    config = {"r": 2, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
    for saved in (None, ["lm_head"]):
        adapted = get_peft_model(load(), LoraConfig(**config, modules_to_save=saved))
        families.assert_same(adapted.eval(), families.batch())
    with pytest.raises(ValueError, match="llm_int8_skip_modules=.'lm_head'"):
        read_head(load(llm_int8_skip_modules=["nothing"]))
