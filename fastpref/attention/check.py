"""Whether a model computes rows of segments exactly: what is known, and a comparison."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastpref.attention.switch import FUNCTION, MASK, SegmentAttention, UnsupportedAttention
from fastpref.data.batches import model_inputs
from fastpref.heads.calling import hidden_states, labelled_states
from fastpref.heads.modes import evaluating
from fastpref.heads.reading import read_head, unwrap
from fastpref.heads.sharded import is_sharded
from fastpref.logps.linear import linear_token_logps

# The largest difference by the dtype of the layers' products: of log-probs in nats, and of the
# gradient of the embeddings relative to its norm. Models of float64 compute some parts in fp32.
_LIMITS = {torch.float64: (1e-6, 1e-5), torch.float32: (1e-3, 1e-3)}
_LIMITS_16_BIT = 0.2, 0.2
_PROMPT, _ANSWER = 128, 64  # the most tokens that are compared
_LAYERS = {"full_attention", "sliding_attention", "attention"}
# PEFT's adapters that treat every token by itself. A new adapter usually changes nothing yet, so
# that a comparison would not show what it reads.
_ADAPTERS = {
    "ADALORA", "BOFT", "BONE", "C3A", "DELORA", "FOURIERFT", "HRA", "IA3", "LN_TUNING", "LOHA",
    "LOKR", "LORA", "MISS", "OFT", "RANDLORA", "ROAD", "SHIRA", "TRAINABLE_TOKENS", "VBLORA",
    "VERA", "WAVEFT",
}  # fmt: skip


def unsupported_reason(model: Any) -> str | None:
    """Why a model is known not to compute rows of segments, as part of a sentence; else None."""
    outer, model = model, unwrap(model)
    config = model.config.get_text_config(decoder=True)
    for adapter in (getattr(outer, "peft_config", None) or {}).values():
        if (reason := _adapter_reason(adapter)) is not None:
            return reason
    others = sorted(set(getattr(config, "layer_types", None) or ()) - _LAYERS)
    if others:
        return f"it has layers of the type {others[0]}, which do not go by an attention mask"
    if getattr(model, "_is_stateful", False):
        return "it has recurrent or state-space layers, whose state runs through the row"
    if getattr(config, "alibi", False):
        return "its ALiBi biases are made from the mask and not from positions"
    ropes = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None)
    if "mrope_section" in (ropes or {}):
        return "its positions are three-dimensional"
    backbone = getattr(model, "base_model", model)
    if "position_ids" not in inspect.signature(type(backbone).forward).parameters:
        return "it takes no position_ids, and positions restart within a row"
    if any(p.is_meta or p.numel() == 0 or is_sharded(p) for p in model.parameters()):
        return "its weights are not whole on this process, so that the rows cannot be checked"
    return None


def _adapter_reason(adapter: Any) -> str | None:
    """Why a PEFT adapter does not go with rows of segments, as part of a sentence; else None."""
    if getattr(adapter, "is_prompt_learning", False):
        return "its adapter puts virtual tokens in front of every row"
    if getattr(adapter, "alora_invocation_tokens", None):
        return "its adapter looks for the tokens that invoke it once in a row"
    kind = getattr(adapter.peft_type, "value", str(adapter.peft_type))
    if kind not in _ADAPTERS:
        return f"its adapter {kind} is not known to treat every token by itself"
    return None


def check_attention(
    model: Any,
    examples: list[dict[str, Any]],
    separate: Callable[[list[dict[str, Any]]], dict[str, Any]],
    segments: Callable[[list[dict[str, Any]]], dict[str, Any]],
    autocast: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext,
) -> SegmentAttention:
    """The attention that computes rows of segments as the model computes separate rows.

    Compares log-probs and the gradient of the token embeddings on real pairs, for our attention and
    then for a dense mask. Long pairs are cut: this runs without activation checkpointing, and masks
    are compared beyond the rows' length anyway.

    Args:
        model: a causal language model, on its device.
        examples: tokenised pairs.
        separate: the collator of padded rows.
        segments: the collator of rows of segments.
        autocast: the context of a training step's forward pass.

    Raises:
        UnsupportedAttention: neither computes the same. The message names the model, and the
            difference or the reason.
    """
    name = type(unwrap(model)).__name__
    reason = unsupported_reason(model)
    if reason is not None:
        raise UnsupportedAttention(f"{name} cannot compute rows of segments: {reason}")
    examples, reasons = [_cut(example) for example in examples], []
    try:
        expected = _outcome(model, separate(examples), None, autocast)
    except Exception as error:  # such as weights that pass no gradient on
        raise UnsupportedAttention(
            f"{name} cannot be compared with rows of segments: {_first_line(error)}"
        ) from error
    for implementation in (FUNCTION, MASK):
        try:
            attention = SegmentAttention(model, implementation)
            outcome = _outcome(model, segments(examples), attention, autocast)
        except UnsupportedAttention as error:
            reasons.append(f"{implementation}: {error}")
            continue
        except Exception as error:  # of the model's own code, which does not know such a mask
            reasons.append(f"{implementation}: {_first_line(error)}")
            continue
        difference = _difference(expected, outcome)
        if difference is None:
            attention.checked = True
            return attention
        reasons.append(f"{implementation}: {difference}")
    raise UnsupportedAttention(f"{name} cannot compute rows of segments ({'; '.join(reasons)})")


def _first_line(error: Exception) -> str:
    line = str(error).strip().split("\n")[0][:100]
    return f"{type(error).__name__}: {line}"


def _cut(example: dict[str, Any]) -> dict[str, Any]:
    """The end of an example's prompt and the starts of its answers."""
    cut = {key: ids[:_ANSWER] for key, ids in example.items() if key.endswith("_ids")}
    return {**example, **cut, "prompt_ids": example["prompt_ids"][-_PROMPT:]}


def _outcome(
    model: Any, batch: dict[str, Any], attention: SegmentAttention | None, autocast: Any
) -> tuple[Tensor, Tensor, torch.dtype]:
    """Log-probs [N] of the labelled tokens, the gradient of the embeddings [U, H] of the batch's
    different tokens in increasing order, and the dtype of the layers' products.
    """
    device = next(model.parameters()).device
    batch = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}
    leaves: list[Tensor] = []

    def cut(module: Any, args: Any, out: Tensor) -> Tensor:
        leaves.append(out.detach().requires_grad_())
        return leaves[-1]

    embedding = unwrap(model).get_input_embeddings()
    switched = contextlib.nullcontext() if attention is None else attention.rows_of(batch)
    handle = embedding.register_forward_hook(cut)
    try:
        with evaluating(model), switched, autocast():
            hidden = hidden_states(model, **model_inputs(batch))
            mixed = torch.is_autocast_enabled(device.type)
            dtype = torch.get_autocast_dtype(device.type) if mixed else hidden.dtype
            labels, tokens = batch["labels"], batch["token_indices"]
            hidden = labelled_states(hidden, labels, batch.get("hidden_indices"))
            hidden = hidden.flatten(0, -2).index_select(0, tokens)
            labels = labels.flatten().index_select(0, tokens)
            head = read_head(model, adapters=True)
            logps = linear_token_logps(hidden, head.weight, labels, **head.options(hidden))
            assert isinstance(logps, Tensor)
            # Different factors, so that the gradients of a pair's two answers do not cancel.
            factor = 1 + torch.arange(len(logps), device=device).to(logps).sin() / 2
            (gradient,) = torch.autograd.grad((logps * factor).sum(), leaves[:1])
    finally:
        handle.remove()
    ids, counted = batch["input_ids"].flatten(), batch["attention_mask"].flatten().bool()
    tokens, places = ids[counted].unique(return_inverse=True)
    rows = gradient.flatten(0, 1)[counted].double()
    by_token = rows.new_zeros((len(tokens), rows.shape[1])).index_add(0, places, rows)
    return logps.detach().double(), by_token, dtype


def _difference(
    expected: tuple[Tensor, Tensor, torch.dtype], actual: tuple[Tensor, Tensor, torch.dtype]
) -> str | None:
    """What differs by more than rounding, or None."""
    logp_limit, gradient_limit = _LIMITS.get(expected[2], _LIMITS_16_BIT)
    gap = (expected[0] - actual[0]).abs().max().item() if len(expected[0]) else 0.0
    if not gap <= logp_limit:
        return f"log-probs differ by {gap:.2g} nats from those of separate rows"
    norm = expected[1].norm().item()
    gap = (expected[1] - actual[1]).norm().item()
    if not gap <= gradient_limit * norm:
        return f"gradients differ by {gap / max(norm, 1e-30):.2g} of their norm"
    return None
