"""Every family of transformers: its own logits and log-probs, or a refusal that says why."""

import copy
import json
import re
import subprocess
import sys

import pytest
import torch
from paths import ROOT, TESTS

transformers = pytest.importorskip("transformers")

import families  # noqa: E402
from known_families import KNOWN, skipping_new  # noqa: E402
from transformers.models.auto.modeling_auto import (  # noqa: E402
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func  # noqa: E402

from fastpref.heads import check_head, install_head_forward  # noqa: E402

# What has to work, with the scale and the softcap that each reads from its config.
NAMED = {
    "llama": (1.0, None), "mistral": (1.0, None), "qwen2": (1.0, None), "qwen3": (1.0, None),
    "qwen3_moe": (1.0, None), "gemma2": (1.0, 3.0), "gemma3_text": (1.0, 3.0),
    "phi3": (1.0, None), "cohere2": (0.5, None), "granite": (0.25, None),
    "falcon_h1": (0.3, None), "gpt2": (1.0, None), "gpt_neox": (1.0, None), "opt": (1.0, None),
    "olmo3": (1.0, None), "smollm3": (1.0, None), "gpt_oss": (1.0, None), "phi": (1.0, None),
    "hyperclovax": (4.0, None), "recurrent_gemma": (1.0, 5.0), "xlstm": (1.0, 4.0),
    "inkling_text": (1 / 1.5, None), "inkling2_text": (1.0, 3.0),
    "dory": (1.0, None),
}  # fmt: skip
# A dense layer and a norm between the backbone and the output layer.
BERT = {
    "bert", "big_bird", "camembert", "data2vec-text", "electra", "ernie", "megatron-bert",
    "modernbert-decoder", "rembert", "roberta", "roberta-prelayernorm", "roc_bert", "roformer",
    "xlm-roberta", "xlm-roberta-xl", "xmod",
}  # fmt: skip
OTHERS = sorted(
    set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    - set(NAMED)
    - set(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)  # whose text models are listed by themselves
    - {"blt", "moss_transcribe_diarize"}  # no config of theirs that is tiny was found
    - {"gemma4_assistant", "gemma4_unified_assistant"}  # they read another model's states
)
MUSIC = {"musicgen", "musicgen_melody"}  # a head for each codebook


def causal(name, **kwargs):
    made = families.config(name, **kwargs)
    cls = MODEL_FOR_CAUSAL_LM_MAPPING[type(made)]
    return families.build(cls, made.decoder if name in MUSIC else made)


@pytest.mark.parametrize("name", NAMED)
def test_logits_log_probs_and_gradients_are_the_models_own(name):
    if name not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        pytest.skip(f"this transformers has no {name}")
    model = causal(name)
    head = families.assert_same(model, families.batch("right"))
    families.assert_same(model, families.batch("left"))
    assert (head.scale, head.softcap) == (pytest.approx(NAMED[name][0]), NAMED[name][1])
    assert head.tied == (model.get_input_embeddings().weight is head.weight)
    check_head(model.train())
    assert all(module.training for module in model.modules())
    if name != "inkling2_text":  # its own experts want float32
        check_head(model.bfloat16())


@pytest.mark.train
@pytest.mark.parametrize("name", OTHERS)
def test_any_causal_model_gives_its_own_logits_or_is_refused(name):
    inputs = families.batch("right")
    with skipping_new(name):  # it may need other packages, other inputs or a config of its own
        model = causal(name)
        refusal = _refusal(name)
        if refusal is not None:
            with pytest.raises(ValueError, match=refusal):
                install_head_forward(model)
            return
        with torch.no_grad():
            own = families.own_logits(model, inputs)
        families.assert_same(model, inputs, grads=False)
        with torch.no_grad():  # without head_fn it is the model that it was
            torch.testing.assert_close(families.own_logits(model, inputs), own)


def _refusal(name):
    """What is said of a family whose head is refused; None: it works."""
    if name in MUSIC:
        return "the output head is a list of 2 layers"
    if name in BERT or name == "prophetnet":
        return "Give linear_token_logps what the model's last layer"
    return None


def test_the_pages_count_the_families():
    others = [name for name in OTHERS if name in KNOWN and _refusal(name) is None]
    version, heads = _page_of_families()
    if not transformers.__version__.startswith(version):
        pytest.skip(f"the pages count the families of transformers {version}")
    assert f"that a tiny config makes: {len(others)} more" in heads
    readme = (ROOT / "README.md").read_text("utf-8")
    assert f"The heads of {len(NAMED) + len(others)} causal model families" in readme


def _page_of_families():
    """The version of transformers that docs/heads.md counts families of, and the page."""
    page = (ROOT / "docs" / "heads.md").read_text("utf-8")
    (version,) = re.findall(r"causal model of transformers ([\d.]+) that", page)
    return version, page


def test_a_new_family_that_fails_is_a_skip_with_its_name():
    with pytest.raises(
        pytest.skip.Exception, match=r"newcomer, new in transformers 5\..*: nothing"
    ):
        with skipping_new("newcomer"):
            raise ValueError("nothing like it")
    with pytest.raises(AssertionError), skipping_new("llama"):
        raise AssertionError


MOE = sorted(
    name
    for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    if ("moe" in name or name in ("mixtral", "gpt_oss", "dbrx", "jamba", "flex_olmo", "minimax"))
    and name not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES  # their text models are here
)


@pytest.mark.parametrize("name", MOE)
def test_load_balancing_loss_is_the_models_own_or_mixtrals(name):
    inputs = families.batch("right")
    call = dict(inputs, output_router_logits=True, use_cache=False)
    with skipping_new(name):
        model = causal(name)
        with torch.no_grad():
            own = model(**call).aux_loss
            if own is None:  # this family's own forward has none
                logits, config = model.base_model(**call).router_logits, model.config
                sizes = logits[0].shape[-1], config.num_experts_per_tok
                own = load_balancing_loss_func(logits, *sizes, inputs["attention_mask"])
        install_head_forward(model)
        call = dict(inputs, head_fn=lambda hidden, head, aux: aux)
        got = model(**call, output_router_logits=True)
        torch.testing.assert_close(got.detach(), own)
        got.backward()
        assert any(g.any() for g in families.gradients(model).values())
        assert model(**call) is None


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_load_balancing_loss_under_gradient_checkpointing(name):
    model, found = causal(name).train(), []
    install_head_forward(model)
    inputs = dict(families.batch(), output_router_logits=True)
    for checkpointing in (False, True):
        if checkpointing:
            families.enable_checkpointing(model, False)
        loss = model(**inputs, head_fn=lambda hidden, head, aux: hidden.square().mean() + aux)
        loss.backward()
        found.append((loss.detach(), families.gradients(model)))
    torch.testing.assert_close(*found)


def test_load_balancing_losses_of_another_form_are_refused():
    inputs = families.batch()
    for name, why in (("llama", "returns no router logits"), ("doge", "in a way of its own")):
        model = causal(name)
        install_head_forward(model)
        with pytest.raises(ValueError, match=why):
            model(**inputs, output_router_logits=True, head_fn=lambda *_: None)


@pytest.mark.parametrize(
    "name", ["llama", "gemma2", "cohere2", "granite", "falcon_h1", "hyperclovax", "phi", "mixtral"]
)
def test_log_probs_and_auxiliary_loss_are_those_of_trls_fused_head(name):
    utils = pytest.importorskip("trl.trainer.utils")
    if not hasattr(utils, "add_fused_lm_head"):
        pytest.skip("this trl has no fused head")
    model, inputs = causal(name), families.batch("right")
    labels = families.labels_of(inputs)
    theirs = copy.deepcopy(model)
    utils.add_fused_lm_head(theirs)
    moe = {"output_router_logits": True} if name == "mixtral" else {}
    out = theirs(**inputs, **moe, labels=labels, shift_labels=labels, fused_lm_head=True)
    install_head_forward(model)

    def head_fn(hidden, head, aux_loss):
        return families.fused(hidden, head, None, labels=labels)[0], aux_loss

    got, aux_loss = model(**inputs, **moe, head_fn=head_fn)
    torch.testing.assert_close(got, out.log_probs, rtol=1e-4, atol=1e-5)
    if moe:
        torch.testing.assert_close(aux_loss, out.aux_loss)


# ---- vision-language models ----

TINY_VISION = {
    "gemma3": {"vision_config": {"model_type": "siglip_vision_model"}},
    "qwen3_vl": {},
    "llava": {
        "text_config": {"model_type": "llama"},
        "vision_config": {"model_type": "clip_vision_model"},
        "image_token_index": 7, "vision_feature_layer": -1,
    },
}  # fmt: skip


def vision_language(name):
    options = dict(TINY_VISION[name])
    for part, value in options.items():
        if part.endswith("_config"):
            options[part] = families.config(value["model_type"])
    made = families.config(name, **options)
    return families.build(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[type(made)], made)


@pytest.mark.parametrize("name", TINY_VISION)
def test_the_text_side_of_a_vision_language_model(name):
    model = vision_language(name)
    inputs = families.batch("right")
    inputs["input_ids"] = inputs["input_ids"].clamp(min=8) * inputs["attention_mask"]
    if name == "gemma3":  # its own forward, unlike the text model's, does not apply the softcap
        with pytest.raises(ValueError, match=r"transform=\{'scale': 1, 'softcap': None\}"):
            install_head_forward(model)
        install_head_forward(model, transform={"scale": 1.0, "softcap": None})
    families.assert_same(model, inputs)


def test_a_vision_language_model_with_an_image():
    model = vision_language("llava")
    inputs = families.batch(None)
    inputs["input_ids"] = inputs["input_ids"].clamp(min=8)
    inputs["input_ids"][:, 1:5] = 7  # an image of 2 x 2 patches
    inputs["pixel_values"] = torch.randn(2, 3, 8, 8)
    families.assert_same(model, inputs)


@pytest.mark.slow
def test_full_size_vision_language_heads_on_the_meta_device():
    # By itself, as the poisoned memory of the tests' fixtures is real memory.
    script = TESTS / "support" / "meta_heads.py"
    out = subprocess.run([sys.executable, script], capture_output=True, text=True, check=True)
    found = json.loads(out.stdout.splitlines()[-1])
    new = {name: error for name, error in found.items() if error and name not in KNOWN}
    for name, error in found.items():
        if name in new:
            continue
        if name in META_REFUSED:
            assert re.search(META_REFUSED[name], error or ""), (name, error)
        else:
            assert error is None, (name, error)
    assert len(found) > 60
    version, page = _page_of_families()
    if transformers.__version__.startswith(version):
        work = sum(error is None for error in found.values())
        assert f"| {work} vision-language models |" in page
    if new:
        pytest.skip(f"new in transformers {transformers.__version__}: {new}")


META_REFUSED = {
    **dict.fromkeys(
        ["blip", "blip-2", "instructblip", "instructblipvideo", "kosmos-2", "kosmos-2.5", "llama4",
         "nemotron_h_omni", "pi0", "pix2struct", "udop",
         "vision-encoder-decoder"],
        "has no (backbone apart from its output head|output head)",
    ),
    "cohere2_vision": r"seen to use transform=\{'scale': 1, 'softcap': None\}",
}  # fmt: skip
