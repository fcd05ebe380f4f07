"""A reference that follows the policy: TR-DPO, Gorbatovski et al. 2024 (arXiv:2404.09656)."""

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
    """Refuse options that a reference which moves does not go with."""
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
    if args.precompute_ref_log_probs:
        raise ValueError(
            "sync_ref_model is True and so is precompute_ref_log_probs, whose log-probs would be "
            "those of a reference that has moved on; expected one of the two"
        )


def check_sync_columns(args: BaseConfig, given: list[bool]) -> None:
    """Refuse data sets that bring their reference's log-probs. given: which of them do."""
    if args.sync_ref_model and any(given):
        raise ValueError(
            "sync_ref_model is True but the data has columns of reference log-probs, which do not "
            "move; remove the columns or set sync_ref_model=False"
        )


class ReferenceSync(TrainerCallback):
    """Moves the reference towards the policy every so many optimiser steps.

    Every weight of the reference becomes alpha * policy + (1 - alpha) * reference. Of an adapter
    these are its own weights, such as LoRA's A and B, each by itself.

    Args:
        policy: the model that is trained.
        reference: a second model, or None for the policy's own adapter "ref".
        args: a trainer's configuration.

    Raises:
        ValueError: reference and policy do not have the same weights, or the reference is the
            policy without its adapter and has none of its own.
    """

    def __init__(self, policy: Any, reference: Any, args: BaseConfig) -> None:
        self.policy, self.reference = policy, reference
        self.alpha, self.every = args.ref_model_mixup_alpha, args.ref_model_sync_steps
        self._check()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % self.every == 0:
            self.mix()

    @torch.no_grad()
    def mix(self) -> None:
        """Move the reference once."""
        policy, reference = self._weights()
        for name, target in reference.items():
            source = policy[name]
            if source.dtype == target.dtype:
                target.lerp_(source, self.alpha)
            else:
                target.copy_(target.to(source.dtype).lerp_(source, self.alpha))

    def save(self, directory: str) -> None:
        """Write the reference to a checkpoint, which holds an adapter "ref" anyway."""
        if self.reference is not None:
            save_model(self.reference, str(Path(directory) / FILE))

    def load(self, directory: str) -> None:
        """Bring the reference back to where it was at a checkpoint."""
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
        found = [
            get_peft_model_state_dict(self.policy, adapter_name=name, save_embedding_layers=False)
            for name in (active, REF_ADAPTER)
        ]
        return found[0], found[1]

    def _check(self) -> None:
        if self.reference is None and REF_ADAPTER not in self.policy.peft_config:
            raise ValueError(
                "sync_ref_model is True but the reference is the model with its adapter off, which "
                "has no weights of its own to move; continue a trained adapter, pass ref_model or "
                "set sync_ref_model=False"
            )
        policy, reference = self._weights()
        odd = [n for n in reference if n not in policy or policy[n].shape != reference[n].shape]
        odd += [name for name in policy if name not in reference]
        if odd:
            raise ValueError(
                f"sync_ref_model is True but {len(odd)} weights of model and ref_model differ in "
                f"name or shape ({odd[0]}, ...); expected two models that are alike"
            )
        fixed = [name for name, weight in reference.items() if not weight.is_floating_point()]
        if fixed:
            raise ValueError(
                f"sync_ref_model is True but {len(fixed)} weights of the reference are quantised "
                f"({fixed[0]}, ...) and cannot be mixed; set sync_ref_model=False"
            )


class SyncingTrainer(Trainer):
    """A trainer whose reference may move, and whose checkpoints hold where it is."""

    args: BaseConfig
    _sync: ReferenceSync | None = None

    def start_sync(self, reference: Any) -> None:
        """Have the reference, a second model or None for the adapter "ref", follow the policy."""
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:
            raise ValueError(
                "sync_ref_model is True, which needs whole weights on every process, but DeepSpeed "
                "or FSDP shards them; use DDP or set sync_ref_model=False"
            )
        self._sync = ReferenceSync(self.model, reference, self.args)
        self.add_callback(self._sync)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        super().save_model(output_dir, _internal_call)
        # Of checkpoints alone, and before trainer_state.json, by which they are known as complete.
        keep = _internal_call and self.args.should_save and not self.args.save_only_model
        if self._sync is not None and keep and output_dir:
            self._sync.save(output_dir)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        if self._sync is not None:
            self._sync.load(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        super()._load_best_model()
        if self._sync is not None:  # the best figure is that against the reference of its time
            self._sync.load(str(self.state.best_model_checkpoint))
