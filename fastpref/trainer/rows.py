"""The rows of a trainer's batches: one for each answer, or rows of segments."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import numpy as np
import torch
from accelerate.data_loader import SeedableRandomSampler
from accelerate.utils import DistributedType
from torch import nn
from torch.utils.data import RandomSampler

from fastpref.attention import (
    SegmentAttention,
    UnsupportedAttention,
    check_attention,
    unsupported_reason,
)
from fastpref.data.packing import PARTS, SHARES, BalancedSampler, PartsCollator
from fastpref.data.segments import SegmentCollator, UnpairedSegmentCollator, shared_fraction
from fastpref.heads.reading import unwrap
from fastpref.trainer.config import BaseConfig
from fastpref.trainer.processes import AgreeingTrainer

logger = logging.getLogger("fastpref")

_WORTH = 0.1  # the fraction of tokens from which on prefix sharing pays
_SAMPLE = 2000  # rows of the data from which that fraction is estimated
_CANDIDATES = 64  # rows of the data among which those that are compared are chosen
# What sees a batch. A subclass that has its own may read padded rows.
_READERS = (
    "compute_loss",
    "floating_point_ops",
    "loss_head",
    "make_collator",
    "prediction_step",
    "rows_head",
    "step_inputs",
    "training_step",
    "_prepare_inputs",
)


class RowsTrainer(AgreeingTrainer):
    """The part of a trainer that chooses the rows, and computes rows of segments.

    Attributes:
        segment_collator: the class of the collator of rows of segments.
        padded_collator_class: that of separate rows.
    """

    args: BaseConfig
    segment_collator: type[SegmentCollator] | type[UnpairedSegmentCollator]
    padded_collator_class: type
    ref_model: Any
    _attention: SegmentAttention | None = None  # of the policy, if batches are rows of segments
    _dispatches: bool
    _router_coef: float
    _share: float
    _parts: Sequence[dict[str, Any]] = ()  # of the present batch
    _part_index = 0  # of the part that is being computed
    _padded_collator: Any  # the collator of separate rows
    _sharing: bool
    _quiet_reason = False  # whether the user's own choice is the reason

    def choose_rows(self) -> tuple[SegmentAttention | None, SegmentAttention | None]:
        """Replace the collator as prefix_sharing and packing ask for.

        Returns:
            The attention of the policy and of the reference model, checked on real pairs; None for
            rows of one answer each.

        Raises:
            ValueError: prefix_sharing=True or packing=True cannot be had.
        """
        args: Any = self.args
        prefix_sharing = getattr(args, "prefix_sharing", False)  # an option of pairs
        requested = {"prefix_sharing": prefix_sharing, "packing": args.packing}
        wants = [name for name, value in requested.items() if value is True]
        if not wants and prefix_sharing is False:
            return None, None
        self._padded_collator = self.data_collator
        sharing, reason = prefix_sharing is not False, self._reason()
        if prefix_sharing == "auto" and reason is None:
            fraction = self._shared_fraction()
            sharing = fraction >= _WORTH
            if sharing and (readers := self._own_readers()):
                sharing = False
                self._say(
                    f"prefix sharing is off: {type(self).__name__} has a {readers[0]} of its own, "
                    "which may expect a row for each answer; prefix_sharing=True shares all the "
                    "same"
                )
            if not sharing and not args.packing:
                return None, None
        if reason is None:
            try:
                attentions = self._checked_attentions(sharing)
            except UnsupportedAttention as error:
                reason = str(error)
        if reason is not None:
            if wants:
                raise ValueError(f"{' and '.join(wants)}: got True, expected False: {reason}")
            if not self._quiet_reason:
                self._say(f"prefix sharing is off: {reason}")
            return None, None
        if sharing and prefix_sharing == "auto":
            self._say(
                f"prefix sharing: the prompt of a pair is computed once, which leaves out "
                f"{fraction:.0%} of the data's tokens",
                logging.INFO,
            )
        self.data_collator = self._segment_collator(sharing)
        self._attention, self._sharing = attentions[0], sharing
        return attentions

    def _say(self, sentence: str, level: int = logging.WARNING) -> None:
        if self.args.process_index == 0:
            logger.log(level, sentence)

    def _reason(self) -> str | None:
        """Why these options do not go with rows of segments; None: they do."""
        args, model = self.args, cast(nn.Module, self.model)
        if type(self.data_collator) is not self.padded_collator_class:
            self._quiet_reason = True
            return "data_collator is one of your own"
        if self._dispatches:
            return "with dispatch_batches the batches of all processes have one shape"
        if self._router_coef:
            return "the load-balancing loss of a mixture of experts counts every row's tokens"
        if args.neftune_noise_alpha:
            return "NEFTune's noise depends on the length of rows"
        if not args.disable_dropout:
            return "dropout would treat a shared token as one token"
        if args.torch_compile or any(map(_is_compiled, model.modules())):
            return "torch_compile would compile the model for every batch's segments"
        if noise := next(filter(None, map(_jitter_of, model.modules())), None):
            return f"{noise} would treat a shared token as one token"
        if not self._has_length:
            return "the data is a stream, whose rows are not known before the training"
        return self._parts_reason() if args.tokens_per_batch else None

    def _parts_reason(self) -> str | None:
        """Why a batch cannot be computed in parts; None: it can."""
        kind = self.accelerator.distributed_type
        if kind in (DistributedType.FSDP, DistributedType.DEEPSPEED):
            return f"with tokens_per_batch, {kind.value} would need equally many passes everywhere"
        optimizer = str(self.args.optim).lower()
        if "lomo" in optimizer or "layerwise" in optimizer:
            return "with tokens_per_batch, weights cannot move in each backward pass"
        return self.why_loss_is_whole()

    @property
    def _has_length(self) -> bool:
        dataset: Any = self.train_dataset
        return hasattr(dataset, "__len__") and len(dataset) > 0

    def _shared_fraction(self) -> float:
        dataset: Any = self.train_dataset
        count = min(len(dataset), _SAMPLE)
        indices = np.linspace(0, len(dataset) - 1, count).astype(int)
        return shared_fraction(dataset.select(indices), self._segment_collator(True))

    def _own_readers(self) -> list[str]:
        """The methods that see a batch and are of a subclass, from outside of fastpref."""
        ours = ("fastpref", "transformers")
        modules = {name: getattr(type(self), name).__module__ for name in _READERS}
        return [name for name, module in modules.items() if module.split(".")[0] not in ours]

    def _segment_collator(self, sharing: bool) -> Any:
        plain = self._padded_collator
        return self.segment_collator(
            plain.pad_token_id,
            plain.max_length,
            plain.truncation_mode,
            plain.pad_to_multiple_of,
            sharing=sharing,
            packing=self.args.packing,
            nll_on_prompt=getattr(self.args, "nll_on_prompt", False),
        )

    def _checked_attentions(
        self, sharing: bool
    ) -> tuple[SegmentAttention, SegmentAttention | None]:
        # FSDP may leave the weights on the first process until the training.
        implementations = self.on_first(lambda: self._checked_implementations(sharing))
        policy, reference = (
            None
            if implementation is None
            else SegmentAttention(model, implementation, checked=True)
            for model, implementation in zip(
                (self.model, self.ref_model), implementations, strict=True
            )
        )
        assert policy is not None
        return policy, reference

    def _checked_implementations(self, sharing: bool) -> tuple[str, str | None]:
        """The attention's `implementation` of policy and `ref_model`, checked on real pairs."""
        examples = self._examples(2 if self.args.packing else 1)
        segments = replace(self._segment_collator(sharing), nll_on_prompt=False)
        collators = self._padded_collator, segments
        autocast = self.accelerator.autocast
        policy = check_attention(self.model, examples, *collators, autocast)
        if self.ref_model is None:
            return policy.implementation, None
        models = unwrap(self.ref_model), unwrap(self.model)
        is_alike = type(models[0]) is type(models[1]) and unsupported_reason(self.ref_model) is None
        # Checkpointing has switched the policy's cache off.
        configs = [{**model.config.to_dict(), "use_cache": None} for model in models]
        if is_alike and configs[0] == configs[1]:
            return policy.implementation, policy.implementation
        return policy.implementation, check_attention(
            self.ref_model, examples, *collators, autocast
        ).implementation

    def _examples(self, count: int) -> list[dict[str, Any]]:
        """The first rows with much to compare, for a pair a prompt, and answers that differ."""
        dataset: Any = self.train_dataset
        size = self._segment_collator(True).compared
        rows = [dataset[i] for i in range(min(len(dataset), _CANDIDATES))]
        rows = [{k: v for k, v in row.items() if not k.startswith("KL_")} for row in rows]
        return sorted(rows, key=size, reverse=True)[:count]

    # ---- batches ----

    def get_train_dataloader(self) -> Any:
        """`transformers.Trainer`'s; of batches in parts with tokens_per_batch."""
        whole, most = self.data_collator, self.args.tokens_per_batch
        if self._attention is not None and most is not None:
            self.data_collator = PartsCollator(
                whole, self._segment_collator(self._sharing).tokens, most
            )
        try:
            return super().get_train_dataloader()
        finally:
            self.data_collator = whole

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        """`transformers.Trainer`'s; with packing, processes exchange rows."""
        return self.exchanging(super()._get_train_sampler(train_dataset))

    def exchanging(self, sampler: Any) -> Any:
        """A training sampler whose rows the processes exchange with packing."""
        processes = self.accelerator.num_processes
        if self._attention is None or not self.args.packing or processes == 1:
            return sampler
        if isinstance(sampler, RandomSampler):  # as accelerate would do to it
            seed = getattr(self.accelerator.dataloader_config, "data_seed", None)
            sampler = SeedableRandomSampler(sampler.data_source, data_seed=seed)
        tokens = self._segment_collator(self._sharing).tokens
        dataset: Any = self.train_dataset
        sizes = [tokens(row) for row in dataset]
        size = self._train_batch_size  # auto_find_batch_size may have lowered it
        size = size // processes if self.accelerator.split_batches else size
        return BalancedSampler(sampler, sizes, size, processes)

    def floating_point_ops(self, inputs: Any) -> int:
        flops_of = super().floating_point_ops
        return sum(flops_of(part) for part in inputs.get(PARTS, [inputs]))

    def _track_num_input_tokens(self, inputs: Any) -> None:
        if PARTS in inputs:  # counted once, since every count is exchanged between the processes
            names = ("input_ids", "attention_mask")
            parts = inputs[PARTS]
            inputs = {name: torch.cat([p[name].flatten() for p in parts]) for name in names}
        super()._track_num_input_tokens(inputs)

    # ---- steps ----

    def _rows_of(self, inputs: Mapping[str, Any]) -> contextlib.AbstractContextManager:
        nothing = contextlib.nullcontext()
        return nothing if self._attention is None else self._attention.rows_of(inputs)

    def training_step(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """`transformers.Trainer`'s, of each part; the backward pass recomputes segments as well."""
        if PARTS not in inputs:
            with self._rows_of(inputs):
                return super().training_step(model, inputs, *args, **kwargs)
        losses, parts = [], inputs[PARTS]
        try:
            self._parts = parts
            for i, part in enumerate(parts):
                self._part_index, self._share = i, inputs[SHARES][i]
                # The processes exchange gradients once, after the last part.
                waits: Any = contextlib.nullcontext()
                if i < len(parts) - 1:
                    waits = self.accelerator.no_sync(model)
                with waits:
                    losses.append(self.training_step(model, part, *args, **kwargs))
        finally:
            self._share, self._parts, self._part_index = 1.0, (), 0
        return torch.stack(losses).sum()

    def compute_loss(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        with self._rows_of(inputs):
            return super().compute_loss(model, inputs, *args, **kwargs)

    def prediction_step(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        with self._rows_of(inputs):
            return super().prediction_step(model, inputs, *args, **kwargs)

    # ---- defined by a subclass ----

    def why_loss_is_whole(self) -> str | None:
        """Why the loss of a batch is not a mean over parts of it; None: it is."""
        raise NotImplementedError


def _is_compiled(module: nn.Module) -> bool:
    return hasattr(module, "_orig_mod") or module._compiled_call_impl is not None


def _jitter_of(module: nn.Module) -> str | None:
    """The noise that a router adds to tokens in training, or None."""
    for key, value in vars(module).items():
        if "jitter" in key and isinstance(value, float) and value > 0:
            return f"{key}={value:g}"
    return None
