"""The reference's log-probabilities of a batch: from a second model, or an adapter switched off."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastpref.data.batches import batch_labels, model_inputs
from fastpref.heads.calling import align_to_tokens
from fastpref.heads.modes import evaluating, same_weights_trained
from fastpref.heads.reading import Head, unwrap
from fastpref.logps.linear import linear_token_logps
from fastpref.logps.sequences import sequence_logps
from fastpref.losses.tokens import ld_sequence_logps

REF_ADAPTER = "ref"


def is_peft(model: Any) -> bool:
    """Whether model is a `peft.PeftModel`."""
    return hasattr(model, "peft_config") and hasattr(model, "get_base_model")


def frozen_copy(model: Any) -> Any:
    """A copy of the model as it is now, in evaluation mode, that nothing trains."""
    return copy.deepcopy(model).eval().requires_grad_(False)


def add_reference_adapter(model: Any) -> None:
    """Add a frozen copy of a PeftModel's active adapter, named "ref", unless there is one.

    Training that continues from a trained adapter must measure against that adapter, not against
    the bare model. Checkpoints hold both, so a resumed run gets its first reference back.
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
        several = ", ".join(model.active_adapters) or "none"
        raise ValueError(f"the PEFT model's active adapters are {several}; expected one of them")
    (active,) = model.active_adapters
    bias = getattr(model.peft_config[active], "bias", "none")
    if bias != "none":
        raise ValueError(
            f"the PEFT model's adapter {active!r} has bias={bias!r}: it trains biases of the base "
            "model, which an adapter as the reference would share; pass ref_model"
        )
    # The embeddings are the base model's: they are not part of an adapter on the output layer.
    found = get_peft_model_state_dict(model, adapter_name=active, save_embedding_layers=False)
    state = {k: v.clone() for k, v in found.items()}
    config = copy.deepcopy(model.peft_config[active])
    if getattr(config, "init_lora_weights", True) is not True:
        config.init_lora_weights = True  # PiSSA's would change the base's weights once more
    with same_weights_trained(model):
        model.add_adapter(REF_ADAPTER, config)
        set_peft_model_state_dict(model, state, adapter_name=REF_ADAPTER)
        model.set_adapter(active)  # and nothing of the new one is trained


@contextlib.contextmanager
def as_reference(model: Any) -> Iterator[None]:
    """Within it, a PeftModel is its own reference: its "ref" adapter, or no adapter at all.

    Afterwards the same weights are trainable as before.
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
    """Refuse a PeftModel that trains weights which stay when its adapter is switched off.

    Raises:
        ValueError: the "reference" would move with the policy.
    """
    with as_reference(model):
        base = unwrap(model)
        named = [(n, p) for n, p in base.named_parameters() if REF_ADAPTER not in n.split(".")]
        moving = [n for n, p in named if p.requires_grad]
    if moving:
        raise ValueError(
            f"{len(moving)} weights outside the adapter are trainable ({moving[0]}, ...), so the "
            "model without its adapter does not stay the reference; freeze them or pass ref_model"
        )


@dataclass
class Reference:
    """Something that gives the reference's log-probs of a batch.

    The model is in evaluation mode meanwhile, so that nothing that belongs to training, such as
    dropout, NEFTune's noise or a router's jitter, is in them.

    Args:
        model: a second model; or the policy, which is its own reference within `as_reference` or,
            as long as it has not been trained, as it is.
        adapter: the policy is a PeftModel that shares its weights with the reference.
        options: strategy, precision, backend ... of `linear_token_logps`.
        ld_alpha: weight of the tokens past the pair's shorter answer (LD-DPO); None: 1.
        own_mode: leave the model in the mode that it is in.
    """

    model: Any
    adapter: bool
    options: dict[str, Any]
    ld_alpha: float | None = None
    own_mode: bool = False

    def logps(self, batch: dict[str, Any]) -> Tensor:
        """The log-probability of each sequence's completion, [2P]."""
        nothing = contextlib.nullcontext()
        adapter = as_reference(self.model) if self.adapter else nothing
        mode = nothing if self.own_mode else evaluating(self.model)
        inputs = {"labels": batch_labels(batch), "token_indices": batch.get("token_indices")}
        with torch.no_grad(), adapter, mode:
            return self.model(
                **model_inputs(batch), head_fn=self._sequence_logps, head_inputs=inputs
            )

    def _sequence_logps(
        self, hidden: Tensor, head: Head, aux_loss: Any, labels: Tensor, token_indices: Tensor
    ) -> Tensor:
        hidden = align_to_tokens(hidden, labels)
        logps = linear_token_logps(
            hidden,
            head.weight,
            labels,
            token_indices=token_indices,
            fused=head.fused,  # the policy's kernels: margins are 0 as long as the models agree
            **head.options(hidden),
            **self.options,
        )
        assert isinstance(logps, Tensor)
        if self.ld_alpha is not None:
            return ld_sequence_logps(logps, labels, self.ld_alpha)
        return sequence_logps(logps, labels)
