"""Rows of segments hold the same sequences and labels as padded rows."""

from __future__ import annotations

import pickle

import pytest
import torch

from fastpref.data import PreferenceCollator
from fastpref.data.segments import PLAN, RowPlan, Segment, SegmentCollator, shared_fraction

PAIRS = [
    {"prompt_ids": [5, 6, 7], "chosen_ids": [8, 9], "rejected_ids": [8, 4, 3]},  # 8 is common
    {"prompt_ids": [], "chosen_ids": [3, 4], "rejected_ids": [5]},
    {"prompt_ids": [9], "chosen_ids": [2], "rejected_ids": [2, 6, 6]},  # a prefix of the other
    {"prompt_ids": [4, 4, 4, 4, 4, 4], "chosen_ids": [1, 2, 3, 4, 5], "rejected_ids": [1, 9]},
]
ROWS = [(True, False), (True, True), (False, True), (False, False)]
CUTS = [{}, {"max_length": 5}, {"max_length": 5, "truncation_mode": "keep_end"}]


@pytest.mark.parametrize("cut", CUTS, ids=lambda cut: cut.get("truncation_mode", str(len(cut))))
@pytest.mark.parametrize(("sharing", "packing"), ROWS)
def test_every_labelled_token_sees_its_sequence(sharing, packing, cut):
    plain = PreferenceCollator(0, **cut)(PAIRS)
    batch = SegmentCollator(0, **cut, sharing=sharing, packing=packing)(PAIRS)
    at = plain["token_indices"]
    assert torch.equal(batch["labels"], plain["labels"].flatten()[at])
    width = plain["input_ids"].shape[1]
    assert torch.equal(batch["sequence_ids"], at // width)
    assert torch.equal(batch["lengths"], plain["completion_mask"].sum(1).clamp(min=1))
    assert torch.equal(batch["sequence_tokens"], plain["attention_mask"].sum(1))
    rows = batch["input_ids"].shape[1]
    seen = batch[PLAN].visible(None, "cpu")[:, 0]
    for place, index in zip(at.tolist(), batch["hidden_indices"].tolist(), strict=True):
        row, query = divmod(index, rows)
        keys = seen[row, query].nonzero()[:, 0]
        expected = plain["input_ids"][place // width, : place % width + 1]
        assert torch.equal(batch["input_ids"][row, keys], expected)
        assert torch.equal(batch["position_ids"][row, keys], torch.arange(len(keys)))
        near = batch[PLAN].visible(2, "cpu")[row, 0, query].nonzero()[:, 0]
        assert torch.equal(near, keys[-2:])


def test_sharing_and_packing_leave_tokens_out():
    sizes = {}
    for sharing, packing in ROWS:
        batch = SegmentCollator(0, sharing=sharing, packing=packing)(PAIRS)
        sizes[sharing, packing] = batch["input_ids"].numel(), int(batch["attention_mask"].sum())
    real = int(PreferenceCollator(0)(PAIRS)["attention_mask"].sum())
    assert sizes[False, True] == (real, real)
    assert sizes[True, True][0] == sizes[True, True][1] == real - 4 - 0 - 2 - 7
    assert sizes[True, False][1] == sizes[True, True][1] < sizes[True, False][0]


def test_the_last_prompt_token_predicts_both_answers():
    batch = SegmentCollator(0)([{"prompt_ids": [5, 6], "chosen_ids": [7], "rejected_ids": [8, 9]}])
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 2, 3]]
    assert batch[PLAN].rows == ((Segment(0, 2), Segment(2, 3, 0), Segment(3, 5, 0)),)
    assert batch["hidden_indices"].tolist() == [1, 1, 3]
    assert batch["labels"].tolist() == [7, 8, 9] and batch["sequence_ids"].tolist() == [0, 1, 1]


def test_the_nll_counts_prompts():
    plain = PreferenceCollator(0)(PAIRS)
    batch = SegmentCollator(0, nll_on_prompt=True, packing=True)(PAIRS)
    chosen = batch["sequence_ids"] < len(PAIRS)
    real = plain["attention_mask"][: len(PAIRS)].sum(1)
    assert int(chosen.sum()) == int((real - 1).clamp(min=0).sum())
    assert bool((batch["nll_labels"][chosen] != -100).all())
    labelled = batch["labels"] != -100
    assert torch.equal(batch["labels"][labelled], plain["labels"].flatten()[plain["token_indices"]])


def test_a_plan_travels_without_its_cache():
    plan = RowPlan([[Segment(0, 3), Segment(3, 4, 0)]], 6)
    mask = plan.visible(None, "cpu")
    copy = pickle.loads(pickle.dumps(plan))
    assert copy.rows == plan.rows and not copy.cache
    assert torch.equal(copy.visible(None, "cpu"), mask)


def test_the_fraction_that_sharing_leaves_out():
    rows = [{"prompt_ids": [1] * 8, "chosen_ids": [1, 2], "rejected_ids": [3, 2]}]
    assert shared_fraction(rows, SegmentCollator(0)) == 8 / 20
    assert shared_fraction([], SegmentCollator(0)) == 0
    # Truncation at the start leaves two sequences that begin with different tokens.
    rows[0] |= {"prompt_ids": list(range(10, 18)), "rejected_ids": [3, 2, 4, 5]}
    assert shared_fraction(rows, SegmentCollator(0, 8, "keep_end")) == 0
