"""`predict` of the trainers: the rewards of all rows, in the order of the data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from transformers.trainer_utils import PredictionOutput, has_length

from fastpref.data.files import load_preference_data
from fastpref.data.tokenise import DataReport
from fastpref.trainer.evaluation import EvaluatingTrainer


class PredictingTrainer(EvaluatingTrainer):
    """The part of a trainer that predicts the rewards of rows."""

    reports: dict[str, DataReport]
    predicts = False  # whether `predict` prepares its data

    def predict(
        self,
        test_dataset: Any,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "test",
    ) -> PredictionOutput:
        """The rewards of all rows, and the metrics of `evaluate`.

        Args:
            test_dataset: data that the trainer accepts, or the name of one of its evaluation data
                sets. A stream is read to its end first.
            ignore_keys: without effect.
            metric_key_prefix: goes before the names of the metrics.

        Returns:
            A `PredictionOutput` in the order of the data:

            - predictions: the rewards, float32; [rows, 2] of the chosen and of the rejected answer
              for pairs, [rows] for single answers.
            - label_ids: int64 [rows]; for pairs 0, the column of the preferred answer; for single
              answers 1 if desirable, else 0.
            - metrics: over the rows that can be scored.

            A row that cannot be scored, such as one whose prompt has max_length tokens, has NaN and
            the label -100; the log names it. Pairs in a trainer of single answers are split into
            rows in the order of `fastpref.data.prepare_unpaired_dataset`. Rows of a single prompt
            have rewards and log-probs; KTO's KL term, and with it the loss, is then estimated from
            the answers to that prompt.

        Raises:
            ValueError: a dict of data sets, or bad data.
        """
        if isinstance(test_dataset, Mapping):
            raise ValueError(
                f"test_dataset is a dict of {len(test_dataset)} data sets; expected one of them, "
                "as predict returns the rows of one"
            )
        stored: Any = self.eval_dataset
        if isinstance(test_dataset, str) and isinstance(stored, Mapping) and test_dataset in stored:
            test_dataset = stored[test_dataset]
        source = load_preference_data(test_dataset)
        if not has_length(source):
            source = load_preference_data(list(source))
        if "row" in source.column_names and "prompt_ids" not in source.column_names:
            source = source.remove_columns("row")  # numbers must be positions in the output
        self.reports.pop(metric_key_prefix, None)
        self.predicts = True
        try:
            dataset = self.evaluation_data(source, metric_key_prefix)
        finally:
            self.predicts = False
        output = super().predict(dataset, ignore_keys, metric_key_prefix)
        predictions, labels = output.predictions, output.label_ids
        report = self.reports[metric_key_prefix]
        if predictions is not None and report.rows != report.kept:
            numbers, rows = np.asarray(dataset["row"]), report.rows or 0
            predictions = _spread(predictions, numbers, rows, np.nan)
            labels = _spread(labels, numbers, rows, -100)
        return PredictionOutput(predictions, labels, output.metrics)


def _spread(values: Any, numbers: np.ndarray, rows: int, fill: float) -> np.ndarray:
    """An array of `rows` rows: values at the positions `numbers`, and fill elsewhere."""
    out = np.full((rows, *values.shape[1:]), fill, values.dtype)
    out[numbers] = values
    return out
