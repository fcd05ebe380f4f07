"""Tiny random models of transformers' families, and the comparison of a head with their logits."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import CONFIG_MAPPING

from fastpref.heads import Head, align_to_tokens, install_head_forward, read_head, unwrap
from fastpref.heads.probe import accepted
from fastpref.logps import linear_token_logps

# What every family's config gets of this, as far as it has the field. Scales and softcaps are
# unusual on purpose: with the defaults a head that forgets them would pass.
SMALL: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "initializer_range": 0.3,
    "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 1, "n_embd": 32, "n_layer": 2,
    "n_head": 4, "n_inner": 48, "d_model": 32, "n_heads": 4, "n_layers": 2, "ffn_dim": 48,
    "num_layers": 2, "moe_intermediate_size": 16, "num_experts": 4, "num_local_experts": 4,
    "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_num_experts": 4, "moe_k": 2,
    "n_shared_experts": 1, "shared_expert_intermediate_size": 16, "n_group": 1, "topk_group": 1,
    "first_k_dense_replace": 1, "moe_layer_start_index": 1, "q_lora_rank": 16, "kv_lora_rank": 16,
    "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8, "max_position_embeddings": 128,
    "n_positions": 128, "decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 48,
    "encoder_layers": 1, "encoder_attention_heads": 4, "encoder_ffn_dim": 48, "state_size": 4,
    "mamba_d_state": 4, "mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8,
    "mamba_n_groups": 1, "mamba_expand": 1, "linear_num_key_heads": 2, "linear_num_value_heads": 2,
    "linear_key_head_dim": 8, "linear_value_head_dim": 8, "attention_hidden_size": 32,
    "word_embed_proj_dim": 32, "max_seq_len": 128, "sliding_window": 8, "rotary_dim": 8,
    "num_codebooks": 2, "embedding_size": 32, "dropout": 0.0, "chunk_size": 4,
    "mamba_num_heads": 4, "mamba_head_dim": 8, "ssm_state_size": 4, "n_groups": 1, "dim_head": 8,
    "dim_ff": 48, "swa_head_dim": 8, "swa_num_attention_heads": 4, "swa_num_key_value_heads": 2,
    "vocab_size_per_layer_input": 64, "hidden_size_per_layer_input": 8, "lru_width": 32,
    "num_kv_shared_layers": 0, "index_n_heads": 2, "index_head_dim": 8, "index_topk": 4,
    "o_lora_rank": 8, "o_groups": 2, "emb_dim": 32, "n_words": 64,
    "final_logit_softcapping": 3.0, "logits_soft_cap": 5.0, "output_logit_soft_cap": 4.0,
    "logit_scale": 0.5, "output_multiplier": 0.7, "lm_head_multiplier": 0.3, "logits_scaling": 4.0,
    "logits_mup_width_multiplier": 1.5, "unpadded_vocab_size": 60,
}  # fmt: skip
TINY = 20_000_000  # parameters: larger models would take the tests' time and memory
_MLA = {"head_dim": None, "num_key_value_heads": 4}  # the rotary part of a head is not head_dim
OWN: dict[str, dict[str, Any]] = {
    "axk1": _MLA, "axk2": _MLA, "deepseek_v2": _MLA, "deepseek_v3": _MLA, "deepseek_v32": _MLA,
    "dots3_note_text": _MLA, "glm4_moe_lite": _MLA, "glm_moe_dsa": _MLA, "minicpm3": _MLA,
    "sarvam_mla": _MLA, "youtu": _MLA,
    "cohere_compass_text": {
        "rope_parameters": {
            "full_attention": {
                "rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1],
            },
        },
    },
    "dbrx": {
        "attn_config": {"clip_qkv": 8, "kv_n_heads": 2, "rope_theta": 1e4},
        "ffn_config": {
            "ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 32,
        },
    },
    "doge": {"is_moe": True, "num_experts": 16},
    "dory": {"num_hidden_layers": 3, "n_input_layers": 1, "n_output_layers": 1},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "longcat_flash": {
        "ffn_hidden_size": 48, "expert_ffn_hidden_size": 16, "zero_expert_num": 2, "moe_topk": 2,
        "num_key_value_heads": 4,
    },
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "mamba2": {"num_heads": 8, "head_dim": 8, "n_groups": 1},
    "mpt": {"logit_scale": None},  # a key that the model's forward does not read
    "opt": {"word_embed_proj_dim": 16},
    "reformer": {
        "is_decoder": True, "axial_pos_embds": False, "feed_forward_size": 48,
        "attention_head_size": 8, "attn_layers": ["local", "local"], "local_attn_chunk_length": 4,
    },
    "zamba": {
        "num_hidden_layers": 4, "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"],
        "attention_hidden_size": 64, "attention_head_dim": 16, "n_mamba_heads": 2,
    },
    "zamba2": {
        "num_hidden_layers": 3, "layers_block_type": ["mamba", "hybrid", "mamba"],
        "n_mamba_heads": 4, "mamba_headdim": 8, "mamba_ngroups": 1,
    },
    "zaya": {"num_experts_per_tok": 1},
    "siglip_vision_model": {"image_size": 8, "patch_size": 4},
    "clip_vision_model": {"image_size": 8, "patch_size": 4, "projection_dim": 8},
    "gemma3": {"mm_tokens_per_image": 4},
    "qwen3_vl_vision": {
        "depth": 2, "num_heads": 4, "out_hidden_size": 32, "patch_size": 4,
        "deepstack_visual_indexes": [0], "num_position_embeddings": 16,
    },
}  # fmt: skip


def _fields(cls: type) -> Any:
    if dataclasses.is_dataclass(cls):
        return {f.name for f in dataclasses.fields(cls)}
    return inspect.signature(cls.__init__).parameters


def config(name: str, cls: Any = None, **kwargs: Any) -> Any:
    """A tiny config of a family, by its model_type; configs inside it are tiny, too.

    Skips the test where the installed transformers has no such family.
    """
    if cls is None and name not in CONFIG_MAPPING:
        pytest.skip(f"this transformers has no {name}")
    cls = cls or CONFIG_MAPPING[name]
    known = _fields(cls)
    options = {key: value for key, value in SMALL.items() if key in known}
    options.update({k: v for k, v in OWN.get(name, {}).items() if not (v is None and k in known)})
    for key, value in OWN.get(name, {}).items():
        if value is None:
            options.pop(key, None)
    for sub, kind in getattr(cls, "sub_configs", {}).items():
        if sub not in options and sub not in kwargs and hasattr(kind, "model_type"):
            options[sub] = config(kind.model_type, kind)
    return cls(**{**options, **kwargs})


def build(cls: Any, made: Any, seed: int = 0) -> Any:
    """A model whose biases and norms are random, too. Raises if the config is not tiny."""
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in cls(made).parameters())
    if size > TINY:
        raise ValueError(f"{cls.__name__} has {size:,} parameters; a tiny one has at most {TINY:,}")
    torch.manual_seed(seed)
    model = cls(made).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def batch(padding: str | None = "right", length: int = 9, vocab: int = 60) -> dict[str, Tensor]:
    """Two rows of token ids, one of them shorter by three on the left or the right."""
    ids = torch.randint(2, vocab, (2, length), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    if padding is not None:
        mask[1, -3:] = 0
        mask[1] = mask[1] if padding == "right" else mask[1].flip(0)
    return {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask}


def enable_checkpointing(model: Any, reentrant: bool) -> None:
    """Of a model, by the method that this transformers does not warn about."""
    kind = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
    getattr(model, f"{kind}_checkpointing_enable")({"use_reentrant": reentrant})


def labels_of(inputs: dict[str, Tensor]) -> Tensor:
    """The next token of each real position of a batch."""
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    labels = torch.full_like(ids, -100)
    labels[:, :-1] = ids[:, 1:].masked_fill((mask[:, 1:] & mask[:, :-1]) == 0, -100)
    return labels


def _wide(t: Tensor) -> Tensor:
    return t if t.dtype == torch.float64 else t.float()


def log_probs(logits: Tensor, labels: Tensor) -> Tensor:
    rows = _wide(logits).log_softmax(-1)
    picked = rows.gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    return picked.masked_fill(labels == -100, 0.0)


def fused(hidden: Tensor, head: Head, aux_loss: Tensor | None, *, labels: Tensor) -> Any:
    """A `head_fn`: token log-probs by the fused operation, and plain logits."""
    hidden = align_to_tokens(hidden, labels)
    with torch.no_grad():
        plain = head.logits(hidden)
    return linear_token_logps(hidden, head.weight, labels, **head.options(hidden)), plain


def own_logits(model: Any, inputs: dict[str, Any]) -> Tensor:
    options = accepted(type(unwrap(model)).forward, {"use_cache": False})
    return model(**inputs, **options).logits


def gradients(model: Any) -> dict[str, Tensor]:
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def assert_same(
    model: Any,
    inputs: dict[str, Any],
    *,
    rtol: float = 1e-4,
    atol: float = 1e-5,
    grads: bool = True,
    labels: Tensor | None = None,
) -> Head:
    """The head gives the model's own logits, log-probs and gradients of every trained weight."""
    labels = labels_of(inputs) if labels is None else labels
    weights = torch.randn(labels.shape, generator=torch.Generator().manual_seed(1))
    real = inputs.get("attention_mask", torch.ones_like(labels)) == 1
    trained = [p for p in model.parameters() if p.requires_grad]
    with torch.set_grad_enabled(grads and bool(trained)):
        own = own_logits(model, inputs)[:, -labels.shape[1] :]
        expected = log_probs(own, labels)
        if expected.requires_grad:
            (weights * expected).sum().backward()
        wanted = gradients(model)
        install_head_forward(model)
        got, plain = model(**inputs, head_fn=fused, head_inputs={"labels": labels})
        if got.requires_grad:
            (weights * got).sum().backward()
        found = gradients(model)
    close = {"rtol": rtol, "atol": atol}
    torch.testing.assert_close(plain[real], _wide(own.detach())[real], **close)
    torch.testing.assert_close(got, expected, **close)
    assert {n for n in wanted if wanted[n].any()} == {n for n in found if found[n].any()}
    for name in found:
        size = float(wanted[name].abs().max())
        torch.testing.assert_close(
            found[name], wanted[name], rtol=10 * rtol, atol=atol + rtol * size
        )
    return read_head(model, adapters=True)
