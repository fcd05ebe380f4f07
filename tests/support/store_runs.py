"""Small training runs whose reference is a store."""

from __future__ import annotations

import numpy as np
from tiny import trainer

COLUMNS = ("ref_chosen_logps", "ref_rejected_logps")


def stored(tmp_path, policy=None, **options):
    return trainer(tmp_path, policy, reference_store=str(tmp_path / "store"), **options)


def values(t, columns=COLUMNS):
    return np.array([[row[column] for column in columns] for row in t.train_dataset])
