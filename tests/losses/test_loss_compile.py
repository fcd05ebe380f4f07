"""The losses under torch.compile: one graph, and the results of the ordinary call."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fastpref import LossOptions, linear_kto_loss, linear_preference_loss

P, T, H, V = 2, 6, 16, 51


def own(pairs):
    return F.softplus(-pairs.advantage())


CASES = [
    {"loss_type": "exo_pair", "label_smoothing": 0.01},
    {"loss_type": "aot"},
    {"loss_type": "discopop"},
    {"loss_type": "orpo", "beta": 0.5},
    {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]},
    {"ld_alpha": 0.3, "use_weighting": True, "f_divergence_type": "js_divergence"},
    {"loss_type": own, "soft_labels": torch.tensor([0.2, 0.9]), "nll_weight": 0.5},
    {"loss_options": LossOptions("sigmoid_norm", beta=2.0), "margin": torch.tensor([0.2, 0.9])},
]


def inputs():
    hidden = torch.randn(2 * P, T, H).requires_grad_()
    weight = torch.randn(V, H).requires_grad_()
    labels = torch.randint(V, (2 * P, T))
    labels[:, :2] = -100
    labels[1, 4:] = -100
    return hidden, weight, labels


def compare(step, arguments):
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    results = []
    for function in (step, compiled):
        loss, *rest = function(*arguments)
        results.append((loss, *rest, *torch.autograd.grad(loss, arguments[:2])))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


# The fast tests have the last case, whose loss needs the most: margins, lengths and an object.
@pytest.mark.parametrize(
    "options",
    [*(pytest.param(case, marks=pytest.mark.slow) for case in CASES[:-1]), CASES[-1]],
    ids=lambda v: "-".join(v),
)
def test_no_graph_break(options):
    ready = options.get("loss_options")
    loss_type = options.get("loss_type", "sigmoid")
    reference = None if loss_type == "orpo" else torch.linspace(-30, -20, 2 * P)

    def step(hidden, weight, labels):
        out = linear_preference_loss(hidden, weight, labels, reference, **options)
        return out.loss, out.chosen_rewards, out.rejected_logps

    assert ready is None or ready.needs_lengths
    compare(step, inputs())


def test_kto():
    desirable = torch.tensor([True, False, True, False])

    def step(hidden, weight, labels):
        out = linear_kto_loss(
            hidden, weight, labels, desirable, torch.full((2 * P,), -25.0), kl=0.4,
            undesirable_weight=0.7,
        )  # fmt: skip
        return out.loss, out.rewards

    compare(step, inputs())
