"""The logit-free products, against float64: on a GPU, or on the CPU in
Triton's interpreter and in the emulation of CUDA.
"""

from __future__ import annotations

import math

import machine
import oracle
import pytest
import torch
from forward_problem import TRANSFORMS, Forward, check, head

from fastpref import backends, linear_dpo_loss, linear_token_logps
from fastpref.backends import cuda, eager, triton
from fastpref.backends.stats import EXTRAS, Stats
from fastpref.backends.tile import Transform
from fastpref.logps import prepared

SENTINEL = 7.0
BF16 = 2**-8  # half of the distance from 1 to the next number


@pytest.fixture(params=["cuda", "triton"])
def backend(request):
    reason = Forward(request.param).why_not()
    if reason is not None:
        pytest.skip(reason)
    return backends._MODULES[request.param]


def extras_of(backend):
    return EXTRAS if backend is cuda else ()


def run(backend, x, weight, labels, bias=None, extras=(), **transform):
    """(Stats, D in float64) on the CPU; nothing may be written beside what they take."""
    device = machine.device_of(backend.NAME)
    n, vocab = x.shape[0], weight.shape[0]
    width = -(-vocab // 8) * 8
    room = torch.full((n + 2, width + 8), SENTINEL, dtype=torch.bfloat16, device=device)
    factors = torch.full((n + 300,), SENTINEL, device=device)
    out, factor = room[1 : n + 1, :vocab], factors[:n]
    moved = (None if t is None else t.to(device) for t in (x, weight, labels, bias))
    x, weight, labels, bias = moved
    transform = Transform(**transform)
    assert backend.logit_free_reason(weight, transform, extras) is None
    stats = Stats.empty(n, device, torch.float32, extras)
    backend.logit_free_forward(x, weight, labels, bias, stats, transform, out, factor)
    around = room.clone()
    around[1 : n + 1, :vocab] = SENTINEL
    assert (around == SENTINEL).all() and (factors[n:] == SENTINEL).all()
    again = Stats.empty(n, device, torch.float32)
    backend.logit_free_forward(x, weight, labels, bias, again, transform)
    for a, b in ((stats.logps, again.logps), (stats.lse, again.lse)):
        # Those of a pass without gradients and extras: with cuda, to the last bit.
        bound = 0 if backend is cuda else 1e-5
        torch.testing.assert_close(a, b, rtol=bound, atol=bound, equal_nan=True)
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


def check_all(backend, *given, extras=(), roundings=1, **transform):
    got, d = run(backend, *given, extras=extras, **transform)
    # Under a cap a logit is one less a number near 1, whose rounding counts as many times as wide.
    cap = 3e-7 * (transform.get("softcap") or 0) / transform.get("temperature", 1)
    check((got.logps, got.lse), *given, more=cap, **transform)
    true, expected = truth(*given, **transform)
    # bf16's rounding of each entry, and a logit's own error, which is one of the entry's size; the
    # label's entry is 1 - p, whatever is left of it.
    logits = oracle.logits(given[0], given[1], given[3] if len(given) > 3 else None, **transform)
    largest = logits.abs().where(logits.isfinite(), 0.0).amax()
    bound = expected.abs() * (roundings * BF16 + 3e-6 * (1 + largest) + 2 * cap) + 1e-20
    bound[range(len(bound)), given[2]] += 3e-7
    oracle.assert_within(d, expected, bound)
    if extras:
        oracle.assert_within(got.entropy(), true.entropy(), 3e-6 * (1 + largest) + cap)
        vocab = given[1].shape[0]
        oracle.assert_within(got.mean_logit(vocab), true.mean_logit(vocab), 1e-6 * (1 + largest))
        squares = got.log_sum_sq_probs(), true.log_sum_sq_probs()
        oracle.assert_within(*squares, 6e-6 * (1 + largest) + 2 * cap)
        assert got.argmax.equal(true.argmax)


@pytest.mark.only_if(lambda backend, extras, **_: backend == "cuda" or not extras)
@pytest.mark.parametrize("extras", [False, True], ids=["", "extras"])
@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_matches_the_oracle(backend, transform, extras):
    extras = extras_of(backend) if extras else ()
    x, weight, labels = head(37, 72, 300)
    labels[:2] = torch.tensor([0, 299])
    for bias in (None, torch.randn(300).bfloat16()):
        check_all(backend, x, weight, labels, bias, extras=extras, **transform)


@pytest.mark.parametrize(
    "n, hidden, vocab", [(700, 200, 900), (1, 8, 1), (257, 64, 128), (9, 70, 131)]
)
def test_shapes(backend, n, hidden, vocab):
    """More tiles than clusters; rows that end within 16 bytes; a hidden size that does, too."""
    if n == 700 and backend is triton and machine.INTERPRETED:
        n, hidden, vocab = 270, 72, 520  # of 128 x 128 entries still several tiles each way
    x, weight, labels = head(n, -(-hidden // 8) * 8, vocab)
    check_all(backend, x[:, :hidden], weight[:, :hidden], labels, extras=extras_of(backend))


@pytest.mark.parametrize("softcap", [None, 200.0])
def test_labels_of_any_probability(backend, softcap):
    """From 1 to e^-400: far from the base that a row has to begin with, and there and back."""
    n, vocab = 48, 600
    x, weight, labels = head(n, 64, vocab, spread=0.5)
    weight[:, :n] = 0
    steps = torch.linspace(60, -400, n) / 8
    weight[:n, :n] = torch.eye(n) * 8
    x[:, :n] = torch.diag(steps)
    labels = torch.arange(n)
    check_all(backend, x, weight, labels, extras=extras_of(backend), softcap=softcap, roundings=2)
    # One entry of another tile far above all others, whose tiles then have bases of their own.
    weight[500] = 0
    weight[500, 60] = 16
    x[:, 60] = 16
    check_all(backend, x, weight, labels, extras=extras_of(backend), softcap=softcap, roundings=2)


def test_gradients_of_labels_of_any_probability(backend):
    """No factor, coefficient or product of them leaves bf16's range: each token's own gradient is
    as exact as the others', but for 1 - p of confident ones, whose p is an fp32 number."""
    device = machine.device_of(backend.NAME)
    n, hidden, vocab = 40, 64, 300
    x, weight, _ = head(n, hidden, vocab, spread=0.5)
    weight[:, :n] = 0
    weight[:n, :n] = torch.eye(n) * 8
    x[:, :n] = torch.diag(torch.linspace(20, -200, n) / 8)
    labels, coef = torch.arange(n), torch.logspace(0, -6, n)
    leaves = [t.clone().to(device).requires_grad_() for t in (x, weight)]
    logps = linear_token_logps(
        *leaves, labels.to(device), backend=backend.NAME, fused=True, strategy="stash"
    )
    dx, dweight = torch.autograd.grad(logps, leaves, coef.to(device))
    _, d = truth(x, weight, labels)
    expected = (coef.double()[:, None] * d) @ weight.double()
    for row in range(n):
        error = (dx[row].cpu().double() - expected[row]).norm()
        assert error <= 4 * BF16 * expected[row].norm() + coef[row] * 2e-7 * weight[row].norm()
    expected = (coef.double()[:, None] * d).t() @ x.double()
    for row in range(n):  # mostly the gradient of token `row`, whose label that is
        error = (dweight[row].cpu().double() - expected[row]).norm()
        assert error <= 4 * BF16 * expected[row].norm() + coef[row] * 2e-7 * x[row].norm()


def test_labels_out_of_range_are_nan(backend):
    x, weight, labels = head(12, 64, 300)
    labels[:5] = torch.tensor([300, 383, -1, 2**33 + 5, 2**62])
    stats, d = run(backend, x, weight, labels)
    assert stats.logps[:5].isnan().all() and d[:5].isnan().all()
    _, expected = truth(x[5:], weight, labels[5:])
    oracle.assert_within(d[5:], expected, expected.abs() * (BF16 + 1e-4) + 1e-20)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_broken_row_spoils_only_itself(backend, bad):
    x, weight, labels = head(20, 64, 300)
    _, clean = run(backend, x, weight, labels)
    x[3, 5] = bad
    _, d = run(backend, x, weight, labels)
    others = torch.arange(20) != 3
    assert d[3].isnan().any() and d[others].equal(clean[others])


@pytest.mark.parametrize("level", [0.0, -150.0, 200.0])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_logits_of_minus_infinity(backend, softcap, level):
    """A bias of -inf takes entries out of the vocabulary, whole tiles and labels too."""
    x, weight, labels = head(20, 64, 500)
    bias = torch.full((500,), level)
    bias[:300] = -math.inf
    labels[:10], labels[10:] = 300 + labels[:10] % 200, labels[10:] % 300
    stats, d = run(backend, x, weight, labels, bias, softcap=softcap)
    true, expected = truth(x, weight, labels, bias, softcap=softcap)
    assert stats.logps.isneginf().equal(true.logps.isneginf())
    # A row whose label has no logit is rounded twice.
    oracle.assert_within(d, expected, expected.abs() * (2 * BF16 + 1e-3) + 1e-20)


def test_logits_so_large_that_sums_of_them_differ(backend):
    """The label's logit, on which the base rests, is added up in another order than the tile's."""
    x, weight, labels = head(16, 64, 300, spread=1e8)
    labels = (x.double() @ weight.double().t()).argmax(1)
    _, d = run(backend, x, weight, labels)
    assert d.abs().max() < 1e-6


def test_bitwise_independent_of_the_batch(backend, monkeypatch):
    from fastpref.kernels import forward_config

    # numpy's product, unlike a GPU's, depends on where in the tile a row is.
    n, start = (150, 128) if backend is triton and machine.INTERPRETED else (300, 77)
    x, weight, labels = head(n, 64, 300)
    stats, d = run(backend, x, weight, labels, extras=extras_of(backend))
    some, part = run(backend, x[start:], weight, labels[start:], extras=extras_of(backend))
    assert part.equal(d[start:]) and some.lse.equal(stats.lse[start:])
    if extras_of(backend):
        assert some.entropy().equal(stats.entropy()[start:])
    monkeypatch.setattr(forward_config, "_MAX_PARTIALS", 1)  # several launches
    assert run(backend, x, weight, labels)[1].equal(d)


def test_a_head_that_it_does_not_take(backend):
    device = machine.device_of(backend.NAME)
    weight = torch.zeros(20, 16, dtype=torch.bfloat16, device=device)
    plain, reason = Transform(), backend.logit_free_reason
    assert reason(weight, plain) is None
    assert (reason(weight, plain, EXTRAS) is None) == (backend is cuda)
    assert "float16" in reason(weight.half(), plain)
    assert "float32" in reason(weight.float(), plain)
    assert "16 bytes" in reason(weight[:, 3:11], plain)
    assert "scale is 0" in reason(weight, Transform(scale=0.0))


@pytest.mark.parametrize("strategy", ["stash", "recompute", "mixed", "frozen"])
def test_every_strategy(backend, strategy):
    """Gradients and log-probs of all strategies against float64, with ignored tokens."""
    device = machine.device_of(backend.NAME)
    x, weight, labels = head(64, 72, 300)
    bias, coef = torch.randn(300).bfloat16(), torch.linspace(-1, 1, 64)
    labels[5:9] = -100
    trains = strategy != "frozen"
    leaves = [t.clone().to(device) for t in (x, weight, bias)]
    for t in leaves if trains else leaves[:1]:
        t.requires_grad_()
    options = {"strategy": strategy if trains else "auto", "backend": backend.NAME, "fused": True}
    logps = linear_token_logps(leaves[0], leaves[1], labels.to(device), leaves[2], **options)
    wanted = leaves if trains else leaves[:1]
    grads = torch.autograd.grad(logps, wanted, coef.to(device))
    exact = [t.double().requires_grad_() for t in (x, weight, bias)]
    truth = oracle.linear_logps(exact[0], exact[1], labels, exact[2])
    oracle.assert_within(logps.cpu(), truth, 1e-4)
    expected = torch.autograd.grad(truth, exact[: len(wanted)], coef.double())
    for got, true in zip(grads, expected, strict=True):
        assert (got.cpu().double() - true).norm() <= BF16 * true.norm()


@pytest.mark.parametrize("fused", [None, True, False])
def test_the_reference_takes_the_product_of_the_policy(backend, monkeypatch, fused):
    """So that margins are exactly 0 as long as the two models are the same."""
    device = machine.device_of(backend.NAME)
    taken = []
    for name in ("logit_free_forward", "linear"):
        real = getattr(backend, name)
        record = lambda *a, real=real, name=name: (taken.append(name), real(*a))  # noqa: E731
        monkeypatch.setattr(backend, name, record)
    x, weight, labels = (t.to(device) for t in head(8, 64, 300))
    hidden, labels = x.view(4, 2, 64).requires_grad_(), labels.view(4, 2)
    options = dict(backend=backend.NAME, fused=fused)
    logit_free = backend.LOGIT_FREE_BY_DEFAULT if fused is None else fused
    assert backend.LOGIT_FREE_BY_DEFAULT == (backend is not triton)
    for strategy in ("auto", "forward-only"):  # which is for passes without gradients
        given = dict(ref_hidden=hidden.detach(), strategy=strategy, **options)
        out = linear_dpo_loss(hidden, weight, labels, **given)
        assert taken == ["logit_free_forward" if logit_free else "linear"] * 2
        assert (out.chosen_rewards == 0).all() and (out.rejected_rewards == 0).all()
        taken.clear()
    with torch.no_grad():
        alone = linear_token_logps(hidden, weight, labels, **options)
    assert alone.sum(1).equal(torch.cat([out.chosen_logps, out.rejected_logps]))


def test_the_policys_adapter_or_extras_decide_for_the_reference(backend, monkeypatch):
    """Where the policy cannot take the logit-free product, its reference takes tiles too."""
    device = machine.device_of(backend.NAME)
    monkeypatch.setattr(backend, "LOGIT_FREE_BY_DEFAULT", True)
    x, weight, labels = (t.to(device) for t in head(8, 64, 300))
    hidden, labels = x.view(4, 2, 64), labels.view(4, 2)
    scale = torch.ones(300, device=device).bfloat16()
    given = dict(ref_hidden=hidden, backend=backend.NAME, dora_scale=scale)
    out = linear_dpo_loss(hidden, weight, labels, **given)
    assert (out.chosen_rewards == 0).all() and (out.rejected_rewards == 0).all()
    with pytest.raises(ValueError, match="^fused: got True, expected .*: the head has an adapter"):
        linear_dpo_loss(hidden, weight, labels, fused=True, **given)


def test_a_softcap_too_wide(backend):
    device = machine.device_of(backend.NAME)
    given = [t.to(device) for t in head(8, 64, 300)]
    with pytest.raises(ValueError, match="^fused: got True, expected .*: the softcap is more than"):
        linear_token_logps(*given, softcap=101.0, fused=True, backend=backend.NAME)


def test_the_fastest_pass_without_gradients(backend, monkeypatch):
    """strategy="forward-only" on a GPU; elsewhere, and with fused=False, it takes tiles."""
    device = machine.device_of(backend.NAME)
    given = [t.to(device) for t in head(8, 64, 300)]
    planned = []
    real = prepared.plan_head
    monkeypatch.setattr(prepared, "plan_head", lambda *a, **k: planned.append(k) or real(*a, **k))
    for strategy, fused in (("forward-only", None), ("auto", backend.LOGIT_FREE_BY_DEFAULT)):
        linear_token_logps(*given, strategy=strategy, backend=backend.NAME)
        assert planned.pop()["fused"] is fused
    half = [given[0].half(), given[1].half(), given[2]]  # whose D would not fit its numbers
    linear_token_logps(*half, strategy="forward-only", fused=True, backend=backend.NAME)
    with pytest.raises(ValueError, match="^fused: got True, expected None or False: .*float16"):
        linear_token_logps(*half, fused=True, backend=backend.NAME)


def test_a_backend_without_it_says_so():
    given = head(8, 64, 300)
    with pytest.raises(ValueError, match="^fused: got True, .* no logit-free product"):
        linear_token_logps(*given, fused=True, backend="eager")
    with pytest.raises(ValueError, match="^fused: got 'match', .* None has its meaning"):
        linear_token_logps(*given, fused="match", backend="eager")
