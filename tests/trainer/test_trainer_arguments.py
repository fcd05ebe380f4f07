"""What TRL's trainers take as arguments and options, and the cards of saved models."""

import dataclasses
import inspect
import re
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

import test_unpaired_trainer as unpaired  # noqa: E402
import tiny  # noqa: E402
from huggingface_hub import ModelCard  # noqa: E402
from tiny import config, lora, trainer  # noqa: E402
from transformers import BitsAndBytesConfig, TrainingArguments  # noqa: E402

from fastpref import (  # noqa: E402
    PreferenceConfig,
    PreferenceTrainer,
    UnpairedPreferenceConfig,
    UnpairedPreferenceTrainer,
)
from fastpref.trainer.checks import check_parallelism  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
PAGE = Path(__file__).parents[2] / "docs" / "migration.md"


@pytest.fixture(autouse=True)
def quiet():
    from datasets import disable_progress_bars

    disable_progress_bars()


@pytest.fixture
def base(tmp_path):
    tiny.model().save_pretrained(tmp_path / "base")
    tiny.tokenizer().save_pretrained(tmp_path / "base")
    return str(tmp_path / "base")


# ---- TRL's names ----


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [(PreferenceConfig, "DPOConfig"), (UnpairedPreferenceConfig, "KTOConfig")],
)
def test_every_option_of_trl_is_here_or_explained(tmp_path, ours, theirs):
    trl = pytest.importorskip("trl")
    base = {field.name for field in dataclasses.fields(TrainingArguments)}
    own = {field.name: field for field in dataclasses.fields(ours)}
    page = PAGE.read_text("utf-8")
    for field in dataclasses.fields(getattr(trl, theirs)):
        if field.name in base:
            continue
        assert f"`{field.name}`" in page, field.name
        if field.name not in own:
            with pytest.raises(TypeError, match=field.name):
                ours(output_dir=str(tmp_path), **{field.name: True})
        elif field.name not in ("loss_type", "pad_to_multiple_of"):
            assert own[field.name].default == field.default, field.name


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [(PreferenceTrainer, "DPOTrainer"), (UnpairedPreferenceTrainer, "KTOTrainer")],
)
def test_the_arguments_are_trls_in_their_order(ours, theirs):
    trl = pytest.importorskip("trl")
    names = list(inspect.signature(getattr(trl, theirs).__init__).parameters)
    assert list(inspect.signature(ours.__init__).parameters)[: len(names)] == names


@pytest.mark.parametrize(
    "options, message",
    [({"tp_size": 2}, "^tensor parallelism gives"), ({"cp_size": 2}, "^context and sequence para")],
)
def test_rows_that_processes_share_are_refused(tmp_path, options, message):
    from accelerate.parallelism_config import ParallelismConfig

    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, parallelism_config=ParallelismConfig(**options))
    assert check_parallelism((tiny.model(), None), ParallelismConfig()) is None


def test_padding_lengths(tmp_path):
    for given, meant in (("auto", None), (None, None), ("none", None), ("8", 8), (8, 8)):
        assert config(tmp_path, pad_to_multiple_of=given).pad_to_multiple_of == meant
    for given in ("many", 0, 2.5, -8):
        with pytest.raises(ValueError, match="pad_to_multiple_of is .*; expected at least 1"):
            config(tmp_path, pad_to_multiple_of=given)


def test_ligers_layers_leave_the_head_alone(tmp_path):
    found = config(tmp_path, use_liger_kernel=True, liger_kernel_config={"rope": False})
    assert found.liger_kernel_config == {"rope": False, "fused_linear_cross_entropy": False}
    with pytest.raises(ValueError, match="replaces the head"):
        config(
            tmp_path,
            use_liger_kernel=True,
            liger_kernel_config={"fused_linear_cross_entropy": True},
        )


def test_the_pad_token_is_chosen(tmp_path):
    t = trainer(tmp_path, pad_token="w7")
    assert t.processing_class.pad_token == "w7"
    pad = t.processing_class.pad_token_id
    assert t.model.config.pad_token_id == t.data_collator.pad_token_id == pad
    t = unpaired.trainer(tmp_path, pad_token="w7")
    assert t.data_collator.pad_token_id == pad
    with pytest.raises(
        ValueError, match="pad_token is '<none>', which is not in the tokenizer's v"
    ):
        trainer(tmp_path, pad_token="<none>")
    ids = [{"prompt_ids": [5], "chosen_ids": [7], "rejected_ids": [9]}] * 2
    with pytest.raises(ValueError, match="pad_token is 'w7' but there is no tokenizer"):
        PreferenceTrainer(tiny.model(), args=config(tmp_path, pad_token="w7"), train_dataset=ids)


def test_quantisation(tmp_path, base, monkeypatch):
    from transformers import LlamaForCausalLM

    from fastpref.trainer import loading

    four = BitsAndBytesConfig(load_in_4bit=True)
    with pytest.raises(ValueError, match="quantization_config is given but the model is already"):
        PreferenceTrainer(
            tiny.model(), args=config(tmp_path), train_dataset=tiny.rows(), quantization_config=four
        )
    twice = config(tmp_path, model_init_kwargs={"quantization_config": four})
    with pytest.raises(ValueError, match="and in model_init_kwargs as well"):
        PreferenceTrainer(base, args=twice, train_dataset=tiny.rows(), quantization_config=four)
    seen = []

    def from_pretrained(name, quantization_config=None, **options):
        seen.append(quantization_config)
        return LlamaForCausalLM.from_pretrained(name, **options)

    class Loader:
        pass

    Loader.from_pretrained = staticmethod(from_pretrained)
    monkeypatch.setattr(loading, "_auto_class", lambda *_: Loader)
    for kind, rows in (
        (PreferenceTrainer, tiny.rows()),
        (UnpairedPreferenceTrainer, unpaired.rows()),
    ):
        make = config if kind is PreferenceTrainer else unpaired.config
        kind(base, base, make(tmp_path), train_dataset=rows, quantization_config=four)
        assert seen == [four, four]
        seen.clear()

    def missing(name, **options):
        raise ImportError("Using `bitsandbytes` 4-bit quantization\nrequires bitsandbytes")

    Loader.from_pretrained = staticmethod(missing)
    with pytest.raises(ImportError, match="could not be loaded: Using .* requires bitsandbytes"):
        PreferenceTrainer(
            base, args=config(tmp_path), train_dataset=tiny.rows(), quantization_config=four
        )


def test_the_router_loss_is_named_as_in_trl(tmp_path):
    from transformers import MixtralConfig, MixtralForCausalLM

    assert not trainer(tmp_path).aux_loss_enabled
    options = {
        "vocab_size": 200,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_local_experts": 2,
    }
    options.update(num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2)
    for given, enabled in ((None, True), (0.0, False)):
        experts = MixtralForCausalLM(MixtralConfig(**options, router_aux_loss_coef=0.5))
        assert trainer(tmp_path, experts, router_aux_loss_coef=given).aux_loss_enabled == enabled


# ---- model cards ----


def card(path):
    return ModelCard.load(path / "README.md")


@pytest.mark.parametrize("adapter", [False, True], ids=["whole", "adapter"])
def test_saved_models_have_a_card(tmp_path, adapter, monkeypatch):
    import socket

    def offline(*args, **kwargs):
        raise AssertionError("the network was asked for")

    monkeypatch.setattr(socket, "getaddrinfo", offline)
    t = trainer(
        tmp_path, max_steps=1, save_strategy="steps", save_steps=1,
        peft_config=lora() if adapter else None,
    )  # fmt: skip
    assert {"fastpref", "dpo"} <= set(t.model.model_tags)
    t.train()
    t.save_model(str(tmp_path / "end"))
    for path in (tmp_path / "out" / "checkpoint-1", tmp_path / "end"):
        found = card(path)
        assert {"fastpref", "dpo"} <= set(found.data.tags)
        assert ("lora" in found.data.tags) == adapter
        assert found.data.library_name == ("peft" if adapter else "transformers")
        assert found.data.base_model is None and str(tmp_path) not in found.text
        assert "| loss_type | sigmoid |" in found.text and "`PreferenceTrainer`" in found.text
        assert found.data.model_name == path.name
    t.create_model_card("en", "mit", "mine", "Named", dataset_name=["a/b"], finetuned_from="c/d")
    found = card(tmp_path / "out")
    assert {"mine", "dpo"} <= set(found.data.tags) and found.data.datasets == ["a/b"]
    assert (found.data.license, found.data.base_model) == ("mit", "c/d")
    assert "# Named" in found.text and "c/d" in found.text and "a/b" in found.text


def test_cards_of_single_answers_and_of_others(tmp_path, caplog):
    t = unpaired.trainer(tmp_path, max_steps=1)
    assert {"fastpref", "kto"} <= set(t.model.model_tags)
    written = "---\ntags:\n- precious\n---\n\n# By hand\n"
    (tmp_path / "end").mkdir()
    (tmp_path / "end" / "README.md").write_text(written)
    t.save_model(str(tmp_path / "end"))
    found = card(tmp_path / "end")
    assert "# By hand" in found.text and "fastpref," not in found.text
    assert {"fastpref", "kto", "precious"} <= set(found.data.tags)
    odd = "---\ntags: [\n---\n"
    (tmp_path / "end" / "README.md").write_text(odd)
    t.save_model(str(tmp_path / "end"))
    assert (tmp_path / "end" / "README.md").read_text() == odd
    assert "is left as it is, because its metadata cannot be read" in caplog.text


def test_a_hub_name_is_the_base_and_a_directory_is_not(tmp_path):
    for name, base in (("org/model", "org/model"), (str(tmp_path), None), ("./x", None)):
        model = tiny.model()
        model.config._name_or_path = name
        trainer(tmp_path, model).create_model_card(output_dir=str(tmp_path / "card"))
        found = card(tmp_path / "card")
        assert found.data.base_model == base
        assert bool(re.search("huggingface.co/org/model", found.text)) == (base is not None)
        (tmp_path / "card" / "README.md").unlink()
    model = tiny.model()
    model.name_or_path = model.config._name_or_path = str(tmp_path)
    trainer(tmp_path, model, peft_config=lora()).save_model(str(tmp_path / "card"))
    assert str(tmp_path) not in (tmp_path / "card" / "README.md").read_text()


# ---- data that does not fit the model or the batches ----


def test_rows_longer_than_learned_positions(tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"vocab_size": 200, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 32}
    rows = [{**row, "chosen": " ".join(["w3"] * 60)} for row in tiny.rows(4)]
    with pytest.raises(
        ValueError, match="^max_length is None, .* GPT2LMHeadModel has positions .*32"
    ):
        trainer(tmp_path, GPT2LMHeadModel(GPT2Config(**sizes)), train=rows, max_length=None)
    t = trainer(tmp_path, GPT2LMHeadModel(GPT2Config(**sizes)), train=rows, max_length=32)
    with pytest.raises(ValueError, match="^max_length is 64, the longest row has"):
        t.args.max_length = 64
        t.evaluate(rows)
    # RoPE, even where a table of embeddings has as many rows, as LoRA's copy of a vocabulary.
    trainer(tmp_path, tiny.model(max_position_embeddings=32), train=rows, max_length=None)
    model = tiny.model(max_position_embeddings=32)
    model.model.other = torch.nn.Embedding(32, 4)
    trainer(tmp_path, model, train=rows, max_length=None)


def test_batches_of_which_none_is_whole(tmp_path):
    t = trainer(
        tmp_path, train=tiny.rows(3), per_device_train_batch_size=8, dataloader_drop_last=True
    )
    with pytest.raises(
        ValueError, match="^dataloader_drop_last leaves out the only batch: .* 3 rows"
    ):
        t.train()
