"""The choice of columns of D, its bound and its error, and the primitives behind it."""

from __future__ import annotations

import math

import machine
import oracle
import pytest
import torch

from fastpref.backends import eager
from fastpref.backends.column_choice import block_hash, choose_columns, uniforms
from fastpref.logps.columns import (
    ColumnBlock,
    ColumnOptions,
    Sampler,
    bias_grad,
    head_grad,
    spread,
)


def _problem(n):
    torch.manual_seed(1)
    hidden, weight = torch.randn(n, 16).double() * 1.3, torch.randn(900, 16).double() + 0.5
    return hidden, weight, torch.randint(900, (n,))


def _distance(a, b):
    return float((a - b).norm() / b.norm())


def _block(d, weight, labels, tolerance, seed=0, count=None):
    """(choice, sampler, u) of D [n, V] with a seed."""
    options = ColumnOptions(tolerance, None, seed)
    sampler = Sampler(options, eager, weight, None, count, False)
    u, lse = torch.empty(d.shape[0], weight.shape[1], dtype=d.dtype), d.sum(1)
    sampler.add(d, labels, lse, None, u)
    sampler.finish()
    norm = (d @ weight).square().sum()
    squares = d.square().sum(0)
    distance = spread(weight, None, d.dtype).distance
    state = block_hash(labels, lse, seed)
    chosen = choose_columns(squares, labels, distance, norm, (tolerance, None), state, count)
    return chosen, sampler, u


def _d(logits, labels):
    return torch.nn.functional.one_hot(labels, logits.shape[1]) - logits.softmax(1)


@pytest.mark.parametrize("count", [100, 250, 700])
def test_a_number_of_columns_that_is_given(count):
    """As on a GPU, where no value is read on the host: so many columns, and the mean is exact."""
    hidden, weight, labels = _problem(n=40)
    d = _d(hidden @ weight.t(), labels)
    truth, draws = d @ weight, []
    for seed in range(64):
        chosen, sampler, u = _block(d, weight, labels, 0.01, seed, count)
        assert chosen.columns.shape == (count,) and set(labels.tolist()) <= set(
            chosen.columns[chosen.kept].tolist()
        )
        draws.append(u)
    one = math.sqrt(sum(_distance(u, truth) ** 2 for u in draws) / len(draws))
    assert _distance(torch.stack(draws).mean(0), truth) < one / 8 * 1.6
    assert one < 1.05 * math.sqrt(float(sampler.sums[0][1] / truth.square().sum()))


def test_uniform_numbers():
    labels, lse = torch.arange(9), torch.linspace(1, 2, 9)
    numbers = uniforms(block_hash(labels, lse, 3), 20000)
    assert 0 <= numbers.min() and numbers.max() < 1
    assert abs(float(numbers.mean()) - 0.5) < 0.01 and abs(float(numbers.var()) - 1 / 12) < 2e-3
    pairs = torch.corrcoef(torch.stack([numbers[:-1], numbers[1:]]))[0, 1]
    assert abs(float(pairs)) < 0.03
    for other in ((labels.flip(0), lse, 3), (labels, lse + 1e-6, 3), (labels, lse, 4)):
        assert not torch.equal(uniforms(block_hash(*other), 4), numbers[:4])


def test_columns_that_are_drawn_again_are_added_in_one_order(threads):
    """With one thread or two: of so many numbers torch gives each thread some."""
    count, vocab, hidden = 100_000, 5000, 2
    index = torch.randint(vocab, (count,))
    block = ColumnBlock(torch.randn(3, count + 1), index, torch.ones(vocab))
    x, dlogp = torch.randn(3, hidden), torch.randn(3)
    weight, bias = torch.empty(6, vocab, hidden), torch.empty(6, vocab)
    for i in range(6):
        threads(1 if i == 0 else 2)
        head_grad(eager, (block,), x, weight[i])
        bias_grad((block,), dlogp, bias[i])
    assert (weight == weight[0]).all() and (bias == bias[0]).all()


pytest.importorskip("hypothesis")
from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402


@st.composite
def blocks(draw):
    """D [n, V] of an adversarial distribution, W [V, H] and labels [n]."""
    torch.manual_seed(draw(st.integers(0, 2**31)))
    n, v, h = draw(st.integers(1, 40)), draw(st.integers(1, 400)), draw(st.integers(1, 20))
    shape = draw(st.sampled_from(["flat", "two peaks", "one hot", "random", "impossible"]))
    labels = torch.randint(v, (n,))
    logits = torch.zeros(n, v, dtype=torch.float64)
    if shape == "two peaks":
        logits[:, torch.randint(v, (2,))] = 9.0
    elif shape == "one hot":
        logits[torch.arange(n), torch.randint(v, (n,))] = 60.0
    elif shape == "random":
        logits = torch.randn(n, v, dtype=torch.float64) * draw(st.sampled_from([0.5, 3.0, 20.0]))
    elif shape == "impossible":  # the labels, among much else
        logits = torch.randn(n, v, dtype=torch.float64)
        logits[:, torch.rand(v) < 0.5] = -math.inf
        logits[:, 0] = 0.0
        logits[torch.arange(n), labels] = -50.0
    weight = torch.randn(v, h, dtype=torch.float64) + draw(st.sampled_from([0.0, 5.0]))
    return _d(logits, labels), weight, labels


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(block=blocks(), tolerance=st.sampled_from([0.5, 0.1, 1e-2, 1e-4]))
def test_the_bound_of_what_is_left_out(block, tolerance):
    """A row's error without the drawn columns is at most |r| max |W_v - q^T W| over R, and that no
    more than what is reported. The labels are always kept."""
    d, weight, labels = block
    chosen, sampler, _ = _block(d, weight, labels, tolerance)
    truth = d @ weight
    if sampler.multiplied == d.numel():
        assert not sampler.bounds[0].any()
    if chosen is None:  # the sampler estimates |u|, so that it may choose where this does not
        return
    rest = torch.ones(d.shape[1], dtype=torch.bool)
    rest[chosen.columns[chosen.kept]] = False
    assert not rest[labels].any()
    r, q = d[:, rest].sum(1), d[:, rest].sum(0)
    q = q / q.sum() if q.sum() != 0 else q
    m = q @ weight[rest]
    undrawn = d[:, ~rest] @ weight[~rest] + r[:, None] * m
    farthest = (weight[rest] - m).norm(dim=1).max() if rest.any() else 0.0
    bound = r.abs() * farthest
    assert ((undrawn - truth).norm(dim=1) <= bound * (1 + 1e-9) + 1e-12).all()


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(block=blocks(), tolerance=st.sampled_from([0.5, 0.1, 1e-2]))
def test_the_tolerance_is_met_on_average(block, tolerance):
    d, weight, labels = block
    truth = d @ weight
    errors = []
    for seed in range(12):
        _, sampler, u = _block(d, weight, labels, tolerance, seed)
        assert u.isfinite().all()
        errors.append((u - truth).square().sum())
    mean = math.sqrt(float(torch.stack(errors).mean()))
    # Twelve draws of a heavy-tailed error; |u| was estimated, too.
    assert mean <= 1.5 * tolerance * float(truth.norm()) + 1e-9


# ---- primitives of the backends ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("n, v", [(1, 1), (3, 70), (9, 2100), (70, 5000)])
@pytest.mark.parametrize("scaled", [False, True])
def test_primitives(backend, dtype, n, v, scaled):
    n, v = min(n, machine.sized(backend, n, 9)), min(v, machine.sized(backend, v, 600))
    module = machine.backends._MODULES[machine.backend_of(backend)]
    d = (torch.randn(n, v + 3) * 0.1).to(dtype)[:, :v]
    row_scale = torch.rand(n) + 0.5 if scaled else None
    wide = d.double() * (1 if row_scale is None else row_scale[:, None].double())
    squares, totals, row_sums = module.column_sums(d, row_scale)
    assert torch.allclose(squares.double(), wide.square().sum(0), rtol=1e-5, atol=1e-6)
    assert torch.allclose(totals.double(), wide.sum(0), rtol=1e-5, atol=1e-5)
    assert torch.allclose(row_sums.double(), d.double().sum(1), rtol=1e-5, atol=1e-4)
    count = min(v, 20)
    index = torch.randperm(v)[:count]
    kept = torch.arange(count) < count // 2
    factor, mean = (torch.where(kept, a, torch.rand(count)) for a in (1.0, 0.0))
    out = d.new_empty((n, count + 1))
    rest = module.gather_columns(d, index, kept, factor, mean, row_sums, out)
    columns = d[:, index].double()
    left = row_sums.double() - (columns * kept).sum(1)
    columns = (columns - left[:, None] * mean) * factor
    last = left - (columns * ~kept).sum(1)
    tolerance = dict(rtol=1e-2, atol=1e-3) if dtype != torch.float32 else dict(rtol=1e-5, atol=1e-5)
    assert torch.allclose(rest.double(), left, rtol=1e-5, atol=1e-4)
    assert torch.allclose(out[:, :-1].double(), columns, **tolerance)
    assert torch.allclose(out[:, -1].double(), last, rtol=tolerance["rtol"], atol=2e-3)
    assert torch.equal(out[:, :-1][:, kept], d[:, index[kept]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("v, h", [(1, 1), (70, 5), (3001, 40)])
def test_primitives_of_the_weight(backend, dtype, v, h):
    module = machine.backends._MODULES[machine.backend_of(backend)]
    weight, q = torch.randn(v, h + 1).to(dtype)[:, :h], torch.rand(3, v)
    q[:, ::3] = 0
    found = module.weighted_rows(q, weight)
    assert torch.allclose(found.double(), q.double() @ weight.double(), rtol=1e-4, atol=1e-4)
    index = torch.randint(v, (7,))
    for rows, last in ((weight[index], None), (torch.cat([weight[index], found[:1]]), found[0])):
        d, memory = torch.randn(4, rows.shape[0]).to(dtype), weight.new_empty((8, h))
        out, expected = weight.new_empty((4, h)), weight.new_empty((4, h))
        module.project_rows(d, weight, index, last, memory, out)
        eager.project(d, rows.to(dtype), expected)
        close = 1e-4 if dtype == torch.float32 else 2e-2
        assert torch.allclose(out.float(), expected.float(), rtol=close, atol=close)


def test_the_oracle_of_these_tests():
    """All columns: the gradients are those of autograd through float64 logits."""
    hidden, weight, labels = _problem(n=7)
    leaf = hidden.clone().requires_grad_()
    oracle.linear_logps(leaf, weight, labels).sum().backward()
    d = _d(hidden @ weight.t(), labels)
    assert torch.allclose(d @ weight, leaf.grad)


@pytest.mark.parametrize("tolerances", [(1e-2, None), (None, 3e-2), (1e-2, 2e-2), (1e-6, None)])
@pytest.mark.parametrize("shape", ["flat", "peaks", "zeros", "ties", "few", "nan", "inf"])
def test_the_native_choice_is_torchs(shape, tolerances):
    """The same columns, factors and variances, to the bit."""
    from fastpref.backends import native

    if native.problem():
        pytest.skip(native.problem())
    torch.manual_seed(3)
    vocab = 5 if shape == "few" else 3000
    labels = torch.randint(-1, vocab + 1, (40,))
    squares = torch.randn(vocab).mul(0 if shape == "flat" else 3).exp().square() * 1e-9
    if shape == "zeros":
        squares[torch.rand(vocab) < 0.7] = 0
    if shape == "ties":
        squares = squares.round(decimals=9)
    if shape in ("nan", "inf"):
        squares[7] = float(shape)
    distance = torch.rand(vocab) + 0.5
    norm = (squares * distance.square()).nan_to_num(0, 0, 0).sum() * 1.3
    state = block_hash(labels, torch.rand(40), 5)
    spaced = torch.stack([labels, labels], 1)[:, 0]
    arguments = squares, spaced, distance, norm, tolerances, state
    expected, found = (m.choose_columns(*arguments) for m in (eager, native))
    if shape in ("nan", "inf"):  # torch keeps such a column, where it is the only one
        assert found is None
        return
    assert (expected is None) == (found is None)
    if shape == "peaks" and tolerances[0] != 1e-6:
        assert found is not None and 0 < found.kept.sum() < found.columns.numel() < vocab
    for theirs, ours in zip(expected or (), found or (), strict=True):
        assert theirs.dtype == ours.dtype and torch.equal(theirs, ours)
