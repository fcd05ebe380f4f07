"""CHES: the scores are those of float64 states of unpadded sequences, and rank pairs."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers")

from support import tiny

from fastpref.data.collate import PreferenceCollator
from fastpref.heads.calling import install_head_forward
from fastpref.quality.displacement import Scored, ches
from fastpref.reference import Reference

KEYS = ("prompt_ids", "chosen_ids", "rejected_ids")
PAIRS = [([6, 7], [8, 9, 10], [11]), ([5, 6, 7, 8], [9], [10, 11, 12, 13])]


def exact(model, prompt, chosen, rejected):
    """Both scores of a pair, from the sums and means of its answers' states, without padding."""
    sums, means = [], []
    for answer in (chosen, rejected):
        with torch.no_grad():
            states = model.model(torch.tensor([prompt + answer])).last_hidden_state[0].double()
        before = [states[len(prompt) + k - 1] for k in range(len(answer))]
        sums.append(torch.stack(before).sum(0))
        means.append(sums[-1] / len(answer))
    return [float(a @ b - a @ a) for a, b in (sums, means)]


def test_scores_are_those_of_float64():
    model = tiny.model()
    install_head_forward(model)
    examples = [dict(zip(KEYS, pair, strict=True)) for pair in PAIRS]
    scored = Scored(Reference(model, False, {}))
    plain = Reference(model, False, {}).token_logps(PreferenceCollator(0, 64)(examples))
    logps = scored.token_logps(PreferenceCollator(0, 64)(examples))
    assert torch.equal(logps, plain)
    expected = [exact(model.double(), *pair) for pair in PAIRS]
    assert scored.scores == [pytest.approx(pair, rel=1e-4) for pair in expected]
    ranked = scored.ranked([3, 8])
    assert [p.row for p in ranked] == ([3, 8] if expected[0][0] > expected[1][0] else [8, 3])


def test_equal_answers_have_a_score_of_0_and_opposite_ones_the_least():
    states = torch.randn(1, 3, 5)
    labels = torch.tensor([[-100, 4, 4]] * 2)
    for sign, factor in ((1, 0.0), (-1, -2.0)):
        both = ches(torch.cat([states, sign * states]), labels)
        total = states[0, 1:].double().sum(0)
        for score, count in zip(both, (1, 2), strict=True):
            norm = float((total / count).square().sum())
            assert float(score) == pytest.approx(factor * norm, abs=1e-12)
