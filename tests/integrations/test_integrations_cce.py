"""fastpref.integrations.cce against float64, cut-cross-entropy and torch's own function."""

from __future__ import annotations

import enum
import importlib.util

import oracle
import pytest
import torch
import torch.nn.functional as F

import fastpref
from fastpref.integrations import cce as ours
from fastpref.integrations.cce import torch_linear_cross_entropy

B, T, H, V = 3, 6, 16, 37

cce = None
if importlib.util.find_spec("cut_cross_entropy") and importlib.util.find_spec("triton"):
    import cut_cross_entropy as cce


@pytest.fixture
def eager():
    """cut-cross-entropy's compiled path without compiling it."""
    torch.compiler.set_stance("force_eager")
    yield
    torch.compiler.set_stance("default")


def problem(ignored=True, dtype=torch.float32):
    hidden = torch.randn(B, T, H).to(dtype).requires_grad_()
    weight = torch.randn(V, H).to(dtype).requires_grad_()
    labels = torch.randint(0, V, (B, T))
    if ignored:
        labels[0, :2] = labels[2, 5] = -100
    return hidden, weight, labels


def close(given, wanted, inputs, tolerance=2e-5):
    torch.testing.assert_close(given.double(), wanted.double(), rtol=tolerance, atol=tolerance)
    coef = torch.linspace(0.5, 1.5, max(given.numel(), 1)).view(given.shape)
    for g, w in zip(
        torch.autograd.grad((given * coef).sum(), inputs, retain_graph=True),
        torch.autograd.grad((wanted * coef).sum(), inputs, retain_graph=True),
        strict=True,
    ):
        torch.testing.assert_close(g, w, rtol=1e-4, atol=tolerance)


@pytest.mark.parametrize("ignored", [False, True])
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("shift", [False, True, 2])
def test_cut_cross_entropy(shift, reduction, softcap, ignored, eager):
    e, c, targets = problem(ignored)
    options = dict(softcap=softcap, reduction=reduction, shift=shift)
    given = ours.linear_cross_entropy(e, c, targets, **options)
    by = int(shift)
    x, y = (e[:, :-by], targets[:, by:]) if by else (e, targets)
    z = oracle.logits(x, c, softcap=softcap)
    wanted = F.cross_entropy(z.reshape(-1, V), y.reshape(-1), reduction=reduction)
    wanted = wanted.view(y.shape) if reduction == "none" else wanted
    assert given.dtype == torch.float32 and given.shape == wanted.shape
    close(given, wanted, (e, c))
    if cce is not None and shift != 2:
        theirs = cce.linear_cross_entropy(e, c, targets, impl="torch_compile", **options)
        assert theirs.dtype == given.dtype and theirs.shape == given.shape
        close(given, theirs, (e, c))
    module = ours.LinearCrossEntropy(**options)
    assert torch.equal(module(e, c, targets), given)


def test_names_and_options_of_cut_cross_entropy():
    e, c, targets = problem()
    plain = ours.linear_cross_entropy(e, c, targets)
    positional = ours.linear_cross_entropy(e, c, targets, -100, None, "mean", False, None, "cce")
    assert torch.equal(plain, positional)
    for filter_eps in ("auto", "high", None, 1e-3):
        theirs = enum.IntEnum("LinearCrossEntropyImpl", ["CCE", "TORCH_COMPILE"])
        for impl in ("cce", "torch_compile", ours.LinearCrossEntropyImpl.CCE, theirs.CCE):
            given = ours.linear_cross_entropy(e, c, targets, filter_eps=filter_eps, impl=impl)
            assert torch.equal(given, plain)
    bias = torch.randn(V)
    wanted = F.cross_entropy(F.linear(e, c, bias).view(-1, V), targets.view(-1))
    close(ours.linear_cross_entropy(e, c, targets, bias=bias, backend="eager"), wanted, (e, c))
    wanted = F.cross_entropy(
        F.linear(e, c).view(-1, V), targets.masked_fill(targets < 0, 7).view(-1), ignore_index=7
    )
    close(ours.linear_cross_entropy(e, c, targets.masked_fill(targets < 0, 7), 7), wanted, (e, c))
    if cce is not None:
        import inspect

        theirs = list(inspect.signature(cce.linear_cross_entropy).parameters)
        assert (
            list(inspect.signature(ours.linear_cross_entropy).parameters)[: len(theirs)] == theirs
        )
        assert set(cce.__all__) <= set(ours.__all__)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("biased", [False, True])
def test_torch_linear_cross_entropy(reduction, smoothing, weighted, biased):
    hidden, head, labels = problem()
    x, y = hidden.flatten(0, 1), labels.flatten()
    bias = torch.randn(V, requires_grad=True) if biased else None
    weight = torch.rand(V) if weighted else None
    inputs = (x, head, bias) if biased else (x, head)
    options = dict(weight=weight, reduction=reduction, label_smoothing=smoothing)
    given = torch_linear_cross_entropy(x, head, y, linear_bias=bias, **options)
    wanted = F.cross_entropy(F.linear(x, head, bias), y, **options)
    assert given.shape == wanted.shape
    close(given, wanted, inputs)
    if hasattr(F, "linear_cross_entropy"):
        theirs = F.linear_cross_entropy(x, head, y, linear_bias=bias, **options)
        close(given, theirs, inputs)


def test_torch_shapes_ignore_index_and_options():
    hidden, head, labels = problem(ignored=False)
    one = torch_linear_cross_entropy(hidden[0, 0], head, labels[0, 0])
    close(one, F.cross_entropy(hidden[0, 0] @ head.t(), labels[0, 0]), (hidden, head))
    ignored = int(labels[1, 1])
    x, y = hidden.flatten(0, 1), labels.flatten()
    given = torch_linear_cross_entropy(x, head, y, ignore_index=ignored, options=object())
    close(given, F.cross_entropy(x @ head.t(), y, ignore_index=ignored), (hidden, head))
    batched = torch_linear_cross_entropy(hidden, head, labels, reduction="none")
    assert batched.shape == labels.shape


def test_torch_label_smoothing_under_autocast():
    hidden, head, labels = problem()
    x, y = hidden.flatten(0, 1), labels.flatten()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        given = torch_linear_cross_entropy(x, head, y, label_smoothing=0.2)
    z = x.bfloat16().double() @ head.bfloat16().double().t()
    torch.testing.assert_close(
        given.double(), F.cross_entropy(z, y, label_smoothing=0.2), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("function", [ours.linear_cross_entropy, torch_linear_cross_entropy])
def test_no_label_gives_zero_in_the_graph(function):
    hidden, head, labels = problem()
    loss = function(hidden, head, torch.full_like(labels, -100))
    assert loss == 0
    assert all(not g.any() for g in torch.autograd.grad(loss, (hidden, head)))


def test_bfloat16_losses_stay_float32():
    hidden, head, labels = problem(dtype=torch.bfloat16)
    wanted = -oracle.linear_logps(hidden, head, labels)
    for function in (ours.linear_cross_entropy, torch_linear_cross_entropy):
        given = function(hidden, head, labels, reduction="none")
        assert given.dtype == torch.float32
        torch.testing.assert_close(given.double(), wanted, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"reduction": "max"}, "reduction: got 'max'"),
        ({"filter_eps": "low"}, "filter_eps: got 'low'"),
        ({"impl": "triton"}, "impl: got 'triton'"),
        ({"shift": -1}, "shift: got -1"),
        ({"shift": 9}, "shift: got 9"),
        ({"softcap": -1.0}, "softcap: got -1.0"),
        ({"extras": ("entropy",)}, "extras: not an option"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        ours.linear_cross_entropy(*problem(), **options)


def test_bad_inputs():
    e, c, y = problem()
    for args, message in (
        ((e[..., 1:], c, y), r"e: got shape \(3, 6, 15\) with c \(37, 16\)"),
        ((e, c, y[1:]), r"targets: got shape \(2, 6\), expected \(3, 6\)"),
        ((e, c, y.masked_fill(y == y[1, 1], V)), "targets: got 37"),
    ):
        with pytest.raises(ValueError, match=message):
            ours.linear_cross_entropy(*args)
    for args, options, message in (
        ((e, c[None], y), {}, "linear_weight: .*K-dimensional"),
        ((e, c, torch.rand(B, T, V)), {}, "target: got float32, .*class probabilities"),
        ((e, c, y), {"label_smoothing": 2}, "label_smoothing: got 2"),
        ((e, c, y), {"weight": torch.ones(3)}, "weight: got shape"),
        ((e, c, y), {"label_smoothing": 0.1, "softcap": 3.0}, "softcap: not supported with label"),
    ):
        with pytest.raises(ValueError, match=message):
            torch_linear_cross_entropy(*args, **options)


def test_unknown_keywords_are_refused_under_the_functions_own_name():
    e, c, y = problem()
    for function in (ours.linear_cross_entropy, torch_linear_cross_entropy):
        for name in ("colour", "token_indices", "lora_hidden", "low_rank", "weight_scale"):
            own = rf"^{function.__name__}\(\) got an unexpected keyword argument '{name}'"
            with pytest.raises(TypeError, match=own):
                function(e, c, y, **{name: None})
    with pytest.raises(TypeError, match=r"^LinearCrossEntropy\(\) got an unexpected .*'colour'"):
        ours.LinearCrossEntropy(colour=1)
    with pytest.raises(ValueError, match="strategy: got 'x'"):
        ours.LinearCrossEntropy(strategy="x")


BAD = {
    "target outside": (lambda x, w, y: (x, w, y.masked_fill(y == y[0], V)), {}, "target: got 37"),
    "negative target": (lambda x, w, y: (x, w, y.masked_fill(y == y[0], -1)), {}, "target: got -1"),
    "int32 target": (lambda x, w, y: (x, w, y.int()), {}, "target: got int32"),
    "target shape": (lambda x, w, y: (x, w, y[1:]), {}, "target: got shape"),
    "width": (lambda x, w, y: (x[:, 1:], w, y), {}, "input: got shape"),
    "flat weight": (lambda x, w, y: (x, w[0], y), {}, "input: got shape .* linear_weight"),
    "dtypes": (lambda x, w, y: (x, w.double(), y), {}, "linear_weight: got float64"),
    "bias": (lambda x, w, y: (x, w, y), {"linear_bias": torch.ones(3)}, "linear_bias: got shape"),
    "weight": (lambda x, w, y: (x, w, y), {"weight": torch.ones(3)}, "weight: got shape"),
    "smoothing": (lambda x, w, y: (x, w, y), {"label_smoothing": 2.0}, "label_smoothing: got 2.0"),
    "reduction": (lambda x, w, y: (x, w, y), {"reduction": "max"}, "reduction: got 'max'"),
}


@pytest.mark.parametrize("case", BAD)
def test_torch_signature_raises_what_torch_raises(case):
    hidden, head, labels = problem(ignored=False)
    change, options, message = BAD[case]
    args = change(hidden.flatten(0, 1), head, labels.flatten())
    with pytest.raises(ValueError, match=message) as found:
        torch_linear_cross_entropy(*args, **options)
    theirs = getattr(F, "linear_cross_entropy", None)
    if theirs is not None:
        with pytest.raises((RuntimeError, ValueError, IndexError)) as wanted:
            theirs(*args, **options)
        assert isinstance(found.value, wanted.type)


def test_something_else_than_a_tensor():
    e, c, y = problem()
    for args, name in (
        ((None, c, y), "input"),
        ((e, [1], y), "linear_weight"),
        ((e, c, 3), "targ"),
    ):
        with pytest.raises(ValueError, match=f"^{name}.*, expected a tensor"):
            torch_linear_cross_entropy(*args)
    with pytest.raises(ValueError, match="^targets: got list, expected a tensor"):
        ours.linear_cross_entropy(e, c, [1])


def test_top_level_names():
    from fastpref import integrations

    assert integrations.linear_cross_entropy is ours.linear_cross_entropy
    assert integrations.patch_trl is fastpref.patch_trl
