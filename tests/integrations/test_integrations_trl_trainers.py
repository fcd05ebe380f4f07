"""fastpref.patch_trl: TRL's five trainers with and without it."""

from __future__ import annotations

import math

import pytest

pytest.importorskip("transformers")
pytest.importorskip("trl")

import tiny  # noqa: E402
from trl_runs import TRAINERS, assert_same, trained  # noqa: E402

import fastpref  # noqa: E402
from fastpref.integrations import trl as ours  # noqa: E402

pytestmark = [pytest.mark.train, pytest.mark.usefixtures("unpatched")]


@pytest.mark.parametrize("name", TRAINERS)
def test_trainer(name, tmp_path):
    theirs = trained(name, tmp_path)
    calls = []
    real = ours.FusedLogProbs.apply

    def apply(self, *args):
        calls.append(args[0].shape)
        return real(self, *args)

    with pytest.MonkeyPatch.context() as patch, fastpref.patch_trl():
        patch.setattr(ours.FusedLogProbs, "apply", apply)
        mine = trained(name, tmp_path)
    assert len(calls) >= 2
    assert_same(mine, theirs)


def test_trainer_with_lora(tmp_path):
    theirs = trained("dpo", tmp_path, peft=tiny.lora())
    with fastpref.patch_trl():
        mine = trained("dpo", tmp_path, peft=tiny.lora())
    assert_same(mine, theirs)


def test_first_margins_are_exactly_zero(tmp_path):
    with fastpref.patch_trl():
        first = trained("dpo", tmp_path, bf16=True, max_steps=1)[0]
    assert first["rewards/chosen"] == first["rewards/rejected"] == 0
    assert math.isclose(first["loss"], math.log(2), rel_tol=1e-6)
