"""Preference data: reading it, tokenising it and batching it.

The three steps can be used on their own. `load_preference_data` turns a file, a hub name or rows
into a `datasets.Dataset`. `prepare_dataset` tokenises it, drops the rows that cannot be trained on
and reports their number. `PreferenceCollator` makes padded batches. `prepare_unpaired_dataset` and
`UnpairedCollator` are the counterparts for single answers. docs/data.md describes the input.
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
