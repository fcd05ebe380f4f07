"""`UnpairedPreferenceTrainer`: preference optimisation on single answers (KTO)."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from fastpref.data.batches import batch_labels, model_inputs
from fastpref.data.collate import UnpairedCollator
from fastpref.data.columns import UNPAIRED
from fastpref.data.segments import UnpairedSegmentCollator
from fastpref.data.tokenise import DataReport
from fastpref.data.unpaired import prepare_unpaired_dataset
from fastpref.fused.unpaired import linear_kto_loss
from fastpref.heads.calling import labelled_states
from fastpref.heads.reading import Head
from fastpref.trainer.base import BaseTrainer
from fastpref.trainer.config import UnpairedPreferenceConfig
from fastpref.trainer.kl_term import EstimatingTrainer, sequences
from fastpref.trainer.metrics import UNPAIRED_EXTRAS, UNPAIRED_SUMS, unpaired_metrics, unpaired_sums
from fastpref.trainer.scores import Rows, Scored, answer_rows, score_answers

_LAYOUT = ("token_indices", "hidden_indices", "sequence_ids")


class UnpairedPreferenceTrainer(EstimatingTrainer, BaseTrainer):
    """Train a causal language model on answers labelled desirable or undesirable (KTO).

    A drop-in replacement for TRL 1.16's KTOTrainer: the same data, loss, KL term and metric names.
    Everything else, including the reference, is as in `PreferenceTrainer`.

    KTO's KL term is estimated from each prompt with the answer of the row before, cyclically within
    blocks of per_device_train_batch_size rows, as in TRL. So with `loss_type="kto"` rows are read
    in the data's order: shuffle data that is sorted by label. If the row before has the same
    prompt, or a block is a single row, an answer to another prompt is used, where TRL uses the
    answer to the same one. An evaluation estimates the term once, from all rows.

    With `packing` the answers of a batch are in one row, and the mismatched ones in another. The KL
    term of a batch that tokens_per_batch divides is estimated from the whole batch.

    Args:
        train_dataset, eval_dataset: rows of prompt, completion and label, or pairs; see
            `fastpref.data.prepare_unpaired_dataset`.
        args: an `UnpairedPreferenceConfig`.
        data_collator: replaces `UnpairedCollator`.
        compute_metrics: a function of an `EvalPrediction` with the rewards [rows] as predictions
            and labels of 1 (desirable) or 0, as `predict` returns them.
        model, ref_model, processing_class, callbacks, optimizers, quantization_config, peft_config:
            as in `PreferenceTrainer`.

    Raises:
        ValueError: as `PreferenceTrainer`; KTO with a batch size of 1, for which the KL term would
            be the reward.
        NonFiniteLossError: as `PreferenceTrainer`.
    """

    args: UnpairedPreferenceConfig
    config_class = UnpairedPreferenceConfig
    columns = (*UNPAIRED.ids, *UNPAIRED.numbers, *UNPAIRED.labels, *UNPAIRED.extra, "row")
    padded_collator_class = UnpairedCollator
    segment_collator = UnpairedSegmentCollator
    _tag_names = ["fastpref", "kto"]

    def set_loss(self, args: UnpairedPreferenceConfig) -> bool:
        self._loss_options = args.loss_options()
        self.estimates_kl = self.reads_in_order = args.loss_type == "kto"
        if self.estimates_kl and args.per_device_train_batch_size < 2:
            raise ValueError(
                "per_device_train_batch_size: got 1 with loss_type 'kto', whose KL term needs the "
                "answers to other prompts of the batch; expected at least 2"
            )
        return True

    def prepare_rows(self, dataset: Any, **options: Any) -> tuple[Any, DataReport]:
        mismatch = self.args.per_device_train_batch_size if self.estimates_kl else None
        return prepare_unpaired_dataset(
            dataset, **options, mismatch=mismatch, same_prompt=self.predicts
        )

    def why_loss_is_whole(self) -> str | None:
        return None  # each answer's term has the KL term of the whole batch

    def step_inputs(
        self, model: nn.Module, inputs: dict[str, Any], by_row: bool = False
    ) -> tuple[dict, dict]:
        if self._part_index == 0:
            parts = [self._prepare_inputs(part) for part in self._parts or [inputs]]
            self.estimate(model, parts, by_row)
        answers = sequences(inputs)
        ref_logps, ratios = self._estimates[self._part_index]
        return model_inputs(answers), {
            "num_tokens": answers["attention_mask"].sum(),
            "labels": batch_labels(answers),
            "desirable": inputs["label"].bool(),
            "ref_logps": ref_logps,
            "answer_weight": inputs.get("weight"),
            **{name: answers.get(name) for name in _LAYOUT},
            **({"kl_ratios": ratios} if by_row else {"kl": self._kl}),
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
        desirable: Tensor,
        **inputs: Any,
    ) -> dict[str, Any]:
        hidden = labelled_states(hidden, labels, hidden_indices)
        out = linear_kto_loss(
            hidden,
            head.weight,
            labels,
            desirable,
            **inputs,
            fused=head.fused,
            **head.options(hidden),
            **self._loss_options,
            **self._head_options,
            extras=UNPAIRED_EXTRAS,
        )
        loss = self._share * self.add_aux_loss(out.loss, aux_loss)
        out = out._replace(kl=self._share * out.kl)  # the parts' values are added
        ids = inputs["sequence_ids"]
        sums = unpaired_sums(out, loss, aux_loss, desirable, labels, num_tokens, ids)
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
        sequence_ids: Tensor | None,
        ref_logps: Tensor,
        **values: Any,
    ) -> Rows:
        hidden = labelled_states(hidden, labels, hidden_indices)
        stats = self.token_stats(hidden, head, labels, token_indices, UNPAIRED_EXTRAS)
        return answer_rows(labels, stats, sequence_ids, ref_logps, **values, router=router)

    def score(self, rows: Rows) -> Scored:
        return score_answers(rows, self._loss_options, self._router_coef)

    def window_options(self) -> dict[str, Any]:
        return {"names": UNPAIRED_SUMS, "metrics_of": unpaired_metrics}
