"""`PreferenceTrainer`: preference optimisation on pairs of answers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from transformers import (
    EvalPrediction,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
)

from fastpref.data.batches import loss_inputs, model_inputs
from fastpref.data.collate import PreferenceCollator
from fastpref.data.columns import PAIRS, PER_PAIR, REFERENCE
from fastpref.data.segments import PLAN, SegmentCollator
from fastpref.data.tokenise import DataReport, prepare_dataset
from fastpref.fused.pair_loss import PairInputs, prepare_loss
from fastpref.fused.preference import linear_preference_loss
from fastpref.heads.calling import labelled_states
from fastpref.heads.reading import Head
from fastpref.losses.options import LossOptions
from fastpref.losses.pairs import Pairs
from fastpref.trainer.base import BaseTrainer
from fastpref.trainer.config import PreferenceConfig
from fastpref.trainer.metrics import EXTRAS, micro_step_sums
from fastpref.trainer.moments import is_per_token
from fastpref.trainer.rows import RowsTrainer
from fastpref.trainer.scores import Rows, Scored, pair_rows, score_pairs


class PreferenceTrainer(RowsTrainer, BaseTrainer):
    """Train a causal language model on preference pairs (DPO, IPO, ...).

    A drop-in replacement for TRL 1.16's DPOTrainer: the same data, tokenisation, loss, metric names
    and gradient-accumulation semantics (the mean over micro-batches). The output head is computed
    by `linear_preference_loss`, so there are no logits. Metrics are summed on the device and read
    once per log line. An evaluation has the loss and metrics of one batch of all rows; see
    docs/training.md.

    The reference is the first of these that applies:

    1. the data's columns ref_chosen_logps and ref_rejected_logps;
    2. `ref_model`;
    3. with a `peft_config`, the model without the adapter;
    4. for a PeftModel, a frozen copy of its adapter;
    5. with `precompute_ref_log_probs`, the model before training;
    6. a frozen copy of the model.

    Args:
        model: a PreTrainedModel, a PeftModel, a name or a directory. By name it is loaded in
            float32 unless `model_init_kwargs` has a dtype. The name of an adapter loads its base
            model too, and the adapter is trained further.
        ref_model: the reference; a model, a name or None.
        args: a `PreferenceConfig`.
        data_collator: replaces `PreferenceCollator`; must return its input_ids, attention_mask and
            completion_mask.
        train_dataset: data that `load_preference_data` reads.
        eval_dataset: likewise, or a dict of such data by name.
        processing_class: the tokenizer; by default that of the adapter or else of the model.
        compute_metrics: a function of an `EvalPrediction` with the rewards [rows, 2] of chosen and
            rejected answers as predictions, and with labels of 0, as `predict` returns them.
        callbacks, optimizers: as in `transformers.Trainer`.
        quantization_config: as in from_pretrained, for a model that is passed by name.
        peft_config: the adapter to add, such as `peft.LoraConfig`.
        loss_function: a function of `Pairs` that replaces `args.loss_type`; see docs/losses.md.

    Raises:
        ValueError: bad data (see `prepare_dataset`), an unknown loss or option, a model without an
            output head, a tokenizer without a pad token.
        NonFiniteLossError: during training, if the loss, a gradient or a weight is not finite. The
            message names the step and, if known, the rows. Nothing is saved after that.
    """

    args: PreferenceConfig
    config_class = PreferenceConfig
    columns = (*PAIRS.ids, *PAIRS.numbers, "row")
    padded_collator_class = PreferenceCollator
    segment_collator = SegmentCollator
    _tag_names = ["fastpref", "dpo"]

    def __init__(
        self,
        model: str | PreTrainedModel | Any,
        ref_model: str | PreTrainedModel | Any = None,
        args: PreferenceConfig | None = None,
        data_collator: Callable[[list[dict]], dict[str, Tensor]] | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        compute_metrics: Callable[[EvalPrediction], dict] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        quantization_config: Any = None,
        peft_config: Any = None,
        loss_function: Callable[[Pairs], Tensor] | None = None,
    ) -> None:
        self._loss_function = loss_function
        super().__init__(
            model,
            ref_model,
            args,
            data_collator,
            train_dataset,
            eval_dataset,
            processing_class,
            compute_metrics,
            callbacks,
            optimizers,
            quantization_config,
            peft_config,
        )

    def set_loss(self, args: PreferenceConfig) -> bool:
        self._loss_options: LossOptions = args.loss_options(self._loss_function)
        self.ld_alpha = args.ld_alpha
        return self._loss_options.reference == "required"

    def prepare_rows(self, dataset: Any, **options: Any) -> tuple[Any, DataReport]:
        return prepare_dataset(dataset, **options)

    def check_data(self, datasets: list[Any], has_reference: bool) -> None:
        for column, name in PER_PAIR.items():
            if any(column in (dataset.column_names or ()) for dataset in datasets):
                self._loss_options.check_takes(name, column)
        if has_reference:
            if self.args.reference_free:
                raise ValueError("reference_free is True but a reference is given")
            self._loss_options.check_reference(True)

    def why_loss_is_whole(self) -> str | None:
        losses = self._loss_options.losses
        if self._loss_options.needs_nll or any(
            loss.options is None or not loss.per_pair or loss.batch_mean for loss in losses
        ):
            return "with tokens_per_batch, the loss must be a mean over pairs"
        return None

    def reference_columns(self) -> tuple[str, ...]:
        return REFERENCE

    def step_inputs(
        self, model: nn.Module, inputs: dict[str, Any], by_row: bool = False
    ) -> tuple[dict, dict]:
        reference = self.reference_logps(inputs)
        tokens = inputs["sequence_tokens" if PLAN in inputs else "attention_mask"]
        return model_inputs(inputs), {
            "num_tokens": tokens.sum(),
            "hidden_indices": inputs.get("hidden_indices"),
            **loss_inputs(inputs, reference, self.args.nll_on_prompt),
        }

    def loss_head(  # type: ignore[override]
        self,
        hidden: Tensor,
        head: Head,
        aux_loss: Tensor | None,
        *,
        num_tokens: Tensor,
        hidden_indices: Tensor | None,
        labels: Tensor,
        **inputs: Tensor | None,
    ) -> dict[str, Any]:
        hidden = labelled_states(hidden, labels, hidden_indices)
        out = linear_preference_loss(
            hidden,
            head.weight,
            labels,
            **inputs,  # type: ignore[arg-type]
            fused=head.fused,
            **head.options(hidden),
            **self._head_options,
            loss_options=self._loss_options,
            extras=EXTRAS,
        )
        loss = self._share * self.add_aux_loss(out.loss, aux_loss)
        ids = inputs.get("sequence_ids")
        sums = micro_step_sums(
            out, loss, aux_loss, labels, num_tokens, ids, is_per_token(self._loss_options)
        )
        return {"loss": loss, "sums": sums}

    def rows_head(  # type: ignore[override]
        self,
        hidden: Tensor,
        head: Head,
        router: Tensor | None,
        *,
        num_tokens: Tensor,
        hidden_indices: Tensor | None,
        labels: Tensor,
        token_indices: Tensor | None,
        nll_labels: Tensor | None = None,
        sequence_ids: Tensor | None = None,
        **inputs: Tensor | None,
    ) -> Rows:
        hidden = labelled_states(hidden, labels, hidden_indices)
        prepared = prepare_loss(
            labels,
            self._loss_options,
            PairInputs(**inputs),
            has_reference=inputs["ref_logps"] is not None,
            sequence_ids=sequence_ids,
            nll_labels=nll_labels,
        )
        extras = prepared.head_extras(EXTRAS)
        stats = self.token_stats(hidden, head, prepared.head_labels, token_indices, extras)
        return pair_rows(prepared, stats, router)

    def score(self, rows: Rows) -> Scored:
        return score_pairs(rows, self._loss_options, self._router_coef)

    def window_options(self) -> dict[str, Any]:
        return {"has_nll": self._loss_options.needs_nll}
