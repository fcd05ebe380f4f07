"""What autograd and its relatives ask of our functions: what plain torch gives, or one sentence."""

from __future__ import annotations

import contextlib

import pytest
import torch
import torch.nn.functional as F
from autograd_uses import REFUSED, H, N, V, grads, inputs
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint

from fastpref import linear_dpo_loss, linear_token_logps, token_logps

SEQUENCES = 4


def stash(hidden, weight, labels):
    return linear_token_logps(hidden, weight, labels, strategy="stash")


def recompute(hidden, weight, labels):
    return linear_token_logps(hidden, weight, labels, strategy="recompute")


def entropy(hidden, weight, labels):
    stats = linear_token_logps(hidden, weight, labels, extras=("entropy",))
    return stats.logps + 0.5 * stats.entropy


def from_logits(hidden, weight, labels):
    return token_logps(F.linear(hidden, weight), labels)


def closed_form(hidden, weight, labels):
    ids = torch.arange(N, device=labels.device) // (N // SEQUENCES)
    ref = torch.zeros(SEQUENCES, device=labels.device)
    return linear_dpo_loss(hidden, weight, labels, ref, sequence_ids=ids).loss


def plain(hidden, weight, labels):
    return -F.cross_entropy(F.linear(hidden, weight), labels, reduction="none")


def plain_entropy(hidden, weight, labels):
    logps = F.linear(hidden, weight).log_softmax(-1)
    return logps.gather(-1, labels[:, None])[:, 0] - 0.5 * (logps.exp() * logps).sum(-1)


def plain_dpo(hidden, weight, labels):
    sums = plain(hidden, weight, labels).view(SEQUENCES, -1).sum(1)
    return -F.logsigmoid(0.1 * (sums[:2] - sums[2:])).mean()


FUNCTIONS = {
    stash: plain,
    recompute: plain,
    entropy: plain_entropy,
    from_logits: plain,
    closed_form: plain_dpo,
}
functions = pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__)


def assert_as_plain(function, run):
    """run(f) gives for the function what it gives for plain torch."""
    got, expected = run(function), run(FUNCTIONS[function])
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


# ---- what is refused ----


@functions
@pytest.mark.parametrize("use", REFUSED, ids=lambda f: f.__name__)
@pytest.mark.filterwarnings("ignore:`torch.jit.*` is deprecated:DeprecationWarning")
def test_what_the_kernels_cannot_do_is_one_sentence(function, use):
    with pytest.raises(NotImplementedError, match=f"^fastpref: {REFUSED[use]}") as error:
        use(function)
    text = str(error.value)
    assert "\n" not in text and any(word in text for word in ("plain torch", "use ", "pass one"))


def test_a_penalty_beside_ours_needs_no_second_derivative_of_ours():
    hidden, weight, labels = inputs()
    (grad,) = torch.autograd.grad((hidden**3).sum(), hidden, create_graph=True)
    (linear_token_logps(hidden, weight, labels).sum() + grad.sum()).backward()
    assert hidden.grad.isfinite().all()


def test_operators_outside_of_a_compiler_refuse_second_derivatives():
    hidden, weight, labels = inputs()
    graph = make_fx(stash)(hidden, weight, labels)
    loss = graph(hidden, weight, labels).sum()
    with pytest.raises(NotImplementedError, match="second derivatives"):
        torch.autograd.grad(loss, hidden, create_graph=True)


# ---- what works as in plain torch ----


@functions
def test_two_backward_passes(function):
    hidden, weight, labels = inputs()
    loss = function(hidden, weight, labels).sum()
    first = grads(loss, hidden, weight, retain_graph=True)
    second = grads(loss, hidden, weight)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        grads(loss, hidden, weight)


@functions
@pytest.mark.parametrize("way", ["save_on_cpu", "reentrant", "early stop"])
def test_saved_tensors_may_be_moved_or_made_again(function, way):
    def run(f):
        hidden, weight, labels = inputs()
        if way == "save_on_cpu":
            with torch.autograd.graph.save_on_cpu():
                out = f(hidden, weight, labels)
        else:
            out = checkpoint(f, hidden, weight, labels, use_reentrant=way == "reentrant")
        out.sum().backward()
        return out, hidden.grad, weight.grad

    assert_as_plain(function, run)


@functions
@pytest.mark.parametrize("graph", [True, False], ids=["in the graph", "no_grad"])
def test_an_output_may_be_changed_in_place(function, graph):
    def run(f):
        hidden, weight, labels = inputs()
        out = f(hidden, weight, labels)
        loss = out.sum()
        with contextlib.nullcontext() if graph else torch.no_grad():
            out.mul_(2)
        return grads(out.sum() if graph else loss, hidden, weight)

    assert_as_plain(function, run)


@functions
@pytest.mark.parametrize("name", ["hidden", "weight"])
def test_an_input_that_is_changed_in_place_is_an_error_or_has_no_effect(function, name):
    hidden, weight, labels = inputs()
    expected = grads(function(hidden, weight, labels).sum(), hidden, weight)
    loss = function(hidden, weight, labels).sum()
    with torch.no_grad():
        (hidden if name == "hidden" else weight).add_(1)
    try:
        got = grads(loss, hidden, weight)
    except RuntimeError as error:
        assert "modified by an inplace operation" in str(error)
    else:
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@functions
@pytest.mark.parametrize("kind", ["expanded", "strided", "negative view"])
def test_gradients_in_any_memory(function, kind):
    def run(f):
        hidden, weight, labels = inputs()
        out = f(hidden, weight, labels)
        dout = {
            "expanded": torch.ones(1).expand(out.numel()),
            "strided": torch.arange(2.0 * out.numel())[::2],
            "negative view": torch._neg_view(torch.arange(1.0, out.numel() + 1)),
        }[kind]
        return grads(out, hidden, weight, grad_outputs=dout.view(out.shape))

    assert_as_plain(function, run)


@functions
def test_inputs_that_are_negative_views(function):
    def run(f):
        hidden, weight, labels = inputs()
        out = f(torch._neg_view(hidden), torch._neg_view(weight), labels)
        return out, *grads(out.sum(), hidden, weight)

    assert_as_plain(function, run)


def test_logits_that_are_a_negative_view():
    logits, labels = torch.randn(N, V), torch.randint(V, (N,))
    torch.testing.assert_close(
        token_logps(torch._neg_view(logits), labels), token_logps(-logits, labels)
    )


@functions
@pytest.mark.only_if(lambda function, n, **_: n > 0 or function is not closed_form)
@pytest.mark.parametrize("n, h, v", [(N, 0, V), (N, H, 1), (0, H, V), (0, 0, 1)])
def test_sizes_of_none_and_one(function, n, h, v):
    def run(f):
        hidden = torch.ones(n, h, requires_grad=True)
        weight = torch.ones(v, h, requires_grad=True)
        out = f(hidden, weight, torch.zeros(n, dtype=torch.int64))
        return out, *grads(out.sum(), hidden, weight)

    assert_as_plain(function, run)


def test_an_adapter_without_hidden_states_to_it():
    rank = 2
    hidden, weight, labels = torch.randn(N, 0), torch.randn(V, 0), torch.zeros(N).long()
    lora_hidden, lora_B = torch.randn(N, rank, requires_grad=True), torch.randn(V, rank)
    out = linear_token_logps(hidden, weight, labels, lora_hidden=lora_hidden, lora_B=lora_B)
    torch.testing.assert_close(out, plain(lora_hidden, lora_B, labels))
    out.sum().backward()
    assert lora_hidden.grad.shape == (N, rank)


class Tagged(torch.Tensor):
    """A subclass with torch's own memory and operations."""


@functions
def test_a_subclass_that_changes_no_operation(function):
    hidden, weight, labels = inputs()
    got = function(hidden.as_subclass(Tagged), weight, labels)
    assert torch.equal(got.as_subclass(torch.Tensor), function(hidden, weight, labels))


def test_inplace_backward_tells_other_readers_of_the_logits():
    """tanh reads its own output in the backward pass, which must not be the gradient by then."""
    raw, labels = torch.randn(N, V, requires_grad=True), torch.randint(V, (N,))
    loss = token_logps(torch.tanh(raw), labels, inplace_backward=True).sum()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    logits = raw * 1.0
    twice = [token_logps(logits, labels, inplace_backward=True).sum() for _ in range(2)]
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        sum(twice).backward()


def test_inplace_backward_with_saved_tensors_elsewhere():
    raw, labels = torch.randn(N, V, requires_grad=True), torch.randint(V, (N,))
    with torch.autograd.graph.save_on_cpu():
        loss = token_logps(raw * 1.0, labels, inplace_backward=True).sum()
    (got,) = torch.autograd.grad(loss, raw, retain_graph=True)
    torch.testing.assert_close(got, *torch.autograd.grad(token_logps(raw, labels).sum(), raw))
    with pytest.raises(RuntimeError, match="inplace_backward=True overwrote the logits"):
        torch.autograd.grad(loss, raw)


# ---- tensors without values, and graphs ----


def shapes_of(f, device="cpu"):
    hidden, weight = torch.empty(N, H, device=device), torch.empty(V, H, device=device)
    labels = torch.empty(N, dtype=torch.int64, device=device)
    out = f(hidden.requires_grad_(), weight.requires_grad_(), labels)
    out.sum().backward()
    return out, [(t.shape, t.dtype, t.device) for t in (out, hidden.grad, weight.grad)]


@functions
def test_meta_tensors(function):
    assert shapes_of(function, "meta")[1] == shapes_of(FUNCTIONS[function], "meta")[1]


@functions
def test_fake_tensors(function):
    """Whose addresses are 0: no kernel may see one."""
    with FakeTensorMode():
        got, expected = shapes_of(function), shapes_of(FUNCTIONS[function])
    assert isinstance(got[0], FakeTensor) and got[1] == expected[1]


class Module(torch.nn.Module):
    def __init__(self, function, weight):
        super().__init__()
        self.function, self.weight = function, torch.nn.Parameter(weight)

    def forward(self, hidden, labels):
        return self.function(hidden, self.weight, labels)


@functions
@pytest.mark.parametrize("way", ["export", "strict export", "make_fx"])
def test_recorded_graphs(function, way):
    hidden, weight, labels = (t.detach() for t in inputs())
    if way == "make_fx":
        graph = make_fx(function)(hidden, weight, labels)
    else:
        module = Module(function, weight)
        strict = way == "strict export"
        recorded = torch.export.export(module, (hidden, labels), strict=strict).module()

        def graph(hidden, weight, labels):
            return recorded(hidden, labels)

    hidden, labels = torch.randn(N, H), torch.randint(V, (N,))
    torch.testing.assert_close(graph(hidden, weight, labels), function(hidden, weight, labels))
