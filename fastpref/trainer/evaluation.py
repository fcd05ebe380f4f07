"""The trainers' evaluation: loss and metrics over all rows of a data set."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.trainer_utils import EvalLoopOutput, EvalPrediction, denumpify_detensorize

from fastpref.data.loaders import POSITION, own_part
from fastpref.heads.reading import Head
from fastpref.heads.router import router_rows
from fastpref.logps.forward import TokenStats
from fastpref.logps.linear import linear_token_logps
from fastpref.trainer.ending import EndingTrainer
from fastpref.trainer.loaders import LoadingTrainer
from fastpref.trainer.metrics import MetricWindow
from fastpref.trainer.scores import Rows, RowTable, Scored, figures


class EvaluatingTrainer(EndingTrainer, LoadingTrainer):
    """The part of a trainer that evaluates."""

    _head_options: dict[str, Any]
    _router_coef: float
    _table: RowTable  # of the evaluation that is running
    _window: MetricWindow
    _evaluates = False  # whether an evaluation is running

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Evaluate on the trainer's evaluation data, or on other data that the trainer accepts.

        Args:
            eval_dataset: data, a dict of data, or the name of one of the trainer's evaluation data
                sets. The metrics of a dict's data have the prefix `eval_{name}_`.
            ignore_keys: without effect.
            metric_key_prefix: goes before the names of the metrics.
        """
        stored: Any = self.eval_dataset
        source = stored if eval_dataset is None else eval_dataset
        if isinstance(source, Mapping):
            metrics: dict[str, float] = {}
            for name, part in source.items():
                part = name if eval_dataset is None else part
                prefix = f"{metric_key_prefix}_{name}"
                metrics.update(self.evaluate(part, ignore_keys, prefix))
            return metrics
        is_name = isinstance(source, str) and isinstance(stored, Mapping) and source in stored
        if eval_dataset is not None and not is_name:
            eval_dataset = self.evaluation_data(eval_dataset, metric_key_prefix)
        self._evaluates = True
        try:
            return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        finally:
            self._evaluates = False

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[None, None, None]:
        """Store the values of a batch's rows, from which the evaluation's end computes the metrics.

        Returns None for loss, logits and labels.
        """
        self.end_before_batch()
        inputs = self._prepare_inputs(own_part(inputs) if self._dispatches else inputs)
        positions = inputs.pop(POSITION, None)
        with torch.no_grad(), self.compute_loss_context_manager():
            kwargs, head_inputs = self.step_inputs(model, inputs, by_row=True)
            if self._router_coef:
                kwargs.update(output_router_logits=True, router_fn=router_rows)
            values = model(**kwargs, head_fn=self.rows_head, head_inputs=head_inputs)
        self._table.add(values, positions, inputs.get("rows"))
        return None, None, None

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> Any:
        """`transformers.Trainer.evaluation_loop`, with loss and metrics over all rows."""
        self._window.sync()
        accelerator = self.accelerator
        self._table = RowTable(
            accelerator.device, accelerator.process_index, accelerator.num_processes
        )
        output = super().evaluation_loop(
            dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
        )
        self.finish_batches()
        where = f"evaluation after step {self.state.global_step}"
        rewards: Any
        labels: Any
        values, rewards, labels = figures(self._table, self.score, self._window.metrics_from, where)
        self._table.clear()
        if rewards is not None:
            values["num_tokens"] = self._window.total_tokens
            if self.compute_metrics is not None:
                predictions = EvalPrediction(predictions=rewards, label_ids=labels)
                values.update(denumpify_detensorize(self.compute_metrics(predictions)))
        metrics = dict(output.metrics or {})
        for key, value in values.items():  # those of compute_metrics may have the prefix already
            start = f"{metric_key_prefix}_"
            metrics[key if key.startswith(start) else start + key] = value
        count = 0 if rewards is None else len(rewards)
        return EvalLoopOutput(rewards, labels, metrics, count)

    def token_stats(
        self,
        hidden: Tensor,
        head: Head,
        labels: Tensor,
        token_indices: Tensor | None,
        extras: Sequence[str],
    ) -> TokenStats:
        """`linear_token_logps` with the trainer's options of the head."""
        stats = linear_token_logps(
            hidden,
            head.weight,
            labels,
            token_indices=token_indices,
            fused=head.fused,
            extras=extras,
            **head.options(hidden),
            **self._head_options,
        )
        assert isinstance(stats, TokenStats)  # as there are extras
        return stats

    # ---- defined by a subclass ----

    def evaluation_data(self, source: Any, name: str) -> Any:
        """Data that the trainer accepts, prepared for an evaluation."""
        raise NotImplementedError

    def step_inputs(
        self, model: nn.Module, inputs: dict[str, Any], by_row: bool = False
    ) -> tuple[dict, dict]:
        """The arguments of the model for a batch, and those of its `head_fn` after the third.

        The head_fn is `loss_head`, or `rows_head` with by_row=True.
        """
        raise NotImplementedError

    def rows_head(self, hidden: Tensor, head: Head, router: Tensor | None, **inputs: Any) -> Rows:
        """The `head_fn` of an evaluation step: the values of each row."""
        raise NotImplementedError

    def score(self, rows: Rows) -> Scored:
        """Loss, metric sums and rewards of all rows of an evaluation, treated as one batch."""
        raise NotImplementedError
