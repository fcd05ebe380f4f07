"""What saves memory: which parameters are there, and options that leave the training as it is."""

from __future__ import annotations

import gc

import pytest
import tiny
import torch
from tiny import history, trainer

from fastpref import PreferenceTrainer

WIDE = {"hidden_size": 64, "intermediate_size": 128}


def alive():
    """The bytes of all parameters by the address of their memory, shared ones once."""
    gc.collect()
    found = [p.untyped_storage() for p in gc.get_objects() if type(p) is torch.nn.Parameter]
    return {storage.data_ptr(): storage.nbytes() for storage in found}


def continued():
    from peft import get_peft_model

    return get_peft_model(tiny.model(**WIDE), tiny.lora())


# What is there besides the policy: the fraction of its bytes, adapters, and options.
COPIES = {
    "all weights": (1, 0, {}),
    "tied weights": (1, 0, {"tie_word_embeddings": True}),
    "adapter": (0, 1, {"peft_config": tiny.lora()}),
    "continued adapter": (0, 2, {"continued": True}),
    "precompute": (0, 0, {"precompute_ref_log_probs": True}),
    "store": (0, 0, {"reference_store": "store"}),
    "columns": (0, 0, {"columns": True}),
    "no reference": (0, 0, {"loss_type": "simpo"}),
    "store and adapter": (0, 1, {"reference_store": "store", "peft_config": tiny.lora()}),
}


@pytest.mark.parametrize("case", COPIES)
def test_no_copy_of_the_model_without_need(tmp_path, case):
    copies, adapters, options = COPIES[case]
    options, before = dict(options), alive()
    if "reference_store" in options:
        options["reference_store"] = str(tmp_path / "store")
    if options.pop("columns", False):
        numbers = {"ref_chosen_logps": -9.0, "ref_rejected_logps": -8.0}
        options["train"] = [{**row, **numbers} for row in tiny.rows(8)]
    tied = {"tie_word_embeddings": options.pop("tie_word_embeddings", False)}
    policy = continued() if options.pop("continued", False) else tiny.model(**WIDE, **tied)
    t = trainer(tmp_path, policy, **options)
    there = sum(size for at, size in alive().items() if at not in before)
    sizes = {True: 0, False: 0}  # of adapters and of the base model
    for name, p in t.model.named_parameters():
        sizes["lora_" in name] += p.untyped_storage().nbytes()
    assert there == (1 + copies) * sizes[False] + sizes[True]
    one = sum(2 * 2 * 4 * (64 + size) * 4 for size in (64, 32))  # 2 layers, r = 4, q and v
    assert sizes[True] == adapters * one // 2
    assert (t.ref_model is None) == (copies == 0)


def test_eight_bit_optimisers(tmp_path):
    pytest.importorskip("bitsandbytes")
    runs = {}
    for name, optim, resume in (
        ("plain", "adamw_torch", False),
        ("whole", "adamw_bnb_8bit", False),
        ("resumed", "adamw_bnb_8bit", True),
    ):
        t = trainer(
            tmp_path / name, tiny.model(**WIDE), optim=optim, max_steps=4, save_steps=2,
            save_strategy="steps", packing=True,
        )  # fmt: skip
        t.train(str(tmp_path / "whole" / "out" / "checkpoint-2") if resume else None)
        runs[name] = history(t)
        states = [v for state in t.optimizer.state.values() for v in state.values()]
        bytes_of = {v.dtype: v.nbytes for v in states if isinstance(v, torch.Tensor)}
        assert (torch.uint8 in bytes_of) == (name != "plain")
    tiny.same(runs["plain"], runs["whole"], ("loss",), tol=1e-2)
    tiny.same(runs["whole"], runs["resumed"], ("loss", "grad_norm"), tol=1e-6)


def test_qlora(tmp_path):
    """The base in 4 bits is its own reference; rows and checkpointing leave the run as it is."""
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    base = str(tmp_path / "base")
    tiny.model(**WIDE).save_pretrained(base)
    runs = []
    for rows in ({"prefix_sharing": False}, {"packing": True, "gradient_checkpointing": True}):
        four = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
        )
        t = PreferenceTrainer(
            base,
            args=tiny.config(tmp_path, learning_rate=1e-2, **rows),
            train_dataset=tiny.rows(),
            processing_class=tiny.tokenizer(),
            quantization_config=four,
            peft_config=tiny.lora(),
        )
        t.train()
        runs.append(history(t))
        kinds = {type(p).__name__ for p in t.model.parameters() if not p.requires_grad}
        assert "Params4bit" in kinds and t.ref_model is None
    assert runs[0][0]["rewards/margins"] == 0 and runs[0][-1]["rewards/margins"] != 0
    tiny.same(*runs)


def test_what_is_refused(tmp_path):
    with pytest.raises(ValueError, match="^activation_offloading: got True.*gradient_checkp"):
        tiny.config(tmp_path, activation_offloading=True)
    with pytest.raises(ValueError, match="^packing: got True, expected False: torch_compile"):
        trainer(tmp_path, packing=True, torch_compile=True, torch_compile_backend="eager")
