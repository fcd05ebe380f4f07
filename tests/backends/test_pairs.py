"""pair_loss in C++ and CUDA, for every loss with a closed form, against float64 and autograd of the
functions that have the formulas, which tests/losses/test_loss_formulas.py holds to the papers."""

from __future__ import annotations

import machine
import pytest
import torch

from fastpref import LossOptions, backends, linear_preference_loss, preference_loss
from fastpref.backends.tile import PAIR_FORMS
from fastpref.losses import LOSS_TYPES

P = 7
OPTIONS: list[tuple[str, dict]] = [
    ("sigmoid", {}),
    ("sigmoid", {"label_smoothing": 0.2, "margin": True}),
    ("sigmoid", {"reference_free": True}),
    ("sigmoid_norm", {"label_smoothing": 0.1, "margin": True}),
    ("ipo", {}),
    ("ipo", {"ipo_normalization": "sum"}),
    ("hinge", {"margin": True}),
    ("exo_pair", {"label_smoothing": 0.01, "margin": True}),
    ("robust", {"label_smoothing": 0.2, "margin": True}),
    ("nca_pair", {}),
    ("bco_pair", {}),
    ("sppo_hard", {}),
    ("apo_zero", {}),
    ("apo_down", {}),
    ("discopop", {"margin": True}),
    ("discopop", {"discopop_tau": 0.5}),
    ("cpo", {"nll_weight": 0.0, "label_smoothing": 0.1}),
    ("simpo", {"margin": True}),
    ("simpo", {"simpo_gamma": 0.0, "label_smoothing": 0.2}),
    ("alphapo", {"alpha": 0.25, "margin": True}),
    ("alphapo", {"alpha": -0.3, "simpo_gamma": -0.4}),
    ("orpo", {"nll_weight": 0.0}),
]


@pytest.fixture(params=["native", "cuda"])
def module(request):
    """The backends with every closed form."""
    reason = machine.why_not(request.param)
    if reason is not None:
        pytest.skip(reason)
    return backends._MODULES[request.param]


def test_every_closed_form_is_tried(module):
    assert {name for name, _ in OPTIONS} == module.CLOSED_FORMS == set(PAIR_FORMS)
    assert set(LOSS_TYPES) - module.CLOSED_FORMS == {"aot", "aot_unpaired", "sft"}


def _shown(value):
    return value if isinstance(value, str) else "-".join(map(str, value.values())) or "plain"


@pytest.mark.parametrize("order", ["sorted", "shuffled"])
@pytest.mark.parametrize("size", [1.0, 30.0, 3000.0], ids=["near", "far", "extreme"])
@pytest.mark.parametrize("name, options", OPTIONS, ids=_shown)
def test_closed_form(module, name, options, size, order):
    options = dict(options)
    margin = torch.randn(P) if options.pop("margin", False) else None
    checked = LossOptions(name, beta=0.3, **options)
    assert checked.closed_form == name
    ids = torch.randint(2 * P, (300,))
    if name != "orpo":  # which has it end at the dtype's own epsilon
        ids[ids == 5] = 0  # a sequence without a token
    ids = ids.sort().values if order == "sorted" else ids
    logps, weight = -torch.rand(300) * size / 20, torch.rand(P)
    reference = None if checked.reference == "none" else -torch.rand(2 * P) * size
    lengths = torch.bincount(ids, minlength=2 * P).float() if checked.needs_lengths else None
    device = machine.device_of(module.NAME)
    on = [None if t is None else t.to(device) for t in (reference, lengths, weight, margin)]
    loss, sequences, rewards, coef = (
        t.cpu().double()
        for t in module.pair_loss(
            logps.to(device), ids.to(device), P, on[0], loss_type=name, beta=checked.beta,
            label_smoothing=checked.label_smoothing, lengths=on[1], weight=on[2], margin=on[3],
            **checked.pair_parameters,
        )
    )  # fmt: skip
    exact = logps.double().requires_grad_()
    sums = torch.zeros(2 * P, dtype=torch.float64).index_add(0, ids, exact)
    rounded = sums + (sums.float().double() - sums).detach()  # as they are compared
    halves = [None if t is None else t.double() for t in (reference, lengths)]
    (rw, rl), (nw, nl) = ((None, None) if t is None else (t[:P], t[P:]) for t in halves)
    truth = preference_loss(
        rounded[:P], rounded[P:], rw, rl, loss_type=name, beta=0.3, weight=weight.double(),
        margin=None if margin is None else margin.double(), chosen_lengths=nw, rejected_lengths=nl,
        **options,
    )  # fmt: skip
    (wanted,) = torch.autograd.grad(truth.loss, exact)
    close = dict(rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(sequences, rounded.detach(), **close)
    torch.testing.assert_close(loss, truth.loss.detach(), **close)
    both = torch.cat([truth.chosen_rewards, truth.rejected_rewards])
    torch.testing.assert_close(rewards, both, **close)
    scale = float(wanted.abs().max())
    torch.testing.assert_close(coef, wanted, rtol=2e-6, atol=1e-7 * scale + 1e-12)


def _batch(device):
    hidden = torch.randn(2 * P, 6, 8, device=device).requires_grad_()
    weight = torch.randn(40, 8, device=device).requires_grad_()
    labels = torch.randint(40, (2 * P, 6), device=device)
    labels[2, 3:] = -100
    return hidden, weight, labels


@pytest.mark.parametrize("name, options", OPTIONS, ids=_shown)
def test_through_the_whole_loss(monkeypatch, module, name, options):
    """linear_preference_loss takes the closed form, with its options; autograd says the same."""
    calls, real, device = [], module.pair_loss, machine.device_of(module.NAME)
    monkeypatch.setattr(module, "pair_loss", lambda *a: calls.append(a[4]) or real(*a))
    options = dict(options)
    given = {"margin": torch.randn(P, device=device)} if options.pop("margin", False) else {}
    hidden, weight, labels = _batch(device)
    free = LossOptions(name, **options).reference == "none"
    given["ref_logps"] = None if free else -torch.rand(2 * P, device=device) * 20
    results = []
    for backend in (module.NAME, "eager"):
        out = linear_preference_loss(
            hidden, weight, labels, backend=backend, loss_type=name, **options, **given
        )
        results.append([*torch.autograd.grad(out.loss, [hidden, weight]), *out[:5]])
    assert calls == [name]
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["cpo", "orpo", "sft", "aot"])
def test_others_go_through_autograd(monkeypatch, module, name):
    """With an NLL, which is a mean over the batch's tokens, and losses of the whole batch."""
    monkeypatch.setattr(module, "pair_loss", None)
    device = machine.device_of(module.NAME)
    hidden, weight, labels = _batch(device)
    reference = -torch.rand(2 * P, device=device) if name == "aot" else None
    given = {"loss_type": name, "backend": module.NAME}
    out = linear_preference_loss(hidden, weight, labels, reference, **given)
    out.loss.backward()
    assert hidden.grad.isfinite().all()


def test_a_token_of_no_sequence(module):
    """It counts nowhere, and its coefficient is NaN: ids are not checked on a GPU."""
    device = machine.device_of(module.NAME)
    logps, ids = -torch.rand(9), torch.arange(9) % 4
    ids[3], ids[5] = -1, 4
    inside = (ids >= 0) & (ids < 4)
    ids, logps = ids.to(device), logps.to(device)
    given = {"loss_type": "hinge", "beta": 0.1, "label_smoothing": 0.0}
    none = dict.fromkeys(("lengths", "weight", "margin"))
    got = module.pair_loss(logps, ids, 2, None, **given, **none)
    want = module.pair_loss(logps[inside], ids[inside], 2, None, **given, **none)
    for a, b in zip(got[:3], want[:3], strict=True):
        assert torch.equal(a, b)
    assert torch.equal(got[3].isfinite().cpu(), inside)
