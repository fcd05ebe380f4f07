"""TR-DPO: a reference that follows the policy, Gorbatovski et al. 2024 (arXiv:2404.09656)."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_model, save_model
from torch import Tensor
from transformers import Trainer, TrainerCallback

from fastpref.reference.model import REF_ADAPTER
from fastpref.trainer.config import BaseConfig

logger = logging.getLogger("fastpref")
FILE = "reference.safetensors"  # in a checkpoint


def check_sync_options(args: BaseConfig, needs_reference: bool) -> None:
    """Raise ValueError for options that exclude sync_ref_model, or values out of range."""
    if not args.sync_ref_model:
        return
    if not 0 < args.ref_model_mixup_alpha <= 1:
        raise ValueError(
            f"ref_model_mixup_alpha is {args.ref_model_mixup_alpha}; expected above 0 and up to 1"
        )
    steps = args.ref_model_sync_steps
    if not isinstance(steps, int) or steps < 1:
        raise ValueError(f"ref_model_sync_steps is {steps}; expected a whole number from 1")
    if not needs_reference:
        raise ValueError("sync_ref_model is True but the loss needs no reference; set it to False")
    if args.precompute_ref_log_probs or args.reference_store is not None:
        is_store = args.reference_store is not None
        ahead = "reference_store is set" if is_store else "so is precompute_ref_log_probs"
        raise ValueError(
            f"sync_ref_model is True and {ahead}, whose log-probs would be those of a reference "
            "that has moved on; expected one of the two"
        )


def check_sync_columns(args: BaseConfig, has_reference: list[bool]) -> None:
    """Raise ValueError if a data set has reference log-probs, which do not follow the policy."""
    if args.sync_ref_model and any(has_reference):
        raise ValueError(
            "sync_ref_model is True but the data has columns of reference log-probs, which do not "
            "move; remove the columns or set sync_ref_model=False"
        )


class ReferenceSync(TrainerCallback):
    """Moves the reference towards the policy every ref_model_sync_steps optimiser steps.

    Each weight of the reference becomes alpha * policy + (1 - alpha) * reference, where alpha is
    ref_model_mixup_alpha. If the reference is an adapter, its weights are mixed, such as LoRA's A
    and B separately.

    Args:
        policy: the model that is trained.
        reference: a second model, or None for the policy's adapter "ref".
        args: a trainer's configuration.

    Raises:
        ValueError: reference and policy have different weights, or the reference is the policy
            without an adapter, which has no weights to move.
    """

    def __init__(self, policy: Any, reference: Any, args: BaseConfig) -> None:
        self.policy, self.reference = policy, reference
        self.alpha, self.interval = args.ref_model_mixup_alpha, args.ref_model_sync_steps
        self._check()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % self.interval == 0:
            self.mix()

    @torch.no_grad()
    def mix(self) -> None:
        """Mix the policy into the reference."""
        policy, reference = self._weights()
        for name, target in reference.items():
            source = policy[name]
            if source.dtype == target.dtype:
                target.lerp_(source, self.alpha)
            else:
                target.copy_(target.to(source.dtype).lerp_(source, self.alpha))

    def save(self, directory: str) -> None:
        """Write a second model to a checkpoint; an adapter "ref" is part of it already."""
        if self.reference is not None:
            save_model(self.reference, str(Path(directory) / FILE))

    def load(self, directory: str) -> None:
        """Restore the reference from a checkpoint."""
        path = Path(directory) / (REF_ADAPTER if self.reference is None else FILE)
        if not path.exists():
            logger.warning(
                f"{directory} holds no {path.name}: it is not of a run with sync_ref_model, or was "
                "saved without its training state; the reference stays as it is"
            )
        elif self.reference is None:
            self.policy.load_adapter(str(path), REF_ADAPTER)
        else:
            load_model(self.reference, path)

    def _weights(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        if self.reference is not None:
            return dict(self.policy.named_parameters()), dict(self.reference.named_parameters())
        from peft import get_peft_model_state_dict

        (active,) = self.policy.active_adapters
        policy, reference = (
            get_peft_model_state_dict(self.policy, adapter_name=name, save_embedding_layers=False)
            for name in (active, REF_ADAPTER)
        )
        return policy, reference

    def _check(self) -> None:
        if self.reference is None and REF_ADAPTER not in self.policy.peft_config:
            raise ValueError(
                "sync_ref_model is True but the reference is the model with its adapter off, which "
                "has no weights of its own to move; continue a trained adapter, pass ref_model or "
                "set sync_ref_model=False"
            )
        policy, reference = self._weights()
        differing = [
            n for n in reference if n not in policy or policy[n].shape != reference[n].shape
        ]
        differing += [name for name in policy if name not in reference]
        if differing:
            raise ValueError(
                f"sync_ref_model is True but {len(differing)} weights of model and ref_model "
                f"differ in name or shape ({differing[0]}, ...); expected two models that are alike"
            )
        quantised = [name for name, weight in reference.items() if not weight.is_floating_point()]
        if quantised:
            raise ValueError(
                f"sync_ref_model is True but {len(quantised)} weights of the reference are "
                f"quantised ({quantised[0]}, ...) and cannot be mixed; set sync_ref_model=False"
            )


class SyncingTrainer(Trainer):
    """The part of a trainer that moves the reference, and stores it in checkpoints."""

    args: BaseConfig
    _sync: ReferenceSync | None = None

    def start_sync(self, reference: Any) -> None:
        """Make the reference follow the policy; None means the adapter "ref"."""
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:
            raise ValueError(
                "sync_ref_model is True, which needs whole weights on every process, but DeepSpeed "
                "or FSDP shards them; use DDP or set sync_ref_model=False"
            )
        self._sync = ReferenceSync(self.model, reference, self.args)
        self.add_callback(self._sync)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        super().save_model(output_dir, _internal_call)
        # Only with checkpoints, and before trainer_state.json, whose presence marks a complete one.
        is_checkpoint = _internal_call and self.args.should_save and not self.args.save_only_model
        if self._sync is not None and is_checkpoint and output_dir:
            self._sync.save(output_dir)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        if self._sync is not None:
            self._sync.load(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        super()._load_best_model()
        if self._sync is not None:  # the best metric was measured with the reference of its time
            self._sync.load(str(self.state.best_model_checkpoint))
