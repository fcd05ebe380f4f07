"""Properties that hold for any input, with inputs made up by hypothesis."""

from __future__ import annotations

import math

import machine
import oracle
import pytest
import torch

pytest.importorskip("hypothesis")

from hypothesis import HealthCheck, assume, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from fastpref import linear_preference_loss, linear_token_logps, preference_loss, token_logps  # noqa: E402

check = settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    database=None,
    # The fixtures keep no state between examples; the first tensor on a GPU takes seconds.
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]

transforms = st.fixed_dictionaries(
    {},
    optional={
        "scale": st.floats(-2, 2).filter(lambda s: abs(s) > 0.01),
        "softcap": st.floats(0.5, 60),
        "temperature": st.floats(0.2, 5),
    },
)


@st.composite
def problems(draw, dtypes=DTYPES):
    """hidden [n, h], weight [v, h], labels [n] with some ignored, bias or None, options."""
    torch.manual_seed(draw(st.integers(0, 2**31)))
    n, v, h = draw(st.integers(0, 40)), draw(st.integers(1, 700)), draw(st.integers(1, 70))
    dtype, spread = draw(st.sampled_from(dtypes)), draw(st.sampled_from([0.01, 1.0, 5.0]))
    hidden, weight = torch.randn(n, h).to(dtype), (torch.randn(v, h) * spread / h**0.5).to(dtype)
    labels = torch.randint(v, (n,))
    labels[torch.rand(n) < draw(st.sampled_from([0.0, 0.3, 1.0]))] = -100
    bias = torch.randn(v).to(dtype) if draw(st.booleans()) else None
    return hidden, weight, labels, bias


options = st.fixed_dictionaries(
    {
        "strategy": st.sampled_from(["auto", "stash", "recompute", "mixed"]),
        "memory_budget": st.sampled_from([None, 1, 10_000, 200_000]),
    }
)


@pytest.fixture
def backend(backend):
    if machine.sized(backend, False, True):
        pytest.skip("interpreter: too slow for problem after problem")
    return backend


@check
@given(problem=problems(), transform=transforms, option=options)
def test_log_probabilities_and_gradients(backend, problem, transform, option):
    hidden, weight, labels, bias = problem
    dtype = hidden.dtype
    leaves = [t.clone().requires_grad_() for t in (hidden, weight, bias) if t is not None]
    exact = [t.detach().double().requires_grad_() for t in leaves]

    def head(tensors):
        return tensors[0], tensors[1], labels, *tensors[2:]

    stats = linear_token_logps(
        *head(leaves), extras=["entropy"], backend=backend, **option, **transform
    )
    z = oracle.logits(exact[0], exact[1], *exact[2:], **transform)
    truth = oracle.token_stats(z, labels)
    size = float(z.detach().abs().max()) if z.numel() else 0.0
    oracle.assert_within(stats.logps, truth.logps, 2e-5 * (1 + size))
    oracle.assert_within(stats.entropy, truth.entropy, 2e-5 * (1 + size))
    assert not (stats.logps > 0).any() and not stats.logps[labels < 0].any()
    coef = torch.randn(labels.shape)
    got = torch.autograd.grad((stats.logps * coef).sum(), leaves)
    want = torch.autograd.grad((truth.logps * coef.double()).sum(), exact)
    for a, b in zip(got, want, strict=True):
        one = 2e-5 if dtype == torch.float32 else 2.5 * torch.finfo(dtype).eps
        assert float((a.double() - b).norm()) <= one * (1 + size) * float(b.norm()) + 1e-3 * one


@check
@given(problem=problems([torch.float32]), transform=transforms, data=st.data())
def test_order_and_shifts_do_not_matter(backend, problem, transform, data):
    """Tokens may be permuted, the vocabulary renumbered, and all logits raised together."""
    hidden, weight, labels, bias = problem
    logps = linear_token_logps(*problem, backend=backend, **transform)
    rows = torch.randperm(len(labels))
    permuted = linear_token_logps(
        hidden[rows], weight, labels[rows], bias, backend=backend, **transform
    )
    torch.testing.assert_close(permuted, logps[rows], rtol=1e-5, atol=2e-5)
    order = torch.randperm(weight.shape[0])
    renumbered = torch.where(labels < 0, labels, order.argsort()[labels.clamp(min=0)])
    other = None if bias is None else bias[order]
    moved = linear_token_logps(
        hidden, weight[order], renumbered, other, backend=backend, **transform
    )
    torch.testing.assert_close(moved, logps, rtol=1e-4, atol=1e-4)
    assume("softcap" not in transform)
    shift = data.draw(st.floats(-5, 5))
    raised = (torch.zeros(weight.shape[0]) if bias is None else bias) + shift
    shifted = linear_token_logps(hidden, weight, labels, raised, backend=backend, **transform)
    torch.testing.assert_close(shifted, logps, rtol=1e-3, atol=1e-3)


@check
@given(problem=problems([torch.float32]))
def test_probabilities_sum_to_one(backend, problem):
    """The log-probs of every vocabulary entry in one position."""
    hidden, weight, _, bias = problem
    assume(len(hidden))
    vocab = weight.shape[0]
    every = linear_token_logps(
        hidden[:1].expand(vocab, -1), weight, torch.arange(vocab), bias, backend=backend
    )
    assert abs(float(every.double().exp().sum()) - 1) < 1e-5


@check
@given(problem=problems(), transform=transforms)
def test_logits_and_hidden_states_agree(backend, problem, transform):
    hidden, weight, labels, bias = (None if t is None else t for t in problem)
    hidden, weight = hidden.float(), weight.float()
    bias = None if bias is None else bias.float()
    logits = torch.nn.functional.linear(hidden, weight, bias)
    ready = token_logps(logits, labels, backend=backend, **transform)
    fused = linear_token_logps(hidden, weight, labels, bias, backend=backend, **transform)
    torch.testing.assert_close(ready, fused, rtol=1e-4, atol=1e-4)


pairs = st.lists(
    st.tuples(*[st.floats(-300, 0, width=32)] * 4), min_size=1, max_size=6
).map(lambda rows: [torch.tensor(column) for column in zip(*rows, strict=True)])  # fmt: skip
betas = st.floats(0.01, 2)


@check
@given(pairs, betas, st.floats(0, 0.49), st.sampled_from(["sigmoid", "ipo"]))
def test_losses(logps, beta, smoothing, loss_type):
    """The formulas; a swap of the two answers; and a common shift of policy and reference."""
    option = {"loss_type": loss_type, "beta": beta}
    option |= {"label_smoothing": smoothing} if loss_type == "sigmoid" else {}
    option |= {"ipo_normalization": "sum"} if loss_type == "ipo" else {}
    logps = [t.double() for t in logps]
    got = preference_loss(*logps, **option)
    chosen, rejected = logps[0] - logps[2], logps[1] - logps[3]
    if loss_type == "ipo":
        truth = oracle.ipo(chosen, rejected, beta)
    else:
        truth = oracle.dpo(chosen, rejected, beta, smoothing)
    torch.testing.assert_close(got.loss, truth.mean(), rtol=1e-9, atol=1e-12)
    swapped = preference_loss(logps[1], logps[0], logps[3], logps[2], **option)
    assert torch.equal(swapped.chosen_rewards, got.rejected_rewards)
    shifted = preference_loss(logps[0] + 7, logps[1], logps[2] + 7, logps[3], **option)
    torch.testing.assert_close(shifted.loss, got.loss, rtol=1e-9, atol=1e-9)
    assert got.loss >= 0 and math.isfinite(got.loss)


@check
@given(
    count=st.integers(1, 4),
    length=st.integers(1, 9),
    loss_type=st.sampled_from(["sigmoid", "ipo"]),
    number=st.integers(0, 2**31),
)
def test_packing_does_not_matter(backend, count, length, loss_type, number):
    """Padded, flat with ignored tokens, flat without them, in any order: one loss."""
    torch.manual_seed(number)
    hidden, weight = torch.randn(2 * count, length, 12), torch.randn(31, 12)
    labels, reference = torch.randint(31, (2 * count, length)), -torch.rand(2 * count) * 9
    labels[torch.rand(2 * count, length) < 0.4] = -100
    option = dict(loss_type=loss_type, backend=backend)
    padded = linear_preference_loss(hidden, weight, labels, reference, **option)
    ids = torch.arange(2 * count).repeat_interleave(length)
    flat = hidden.view(-1, 12), labels.view(-1), ids
    kept = flat[1] != -100
    order = torch.randperm(int(kept.sum()))
    assume(len(order))  # a batch without a labelled token has a loss of 0 of its own
    for x, y, i in (flat, [t[kept] for t in flat], [t[kept][order] for t in flat]):
        out = linear_preference_loss(x, weight, y, reference, sequence_ids=i, **option)
        for a, b in zip(out[:5], padded[:5], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
