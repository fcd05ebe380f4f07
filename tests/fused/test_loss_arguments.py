"""Options and arguments of a loss: what is refused, and `LossOptions` in their place."""

from __future__ import annotations

import copy
import dataclasses
import pickle

import pytest
import torch
from test_loss_fused import P, T, V, batch

from fastpref import (
    FusedLinearPreferenceLoss,
    LossOptions,
    backends,
    dpo_loss,
    linear_preference_loss,
)
from fastpref.validation import cached_options


@pytest.mark.parametrize(
    "name, options",
    [
        ("loss_type", {"loss_type": []}),
        ("loss_type", {"loss_type": ["sigmoid", "simpoo"]}),
        ("loss_type", {"loss_type": 3}),
        ("loss_type", {"loss_type": None}),
        ("loss_weights", {"loss_weights": [1.0, 2.0]}),
        ("loss_weights", {"loss_type": ["sigmoid", "sft"], "loss_weights": 1.0}),
        ("loss_weights", {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, "2"]}),
        ("loss_weights", {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, float("nan")]}),
        ("label_smoothing", {"loss_type": "exo_pair"}),
        ("label_smoothing", {"loss_type": "hinge", "label_smoothing": 0.1}),
        ("alpha", {"loss_type": "alphapo"}),
        ("alpha", {"loss_type": "simpo", "alpha": 0.1}),
        ("simpo_gamma", {"simpo_gamma": 0.2}),
        ("discopop_tau", {"discopop_tau": 0.2}),
        ("discopop_tau", {"loss_type": "discopop", "discopop_tau": 0.0}),
        ("f_divergence_type", {"f_divergence_type": "kl"}),
        ("f_divergence_type", {"loss_type": "apo_zero", "f_divergence_type": "js_divergence"}),
        ("f_divergence_type", {"loss_type": ["sigmoid", "bco_pair"],
                               "f_divergence_type": "js_divergence"}),
        ("f_divergence_type", {"loss_type": "simpo", "f_divergence_type": "js_divergence"}),
        ("f_alpha_divergence_coef", {"f_alpha_divergence_coef": 0.7}),
        ("ld_alpha", {"ld_alpha": 1.5}),
        ("ld_alpha", {"ld_alpha": "0.5"}),
        ("ld_alpha", {"ld_alpha": 0.5, "loss_type": "sft"}),
        ("nll_weight", {"nll_weight": float("inf")}),
        ("use_weighting", {"loss_type": "aot", "use_weighting": True}),
        ("use_weighting", {"loss_type": "sft", "use_weighting": True}),
        ("soft_labels", {"soft_labels": torch.full((P,), 1.5)}),
        ("soft_labels", {"soft_labels": torch.full((P,), float("nan"))}),
        ("soft_labels", {"soft_labels": torch.zeros(2 * P)}),
        ("soft_labels", {"soft_labels": torch.ones(P), "label_smoothing": 0.1}),
        ("soft_labels", {"soft_labels": torch.ones(P), "loss_type": ["sigmoid", "apo_zero"]}),
        ("pair_weight", {"pair_weight": torch.ones(P), "loss_type": ["sigmoid", "aot"]}),
        ("nll_labels", {"nll_labels": torch.zeros(2 * P, T).long()}),
        ("nll_labels", {"nll_labels": torch.zeros(P, T).long(), "nll_weight": 1.0}),
        ("nll_labels", {"nll_labels": torch.zeros(2 * P, T), "nll_weight": 1.0}),
        ("nll_labels", {"nll_labels": "other", "nll_weight": 1.0}),
        ("ref_logps", {"loss_type": "simpo"}),
        ("ref_logps", {"loss_type": ["orpo", "cpo"]}),
        ("loss_options", {"loss_options": {"beta": 1.0}}),
        ("beta", {"loss_options": LossOptions(), "beta": 1.0}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)  # fmt: skip
def test_bad_options(monkeypatch, name, options):
    for module in (backends.native, backends.eager):
        monkeypatch.delattr(module, "linear")  # no kernel runs
    hidden, weight, labels, ref_logps = batch()
    if isinstance(options.get("nll_labels"), str):
        options = {**options, "nll_labels": torch.where(labels >= 0, (labels + 1) % V, -100)}
    with pytest.raises(ValueError, match=f"^{name}: .*(expected|support)"):
        linear_preference_loss(hidden, weight, labels, ref_logps, **options)


def test_unknown_keywords_are_refused():
    with pytest.raises(TypeError, match="unexpected keyword argument 'gamma'"):
        linear_preference_loss(*batch(), gamma=0.5)
    with pytest.raises(ValueError, match="gamma: not an option"):
        FusedLinearPreferenceLoss("simpo", gamma=0.5)
    with pytest.raises(ValueError, match="^use_weighting: .* expected"):
        logits = torch.zeros(2 * P, T, V)
        dpo_loss(logits, torch.zeros(2 * P, T).long(), torch.zeros(2 * P), use_weighting=True)


def test_ready_options_and_lists():
    arguments = batch()
    options = LossOptions("robust", beta=0.2, label_smoothing=0.1)
    named = linear_preference_loss(*arguments, loss_type="robust", beta=0.2, label_smoothing=0.1)
    ready = linear_preference_loss(*arguments, loss_options=options)
    assert torch.equal(named.loss, ready.loss)
    # An option that one loss of the list has is that loss's.
    mixed = linear_preference_loss(*arguments, loss_type=("robust", "hinge"), label_smoothing=0.1)
    parts = [
        linear_preference_loss(*arguments, loss_type="robust", label_smoothing=0.1).loss,
        linear_preference_loss(*arguments, loss_type="hinge").loss,
    ]
    torch.testing.assert_close(mixed.loss, sum(parts))


def test_loss_options_survive_what_dataclasses_do_to_them():
    options = LossOptions(["sigmoid", "sft"], loss_weights=[1.0, 0.5], beta=0.3)
    others = [
        LossOptions(**dataclasses.asdict(options)),
        pickle.loads(pickle.dumps(options)),
        copy.deepcopy(options),
        dataclasses.replace(options),
    ]
    for other in others:
        assert other == options and other.terms == options.terms and other.needs_nll
    changed = dataclasses.replace(options, loss_type="ipo", loss_weights=None)
    assert changed.closed_form == "ipo" and not changed.needs_nll and options.closed_form is None


def test_options_are_remembered_by_their_types():
    assert cached_options(LossOptions, {"beta": 1}) is cached_options(LossOptions, {"beta": 1})
    assert type(cached_options(LossOptions, {"beta": 1}).beta) is int
    assert type(cached_options(LossOptions, {"beta": 1.0}).beta) is float
    for _ in range(2):  # a bad value is not remembered
        with pytest.raises(ValueError, match="beta: got True"):
            cached_options(LossOptions, {"beta": True})
    own = lambda pairs: pairs.advantage()  # noqa: E731
    assert cached_options(LossOptions, {"loss_type": own}) is not cached_options(
        LossOptions, {"loss_type": own}
    )


@pytest.mark.parametrize("fused", [0, 1, "yes", 0.0])
def test_fused_is_one_of_four(fused):
    with pytest.raises(ValueError, match="fused: got"):
        linear_preference_loss(*batch(), fused=fused)
