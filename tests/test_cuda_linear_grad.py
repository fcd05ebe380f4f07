"""The CUDA product that writes D instead of its logits, against float64: on a Hopper GPU, or
emulated on the CPU.
"""

from __future__ import annotations

import math

import machine
import oracle
import pytest
import torch
from forward_problem import TRANSFORMS, check, head

from fastpref import linear_dpo_loss, linear_token_logps
from fastpref.backends import cuda, cuda_forward, cuda_module, eager
from fastpref.backends.tile import EXTRAS, Stats, Transform

DEVICE = machine.device_of("cuda")
SENTINEL = 7.0
BF16 = 2**-8  # half of the distance from 1 to the next number


@pytest.fixture(autouse=True, scope="module")
def _works():
    reason = machine.why_not("cuda", [torch.bfloat16])
    if reason is not None:
        pytest.skip(reason)
    if machine.HAS_GPU and not cuda_module.forward_works(torch.cuda.current_device()):
        pytest.skip("it is for sm_90")


def run(x, weight, labels, bias=None, extras=(), **transform):
    """(Stats, D in float64) on the CPU; nothing may be written beside what they take."""
    n, vocab = x.shape[0], weight.shape[0]
    width = -(-vocab // 8) * 8
    room = torch.full((n + 2, width + 8), SENTINEL, dtype=torch.bfloat16, device=DEVICE)
    factors = torch.full((n + 300,), SENTINEL, device=DEVICE)
    out, factor = room[1 : n + 1, :vocab], factors[:n]
    moved = (None if t is None else t.to(DEVICE) for t in (x, weight, labels, bias))
    x, weight, labels, bias = moved
    transform = Transform(**transform)
    assert cuda_forward.why_no_grad(weight, transform) is None
    stats = Stats.empty(n, DEVICE, torch.float32, extras)
    cuda_forward.linear_grad(x, weight, labels, bias, stats, transform, out, factor)
    around = room.clone()
    around[1 : n + 1, :vocab] = SENTINEL
    assert (around == SENTINEL).all() and (factors[n:] == SENTINEL).all()
    again = Stats.empty(n, DEVICE, torch.float32)
    cuda_forward.linear_logps(x, weight, labels, bias, again, transform)
    for a, b in ((stats.logps, again.logps), (stats.lse, again.lse)):
        # The bits of a pass without gradients and extras.
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
    d = out.cpu().double() * factor.cpu().double()[:, None]
    return Stats(*(None if t is None else t.cpu() for t in stats)), d


def truth(x, weight, labels, bias=None, **transform):
    """(Stats, D) in float64."""
    raw = x.double() @ weight.double().t()
    raw = raw if bias is None else raw + bias.double()
    stats = Stats.empty(len(x), raw.device, torch.float64, EXTRAS)
    d = torch.empty_like(raw)
    eager.fold(raw, labels, 0, stats, Transform(**transform))
    eager.grad(raw, labels, 0, stats.lse, stats.logps, d, Transform(**transform))
    return stats, d


def check_all(*given, extras=(), roundings=1, **transform):
    got, d = run(*given, extras=extras, **transform)
    check((got.logps, got.lse), *given, **transform)
    true, expected = truth(*given, **transform)
    # bf16's rounding of each entry, and a logit's own error, which is one of the entry's size; the
    # label's entry is 1 - p, whatever is left of it.
    logits = oracle.logits(given[0], given[1], given[3] if len(given) > 3 else None, **transform)
    largest = logits.abs().where(logits.isfinite(), 0.0).amax()
    bound = expected.abs() * (roundings * BF16 + 3e-6 * (1 + largest)) + 1e-20
    bound[range(len(bound)), given[2]] += 3e-7
    oracle.assert_within(d, expected, bound)
    if extras:
        oracle.assert_within(got.entropy(), true.entropy(), 3e-6 * (1 + largest))
        vocab = given[1].shape[0]
        oracle.assert_within(got.mean_logit(vocab), true.mean_logit(vocab), 1e-6 * (1 + largest))
        squares = got.log_sum_sq_probs(), true.log_sum_sq_probs()
        oracle.assert_within(*squares, 6e-6 * (1 + largest))
        assert got.argmax.equal(true.argmax)


@pytest.mark.parametrize("extras", [(), EXTRAS], ids=["", "extras"])
@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_matches_the_oracle(transform, extras):
    x, weight, labels = head(37, 72, 300)
    labels[:2] = torch.tensor([0, 299])
    for bias in (None, torch.randn(300).bfloat16()):
        check_all(x, weight, labels, bias, extras=extras, **transform)


@pytest.mark.parametrize(
    "n, hidden, vocab", [(700, 200, 900), (1, 8, 1), (257, 64, 128), (9, 70, 131)]
)
def test_shapes(n, hidden, vocab):
    """More tiles than clusters; rows that end within 16 bytes; a hidden size that does, too."""
    x, weight, labels = head(n, -(-hidden // 8) * 8, vocab)
    check_all(x[:, :hidden], weight[:, :hidden], labels, extras=EXTRAS)


@pytest.mark.parametrize("softcap", [None, 200.0])
def test_labels_of_any_probability(softcap):
    """From 1 to e^-400: far from the base that a row has to begin with, and there and back."""
    n, vocab = 48, 600
    x, weight, labels = head(n, 64, vocab, spread=0.5)
    weight[:, :n] = 0
    steps = torch.linspace(60, -400, n) / 8
    weight[:n, :n] = torch.eye(n) * 8
    x[:, :n] = torch.diag(steps)
    labels = torch.arange(n)
    check_all(x, weight, labels, extras=EXTRAS, softcap=softcap, roundings=2)
    # One entry of another tile far above all others, whose tiles then have bases of their own.
    weight[500] = 0
    weight[500, 60] = 16
    x[:, 60] = 16
    check_all(x, weight, labels, extras=EXTRAS, softcap=softcap, roundings=2)


def test_gradients_of_labels_of_any_probability():
    """No factor, coefficient or product of them leaves bf16's range: each token's own gradient is
    as exact as the others', but for 1 - p of confident ones, whose p is an fp32 number."""
    n, hidden, vocab = 40, 64, 300
    x, weight, _ = head(n, hidden, vocab, spread=0.5)
    weight[:, :n] = 0
    weight[:n, :n] = torch.eye(n) * 8
    x[:, :n] = torch.diag(torch.linspace(20, -200, n) / 8)
    labels, coef = torch.arange(n), torch.logspace(0, -6, n)
    leaves = [t.clone().to(DEVICE).requires_grad_() for t in (x, weight)]
    logps = linear_token_logps(*leaves, labels.to(DEVICE), backend="cuda", strategy="stash")
    dx, dweight = torch.autograd.grad(logps, leaves, coef.to(DEVICE))
    _, d = truth(x, weight, labels)
    expected = (coef.double()[:, None] * d) @ weight.double()
    for row in range(n):
        error = (dx[row].cpu().double() - expected[row]).norm()
        assert error <= 4 * BF16 * expected[row].norm() + coef[row] * 2e-7 * weight[row].norm()
    expected = (coef.double()[:, None] * d).t() @ x.double()
    for row in range(n):  # mostly the gradient of token `row`, whose label that is
        error = (dweight[row].cpu().double() - expected[row]).norm()
        assert error <= 4 * BF16 * expected[row].norm() + coef[row] * 2e-7 * x[row].norm()


def test_labels_out_of_range_are_nan():
    x, weight, labels = head(12, 64, 300)
    labels[:5] = torch.tensor([300, 383, -1, 2**33 + 5, 2**62])
    stats, d = run(x, weight, labels)
    assert stats.logps[:5].isnan().all() and d[:5].isnan().all()
    _, expected = truth(x[5:], weight, labels[5:])
    oracle.assert_within(d[5:], expected, expected.abs() * (BF16 + 1e-4) + 1e-20)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_broken_row_spoils_only_itself(bad):
    x, weight, labels = head(20, 64, 300)
    _, clean = run(x, weight, labels)
    x[3, 5] = bad
    _, d = run(x, weight, labels)
    others = torch.arange(20) != 3
    assert d[3].isnan().any() and d[others].equal(clean[others])


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_logits_of_minus_infinity(softcap):
    """A bias of -inf takes entries out of the vocabulary, whole tiles and labels too."""
    x, weight, labels = head(20, 64, 500)
    bias = torch.zeros(500)
    bias[:300] = -math.inf
    labels[:10], labels[10:] = 300 + labels[:10] % 200, labels[10:] % 300
    stats, d = run(x, weight, labels, bias, softcap=softcap)
    true, expected = truth(x, weight, labels, bias, softcap=softcap)
    assert stats.logps.isneginf().equal(true.logps.isneginf())
    oracle.assert_within(d, expected, expected.abs() * (BF16 + 1e-4) + 1e-20)


def test_bitwise_independent_of_the_batch(monkeypatch):
    from fastpref.kernels import forward_config

    x, weight, labels = head(300, 64, 300)
    stats, d = run(x, weight, labels, extras=EXTRAS)
    some, part = run(x[77:], weight, labels[77:], extras=EXTRAS)
    assert part.equal(d[77:]) and some.entropy().equal(stats.entropy()[77:])
    monkeypatch.setattr(forward_config, "_MAX_PARTIALS", 1)  # several launches
    assert run(x, weight, labels)[1].equal(d)


def test_a_head_that_it_does_not_take():
    weight = torch.zeros(20, 16, dtype=torch.bfloat16, device=DEVICE)
    assert cuda.keeps_logits(weight, Transform())
    assert not cuda.keeps_logits(weight.half(), Transform())
    assert not cuda.keeps_logits(weight.float(), Transform())
    assert not cuda.keeps_logits(weight[:, 3:11], Transform())
    assert not cuda.keeps_logits(weight, Transform(scale=0.0))


@pytest.mark.parametrize("fused", [None, True, False, "match"])
def test_the_reference_takes_the_way_of_the_policy(monkeypatch, fused):
    """So that margins are exactly 0 as long as the two models are the same."""
    taken = []
    for name in ("linear_grad", "linear_logps", "fold_grad", "fold"):
        real = getattr(cuda, name)
        record = lambda *a, real=real, name=name: (taken.append(name), real(*a))  # noqa: E731
        monkeypatch.setattr(cuda, name, record)
    x, weight, labels = (t.to(DEVICE) for t in head(8, 64, 300))
    hidden, labels = x.view(4, 2, 64).requires_grad_(), labels.view(4, 2)
    given = dict(ref_hidden=hidden.detach(), backend="cuda", fused=fused)
    out = linear_dpo_loss(hidden, weight, labels, **given)
    own = fused is not False
    assert taken == (["linear_logps", "linear_grad"] if own else ["fold_grad", "fold_grad"])
    assert (out.chosen_rewards == 0).all() and (out.rejected_rewards == 0).all()
    with torch.no_grad():
        alone = linear_token_logps(hidden, weight, labels, backend="cuda", fused="match")
        if own:
            assert alone.sum(1).equal(torch.cat([out.chosen_logps, out.rejected_logps]))
