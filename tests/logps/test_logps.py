"""Token log-probabilities and their gradients: how exact, and the same from run to run."""

from __future__ import annotations

import functools

import machine
import oracle
import pytest
import torch
from torch import Tensor

import fastpref
from fastpref import linear_token_logps, token_logps
from fastpref.backends import native
from fastpref.backends.stats import EXTRAS

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
N, V, H = 100, 1999, 64
TRANSFORMS = {
    "plain": {},
    "bias": {},
    "softcap": {"scale": 0.7, "softcap": 15.0, "temperature": 1.3},
}
# Budgets that cut the problem into several tiles both ways, or keep D of a part of the tokens.
PLANS = {
    "auto": {},
    "stash": {"strategy": "stash"},
    "recompute": {"strategy": "recompute", "memory_budget": 1},
    "mixed": {"strategy": "mixed", "memory_budget": 90 * V * 4},
}


@pytest.fixture
def tiles_of_40_rows(monkeypatch):
    """In fp32, on any device: a GPU's own tiles would hold all of what is tested here."""
    monkeypatch.setattr(fastpref.logps.plan, "_TILE_BYTES_PER_COLUMN", {"cpu": 160, "cuda": 160})


def _size(backend) -> tuple[int, int, int]:
    return machine.sized(backend, (N, V, H), (12, 701, H))


def _own_product(dtype) -> bool:
    """Whether the native backend does the logits product in its own kernel, row by row."""
    return not native.problem() and native.product_kernel(dtype, torch.float32) is not None


def _problem(dtype, transform, size=(N, V, H)):
    """Hidden states, head, labels (every seventh ignored), bias, and the coefficients of a loss."""
    return _problem_on(torch.get_default_device(), dtype, transform, *size)


@functools.cache
def _problem_on(device, dtype, transform, n, vocab, h):
    torch.manual_seed(n + vocab)
    with torch.device("cpu"):  # the same numbers on every device
        hidden, weight = torch.randn(n, h).to(dtype), (torch.randn(vocab, h) * 0.4).to(dtype)
        labels = torch.randint(vocab, (n,))
        labels[::7] = -100
        bias = None if transform == "plain" else torch.randn(vocab).to(dtype)
        coef = torch.randn(n, dtype=torch.float64)
    problem = hidden, weight, labels, bias, coef
    return tuple(None if t is None else t.to(device) for t in problem)


def _run(function, problem, needs=("hidden", "weight", "bias"), dtype=None, **options):
    """Log-probs, and the gradients of sum(coefficients * log-probs) in what is needed."""
    hidden, weight, labels, bias, coef = problem
    inputs = {"hidden": hidden, "weight": weight, "bias": bias}
    inputs = {
        k: t.detach().to(dtype or t.dtype).requires_grad_(k in needs)
        for k, t in inputs.items()
        if t is not None
    }
    logps = function(labels=labels, **inputs, **options)
    leaves = [t for t in inputs.values() if t.requires_grad]
    grads = torch.autograd.grad((logps * coef.to(logps.dtype)).sum(), leaves)
    return [logps.detach(), *grads]


@functools.cache
def _expected(device, dtype, transform, size):
    """(truth, eager) of a problem: log-probs and gradients each."""
    problem, options = _problem(dtype, transform, size), TRANSFORMS[transform]
    truth = _run(oracle.linear_logps, problem, dtype=torch.float64, **options)
    return truth, _run(oracle.eager_logps, problem, **options)


@pytest.mark.parametrize("precision", ["exact", "fast"])
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.usefixtures("tiles_of_40_rows")
def test_no_less_exact_than_eager(backend, dtype, transform, plan, precision):
    problem = _problem(dtype, transform, _size(backend))
    options = TRANSFORMS[transform] | PLANS[plan]
    got = _run(linear_token_logps, problem, **options, precision=precision, backend=backend)
    truth, eager = _expected(torch.get_default_device(), dtype, transform, _size(backend))
    assert got[0].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert [g.dtype for g in got[1:]] == [dtype] * (len(got) - 1)
    assert (got[0] <= 0).all() and (got[0][problem[2] < 0] == 0).all()
    for ours, theirs, true in zip(got, eager, truth, strict=True):
        oracle.assert_no_worse(ours, theirs, true, dtype)
    if precision == "exact":  # the logits of 16-bit inputs are fp32's
        eps = torch.finfo(got[0].dtype).eps
        oracle.assert_within(got[0], truth[0], 100 * eps)


@pytest.mark.parametrize("needs", [("hidden",), ("weight",), ("bias",), ("weight", "bias")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_only_what_needs_a_gradient_gets_one(backend, dtype, needs):
    """A frozen head, a head trained alone: the same numbers as when all is trained."""
    problem = _problem(dtype, "bias", _size(backend))
    got = _run(linear_token_logps, problem, needs, backend=backend)
    everything = _run(linear_token_logps, problem, backend=backend, strategy="stash")
    names = ("logps", "hidden", "weight", "bias")
    expected = [t for k, t in zip(names, everything, strict=True) if k in ("logps", *needs)]
    if needs == ("hidden",) and backend == "native":  # D and its product are made together
        assert torch.equal(got[0], expected[0])
        true, eager = (
            _run(linear_token_logps, problem, needs, dtype=dtype, backend="eager")[1]
            for dtype in (torch.float64, None)
        )
        oracle.assert_no_worse(got[1], eager, true, dtype)
        return
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("extras", [(), ("entropy",)], ids=["logps", "entropy"])
@pytest.mark.parametrize("strategy", ["stash", "recompute", "mixed"])
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_gradcheck(transform, strategy, extras):
    hidden, weight, labels, bias, _ = _problem(torch.float64, transform, (5, 7, 3))
    inputs = [t.clone().requires_grad_() for t in (hidden, weight, bias) if t is not None]

    def function(hidden, weight, bias=None):
        options = dict(TRANSFORMS[transform], extras=extras, strategy=strategy)
        out = linear_token_logps(hidden, weight, labels, bias, **options)
        return (out.logps, out.entropy) if extras else out

    assert torch.autograd.gradcheck(function, inputs)


def _softcap(z):
    o = TRANSFORMS["softcap"]
    return o["softcap"] * torch.tanh(o["scale"] * z / o["softcap"]) / o["temperature"]


@pytest.mark.parametrize("precision", ["exact", "fast"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_entropy_has_a_gradient(backend, dtype, precision):
    """Of the entropy and the log-prob at once, by one more pass over the head."""
    problem = _problem(dtype, "softcap", _size(backend))
    coef = torch.randn(_size(backend)[0], dtype=torch.float64)

    def both(logps, entropy):
        return logps + entropy * coef.to(entropy.dtype)

    def ours(labels, **inputs):
        options = dict(TRANSFORMS["softcap"], memory_budget=1, precision=precision)
        options = dict(options, extras=["entropy"], backend=backend)
        stats = linear_token_logps(labels=labels, **inputs, **options)
        return both(stats.logps, stats.entropy)

    def theirs(labels, hidden, weight, bias):
        z = torch.nn.functional.linear(hidden, weight, bias)
        z = z if z.dtype == torch.float64 else z.float()
        logp = torch.log_softmax(_softcap(z), -1)
        target = logp.gather(-1, labels.clamp(min=0)[:, None])[:, 0]
        return torch.where(labels >= 0, both(target, -(logp.exp() * logp).sum(-1)), 0.0)

    def exact(labels, **inputs):
        stats = oracle.token_stats(oracle.logits(**inputs, **TRANSFORMS["softcap"]), labels)
        return both(stats.logps, stats.entropy)

    truth = _run(exact, problem, dtype=torch.float64)
    eager = _run(theirs, problem)
    for got, other, true in zip(_run(ours, problem), eager, truth, strict=True):
        oracle.assert_no_worse(got, other, true, dtype)


@pytest.mark.few
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_extras(backend, dtype, transform):
    hidden, weight, labels, bias, _ = _problem(dtype, transform, _size(backend))
    z = oracle.logits(hidden, weight, bias, **TRANSFORMS[transform])
    labels = torch.where(torch.arange(labels.numel()) % 3 == 1, z.argmax(1), labels)
    truth = oracle.token_stats(z, labels)
    options = dict(TRANSFORMS[transform], backend=backend, memory_budget=1)
    stats = linear_token_logps(hidden, weight, labels, bias, extras=EXTRAS, **options)
    eps = torch.finfo(stats.logps.dtype).eps
    for name in ("logps", "entropy", "mean_logit", "log_sum_sq_probs"):
        oracle.assert_within(getattr(stats, name), getattr(truth, name), 100 * eps)
        assert getattr(stats, name).dtype == stats.logps.dtype
    assert torch.equal(stats.is_top1, truth.is_top1) and stats.is_top1.any()
    for name in EXTRAS:  # one at a time, and no other
        one = linear_token_logps(hidden, weight, labels, bias, extras=[name], **options)
        assert torch.equal(getattr(one, name), getattr(stats, name))
        assert [k for k in EXTRAS if getattr(one, k) is not None] == [name]


def test_a_sum_over_512_tokens_is_exact(backend):
    """In bf16, with logits up to 30: eager torch is off by tenths of a nat, fastpref by < 1e-3."""
    n, vocab, h = machine.sized(backend, 512, 32), 8192, 256
    hidden = torch.randn(n, h).bfloat16()
    weight = (torch.randn(vocab, h) * 7 / h**0.5).bfloat16()
    labels = (hidden.float() @ weight.float().t() + 12 * torch.randn(n, vocab)).argmax(1)
    truth = oracle.linear_logps(hidden, weight, labels).sum()
    ours = linear_token_logps(hidden, weight, labels, backend=backend)
    eager = oracle.eager_logps(hidden, weight, labels)
    assert abs(float(ours.double().sum() - truth)) < 1e-3
    assert abs(float(eager.double().sum() - truth)) > 1e-2  # so that the above means something


@pytest.mark.few
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("precision", ["exact", "fast"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.usefixtures("tiles_of_40_rows")
def test_policy_and_reference_agree_to_the_bit(backend, dtype, precision, plan):
    """With and without gradients, from run to run, whichever strategy: margins are 0 at step 0."""
    problem = _problem(dtype, "softcap", _size(backend))
    options = dict(TRANSFORMS["softcap"], precision=precision, fused=False, backend=backend)
    with torch.no_grad():
        reference = linear_token_logps(*problem[:4], **options)
    runs = [_run(linear_token_logps, problem, **options, **PLANS[plan]) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
    if "memory_budget" not in PLANS[plan]:  # a budget changes the tiles
        assert torch.equal(runs[0][0], reference)
    with torch.no_grad():
        limit = {k: v for k, v in PLANS[plan].items() if k == "memory_budget"}
        assert torch.equal(runs[0][0], linear_token_logps(*problem[:4], **options, **limit))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_batch_composition(backend, dtype):
    """A token's log-prob does not depend on which tokens, or how many, share its batch."""
    n = machine.sized(backend, 150, 21)
    hidden, weight, labels, bias, _ = _problem(dtype, "softcap", (n, V, H))
    options = dict(TRANSFORMS["softcap"], backend=backend)
    whole = linear_token_logps(hidden, weight, labels, bias, **options)
    own = backend == "native" and _own_product(dtype)
    for rows in ([1], [n - 1, 3, 3, 11], range(n // 4, 3 * n // 4), torch.randperm(n).tolist()):
        rows = list(rows)
        part = linear_token_logps(hidden[rows], weight, labels[rows], bias, **options)
        oracle.assert_within(part, whole[rows], 0.0 if own else 2e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_any_number_of_threads(threads, dtype):
    if not _own_product(dtype):
        pytest.skip("fastpref has no kernel of its own for the product here")
    problem, results = _problem(dtype, "softcap"), []
    options = dict(TRANSFORMS["softcap"], backend="native", extras=EXTRAS)
    for count in (1, 2, 3):
        threads(count)
        results.append(linear_token_logps(*problem[:4], **options))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_backward_twice(backend):
    """retain_graph gives the same gradients again; a gradient of the gradient is refused."""
    hidden, weight, labels, bias, _ = _problem(torch.float32, "bias", _size(backend))
    leaves = [t.clone().requires_grad_() for t in (hidden, weight, bias)]
    for strategy in ("stash", "recompute"):
        logps = linear_token_logps(
            leaves[0], leaves[1], labels, leaves[2], strategy=strategy, backend=backend
        )
        first = torch.autograd.grad(logps.sum(), leaves, retain_graph=True)
        again = torch.autograd.grad(2 * logps.sum(), leaves, retain_graph=True)
        for a, b in zip(first, again, strict=True):
            torch.testing.assert_close(b, 2 * a, rtol=1e-6, atol=1e-6)
        with pytest.raises(NotImplementedError, match="second derivatives .* plain torch"):
            torch.autograd.grad(logps.sum(), leaves, create_graph=True)


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("inplace", [False, True], ids=["copy", "inplace"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_token_logps(backend, dtype, inplace, transform):
    logits = (torch.randn(3, 5, 777) * 3).to(dtype)
    labels = torch.randint(777, (3, 5))
    labels[1, 2:] = -100
    coef, options = torch.randn(3, 5, dtype=torch.float64), TRANSFORMS[transform]

    def run(function, raw) -> list[Tensor]:
        raw = raw.clone().requires_grad_()
        logps = function(raw)
        (grad,) = torch.autograd.grad((logps * coef.to(logps.dtype)).sum(), raw)
        assert not (inplace and function is ours) or grad.data_ptr() == raw.data_ptr()
        return [logps.detach(), grad]

    def ours(raw):
        return token_logps(raw, labels, inplace_backward=inplace, backend=backend, **options)

    def eager(raw):
        z = raw if dtype == torch.float64 else raw.float()
        eye = torch.eye(777, dtype=z.dtype)
        return oracle.eager_logps(z, eye, labels, **options)

    truth = run(lambda raw: oracle.token_stats(oracle.transform(raw, **options), labels).logps,
                logits.double())  # fmt: skip
    for got, theirs, true in zip(run(ours, logits), run(eager, logits), truth, strict=True):
        oracle.assert_no_worse(got, theirs, true, dtype if got.dtype == dtype else got.dtype)
    assert fastpref.token_logps(logits, labels).max() <= 0


def test_inplace_backward_refuses_a_second_one(backend):
    logits, labels = torch.randn(4, 9, requires_grad=True), torch.tensor([1, 8, -100, 0])
    total = token_logps(logits, labels, inplace_backward=True, backend=backend).sum()
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="inplace_backward"):
        total.backward()


@pytest.mark.parametrize("level", [8.0, 14.0, 40.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_confident_tokens_in_fast_mode(backend, dtype, level):
    """The rounding of the label's logit does not show: neither in its own log-prob and gradient,
    nor in the statistics, which stay those of a distribution."""
    n = machine.sized(backend, 40, 10)
    hidden, weight = torch.randn(n, 256).to(dtype), torch.randn(500, 256).to(dtype) / 64
    labels = torch.arange(n) * 12
    weight[labels] = (hidden.float() * level / 256).to(dtype)
    truth = oracle.token_stats(oracle.logits(hidden, weight), labels)
    eager = torch.log_softmax((hidden @ weight.t()).float(), -1)
    options = dict(precision="fast", backend=backend, extras=EXTRAS)
    stats = linear_token_logps(hidden, weight, labels, **options)
    assert stats.logps.max() <= 0
    assert stats.log_sum_sq_probs.max() <= 1e-6
    assert stats.entropy.min() >= -1e-6
    entropy = -(eager.exp() * eager).sum(-1)
    oracle.assert_no_worse(stats.entropy, entropy, truth.entropy, torch.float32)
    squared = (2 * eager).logsumexp(-1)
    oracle.assert_no_worse(stats.log_sum_sq_probs, squared, truth.log_sum_sq_probs, torch.float32)


@pytest.mark.parametrize("precision", ["exact", "fast"])
@pytest.mark.parametrize("level", [8.0, 14.0, 40.0])
def test_the_entropy_gradient_of_confident_tokens(backend, precision, level):
    """The label's entry goes with the normaliser, also where its logit in the tile is rounded."""
    n = machine.sized(backend, 40, 10)
    hidden, weight = torch.randn(n, 256).bfloat16(), torch.randn(500, 256).bfloat16() / 64
    labels = torch.arange(n) * 12
    weight[labels] = (hidden.float() * level / 256).bfloat16()
    h = hidden.double().requires_grad_()
    logp = torch.log_softmax(h @ weight.double().t(), -1)
    entropy = -(logp.exp() * logp).sum(-1)
    (truth,) = torch.autograd.grad(entropy.sum(), h)
    hidden.requires_grad_()
    stats = linear_token_logps(
        hidden, weight, labels, precision=precision, backend=backend, extras=["entropy"]
    )
    (grad,) = torch.autograd.grad(stats.entropy.sum(), hidden)
    scale = truth.norm() + 1e-4 * weight.double().norm()
    assert (grad.double() - truth).norm() <= 0.03 * scale


@pytest.mark.only_if(lambda backend, same: not backend.startswith("eager"))  # no addresses there
@pytest.mark.parametrize(
    "same", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["one row", "rows"]
)
def test_more_than_2_to_the_31_logits(backend, threads, same):
    """N V > 2^31 in bf16: of one row, seen again and again, and in 4.3 GB of memory."""
    if machine.sized(backend, False, True):
        pytest.skip("interpreter: 65000 rows take it ten minutes")
    n, vocab = 2**16 + 9, 2**15
    if same and machine.free_memory(torch.get_default_device()) < 6 * 2**30:
        pytest.skip("needs 6 GiB of free memory")
    threads(2)
    row = (torch.randn(vocab) * 3).bfloat16()
    logits = row.expand(n, vocab)
    logits = logits.contiguous() if same else logits
    labels = torch.arange(n) % vocab
    logps = token_logps(logits, labels, backend=backend)
    oracle.assert_within(logps, torch.log_softmax(row.double(), 0)[labels], 2e-5)
