"""Preference data: reading it, tokenising it and batching it.

Three steps, each usable alone: `load_preference_data` turns a file, a hub name or rows into a
`datasets.Dataset`; `prepare_dataset` tokenises it, drops rows that cannot be trained on and says
how many; `PreferenceCollator` makes a padded batch. `prepare_unpaired_dataset` and
`UnpairedCollator` do the same for single answers. docs/data.md says what is read.
"""

from __future__ import annotations

from fastpref.data.collate import PreferenceCollator, UnpairedCollator
from fastpref.data.files import load_preference_data
from fastpref.data.layouts import extract_prompt
from fastpref.data.tokenise import DataReport, prepare_dataset
from fastpref.data.unpaired import prepare_unpaired_dataset

__all__ = [
    "DataReport",
    "PreferenceCollator",
    "UnpairedCollator",
    "extract_prompt",
    "load_preference_data",
    "prepare_dataset",
    "prepare_unpaired_dataset",
]
