"""Which layers are chosen, what a model on the native product computes, and that it is undone."""

import copy
import pickle

import pytest
import torch
from torch import nn

from fastpref.backends import native
from fastpref.body import LinearProducts, attach, choose_layers
from fastpref.heads.calling import disable_dropout

families = pytest.importorskip("families")
pytestmark = pytest.mark.skipif(native.problem() is not None, reason="the module is not built")

NAMES = [
    "llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3_text", "phi3", "gpt2", "gpt_neox",
    "opt", "bloom", "mixtral", "olmo2", "granite",
]  # fmt: skip


def every(model, **options):
    return choose_layers([model], heads=[model.get_output_embeddings()], speedup=None, **options)


def _from_config(config):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_config(config)


def built(name):

    model = families.build(_from_config, families.config(name))
    disable_dropout(model)
    return model


def run(model, **inputs):
    """Logits, and the gradients of all weights."""
    model.train()
    logits = model(**families.batch(), use_cache=False, **inputs).logits
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1))
    (weights * logits.float()).sum().backward()
    return logits.detach(), families.gradients(model)


def assert_close(ours, theirs, rtol=1e-4, atol=1e-4):
    scale = theirs[0].abs().max().item()
    torch.testing.assert_close(ours[0], theirs[0], rtol=rtol, atol=atol * scale)
    assert ours[1].keys() == theirs[1].keys()
    for name, grad in theirs[1].items():
        scale = grad.abs().max().item() + 1e-6
        torch.testing.assert_close(ours[1][name], grad, rtol=rtol, atol=atol * scale, msg=name)


@pytest.mark.parametrize("name", NAMES)
def test_families(name):
    model = built(name)
    theirs = run(model)
    products = every(model)
    assert products.chosen == products.total > 0
    with products.attached():
        ours = run(model)
    assert_close(ours, theirs)
    assert not any("Native" in type(m).__name__ for m in model.modules())


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_checkpointing_and_autocast(name, autocast, reentrant):
    model = built(name)
    products = every(model)
    found = []
    for own in (False, True):
        if own:
            families.enable_checkpointing(model, reentrant)
        model.enable_input_require_grads()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast), products.attached():
            found.append(run(model))
    assert_close(*found, *((0.0, 0.0) if not autocast else (0.05, 0.05)))


def test_lora():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(
        built("llama"), peft.LoraConfig(target_modules="all-linear", r=4, init_lora_weights=False)
    )
    theirs = run(model)
    products = every(model)
    assert products.total == 2 * 7 * 3  # two blocks of seven layers: W, A and B
    with products.attached():
        ours = run(model)
        with torch.no_grad(), model.disable_adapter():
            base = model(**families.batch()).logits
        merged = copy.deepcopy(model).merge_and_unload()
        with torch.no_grad():
            ours_merged = merged.eval()(**families.batch()).logits
    assert_close(ours, theirs)
    with torch.no_grad(), model.disable_adapter():
        torch.testing.assert_close(model(**families.batch()).logits, base, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours_merged, theirs[0], rtol=1e-3, atol=1e-3)


def test_copies_pickles_hooks_and_state(tmp_path):
    model = built("llama")
    products, calls = every(model), []
    model.model.layers[0].mlp.up_proj.register_forward_hook(lambda *_: calls.append(1))
    names = list(model.state_dict())
    with products.attached():
        assert list(model.state_dict()) == names
        model(**families.batch())
        copied = copy.deepcopy(model.model.layers[0].mlp.down_proj)
        loaded = pickle.loads(pickle.dumps(model.model.layers[0].mlp.down_proj))
        for other in (copied, loaded):
            assert type(other) is nn.Linear  # nothing would restore a copy's class
            assert torch.equal(other.weight, model.model.layers[0].mlp.down_proj.weight)
        model.save_pretrained(tmp_path)
    assert calls == [1]
    assert type(model).from_pretrained(tmp_path).state_dict().keys() == model.state_dict().keys()


def test_it_may_be_nested_and_an_error_undoes_it():
    model = built("gpt2")
    own, products = [type(m) for m in model.modules()], every(model)
    with pytest.raises(KeyError), products.attached():
        with products.attached():
            assert [type(m) for m in model.modules()] != own
        assert [type(m) for m in model.modules()] != own
        raise KeyError
    assert [type(m) for m in model.modules()] == own


def test_transformers_conv1d():
    conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D
    layer = conv1d(4, 3)
    with choose_layers([layer], speedup=None).attached():
        assert isinstance(layer, conv1d) and type(layer) is not conv1d
        assert type(copy.deepcopy(layer)) is conv1d
    assert type(layer) is conv1d


def test_two_trainers_of_one_model():
    """The one that ends last does not bring back the class that it found."""
    layer = nn.Linear(4, 3)
    first, second = (choose_layers([layer], speedup=None).attached() for _ in range(2))
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    second.__exit__(None, None, None)
    assert type(layer) is nn.Linear


def test_a_parametrization_that_is_added_later_counts():
    layer = nn.Linear(4, 3)
    products = choose_layers([layer], speedup=None)
    nn.utils.parametrizations.weight_norm(layer)
    x = torch.randn(2, 4)
    expected = layer(x)
    with products.attached():
        assert torch.equal(layer(x), expected)


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_a_layer_without_inputs_is_left():
    assert not choose_layers([nn.Linear(0, 3)], speedup=None).layers


def test_a_subclass_with_a_forward_of_its_own_is_left():
    assert every(built("falcon")).total == 0  # its layers are FalconLinear


class Special(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def test_which_layers_are_chosen():
    model = nn.Sequential(
        nn.Linear(512, 256), nn.Linear(256, 512), nn.Linear(512, 64), Special(512, 512),
        nn.Linear(512, 512).double(), nn.Linear(512, 512), nn.Linear(512, 512),
    )  # fmt: skip
    model[5].forward = lambda x: x
    asked = []

    def speedup(shape, dtype):
        asked.append((shape, dtype))
        return {(256, 512): 1.5, (512, 256): 1.19, (512, 512): 2.0}[shape]

    reference = nn.Sequential(nn.Linear(512, 256))
    found = choose_layers([model, reference], heads=[model[6]], speedup=speedup)
    assert [layer for layer, _ in found.layers] == [model[0], reference[0]]
    # The small one is not measured; of another dtype, class or forward and the head: none.
    assert {shape for shape, _ in asked} == {(256, 512), (512, 256)}
    assert (found.chosen, found.total, found.gain) == (1, 4, 1.5)
    assert str(found).startswith(
        "cpu_linear: 1 of 4 Linear layers on fastpref's product, 1.50x torch's"
    )
    assert "all 0 Linear layers" in str(LinearProducts())
    bf16 = choose_layers([model], compute_dtype=torch.bfloat16, speedup=speedup)
    assert {dtype for _, dtype in asked[-3:]} == {torch.bfloat16}
    assert bf16.chosen == 2


def test_modules_on_other_devices_are_left():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(512, 512))
    assert not choose_layers([model], speedup=None).layers
    assert attach.LEAST_SPEEDUP == 1.2
