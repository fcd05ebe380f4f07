"""KTO, APO-zero without pairs, and the reward model's loss, against float64 formulas."""

from __future__ import annotations

import loss_formulas
import oracle
import pytest
import torch

from fastpref import backends, kto_loss, linear_kto_loss, reward_loss, sequence_logps
from fastpref.losses.unpaired import kto_kl

B, T, H, V = 5, 6, 8, 19


def answers(dtype=torch.float64):
    """logps, ref_logps [B], desirable [B]."""
    logps = (-torch.rand(B, dtype=dtype) * 20).requires_grad_()
    desirable = torch.tensor([True, False, False, True, True])
    return logps, -torch.rand(B, dtype=dtype) * 20, desirable


@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.3, 2.0)])
@pytest.mark.parametrize("beta", [0.1, 1.3])
@pytest.mark.parametrize("kl", [0.0, 2.5])
def test_kto(kl, beta, weights):
    logps, reference, desirable = answers()
    each = torch.rand(B, dtype=torch.float64)
    options = dict(beta=beta, desirable_weight=weights[0], undesirable_weight=weights[1])
    formula = loss_formulas.kto(logps, reference, desirable, kl, beta, weights)
    for given in (kl, torch.tensor(kl), torch.tensor([kl])):
        out = kto_loss(logps, reference, desirable, given, weight=each, **options)
        torch.testing.assert_close(out.loss, (formula * each).mean())
    (gradient,) = torch.autograd.grad(out.loss, logps, retain_graph=True)
    (expected,) = torch.autograd.grad((formula * each).mean(), logps)
    torch.testing.assert_close(gradient, expected)
    torch.testing.assert_close(out.rewards, beta * (logps - reference).detach())
    assert out.kl == kl and not out.rewards.requires_grad
    apo = kto_loss(logps, reference, desirable, loss_type="apo_zero_unpaired", **options)
    zero = loss_formulas.kto(logps, reference, desirable, 0.0, beta, weights)
    torch.testing.assert_close(apo.loss, zero.mean())
    several = torch.rand(B, requires_grad=True)  # one for each answer, in another dtype
    out = kto_loss(logps, reference, desirable, several, **options)
    formula = loss_formulas.kto(logps, reference, desirable, several.double(), beta, weights)
    torch.testing.assert_close(out.loss, formula.mean())
    assert torch.autograd.grad(out.loss, several, allow_unused=True) == (None,)
    free = kto_loss(logps, None, desirable, kl, reference_free=True)
    same = kto_loss(logps, torch.zeros(B), desirable, kl)
    torch.testing.assert_close(free.loss, same.loss)


def test_kl():
    """The mean over mismatched answers, never below 0, through which no gradient goes."""
    logps, reference, desirable = answers()
    kl_logps = torch.tensor([-1.0, -2.0, -6.0], requires_grad=True)
    ref_kl_logps = torch.tensor([-3.0, -3.0, -4.5])
    out = kto_loss(logps, reference, desirable, kl_logps=kl_logps, ref_kl_logps=ref_kl_logps)
    torch.testing.assert_close(out.kl, torch.tensor(0.5))
    known = kto_loss(logps, reference, desirable, 0.5)
    torch.testing.assert_close(out.loss, known.loss)
    assert torch.autograd.grad(out.loss, kl_logps, allow_unused=True) == (None,)
    assert kto_kl(ref_kl_logps, kl_logps) == 0 and kto_kl(torch.zeros(0), torch.zeros(0)) == 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("gap", [1e4, -1e4])
@pytest.mark.parametrize("name", ["kto", "apo_zero_unpaired"])
def test_extremes(name, gap, dtype):
    _, _, desirable = answers()
    logps = torch.full((B,), gap, dtype=dtype).requires_grad_()
    kl = 1.0 if name == "kto" else None
    out = kto_loss(logps, torch.zeros(B, dtype=dtype), desirable, kl, loss_type=name, beta=1.0)
    (gradient,) = torch.autograd.grad(out.loss, logps)
    assert gradient.isfinite().all()
    torch.testing.assert_close(out.loss.item(), float((desirable == (gap < 0)).sum()) / B)


@pytest.mark.parametrize("flat", [False, True], ids=["padded", "flat"])
@pytest.mark.parametrize("name", ["kto", "apo_zero_unpaired"])
def test_from_hidden_states(name, flat, backend):
    dtype = torch.float64 if backend == "eager" else torch.float32
    hidden = torch.randn(B, T, H, dtype=dtype).requires_grad_()
    weight = torch.randn(V, H, dtype=dtype).requires_grad_()
    labels = torch.randint(V, (B, T))
    labels[:, :2] = -100
    labels[1] = -100
    labels[2, 3:] = -100
    _, reference, desirable = answers(dtype)
    reference, desirable = reference.to(hidden.device), desirable.to(hidden.device)
    kl = {"kl": 0.7} if name == "kto" else {}
    form = {}
    arguments = hidden, weight, labels
    if flat:
        arguments = hidden.view(-1, H), weight, labels.view(-1)
        form = {"sequence_ids": torch.arange(B).repeat_interleave(T)}
    out = linear_kto_loss(
        *arguments, desirable, reference, loss_type=name, beta=0.4, desirable_weight=1.5,
        extras=["entropy"], backend=backend, **kl, **form,
    )  # fmt: skip
    sums = oracle.sequence_sums(oracle.linear_logps(hidden, weight, labels), labels)
    each = loss_formulas.kto(sums, reference, desirable, kl.get("kl", 0.0), 0.4, (1.5, 1.0))
    close = dict(rtol=1e-9, atol=1e-9) if dtype == torch.float64 else dict(rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(out.loss.double(), each.mean(), **close)
    torch.testing.assert_close(out.logps.double(), sums.detach(), **close)
    got = torch.autograd.grad(out.loss, [hidden, weight])
    for a, b in zip(got, torch.autograd.grad(each.mean(), [hidden, weight]), strict=True):
        torch.testing.assert_close(a.double(), b.double(), **close)
    torch.testing.assert_close(
        sequence_logps(out.stats.logps, arguments[2], **form), out.logps, **close
    )
    assert out.stats.entropy is not None and out.stats.mean_logit is None


def test_nothing_labelled():
    hidden = torch.randn(2, 3, H, requires_grad=True)
    labels = torch.full((2, 3), -100)
    out = linear_kto_loss(
        hidden, torch.randn(V, H), labels, torch.tensor([True, False]), torch.zeros(2), kl=0.0
    )
    assert out.loss == 0 and not torch.autograd.grad(out.loss, hidden)[0].any()
    empty = torch.zeros(0, requires_grad=True)
    out = kto_loss(empty, empty.detach(), torch.zeros(0, dtype=torch.bool), 0.0)
    assert out.loss == 0 and torch.autograd.grad(out.loss, empty)[0].shape == (0,)


vector = torch.zeros(B)


@pytest.mark.parametrize(
    "name, changes",
    [
        ("loss_type", {"loss_type": "kto_pair"}),
        ("beta", {"beta": 0.0}),
        ("desirable_weight", {"desirable_weight": -1.0}),
        ("undesirable_weight", {"undesirable_weight": "1"}),
        ("ref_logps", {"ref_logps": None}),
        ("ref_logps", {"ref_logps": vector[1:]}),
        ("reference_free", {"reference_free": True}),
        ("desirable", {"desirable": vector}),
        ("desirable", {"desirable": torch.ones(B, 1).bool()}),
        ("answer_weight", {"answer_weight": vector[1:]}),
        ("kl", {"kl": None}),
        ("kl", {"kl": torch.zeros(2)}),
        ("kl", {"kl": "0"}),
        ("kl", {"kl": 0.5, "kl_logps": vector}),
        ("kl", {"kl": None, "kl_logps": vector}),
        ("ref_kl_logps", {"kl": None, "kl_logps": vector, "ref_kl_logps": vector[1:]}),
        ("kl_logps", {"kl": None, "kl_logps": vector[:, None], "ref_kl_logps": vector}),
        ("kl", {"loss_type": "apo_zero_unpaired"}),
        ("labels", {"labels": torch.zeros(B - 1, T).long()}),
        ("sequence_ids", {"sequence_ids": torch.zeros(B * T).long() + B}),
        ("precision", {"precision": "half"}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_bad_input(monkeypatch, name, changes):
    for module in (backends.native, backends.eager):
        monkeypatch.delattr(module, "linear")  # no kernel runs
    good = dict(
        hidden=torch.randn(B, T, H), weight=torch.randn(V, H), labels=torch.zeros(B, T).long(),
        desirable=torch.ones(B).bool(), ref_logps=vector, kl=0.0,
    )  # fmt: skip
    with pytest.raises(ValueError, match=f"^{name}: .*(expected|support)"):
        linear_kto_loss(**{**good, **changes})


# ---- reward models ----


@pytest.mark.parametrize("coefficient", [None, 0.1])
@pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft"])
def test_reward_loss(soft, coefficient):
    scores = [torch.randn(B, dtype=torch.float64).requires_grad_() for _ in range(2)]
    margin, weight, labels = (torch.rand(B, dtype=torch.float64) for _ in range(3))
    won = labels if soft else torch.ones(B, dtype=torch.float64)
    x = scores[0] - scores[1] - margin
    each = -won * torch.log(1 / (1 + torch.exp(-x))) - (1 - won) * torch.log(1 / (1 + torch.exp(x)))
    each = each + (coefficient or 0.0) * (scores[0] + scores[1]) ** 2
    got = reward_loss(
        *scores, margin, weight=weight, soft_labels=labels if soft else None,
        center_rewards_coefficient=coefficient,
    )  # fmt: skip
    torch.testing.assert_close(got, (weight * each).mean())
    expected = torch.autograd.grad((weight * each).mean(), scores)
    torch.testing.assert_close(torch.autograd.grad(got, scores), expected)


def test_reward_loss_of_few_and_of_far_scores():
    empty = torch.zeros(0, requires_grad=True)
    assert reward_loss(empty, empty.detach()) == 0
    half = torch.tensor([1e4, -1e4], dtype=torch.bfloat16, requires_grad=True)
    loss = reward_loss(half, -half.detach())
    torch.testing.assert_close(loss, -half[1].detach().float())  # the mean of 0 and 2e4
    assert torch.autograd.grad(loss, half)[0].tolist() == [0, -0.5]


@pytest.mark.parametrize(
    "name, changes",
    [
        ("chosen_scores", {"chosen_scores": [1.0]}),
        ("chosen_scores", {"chosen_scores": vector[:, None]}),
        ("rejected_scores", {"rejected_scores": vector[1:]}),
        ("margin", {"margin": vector[1:]}),
        ("weight", {"weight": 2.0}),
        ("soft_labels", {"soft_labels": vector - 1}),
        ("center_rewards_coefficient", {"center_rewards_coefficient": "0.1"}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_bad_scores(name, changes):
    good = {"chosen_scores": vector, "rejected_scores": vector}
    with pytest.raises(ValueError, match=f"^{name}: .*expected"):
        reward_loss(**{**good, **changes})
