"""Gradients from columns of D, against all of D in float64."""

from __future__ import annotations

import math

import machine
import pytest
import torch

from fastpref import linear_preference_loss, linear_token_logps, plan_head
from fastpref.logps.columns import last_gradient_report

N, H, V = 150, 16, 900
DTYPES = [torch.float64, torch.float32, torch.bfloat16]
TRANSFORMS = {
    "plain": {},
    "scale": {"scale": -1.7, "temperature": 0.8},
    "softcap": {"softcap": 9.0, "temperature": 1.3},
}


def _problem(dtype=torch.float64, n=N, h=H, v=V, peak=1.3):
    torch.manual_seed(1)
    hidden, weight = torch.randn(n, h) * peak, torch.randn(v, h) + 0.5
    labels = torch.randint(v, (n,))
    return hidden.to(dtype), weight.to(dtype), labels


def _gradients(tensors, labels, **options):
    """Log-probs, and the gradients of all tensors, for the loss sum_t c_t logp_t."""
    leaves = {k: t.detach().clone().requires_grad_() for k, t in tensors.items()}
    logps = linear_token_logps(labels=labels, **leaves, **options)
    c = torch.linspace(-1, 2, logps.shape[0], dtype=logps.dtype, device=logps.device)
    found = torch.autograd.grad((logps * c).sum(), list(leaves.values()))
    return logps.detach(), dict(zip(leaves, found, strict=True))


def _distance(a, b):
    return float((a.double() - b.double()).norm() / b.double().norm())


# ---- the whole call ----


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "tolerances", [(0.05, None), (None, 0.05), (0.05, 0.05)], ids=["u", "head", "both"]
)
def test_gradients_are_within_the_tolerance(backend, dtype, transform, tolerances):
    """And those without a tolerance are exact, as are the log-probs: the same bits."""
    n, v = machine.sized(backend, (N, V), (20, 300))
    hidden, weight, labels = _problem(dtype, n, v=v)
    tensors = dict(hidden=hidden, weight=weight, bias=torch.randn(v).to(dtype))
    options = dict(TRANSFORMS[transform], backend=backend, extras=())
    logps, exact = _gradients(tensors, labels, **options)
    names = dict(gradient_tolerance=tolerances[0], head_gradient_tolerance=tolerances[1])
    got, approximate = _gradients(tensors, labels, **options, **names)
    assert torch.equal(got, logps)
    rounding = {torch.bfloat16: 1e-2}.get(dtype, 1e-6)
    for name, tolerance in zip(exact, (tolerances[0], *tolerances[1:] * 2), strict=True):
        error = _distance(approximate[name], exact[name])
        # One draw; the loss weighs the tokens otherwise than the tolerance does.
        assert error <= 2 * (tolerance or 0) + rounding, name
        if tolerance is not None and dtype != torch.bfloat16:
            assert error > 0, name


def test_extras_are_exact():
    hidden, weight, labels = _problem(torch.float32)
    options = dict(extras=["entropy", "mean_logit", "is_top1", "log_sum_sq_probs"])
    for backend in ("eager", "native"):
        if machine.why_not(backend) is not None:
            continue
        leaf = hidden.clone().requires_grad_()
        exact = linear_token_logps(leaf, weight, labels, backend=backend, **options)
        by_columns = linear_token_logps(
            leaf, weight, labels, backend=backend, gradient_tolerance=0.1, **options
        )
        assert all(torch.equal(a, b) for a, b in zip(exact, by_columns, strict=True))


@pytest.mark.parametrize("strategy", ["stash", "recompute", "mixed"])
def test_the_weight_stays_exact_in_every_strategy(strategy):
    hidden, weight, labels = _problem()
    tensors = dict(hidden=hidden, weight=weight)
    options = dict(strategy=strategy, memory_budget=60 * V * 8)
    _, exact = _gradients(tensors, labels, **options)
    _, found = _gradients(tensors, labels, gradient_tolerance=0.05, **options)
    assert 0 < _distance(found["hidden"], exact["hidden"]) < 0.1
    assert _distance(found["weight"], exact["weight"]) < 1e-12


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dora", [False, True])
def test_adapters(dtype, dora):
    hidden, weight, labels = _problem(dtype)
    tensors = dict(
        hidden=hidden,
        weight=weight,
        lora_hidden=(torch.randn(N, 3) * 0.3).to(dtype),
        lora_B=torch.randn(V, 3).to(dtype),
    )
    if dora:
        tensors["dora_scale"] = (torch.rand(V) + 0.5).to(dtype)
    logps, exact = _gradients(tensors, labels)
    got, found = _gradients(tensors, labels, gradient_tolerance=0.05)
    assert torch.equal(got, logps)
    assert 0 < _distance(found["hidden"], exact["hidden"]) < 0.1
    rounding = 1e-2 if dtype == torch.bfloat16 else 1e-5
    for name in list(tensors)[1:]:
        assert _distance(found[name], exact[name]) < rounding, name
    if dora:
        with pytest.raises(ValueError, match="head_gradient_tolerance: got a number with dora"):
            _gradients(tensors, labels, head_gradient_tolerance=0.05)
        return
    _, found = _gradients(tensors, labels, head_gradient_tolerance=0.05)
    assert _distance(found["lora_hidden"], exact["lora_hidden"]) < rounding
    assert 0 < _distance(found["lora_B"], exact["lora_B"]) < 0.1 + rounding


def test_the_mean_of_draws_is_exact():
    """The error of a mean over 64 draws is an eighth of that of one draw, for every gradient."""
    hidden, weight, labels = _problem(n=60)
    tensors = dict(hidden=hidden, weight=weight, bias=torch.randn(V).double())
    _, exact = _gradients(tensors, labels)
    options = dict(gradient_tolerance=0.1, head_gradient_tolerance=0.1)
    draws = [_gradients(tensors, labels, gradient_seed=s, **options)[1] for s in range(64)]
    for name, truth in exact.items():
        one = math.sqrt(sum(_distance(d[name], truth) ** 2 for d in draws) / len(draws))
        mean = _distance(torch.stack([d[name] for d in draws]).mean(0), truth)
        assert one > 1e-3 and one / 8 * 0.6 < mean < one / 8 * 1.6, (name, one, mean)


@pytest.mark.parametrize("tolerance", [0.3, 0.1, 0.03, 0.01])
def test_the_error_is_the_expected_one(tolerance):
    """The root mean square over draws is below the tolerance and close to the report's."""
    hidden, weight, labels = _problem(n=100, peak=1.0)
    _, exact = _gradients(dict(hidden=hidden), labels, weight=weight)
    # Of the loss of which each token has the same part, as u itself has.
    leaf = hidden.clone().requires_grad_()

    def u(**options):
        logps = linear_token_logps(leaf, weight, labels, **options)
        return torch.autograd.grad(logps.sum(), leaf)[0]

    errors, truth = [], u()
    for seed in range(8):
        errors.append(_distance(u(gradient_tolerance=tolerance, gradient_seed=seed), truth))
    error = math.sqrt(sum(e * e for e in errors) / len(errors))
    report = last_gradient_report()
    assert report.tokens == 100 and 0 < report.columns < 1
    assert 0.4 * float(report.error) < error < 1.02 * float(report.error) <= 1.1 * tolerance
    assert 0 < report.left_out < 1 and 0 < report.bound_mean < report.bound_max


@pytest.mark.parametrize("name", ["eager", "native"])
def test_blocks_that_have_little_in_common(name):
    """The tolerance is met where each block of a call likely takes tokens of its own."""
    blocks, n, h, v = 3, 512, 24, 3000
    torch.manual_seed(2)
    weight = torch.randn(v, h) * 0.3
    weight[:, :blocks] *= 0.1
    for i in range(blocks):  # each block's direction lifts entries of its own
        weight[i * v // blocks : (i + 1) * v // blocks, i] += 1
    hidden = torch.randn(blocks * n, h)
    for i in range(blocks):
        hidden[i * n : (i + 1) * n, i] += 6
    labels = torch.cat([torch.randint(v // blocks, (n,)) + i * v // blocks for i in range(blocks)])
    tensors = dict(hidden=hidden, weight=weight)
    _, exact = _gradients(tensors, labels, backend=name)
    tolerance, squares = 0.03, {"hidden": 0.0, "weight": 0.0}
    for seed in range(4):
        names = dict(gradient_tolerance=tolerance, head_gradient_tolerance=tolerance)
        _, found = _gradients(tensors, labels, backend=name, gradient_seed=seed, **names)
        assert float(last_gradient_report().columns) < 0.7
        for key in squares:
            squares[key] += _distance(found[key], exact[key]) ** 2 / 4
    assert all(math.sqrt(s) < 1.2 * tolerance for s in squares.values()), squares


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["eager", "native"])
def test_blocks_that_share_a_pass_over_the_weight(name, dtype, monkeypatch):
    """However many wait for one pass, the gradients are those of one after the other."""
    if name == "native" and dtype == torch.float64:
        pytest.skip("the native backend has no float64")
    # Of no other test: plans are remembered.
    hidden, weight, labels = _problem(dtype, n=157)
    names = dict(head_gradient_tolerance=0.05, backend=name)
    if dtype != torch.bfloat16:  # whose u by columns waits for nothing
        names["gradient_tolerance"] = 0.05
    monkeypatch.setattr("fastpref.logps.plan._COLUMN_TOKENS", 32)
    module = machine.backends._MODULES[name]
    passes, weighted_rows = [], module.weighted_rows

    def watched(q, weight):
        passes.append(len(q))
        return weighted_rows(q, weight)

    monkeypatch.setattr(module, "weighted_rows", watched)
    results = []
    for together in (1, 2, 4, 8):
        monkeypatch.setattr("fastpref.logps.columns.BLOCKS_TOGETHER", together)
        tensors = dict(hidden=hidden, weight=weight)
        passes.clear()
        results.append((*_gradients(tensors, labels, **names)[1].values(), last_gradient_report()))
        blocks = sum(passes)  # 5, or 6 where a tile of logits ends
        assert blocks in (5, 6)
        rest = [blocks % together] if blocks % together else []
        assert passes == [together] * (blocks // together) + rest
    rtol = 1e-9 if dtype == torch.float64 else 1e-5
    for *gradients, report in results[1:]:
        for a, b in zip(gradients, results[0], strict=False):
            assert torch.allclose(a, b, rtol=rtol, atol=rtol * float(b.abs().max()))
        assert all(
            torch.allclose(torch.as_tensor(a), torch.as_tensor(b), rtol=1e-5)
            for a, b in zip(report, results[0][2], strict=True)
        )


@pytest.mark.parametrize("name", ["eager", "native"])
def test_a_hidden_size_of_one_with_a_stride(name):
    """Whose only stride of 1 is the one that is never used."""
    torch.manual_seed(4)
    tensors = dict(hidden=torch.randn(64, 1), weight=torch.randn(1, 900).t())
    labels = torch.randint(900, (64,))
    options = dict(gradient_tolerance=0.2, head_gradient_tolerance=0.2, backend=name)
    _, found = _gradients(tensors, labels, **options)
    _, exact = _gradients(tensors, labels, backend=name)
    assert all(_distance(found[key], exact[key]) < 0.5 for key in exact)


def test_the_same_call_has_the_same_bits(threads):
    hidden, weight, labels = _problem(torch.float32)
    tensors = dict(hidden=hidden, weight=weight)
    options = dict(gradient_tolerance=0.1, head_gradient_tolerance=0.1)
    _, first = _gradients(tensors, labels, **options)
    threads(2)
    _, second = _gradients(tensors, labels, **options)
    assert all(torch.equal(first[k], second[k]) for k in first)
    _, other = _gradients(tensors, labels, **options, gradient_seed=1)
    assert not any(torch.equal(first[k], other[k]) for k in first)


@pytest.mark.parametrize("backend", ["eager", "native"])
def test_the_same_bits_with_more_threads(threads, backend):
    """A vocabulary whose sums torch shares out among the threads."""
    if machine.why_not(backend) is not None:
        pytest.skip(machine.why_not(backend))
    torch.manual_seed(0)
    # Few hidden columns, so that the products of torch's libraries have one order of summation.
    hidden, weight = torch.randn(40, 4), torch.randn(70_000, 4)
    tensors = dict(hidden=hidden, weight=weight, bias=torch.randn(70_000))
    labels, found = torch.randint(70_000, (40,)), []
    options = dict(backend=backend, gradient_tolerance=0.1, head_gradient_tolerance=0.1)
    for count in (1, 2, 3, 8):
        threads(count)
        _, gradients = _gradients(tensors, labels, **options)
        found.append([*gradients.values(), *last_gradient_report()[1:]])
    assert all(torch.equal(a, b) for more in found[1:] for a, b in zip(found[0], more, strict=True))


def test_the_report_is_of_what_takes_columns():
    """A tolerance of u counts where u is computed; without any error it is 0, and not no number."""
    hidden, weight, labels = _problem(torch.float32)
    weight.requires_grad_()
    linear_token_logps(hidden, weight, labels, head_gradient_tolerance=0.1)
    alone = last_gradient_report()
    linear_token_logps(hidden, weight, labels, gradient_tolerance=0.9, head_gradient_tolerance=0.1)
    assert last_gradient_report() == alone and 0 < alone.error < 0.11
    hidden, weight, labels = (t[:1] for t in (hidden, weight, labels * 0))  # probability 1
    linear_token_logps(hidden, weight.detach(), labels, head_gradient_tolerance=0.1)
    linear_token_logps(hidden.requires_grad_(), weight, labels, gradient_tolerance=0.1)
    report = last_gradient_report()
    assert report is not alone and [float(t) for t in report[2:]] == [0, 0, 0, 0]


def test_the_entropys_gradient_is_exact():
    hidden, weight, labels = _problem()
    found = []
    for options in ({}, dict(gradient_tolerance=0.1, head_gradient_tolerance=0.1)):
        leaves = [t.clone().requires_grad_() for t in (hidden, weight)]
        out = linear_token_logps(*leaves, labels, extras=["entropy"], **options)
        found.append(torch.autograd.grad((out.logps + 2 * out.entropy).sum(), leaves))
    assert all(_distance(a, b) < 1e-12 for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("n", [0, 1, 2])
@pytest.mark.parametrize("v", [1, 5, 15, 40])
def test_few_tokens_and_few_entries(n, v):
    hidden, weight, labels = _problem(n=n, v=v)
    tensors = dict(hidden=hidden, weight=weight)
    _, exact = _gradients(tensors, labels)
    _, found = _gradients(tensors, labels, gradient_tolerance=0.01, head_gradient_tolerance=0.01)
    for name, truth in exact.items():
        assert (found[name] - truth).norm() <= 0.03 * truth.norm() + 1e-12


def test_impossible_entries():
    """Logits of -inf, in a padded vocabulary, have neither D nor columns."""
    hidden, weight, labels = _problem()
    bias = torch.zeros(V, dtype=torch.float64)
    bias[::3] = -math.inf
    labels = torch.where(labels % 3 == 0, (labels + 1) % V, labels)
    labels = torch.where(labels % 3 == 0, 1, labels)
    tensors = dict(hidden=hidden, weight=weight)
    _, exact = _gradients(tensors, labels, bias=bias)
    options = dict(gradient_tolerance=0.05, head_gradient_tolerance=0.05)
    _, found = _gradients(tensors, labels, bias=bias, **options)
    assert not found["weight"][::3].any()
    assert all(_distance(found[k], exact[k]) < 0.1 for k in exact)


def test_a_row_that_is_no_number_leaves_the_others_alone():
    hidden, weight, labels = _problem(torch.float32)
    hidden[3] = math.nan
    for backend in ("eager", "native"):
        if machine.why_not(backend) is not None:
            continue
        options = dict(weight=weight, backend=backend, gradient_tolerance=0.1)
        _, found = _gradients(dict(hidden=hidden), labels, **options)
        assert found["hidden"].isnan().any(1).nonzero().flatten().tolist() == [3]


def test_losses_and_rewards_are_exact():
    hidden, weight, labels = _problem(torch.float32)
    found = []
    for options in ({}, dict(gradient_tolerance=0.1, head_gradient_tolerance=0.1)):
        leaves = [t.clone().requires_grad_() for t in (hidden.view(10, -1, H), weight)]
        ref_logps = torch.full((10,), -40.0)
        out = linear_preference_loss(*leaves, labels.view(10, -1), ref_logps, **options)
        out.loss.backward()
        found.append((out[:5], [t.grad for t in leaves]))
    assert all(torch.equal(a, b) for a, b in zip(found[0][0], found[1][0], strict=True))
    assert all(0 < _distance(a, b) < 0.3 for a, b in zip(found[1][1], found[0][1], strict=True))


# ---- options and plans ----


@pytest.mark.parametrize("name", ["gradient_tolerance", "head_gradient_tolerance"])
@pytest.mark.parametrize("value", [0, 1, -0.1, math.nan, "1e-3", True])
def test_bad_tolerances(name, value):
    hidden, weight, labels = _problem()
    with pytest.raises(ValueError, match=name):
        linear_token_logps(hidden, weight, labels, **{name: value})


@pytest.mark.parametrize("strategy", ["recompute", "mixed"])
def test_strategies_that_have_no_columns_of_the_head(strategy):
    hidden, weight, labels = _problem()
    weight.requires_grad_()
    with pytest.raises(ValueError, match="strategy: .* head_gradient_tolerance"):
        linear_token_logps(hidden, weight, labels, strategy=strategy, head_gradient_tolerance=0.1)


def test_plans():
    """2NHV for the logits, and 2NHK for u and for dW where they take K columns."""
    n, h, v = 2048, 576, 49152
    options = dict(gradient_tolerance=1.5e-3)
    frozen = plan_head(n, h, v, torch.float32, weight_grad=False, **options)
    k = frozen.columns
    assert frozen.column_tokens == 480 and 0.2 * v < k < 0.25 * v
    assert frozen.flops == 2 * n * h * (v + k)
    exact_head = plan_head(n, h, v, torch.float32, memory_budget=2**33, **options)
    assert exact_head.flops == 2 * n * h * (2 * v + k) and not exact_head.head_columns
    both = plan_head(n, h, v, torch.float32, head_gradient_tolerance=1e-3, **options)
    assert both.head_columns and both.stash_tokens == 0
    assert both.flops == 2 * n * h * (v + 2 * both.columns)
    assert both.extra_bytes < exact_head.extra_bytes
    nothing = plan_head(n, h, v, torch.float32, weight_grad=False, head_gradient_tolerance=0.1)
    assert nothing == plan_head(n, h, v, torch.float32, weight_grad=False)


def test_compiled():
    """u takes columns under torch.compile; dW cannot, since its shapes would depend on D."""
    hidden, weight, labels = _problem(torch.float32)

    def loss(hidden, weight, **options):
        return linear_token_logps(hidden, weight, labels, gradient_tolerance=0.1, **options).sum()

    leaves = [t.requires_grad_() for t in (hidden, weight)]
    expected = torch.autograd.grad(loss(*leaves), leaves)
    found = torch.autograd.grad(torch.compile(loss, backend="eager")(*leaves), leaves)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    with pytest.raises(Exception, match="head_gradient_tolerance: got a number under torch"):
        torch.compile(loss, backend="eager")(*leaves, head_gradient_tolerance=0.1)
