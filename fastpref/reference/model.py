"""`Reference`: the reference's log-probabilities of a batch, from a second model or the policy."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastpref.data.batches import batch_labels, model_inputs
from fastpref.data.segments import PLAN
from fastpref.heads.calling import labelled_states
from fastpref.heads.modes import evaluating, same_weights_trained
from fastpref.heads.reading import Head, unwrap
from fastpref.logps.linear import linear_token_logps
from fastpref.logps.sequences import sequence_logps
from fastpref.losses.tokens import ld_sequence_logps

if TYPE_CHECKING:
    from fastpref.attention import SegmentAttention

REF_ADAPTER = "ref"


def is_peft(model: Any) -> bool:
    """Whether model is a `peft.PeftModel`."""
    return hasattr(model, "peft_config") and hasattr(model, "get_base_model")


def frozen_copy(model: Any) -> Any:
    """A deep copy of the model, in evaluation mode and without trainable weights."""
    return copy.deepcopy(model).eval().requires_grad_(False)


def add_reference_adapter(model: Any) -> None:
    """Add a frozen copy of a PeftModel's active adapter, named "ref", unless there is one.

    Training that continues from a trained adapter needs that adapter as the reference, not the base
    model. Checkpoints hold both adapters, so a resumed run has the same reference.

    Raises:
        ValueError: an active adapter named "ref", several active adapters or none, or one that
            trains biases of the base model.
    """
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    if REF_ADAPTER in model.active_adapters:
        raise ValueError(
            f"the PEFT model's adapter {REF_ADAPTER!r}, the name of the frozen reference, is "
            "active and would be its own reference; expected another name for what trains"
        )
    if REF_ADAPTER in model.peft_config:
        return
    if len(model.active_adapters) != 1:
        names = ", ".join(model.active_adapters) or "none"
        raise ValueError(f"the PEFT model's active adapters are {names}; expected one of them")
    (active,) = model.active_adapters
    bias = getattr(model.peft_config[active], "bias", "none")
    if bias != "none":
        raise ValueError(
            f"the PEFT model's adapter {active!r} has bias={bias!r}: it trains biases of the base "
            "model, which an adapter as the reference would share; pass ref_model"
        )
    # PEFT would save the base model's embeddings with an adapter on the output layer.
    weights = get_peft_model_state_dict(model, adapter_name=active, save_embedding_layers=False)
    state = {k: v.clone() for k, v in weights.items()}
    config = copy.deepcopy(model.peft_config[active])
    if getattr(config, "init_lora_weights", True) is not True:
        config.init_lora_weights = True  # PiSSA's initialisation would change the base's weights
    with same_weights_trained(model):
        model.add_adapter(REF_ADAPTER, config)
        set_peft_model_state_dict(model, state, adapter_name=REF_ADAPTER)
        model.set_adapter(active)  # which freezes the new adapter


@contextlib.contextmanager
def as_reference(model: Any) -> Iterator[None]:
    """Makes a PeftModel its own reference: with its adapter "ref" active or, without one, with no
    adapter. At the end the previous adapter is active and the same weights are trainable.
    """
    with same_weights_trained(model):
        if REF_ADAPTER not in model.peft_config:
            with model.disable_adapter():
                yield
            return
        active = model.active_adapter
        model.set_adapter(REF_ADAPTER)
        try:
            yield
        finally:
            model.set_adapter(active)


def check_adapter_reference(model: Any) -> None:
    """Raise ValueError if a PeftModel cannot be its own reference.

    It cannot if a weight outside the adapter is trainable, since the reference would change with
    the policy.
    """
    with as_reference(model):
        base = unwrap(model)
        named = [(n, p) for n, p in base.named_parameters() if REF_ADAPTER not in n.split(".")]
        trainable = [n for n, p in named if p.requires_grad]
    if trainable:
        raise ValueError(
            f"{len(trainable)} weights outside the adapter are trainable ({trainable[0]}, ...), so "
            "the model without its adapter does not stay the reference; freeze them or pass "
            "ref_model"
        )


@dataclass
class Reference:
    """Computes the reference's log-probs of a batch.

    The model runs in evaluation mode: without dropout, NEFTune's noise or a router's jitter.

    Args:
        model: a second model, or the policy.
        adapter: whether model is a PeftModel that is to be its own reference; see `as_reference`.
        options: strategy, precision, backend ... of `linear_token_logps`.
        ld_alpha: weight of an answer's tokens beyond the length of the pair's shorter one (LD-DPO);
            None means 1.
        own_mode: whether to leave the model in its present mode instead.
        attention: computes batches of rows of segments.
    """

    model: Any
    adapter: bool
    options: dict[str, Any]
    ld_alpha: float | None = None
    own_mode: bool = False
    attention: SegmentAttention | None = None

    def of(self, model: Any) -> Reference:
        """The reference with a copy of its model in the place of the model."""
        if model is self.model:
            return self
        attention = None if self.attention is None else self.attention.of(model)
        return replace(self, model=model, attention=attention)

    def logps(self, batch: dict[str, Any]) -> Tensor:
        """The log-probability of each sequence's completion in nats, [B], without a gradient.

        Args:
            batch: a collator's batch of B sequences, 2P for pairs.
        """
        return self._call(batch, self._sequence_logps)

    def token_logps(self, batch: dict[str, Any]) -> Tensor:
        """The log-probability of each label in nats, [B, T], without a gradient.

        Args:
            batch: as for `logps`.
        """
        return self._call(batch, self._token_logps)

    def _call(self, batch: dict[str, Any], head_fn: Callable[..., Tensor]) -> Tensor:
        nothing = contextlib.nullcontext()
        rows: Any = nothing if self.attention is None else self.attention.rows_of(batch)
        adapter = as_reference(self.model) if self.adapter else nothing
        mode = nothing if self.own_mode else evaluating(self.model)
        inputs = {"labels": batch_labels(batch), "token_indices": batch.get("token_indices")}
        if PLAN in batch:
            names = ("hidden_indices", "sequence_ids")
            inputs |= {name: batch[name] for name in names}
            inputs["num_sequences"] = len(batch["lengths"])
        with torch.no_grad(), adapter, mode, rows:
            return self.model(**model_inputs(batch), head_fn=head_fn, head_inputs=inputs)

    def _token_logps(
        self,
        hidden: Tensor,
        head: Head,
        aux_loss: Any,
        labels: Tensor,
        token_indices: Tensor | None,
        hidden_indices: Tensor | None = None,
        **sequence_layout: Any,
    ) -> Tensor:
        hidden = labelled_states(hidden, labels, hidden_indices)
        logps = linear_token_logps(
            hidden,
            head.weight,
            labels,
            token_indices=token_indices,
            fused=head.fused,  # the policy's kernels, so that equal models have margins of 0
            **head.options(hidden),
            **self.options,
        )
        assert isinstance(logps, Tensor)
        return logps

    def _sequence_logps(self, hidden: Tensor, head: Head, aux_loss: Any, **inputs: Any) -> Tensor:
        logps, labels = self._token_logps(hidden, head, aux_loss, **inputs), inputs["labels"]
        names = ("sequence_ids", "num_sequences")
        sequence_layout = {name: inputs[name] for name in names if name in inputs}
        if self.ld_alpha is not None:
            return ld_sequence_logps(logps, labels, self.ld_alpha, **sequence_layout)
        return sequence_logps(logps, labels, **sequence_layout)
