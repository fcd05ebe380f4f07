"""`predict` of the trainers: the rewards of every row, in the order of the rows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from transformers.trainer_utils import PredictionOutput, has_length

from fastpref.data.files import load_preference_data
from fastpref.data.tokenise import DataReport
from fastpref.trainer.evaluation import EvaluatingTrainer


class PredictingTrainer(EvaluatingTrainer):
    """A trainer whose `predict` takes raw rows and returns the rewards of each."""

    reports: dict[str, DataReport]

    def predict(
        self,
        test_dataset: Any,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "test",
    ) -> PredictionOutput:
        """The rewards of every row, and the metrics that `evaluate` gives, under `test_`.

        Args:
            test_dataset: anything that the trainer takes as data, or the name of one of its
                evaluation data sets. A stream is read to its end first.
            ignore_keys: unused, as there are no model outputs to leave out.
            metric_key_prefix: goes before the names of the metrics.

        Returns:
            A `PredictionOutput`. Its predictions are float32, one row for each row of the data and
            in the same order: [rows, 2] with the rewards of the chosen and of the rejected answer
            for pairs, [rows] with the rewards for single answers. Its label_ids are int64 [rows]:
            0, the column of the preferred answer, for pairs; 1 for a desirable single answer and 0
            for another. A row that cannot be scored, such as one whose prompt fills max_length, is
            NaN with the label -100 and does not count in the metrics; the log names such rows.
            Pairs that a trainer of single answers splits are in the order of
            `fastpref.data.prepare_unpaired_dataset`.
        """
        if isinstance(test_dataset, Mapping):
            raise ValueError(
                f"test_dataset is a dict of {len(test_dataset)} data sets; expected one of them, "
                "as predict returns the rows of one"
            )
        own: Any = self.eval_dataset
        if isinstance(test_dataset, str) and isinstance(own, Mapping) and test_dataset in own:
            test_dataset = own[test_dataset]
        source = load_preference_data(test_dataset)
        if not has_length(source):
            source = load_preference_data(list(source))
        if "row" in source.column_names and "prompt_ids" not in source.column_names:
            source = source.remove_columns("row")  # here a row's number is its place in the output
        self.reports.pop(metric_key_prefix, None)
        dataset = self.evaluation_data(source, metric_key_prefix)
        output = super().predict(dataset, ignore_keys, metric_key_prefix)
        predictions, labels = output.predictions, output.label_ids
        report = self.reports[metric_key_prefix]
        if predictions is not None and report.rows != report.kept:
            numbers, rows = np.asarray(dataset["row"]), report.rows or 0
            predictions = _spread(predictions, numbers, rows, np.nan)
            labels = _spread(labels, numbers, rows, -100)
        return PredictionOutput(predictions, labels, output.metrics)

    def evaluation_data(self, source: Any, name: str) -> Any:
        """Data of any form that the trainer takes, prepared for an evaluation."""
        raise NotImplementedError


def _spread(values: Any, numbers: np.ndarray, rows: int, fill: float) -> np.ndarray:
    """The values at their rows' numbers, and fill at the rows that have none."""
    out = np.full((rows, *values.shape[1:]), fill, values.dtype)
    out[numbers] = values
    return out
