"""What the papers prove of their losses, on the functions that train."""

from __future__ import annotations

import math

import machine
import oracle
import pytest
import torch

from fastpref import dpo_loss, ipo_loss, linear_dpo_loss, linear_ipo_loss, preference_loss


def _sequences(pairs=3, length=6, vocab=17, size=8):
    hidden = torch.randn(2 * pairs, length, size, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(vocab, size, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(vocab, (2 * pairs, length))
    labels[0, 4:] = labels[5, 1:] = -100
    return hidden, weight, labels, -torch.rand(2 * pairs, dtype=torch.float64) * 20


def _gradients(hidden, weight, labels):
    """Of each sequence's log-probability in the hidden states and the head, by autograd."""
    sums = oracle.sequence_sums(oracle.linear_logps(hidden, weight, labels), labels)
    return sums.detach(), [
        torch.autograd.grad(s, [hidden, weight], retain_graph=True) for s in sums
    ]


@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_gradient_of_dpo(beta):
    """Rafailov et al. 2023, section 4: the mean over pairs of
    -beta sigmoid(r_l - r_w) (grad log pi(y_w) - grad log pi(y_l)), r = beta log(pi / pi_ref)."""
    hidden, weight, labels, reference = _sequences()
    sums, each = _gradients(hidden, weight, labels)
    rewards, pairs = beta * (sums - reference), len(sums) // 2
    out = linear_dpo_loss(hidden, weight, labels, reference, beta=beta)
    got = torch.autograd.grad(out.loss, [hidden, weight])
    for i, grad in enumerate(got):
        expected = torch.zeros_like(grad)
        for w in range(pairs):
            lose = w + pairs
            pull = -beta * oracle.sigmoid(float(rewards[lose] - rewards[w])) / pairs
            expected += pull * (each[w][i] - each[lose][i])
        torch.testing.assert_close(grad, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("tau", [0.1, 1.0])
def test_gradient_of_ipo(tau):
    """Azar et al. 2023, Eq. 17: 2 (h - 1/(2 tau)) on the log-prob gradients; it vanishes where the
    log-ratios differ by 1/(2 tau), however sure the preference."""
    hidden, weight, labels, reference = _sequences()
    sums, each = _gradients(hidden, weight, labels)
    pairs = len(sums) // 2
    options = dict(beta=tau, ipo_normalization="sum")
    out = linear_ipo_loss(hidden, weight, labels, reference, **options)
    for i, grad in enumerate(torch.autograd.grad(out.loss, [hidden, weight])):
        expected = torch.zeros_like(grad)
        for w in range(pairs):
            lose = w + pairs
            h = sums[w] - reference[w] - sums[lose] + reference[lose]
            expected += 2 * (h - 1 / (2 * tau)) / pairs * (each[w][i] - each[lose][i])
        torch.testing.assert_close(grad, expected, rtol=1e-10, atol=1e-12)
    at_rest = sums.clone()
    at_rest[:pairs] -= 1 / (2 * tau)
    out = linear_ipo_loss(hidden, weight, labels, at_rest, **options)
    assert out.loss < 1e-20
    for grad in torch.autograd.grad(out.loss, [hidden, weight]):
        assert grad.abs().max() < 1e-10


# Azar et al. 2023, section 5.4: three actions, y1 beats y2, y2 beats y3 and y1 beats y3, always.
WINNERS, LOSERS = [0, 0, 1], [1, 2, 2]
PREFERENCES = [[0.5, 1.0, 1.0], [0.0, 0.5, 1.0], [0.0, 0.0, 0.5]]


def _train(loss, beta, optimizer, steps, learning_rate, backend, **options):
    """A softmax policy over the three actions, from uniform, trained on all comparisons; an answer
    is one token, so the policy's logits are the token's. The policy after each step."""
    if machine.sized(backend, False, True):
        pytest.skip("interpreter: dozens of steps; test_fused has the loss and its gradient")
    dtype = torch.float64 if backend == "eager" else torch.float32
    theta = torch.zeros(3, dtype=dtype, requires_grad=True)
    labels = torch.tensor([[y] for y in WINNERS + LOSERS])
    reference = torch.full((6,), -math.log(3), dtype=dtype)
    optimizer = optimizer([theta], lr=learning_rate)
    policies = []
    for _ in range(steps):
        optimizer.zero_grad()
        logits = theta.expand(6, 1, 3)
        loss(logits, labels, reference, beta=beta, backend=backend, **options).loss.backward()
        optimizer.step()
        policies.append(torch.softmax(theta.detach(), 0))
    return policies


@pytest.mark.train
@pytest.mark.parametrize("beta", [0.1, 0.5, 1.0])
def test_dpo_on_certain_preferences_forgets_the_reference(beta, backend):
    """Azar et al. 2023, section 4.2: the optimum is deterministic whatever beta is."""
    policies = _train(dpo_loss, beta, torch.optim.Adam, 40, 1.0, backend)
    before, after = policies[4], policies[-1]
    assert after[0] > 0.999 > before[0] and after[2] < before[2] < 1e-2


@pytest.mark.train
@pytest.mark.parametrize("tau", [0.1, 0.5, 1.0])
def test_ipo_on_certain_preferences_stays_at_the_regularised_optimum(tau, backend):
    """Azar et al. 2023, Eq. 7: pi* ~ pi_ref exp(p*(y > mu) / tau). The loss is a quadratic form of
    the policy's logits, with the curvature 2 in every direction: a step of 0.4 leaves a fifth of
    the distance."""
    options = dict(ipo_normalization="sum")
    policies = _train(ipo_loss, tau, torch.optim.SGD, 25, 0.4, backend, **options)
    optimum = oracle.ipo_bandit(torch.tensor(PREFERENCES), torch.ones(3) / 3, tau)
    oracle.assert_within(policies[-1], optimum, 1e-4)
    if tau == 1.0:
        assert policies[-1].max() < 0.5  # far from deterministic


def test_cdpo_is_calibrated():
    """Mitchell 2023: with label smoothing e the loss is least where sigmoid(beta d) = 1 - e."""
    beta, smoothing = 0.5, 0.1
    d = torch.tensor([math.log((1 - smoothing) / smoothing) / beta], dtype=torch.float64)
    d.requires_grad_()
    zero = torch.zeros(1, dtype=torch.float64)
    loss = preference_loss(d, zero, zero, zero, beta=beta, label_smoothing=smoothing).loss
    (grad,) = torch.autograd.grad(loss, d)
    assert abs(float(grad)) < 1e-12
