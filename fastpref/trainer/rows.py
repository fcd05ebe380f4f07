"""The rows of a trainer's batches: one for each answer, or rows of segments."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from torch import nn
from transformers import Trainer

from fastpref.attention import SegmentAttention, UnsupportedAttention, check_attention
from fastpref.data.collate import PreferenceCollator
from fastpref.data.segments import SegmentCollator, shared_fraction
from fastpref.heads.reading import unwrap
from fastpref.trainer.config import PreferenceConfig

logger = logging.getLogger("fastpref")

_WORTH = 0.1  # the fraction of tokens from which on prefix sharing pays
_SAMPLE = 2000  # rows of the data from which that fraction is estimated


class RowsTrainer(Trainer):
    """The part of a trainer of pairs that chooses the rows, and computes rows of segments."""

    args: PreferenceConfig
    ref_model: Any
    _attention: SegmentAttention | None = None  # of the policy, if batches are rows of segments
    _dispatches: bool
    _router_coef: float

    def choose_rows(self) -> tuple[SegmentAttention | None, SegmentAttention | None]:
        """Replace the collator as prefix_sharing and packing ask for.

        Returns:
            The attention of the policy and of the reference model, checked on real pairs; None for
            rows of one answer each.

        Raises:
            ValueError: prefix_sharing=True or packing=True cannot be had.
        """
        args = self.args
        wants = [n for n in ("prefix_sharing", "packing") if getattr(args, n) is True]
        if not wants and args.prefix_sharing is False:
            return None, None
        sharing, reason = args.prefix_sharing is not False, self._reason()
        if args.prefix_sharing == "auto" and reason is None:
            fraction = self._shared_fraction()
            sharing = fraction >= _WORTH
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
        if sharing and args.prefix_sharing == "auto":
            self._say(
                f"prefix sharing: the prompt of a pair is computed once, which leaves out "
                f"{fraction:.0%} of the data's tokens"
            )
        self.data_collator = self._segment_collator(sharing)
        self._attention = attentions[0]
        return attentions

    _quiet_reason = False  # whether the user's own choice is the reason

    def _say(self, sentence: str) -> None:
        if self.args.process_index == 0:
            logger.info(sentence)

    def _reason(self) -> str | None:
        """Why these options do not go with rows of segments; None: they do."""
        args = self.args
        parallel = getattr(self.accelerator, "parallelism_config", None)
        if type(self.data_collator) is not PreferenceCollator:
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
        if args.torch_compile:
            return "torch_compile would compile the model for every batch's segments"
        if any(getattr(parallel, f"{name}_size", 1) > 1 for name in ("cp", "sp")):
            return "context and sequence parallelism replace the model's masks"
        if not self._has_length:
            return "the data is a stream, whose rows are not known before the training"
        return None

    @property
    def _has_length(self) -> bool:
        return hasattr(self.train_dataset, "__len__") and len(self.train_dataset) > 0

    def _shared_fraction(self) -> float:
        dataset: Any = self.train_dataset
        count = min(len(dataset), _SAMPLE)
        indices = np.linspace(0, len(dataset) - 1, count).astype(int)
        return shared_fraction(dataset.select(indices))

    def _segment_collator(self, sharing: bool) -> SegmentCollator:
        plain: Any = self.data_collator
        return SegmentCollator(
            plain.pad_token_id,
            plain.max_length,
            plain.truncation_mode,
            plain.pad_to_multiple_of,
            sharing=sharing,
            packing=self.args.packing,
            nll_on_prompt=self.args.nll_on_prompt,
        )

    def _checked_attentions(
        self, sharing: bool
    ) -> tuple[SegmentAttention, SegmentAttention | None]:
        dataset: Any = self.train_dataset
        examples = [dataset[i] for i in range(min(len(dataset), 2 if self.args.packing else 1))]
        segments = replace(self._segment_collator(sharing), nll_on_prompt=False)
        collators = self.data_collator, segments
        autocast = self.accelerator.autocast
        policy = check_attention(self.model, examples, *collators, autocast)
        if self.ref_model is None:
            return policy, None
        if type(unwrap(self.ref_model)) is type(unwrap(self.model)):
            return policy, SegmentAttention(self.ref_model, policy.way, checked=True)
        return policy, check_attention(self.ref_model, examples, *collators, autocast)

    # ---- steps ----

    def _rows_of(self, inputs: Mapping[str, Any]) -> contextlib.AbstractContextManager:
        nothing = contextlib.nullcontext()
        return nothing if self._attention is None else self._attention.rows_of(inputs)

    def training_step(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """`transformers.Trainer`'s; the backward pass recomputes rows of segments as well."""
        with self._rows_of(inputs):
            return super().training_step(model, inputs, *args, **kwargs)

    def compute_loss(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        with self._rows_of(inputs):
            return super().compute_loss(model, inputs, *args, **kwargs)

    def prediction_step(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        with self._rows_of(inputs):
            return super().prediction_step(model, inputs, *args, **kwargs)
