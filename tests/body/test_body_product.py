"""The native product of a linear layer against float64 and against torch's."""

import pytest
import torch
from torch.nn import functional

from fastpref.backends import native
from fastpref.body import linear, matrix_product

pytestmark = pytest.mark.skipif(native.problem() is not None, reason="the module is not built")

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
SHAPES = [((33,), 577, 65), ((2, 9), 31, 300), ((1,), 5, 1), ((0,), 4, 3), ((4, 1), 1, 700)]


def problem(rows, k, n, dtype, bias=True):
    x, weight = torch.randn(*rows, k).to(dtype), torch.randn(n, k).to(dtype)
    b = torch.randn(n).to(dtype) if bias else None
    return [None if t is None else t.requires_grad_() for t in (x, weight, b)]


def results(function, tensors, dy):
    """The layer's output and its gradients."""
    out = function(*tensors)
    wanted = [t for t in tensors if t is not None]
    return [out.detach(), *torch.autograd.grad(out, wanted, dy.to(out.dtype))]


def error(found, exact):
    return max((f.double() - e).abs().max().item() if e.numel() else 0.0
               for f, e in zip(found, exact, strict=True))  # fmt: skip


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize(("rows", "k", "n"), SHAPES)
def test_no_further_from_float64_than_torch(rows, k, n, dtype, bias):
    tensors = problem(rows, k, n, dtype, bias)
    dy = torch.randn(*rows, n).to(dtype)
    wide = [None if t is None else t.detach().double().requires_grad_() for t in tensors]
    exact = results(functional.linear, wide, dy)
    for i, e in enumerate(exact):
        ours = error([results(linear, tensors, dy)[i]], [e])
        theirs = error([results(functional.linear, tensors, dy)[i]], [e])
        # Both round once per element of the result; their sums are in different orders.
        rounding = torch.finfo(dtype).eps * e.abs().max().item() if e.numel() else 0.0
        assert ours <= 1.5 * theirs + rounding


def test_a_weight_is_read_through_its_strides(monkeypatch):
    read = []
    real = native._product_arguments

    def watched(a, b, out, kernel):
        read.append((a.data_ptr(), b.data_ptr()))
        return real(a, b, out, kernel)

    monkeypatch.setattr(native, "_product_arguments", watched)
    x, weight, _ = problem((20,), 30, 40, F32, bias=False)
    dy = torch.randn(20, 40)
    linear(x, weight).backward(dy)
    x_at, w_at, dy_at = (t.data_ptr() for t in (x, weight, dy))
    assert read == [(x_at, w_at), (dy_at, w_at), (dy_at, x_at)]


@pytest.mark.parametrize("frozen", [0, 1, 2])
def test_a_frozen_operand_costs_no_product(frozen, monkeypatch):
    count = []
    real = native.own_product
    monkeypatch.setattr(native, "own_product", lambda *args: count.append(1) or real(*args))
    tensors = problem((20,), 30, 40, F32)
    tensors[frozen].requires_grad_(False)
    out = linear(*tensors)
    out.sum().backward()
    assert len(count) == (3 if frozen == 2 else 2)
    assert tensors[frozen].grad is None
    assert all(t.grad is not None for i, t in enumerate(tensors) if i != frozen)


def test_only_what_a_gradient_needs_is_kept():
    saved = []
    x, weight, bias = problem((20,), 30, 40, F32)
    weight.requires_grad_(False)
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: saved.append(t.shape) or t, lambda t: t
    ):
        linear(x, weight, bias)
    assert saved == [weight.shape]


def test_second_derivatives_are_torchs():
    tensors = problem((6,), 5, 4, F32)
    dy = torch.randn(6, 4)
    found = []
    for function in (linear, functional.linear):
        out = function(*tensors)
        grads = torch.autograd.grad(out, tensors, dy, create_graph=True)
        total = sum((g**3).sum() for g in grads) + (out**3).sum()
        found.append(torch.autograd.grad(total, tensors))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_the_bits_are_the_same_at_any_thread_count(dtype, threads):
    tensors, dy = problem((70,), 600, 130, dtype), torch.randn(70, 130).to(dtype)
    found = []
    for count in (1, 2, 5, 8):
        threads(count)
        found.append(results(linear, tensors, dy)[:3])  # torch sums the bias's gradient
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_a_row_does_not_depend_on_the_others():
    x, weight, bias = problem((70,), 600, 130, F32)
    with torch.no_grad():
        assert torch.equal(linear(x, weight, bias)[11:12], linear(x[11:12], weight, bias))


@pytest.mark.parametrize("weight_dtype", [F32, BF16])
def test_autocast_computes_in_its_dtype(weight_dtype):
    tensors, dy = problem((20,), 300, 40, weight_dtype), torch.randn(20, 40)
    tensors[0] = tensors[0].detach().float().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = (results(f, tensors, dy) for f in (linear, functional.linear))
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=2e-2, atol=0.3)
    with torch.autocast("cpu", torch.bfloat16), torch.autocast("cpu", enabled=False):
        assert linear(*problem((2,), 3, 4, F32)).dtype == F32


def test_a_gradient_without_strides_is_read():
    x, weight, bias = problem((20,), 30, 40, F32)
    linear(x, weight, bias).sum().backward()  # its gradient is one number, expanded
    torch.testing.assert_close(x.grad, weight.detach().sum(0).expand(20, 30))


def test_lazy_signs_and_no_inputs():
    x, weight, _ = (t if t is None else t.detach() for t in problem((6,), 5, 4, F32, bias=False))
    assert torch.equal(linear(torch._neg_view(x), weight), -linear(x, weight))
    assert torch.equal(linear(torch.ones(2, 3, 0), torch.ones(4, 0)), torch.zeros(2, 3, 4))


def test_what_it_cannot_do_is_torchs(monkeypatch):
    monkeypatch.setattr(native, "own_product", lambda *_: pytest.fail("the native product ran"))
    x, weight, bias = (t.detach() for t in problem((6,), 5, 4, F32))

    class Other(torch.Tensor):
        pass

    linear(x.double(), weight.double(), bias.double())
    linear(x.as_subclass(Other), weight, bias)
    assert linear(x.to("meta"), weight.to("meta")).device.type == "meta"
    torch.func.vmap(lambda row: linear(row, weight, bias))(x)
    torch.func.grad(lambda w: linear(x, w, bias).sum())(weight)
    torch.func.jvp(lambda w: linear(x, w, bias), (weight,), (weight,))
    with torch.autograd.forward_ad.dual_level():
        linear(torch.autograd.forward_ad.make_dual(x, x), weight)
    with pytest.raises(RuntimeError):  # torch's own error
        linear(x, weight.to(BF16))
    with pytest.raises(RuntimeError):
        linear(x, weight.t())


def test_batched_gradients_are_refused():
    x, weight, bias = problem((6,), 5, 4, F32)
    with pytest.raises(NotImplementedError, match="batched gradients"):
        torch.autograd.grad(linear(x, weight, bias), x, torch.randn(3, 6, 4), is_grads_batched=True)


def test_inference_mode():
    x, weight, bias = problem((6,), 5, 4, F32)
    with torch.inference_mode():
        assert matrix_product(x, weight, bias).is_inference()
