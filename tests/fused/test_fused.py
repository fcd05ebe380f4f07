"""The losses of hidden states and of logits, and the modules."""

from __future__ import annotations

import math

import oracle
import pytest
import torch

from fastpref import (
    FusedLinearDPOLoss,
    FusedLinearIPOLoss,
    FusedLinearPreferenceLoss,
    backends,
    dpo_loss,
    ipo_loss,
    linear_dpo_loss,
    linear_ipo_loss,
    linear_preference_loss,
    sequence_logps,
)

P, T, H, V = 3, 7, 16, 61
DTYPES = [torch.float64, torch.float32, torch.bfloat16]
LOSSES = {
    "dpo": {},
    "cdpo": {"label_smoothing": 0.1, "margin": [0.5, -1.0, 0.0]},
    "ipo": {"loss_type": "ipo"},
    "ipo lengths": {"loss_type": "ipo", "lengths": [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]},
    "ipo sum": {"loss_type": "ipo", "ipo_normalization": "sum"},
    "weighted": {"pair_weight": [0.5, 0.0, 2.0]},
    "free": {"reference_free": True},
}


def _options(name) -> dict:
    """With its vectors as tensors, on the test's device."""
    return {k: torch.tensor(v) if isinstance(v, list) else v for k, v in LOSSES[name].items()}


def _batch(dtype=torch.float32):
    """hidden, weight, ragged labels with ignored tokens at both ends, reference log-probs."""
    hidden, weight = torch.randn(2 * P, T, H).to(dtype), torch.randn(V, H).to(dtype)
    labels = torch.randint(V, (2 * P, T))
    for row, (start, end) in enumerate([(0, 7), (2, 5), (1, 2), (3, 7), (0, 1), (5, 7)]):
        labels[row, :start] = labels[row, end:] = -100
    return hidden, weight, labels, -torch.rand(2 * P) * 20


def _truth(token_logps, labels, reference, options, beta):
    """(loss, sums, rewards) in float64."""
    sums = oracle.sequence_sums(token_logps, labels)
    ratios = sums if options.get("reference_free") else sums - reference.double()
    chosen, rejected = ratios[:P], ratios[P:]
    if options.get("loss_type") == "ipo":
        lengths = options.get("lengths", (labels >= 0).sum(1).clamp(min=1))
        lengths = (1, 1) if "ipo_normalization" in options else (lengths[:P], lengths[P:])
        each = oracle.ipo(chosen, rejected, beta, *lengths)
    else:
        smoothing = options.get("label_smoothing", 0.0)
        each = oracle.dpo(chosen, rejected, beta, smoothing, options.get("margin", 0.0))
    return (each * options.get("pair_weight", 1.0)).sum() / P, sums, beta * ratios


def _leaves(*tensors, dtype=None):
    return [t.detach().to(dtype or t.dtype).clone().requires_grad_() for t in tensors]


def _assert_output(out, truth, dtype):
    loss, sums, rewards = truth
    exact = dtype == torch.float64
    close = dict(rtol=1e-10, atol=1e-10) if exact else dict(rtol=1e-5, atol=1e-4)
    assert out.loss.dtype == (torch.float64 if exact else torch.float32) and out.loss.dim() == 0
    torch.testing.assert_close(out.loss.double(), loss.double(), **close)
    got = torch.cat([out.chosen_logps, out.rejected_logps])
    torch.testing.assert_close(got.double(), sums.detach().double(), **close)
    got = torch.cat([out.chosen_rewards, out.rejected_rewards])
    torch.testing.assert_close(got.double(), rewards.detach().double(), **close)
    assert not any(t.requires_grad for t in out[1:5])


@pytest.mark.parametrize("flat", [False, True], ids=["padded", "flat"])
@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_linear_loss(backend, dtype, name, flat):
    hidden, weight, labels, reference = _batch(dtype)
    options, beta = _options(name), 0.3
    given = None if options.get("reference_free") else reference
    hidden, weight = _leaves(hidden, weight)
    if flat:
        order = torch.randperm(2 * P * T)
        ids = torch.arange(2 * P).repeat_interleave(T)[order]
        arguments = hidden.reshape(-1, H)[order], weight, labels.reshape(-1)[order], given
        extra = dict(sequence_ids=ids, num_sequences=2 * P)
    else:
        arguments, extra = (hidden, weight, labels, given), {}
    out = linear_preference_loss(*arguments, beta=beta, backend=backend, **options, **extra)
    x, w = _leaves(hidden, weight, dtype=torch.float64)
    truth = _truth(oracle.linear_logps(x, w, labels), labels, reference, options, beta)
    _assert_output(out, truth, dtype)
    assert out.stats is None
    rounding = {torch.float64: 1e-11, torch.float32: 1e-5}.get(dtype, 0.02)
    grads = torch.autograd.grad(out.loss * 3, [hidden, weight])
    for got, want in zip(grads, torch.autograd.grad(truth[0] * 3, [x, w]), strict=True):
        oracle.assert_within(got, want, rounding * float(want.abs().max()) + 1e-12)


@pytest.mark.few
@pytest.mark.parametrize("inplace", [False, True], ids=["copy", "inplace"])
@pytest.mark.parametrize("flat", [False, True], ids=["padded", "flat"])
@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_loss_from_logits(backend, dtype, name, flat, inplace):
    hidden, weight, labels, reference = _batch(dtype)
    options, beta = _options(name), 0.3
    given = None if options.get("reference_free") else reference
    (logits,) = _leaves(hidden @ weight.t())
    (z,) = _leaves(logits, dtype=torch.float64)
    stats = oracle.token_stats(oracle.transform(z, 0.5, 20.0, 1.2), labels)
    truth = _truth(stats.logps, labels, reference, options, beta)
    function = ipo_loss if options.pop("loss_type", "") == "ipo" else dpo_loss
    options |= dict(scale=0.5, softcap=20.0, temperature=1.2, inplace_backward=inplace)
    if flat:
        ids = torch.arange(2 * P).repeat_interleave(T)
        options |= dict(sequence_ids=ids, num_sequences=2 * P)
        arguments = logits.view(-1, V), labels.view(-1), given
    else:
        arguments = logits, labels, given
    if "lengths" in options and flat:
        options.pop("num_sequences")  # the length of lengths, or of ref_logps, says it
    out = function(*arguments, beta=beta, backend=backend, **options)
    _assert_output(out, truth, dtype)
    (want,) = torch.autograd.grad(truth[0], z)
    (got,) = torch.autograd.grad(out.loss, logits)
    rounding = {torch.float64: 1e-11, torch.float32: 1e-5}.get(dtype, 0.01)
    oracle.assert_within(got, want, rounding * float(want.abs().max()) + 1e-12)
    assert not inplace or got.data_ptr() == logits.data_ptr()


@pytest.mark.few
@pytest.mark.parametrize("precision", ["exact", "fast"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["dpo", "ipo", "ipo sum"])
def test_reference_head(backend, dtype, name, precision):
    """ref_hidden, ref_weight and ref_bias instead of ref_logps; a policy that is its reference has
    margins of exactly 0."""
    hidden, weight, labels, _ = _batch(dtype)
    bias, other = torch.randn(V).to(dtype), torch.randn(2 * P, T, H).to(dtype)
    other_weight, other_bias = torch.randn(V, H).to(dtype), torch.randn(V).to(dtype)
    options = dict(_options(name), bias=bias, backend=backend, precision=precision)
    hidden, weight = _leaves(hidden, weight)
    for strategy in ("stash", "recompute"):
        same = dict(options, ref_hidden=hidden.detach(), strategy=strategy)
        out = linear_preference_loss(hidden, weight, labels, **same)
        assert torch.equal(out.chosen_rewards, torch.zeros(P, dtype=out.loss.dtype))
        assert torch.equal(out.rejected_rewards, torch.zeros(P, dtype=out.loss.dtype))
        start = math.log(2) if name == "dpo" else 25.0  # 1 / (2 beta)^2
        assert float(out.loss.detach()) == pytest.approx(start, rel=1e-6)
    out = linear_preference_loss(
        hidden,
        weight,
        labels,
        ref_hidden=other,
        ref_weight=other_weight,
        ref_bias=other_bias,
        **options,
    )
    reference = oracle.sequence_sums(
        oracle.linear_logps(other, other_weight, labels, other_bias), labels
    )
    if precision == "exact":
        logps = oracle.linear_logps(hidden, weight, labels, bias)
        _assert_output(out, _truth(logps, labels, reference, _options(name), 0.1), dtype)
    assert all(g.any() for g in torch.autograd.grad(out.loss, [hidden, weight]))


def test_a_reference_bias_needs_no_reference_weight(backend):
    """ref_weight and ref_bias have their defaults each by itself."""
    hidden, weight, labels, _ = _batch()
    options = dict(bias=torch.randn(V), ref_hidden=hidden, backend=backend)
    other = torch.randn(V)
    short = linear_dpo_loss(hidden, weight, labels, ref_bias=other, **options)
    full = linear_dpo_loss(hidden, weight, labels, ref_weight=weight, ref_bias=other, **options)
    assert torch.equal(short.loss, full.loss) and short.chosen_rewards.any()


def test_a_learned_reference_gets_its_gradient(backend):
    """And so does any other input: the closed forms know only the policy."""
    hidden, weight, labels, reference = _batch()
    reference.requires_grad_()
    out = linear_dpo_loss(hidden, weight, labels, reference, backend=backend)
    (grad,) = torch.autograd.grad(out.loss, reference)
    logps = oracle.linear_logps(hidden, weight, labels)
    truth = _truth(logps, labels, reference, {}, 0.1)
    torch.testing.assert_close(grad, torch.autograd.grad(truth[0], reference)[0])


@pytest.mark.parametrize("name", ["dpo", "ipo", "ipo sum", "cdpo"])
@pytest.mark.parametrize("shape", [(2 * P, T), (2 * P, 0), (0, T)])
@pytest.mark.parametrize("linear", [True, False], ids=["linear", "logits"])
def test_no_labelled_token(backend, shape, name, linear):
    """A batch in which no token counts: a zero loss that connects to the graph."""
    options = _options(name)
    if shape[0] == 0:
        options.pop("margin", None)
    labels, reference = torch.full(shape, -100), torch.zeros(shape[0])
    source = torch.randn(*shape, H if linear else V, requires_grad=True)
    weight = torch.randn(V, H, requires_grad=True)
    if linear:
        out = linear_preference_loss(source, weight, labels, reference, backend=backend, **options)
    else:
        function = ipo_loss if options.pop("loss_type", "") == "ipo" else dpo_loss
        out = function(source, labels, reference, backend=backend, **options)
    leaves = [source, weight] if linear else [source]
    for leaf, grad in zip(leaves, torch.autograd.grad(out.loss, leaves), strict=True):
        assert grad.shape == leaf.shape and not grad.any()
    pairs = (shape[0] // 2,)
    assert {t.shape for t in out[1:5]} == {pairs} and not any(t.any() for t in out[1:5])
    assert out.loss == 0


def test_stats(backend):
    hidden, weight, labels, reference = _batch()
    out = linear_dpo_loss(
        hidden, weight, labels, reference, extras=["entropy", "is_top1"], backend=backend
    )
    truth = oracle.token_stats(oracle.logits(hidden, weight), labels)
    torch.testing.assert_close(out.stats.entropy.double(), truth.entropy, rtol=1e-5, atol=1e-5)
    assert torch.equal(out.stats.is_top1, truth.is_top1) and out.stats.mean_logit is None
    sums = sequence_logps(out.stats.logps, labels)
    torch.testing.assert_close(sums, torch.cat([out.chosen_logps, out.rejected_logps]))


@pytest.mark.parametrize("name", LOSSES)
def test_modules(name):
    hidden, weight, labels, reference = _batch()
    options = _options(name)
    inputs = {k: options.pop(k) for k in ("margin", "pair_weight", "lengths") if k in options}
    given = None if options.get("reference_free") else reference
    expected = linear_preference_loss(hidden, weight, labels, given, beta=0.2, **options, **inputs)
    loss_type = options.pop("loss_type", "sigmoid")
    own = {"sigmoid": FusedLinearDPOLoss, "ipo": FusedLinearIPOLoss}[loss_type]
    modules = [own(beta=0.2, **options), FusedLinearPreferenceLoss(loss_type, beta=0.2, **options)]
    short = {"sigmoid": linear_dpo_loss, "ipo": linear_ipo_loss}[loss_type]
    outs = [m(hidden, weight, labels, given, **inputs) for m in modules]
    outs.append(short(hidden, weight, labels, given, beta=0.2, **options, **inputs))
    for out in outs:
        assert all(torch.equal(a, b) for a, b in zip(out[:5], expected[:5], strict=True))
    assert "beta=0.2" in repr(modules[0]) and not list(modules[0].parameters())
    assert isinstance(modules[0], torch.nn.Module)


@pytest.mark.parametrize(
    "name, options",
    [("loss_type", {"loss_type": "dpo"}), ("beta", {"beta": 0}), ("precision", {"precision": "x"})],
)
def test_modules_refuse_bad_options(name, options):
    with pytest.raises(ValueError, match=f"^{name}: "):
        FusedLinearPreferenceLoss(**options)(*_batch())


def _flat(**changes):
    hidden, weight, labels, reference = _batch()
    ids = torch.arange(2 * P).repeat_interleave(T)
    return dict(
        hidden=hidden.view(-1, H),
        weight=weight,
        labels=labels.view(-1),
        ref_logps=reference,
        sequence_ids=ids,
        **changes,
    )


ids = torch.arange(2 * P).repeat_interleave(T)


@pytest.mark.parametrize(
    "name, changes",
    [
        ("labels", {"hidden": torch.randn(5, T, H), "labels": torch.zeros(5, T).long()}),
        ("labels", {"labels": torch.zeros(2 * P * T).long()}),
        ("labels", {"labels": torch.full((2 * P, T), V)}),
        ("hidden", {"hidden": torch.randn(2 * P, T, H + 1)}),
        ("ref_logps", {"ref_logps": None}),
        ("ref_logps", {"ref_logps": torch.zeros(P)}),
        ("reference_free", {"reference_free": True}),
        ("ref_hidden", {"ref_hidden": torch.randn(2 * P, T, H)}),
        ("ref_hidden", {"ref_logps": None, "ref_weight": torch.randn(V, H)}),
        ("ref_hidden", {"ref_logps": None, "ref_hidden": torch.randn(2 * P, T, H + 1)}),
        ("ref_weight", {"ref_logps": None, "ref_hidden": torch.randn(2 * P, T, H),
                        "ref_weight": torch.randn(V)}),
        ("ref_hidden", {"ref_logps": None, "ref_hidden": torch.randn(2 * P, T + 1, H)}),
        ("hidden", {"ref_logps": None, "ref_hidden": torch.randn(2 * P, T, H),
                    "hidden": torch.randn(2 * P, T, H + 1)}),
        ("extras", {"ref_logps": None, "ref_hidden": torch.randn(2 * P, T, H),
                    "extras": ["perplexity"]}),
        ("hidden", {"hidden": [[1.0]]}),
        ("beta", {"beta": "0.1"}),
        ("temperature", {"temperature": None}),
        ("memory_budget", {"memory_budget": "1GB"}),
        ("loss_type", {"loss_type": "dpo"}),
        ("beta", {"beta": 0.0}),
        ("label_smoothing", {"label_smoothing": 0.7}),
        ("label_smoothing", {"loss_type": "ipo", "label_smoothing": 0.1}),
        ("margin", {"loss_type": "ipo", "margin": torch.zeros(P)}),
        ("margin", {"margin": torch.zeros(2 * P)}),
        ("pair_weight", {"pair_weight": torch.zeros(2 * P)}),
        ("lengths", {"loss_type": "ipo", "lengths": torch.ones(P)}),
        ("ipo_normalization", {"ipo_normalization": "sum"}),
        ("strategy", {"strategy": "fastest"}),
        ("extras", {"extras": ["perplexity"]}),
        ("num_sequences", {"num_sequences": 2 * P + 2}),
        ("sequence_ids", {"flat": True, "sequence_ids": ids[1:]}),
        ("sequence_ids", {"flat": True, "sequence_ids": ids + 1}),
        ("sequence_ids", {"flat": True, "sequence_ids": ids.int()}),
        ("labels", {"flat": True, "ref_logps": torch.zeros(7), "sequence_ids": ids}),
        ("num_sequences", {"flat": True, "ref_logps": None, "reference_free": True}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)  # fmt: skip
def test_bad_input_is_refused_before_any_kernel_runs(monkeypatch, name, changes):
    def ran(*args, **kwargs):
        raise AssertionError("a kernel ran")

    for module in backends._MODULES.values():
        for primitive in ("linear", "fold", "grad", "fold_grad", "logit_free_forward"):
            monkeypatch.setattr(module, primitive, ran)
    changes = dict(changes)
    if changes.pop("flat", False):
        arguments = _flat()
    else:
        arguments = dict(zip(("hidden", "weight", "labels", "ref_logps"), _batch(), strict=True))
    with pytest.raises(ValueError, match=f"^{name}: "):
        linear_preference_loss(**{**arguments, **changes})
