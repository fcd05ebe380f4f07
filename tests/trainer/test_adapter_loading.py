"""Models given as the directory of an adapter: an SFT adapter, DPO on top of it, and the merge."""

import json
import math
import shutil
import warnings

import pytest
import torch

pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

import tiny  # noqa: E402
from tiny import config, history, lora, same  # noqa: E402

from fastpref import UnpairedPreferenceTrainer  # noqa: E402
from fastpref.trainer import PreferenceTrainer  # noqa: E402

# peft reads an attribute that transformers has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
LENIENT = "{{ messages }}"


@pytest.fixture(autouse=True)
def quiet():
    from datasets import disable_progress_bars

    disable_progress_bars()


@pytest.fixture
def sft(tmp_path):
    """The directory of an adapter that changes the model, without a tokenizer; its base's has."""
    return saved(tmp_path)


def saved(tmp_path, name="sft", **kwargs):
    base = tmp_path / "base"
    tiny.model().save_pretrained(base)
    tiny.tokenizer().save_pretrained(base)
    from transformers import AutoModelForCausalLM

    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_pretrained(base)
    model = peft.get_peft_model(
        model, lora(task_type="CAUSAL_LM", **{"init_lora_weights": False, **kwargs})
    )
    model.save_pretrained(tmp_path / name)
    return tmp_path / name


def trainer(tmp_path, model, kind=PreferenceTrainer, **kwargs):
    own = ("ref_model", "processing_class", "peft_config")
    own = {key: kwargs.pop(key) for key in own if key in kwargs}
    return kind(str(model), args=config(tmp_path, **kwargs), train_dataset=tiny.rows(), **own)


def logits(model, ids=((5, 9, 17, 30, 44),)):
    with torch.no_grad():
        return model.eval()(input_ids=torch.tensor(ids)).logits


def test_dpo_on_an_sft_adapter_and_the_merged_model(tmp_path, sft):
    whole = peft.AutoPeftModelForCausalLM.from_pretrained(sft)
    t = trainer(tmp_path, sft, learning_rate=1e-2)
    assert torch.equal(logits(t.model), logits(whole))  # base and adapter, not the base alone
    assert t.ref_model is None and t.model.active_adapter == "default"
    t.train()
    logs = history(t)
    assert logs[0]["loss"] == pytest.approx(math.log(2)) and logs[0]["rewards/margins"] == 0
    assert logs[-1]["rewards/margins"] != 0
    for name, p in t.model.named_parameters():
        assert p.requires_grad == (".default." in name)
    # The reference is the SFT adapter.
    given = trainer(tmp_path, sft, ref_model=str(sft), learning_rate=1e-2)
    assert not any(p.requires_grad for p in given.ref_model.parameters())
    given.train()
    same(logs, history(given))

    out = tmp_path / "dpo"
    t.save_model(str(out))
    trained = logits(t.model)
    merged = peft.AutoPeftModelForCausalLM.from_pretrained(out).merge_and_unload()
    torch.testing.assert_close(logits(merged), trained, rtol=1e-4, atol=1e-4)
    assert (trained - logits(whole)).abs().max() > 1e-2
    merged.save_pretrained(tmp_path / "merged")
    tiny.tokenizer().save_pretrained(tmp_path / "merged")
    again = trainer(tmp_path, tmp_path / "merged", max_steps=1)
    torch.testing.assert_close(logits(again.model), trained, rtol=1e-4, atol=1e-4)
    # What was saved holds the reference as an adapter of its own; a new run starts from the policy,
    # and may be given that reference as well.
    second = trainer(tmp_path, out, max_steps=1)
    assert torch.equal(logits(second.model), trained)
    second.train()
    assert history(second)[0]["loss"] == pytest.approx(math.log(2))
    third = trainer(tmp_path, out, ref_model=str(out / "ref"), max_steps=1)
    third.train()
    assert torch.equal(logits(third.ref_model), logits(whole))


def test_a_run_that_continues_an_adapter_resumes(tmp_path, sft):
    options = {"save_strategy": "steps", "save_steps": 2, "learning_rate": 1e-2}
    whole = trainer(tmp_path, sft, **options)
    whole.train()
    checkpoint = tmp_path / "out" / "checkpoint-2"
    for start in (sft, checkpoint):
        resumed = trainer(tmp_path, start, **options)
        resumed.train(resume_from_checkpoint=str(checkpoint))
        same(history(whole), history(resumed), tol=1e-6)
        for p, q in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
            assert torch.equal(p, q)


@pytest.mark.parametrize(
    "adapter",
    [
        {"modules_to_save": ["lm_head"]},
        {"modules_to_save": ["embed_tokens"], "use_rslora": True},
        {"use_dora": True},
        {"target_modules": ["q_proj", "lm_head"]},
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"trainable_token_indices": list(range(20, 60))},
    ],
    ids=["head-saved", "embeddings-saved", "dora", "adapted-head", "embeddings", "tokens"],
)
@pytest.mark.filterwarnings("ignore:Setting .save_embedding_layers:UserWarning")
def test_adapters_of_other_kinds(tmp_path, adapter):
    path = saved(tmp_path, **adapter)
    with torch.no_grad():  # as training would have moved what is saved as a whole
        model = peft.AutoPeftModelForCausalLM.from_pretrained(path, is_trainable=True)
        for name, p in model.named_parameters():
            if "modules_to_save" in name or "trainable_tokens" in name:
                p.add_(0.1 * torch.randn_like(p))
        model.save_pretrained(path)
    t = trainer(tmp_path, path, learning_rate=1e-2, max_steps=2)
    torch.testing.assert_close(logits(t.model), logits(model))
    t.train()
    assert history(t)[0]["loss"] == pytest.approx(math.log(2))
    assert history(t)[0]["rewards/margins"] == 0 and history(t)[1]["rewards/margins"] != 0


def test_single_answers(tmp_path, sft):
    from test_unpaired_trainer import config, rows

    t = UnpairedPreferenceTrainer(str(sft), args=config(tmp_path), train_dataset=rows())
    t.train()
    assert history(t)[0]["loss"] == pytest.approx(0.5) and history(t)[0]["kl"] == 0


def test_options_reach_the_base_and_the_tokenizer_is_the_adapters(tmp_path, sft):
    t = trainer(tmp_path, sft, model_init_kwargs={"dtype": "bfloat16"}, max_steps=1)
    assert t.model.get_base_model().lm_head.weight.dtype == torch.bfloat16
    assert t.processing_class.chat_template == tiny.TEMPLATE
    own = tiny.tokenizer()
    own.chat_template = LENIENT
    own.save_pretrained(sft)
    assert trainer(tmp_path, sft).processing_class.chat_template == LENIENT
    # Within a directory that is named by the options.
    (tmp_path / "repository").mkdir()
    sft.rename(tmp_path / "repository" / "inner")
    t = trainer(tmp_path, tmp_path / "repository", model_init_kwargs={"subfolder": "inner"})
    assert ".default." in next(n for n, p in t.model.named_parameters() if p.requires_grad)


def change(path, **values):
    file = path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"base_model_name_or_path": None},
            "does not name its base model; load the base",
        ),
        (
            {"base_model_name_or_path": "BASE/no"},
            "the base model of the adapter .* not a directory",
        ),
        ({"base_model_name_or_path": "SFT"}, "is an adapter itself; merge that one into its own"),
        ({"task_type": "SEQ_CLS"}, "is of a SEQ_CLS model; expected CAUSAL_LM"),
        ({"target_modules": ["k_proj"]}, "could not be put on its base model .* missing adapter k"),
        ({"r": 8}, "could not be put on its base model .* size mismatch"),
        ({"peft_type": "LORAX"}, "could not be put on its base model"),
    ],
)
def test_adapters_that_cannot_be_loaded(tmp_path, sft, values, message):
    places = {"BASE/no": str(tmp_path / "no"), "SFT": str(sft)}
    change(sft, **{k: places.get(v, v) if isinstance(v, str) else v for k, v in values.items()})
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, sft)


def test_directories_that_are_no_adapter_alone(tmp_path, sft):
    with pytest.raises(ValueError, match="is the adapter .* and peft_config is given; merge"):
        trainer(tmp_path, sft, peft_config=lora())
    inner = tmp_path / "several"
    shutil.copytree(sft, inner / "one")
    with pytest.raises(ValueError, match="holds no model, but adapters in one; expected one of"):
        trainer(tmp_path, inner)
    (sft / "adapter_model.safetensors").rename(sft / "elsewhere")
    with pytest.raises(ValueError, match="lacks its weights, adapter_model.safetensors"):
        trainer(tmp_path, sft)
    tiny.model().save_pretrained(sft)
    with pytest.raises(ValueError, match="holds both an adapter .* and a whole model"):
        trainer(tmp_path, sft)
    (sft / "model.safetensors").unlink()
    (sft / "adapter_config.json").write_text("{")
    with pytest.raises(ValueError, match="adapter_config.json is not JSON"):
        trainer(tmp_path, sft)
    (sft / "adapter_config.json").write_text("[]")
    with pytest.raises(ValueError, match="adapter_config.json holds a list; expected a JSON obj"):
        trainer(tmp_path, sft)


def test_an_adapter_that_trains_biases_needs_another_reference(tmp_path):
    path = saved(tmp_path, bias="all")
    with pytest.raises(ValueError, match="adapter 'default' has bias='all': .* pass ref_model"):
        trainer(tmp_path, path)
    t = trainer(tmp_path, path, ref_model=str(path), max_steps=1)
    t.train()
    assert history(t)[0]["loss"] == pytest.approx(math.log(2))


def test_peft_is_asked_without_a_warning(tmp_path):
    path = saved(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        trainer(tmp_path, path.parent / "base", peft_config=lora())
        trainer(tmp_path, path)
