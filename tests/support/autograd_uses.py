"""Inputs of the head, and uses of autograd and its relatives that the kernels cannot serve."""

from __future__ import annotations

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor

N, H, V = 8, 6, 11


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(1)
    hidden = torch.randn(N, H, requires_grad=True)
    return hidden, torch.randn(V, H, requires_grad=True), torch.randint(V, (N,))


def grads(loss, *leaves, **options):
    return torch.autograd.grad(loss, leaves, **options)


def penalty(f):
    hidden, weight, labels = inputs()
    loss = f(hidden, weight, labels).sum()
    (grad,) = grads(loss, hidden, create_graph=True)
    (loss + grad.square().sum()).backward()


def backward_with_graph(f):
    f(*inputs()).sum().backward(create_graph=True)


def hessian(f):
    hidden, weight, labels = inputs()
    torch.autograd.functional.hessian(lambda x: f(x, weight, labels).sum(), hidden)


def double_check(f):
    hidden, weight, labels = (t.double() if t.is_floating_point() else t for t in inputs())
    torch.autograd.gradgradcheck(lambda x: f(x, weight, labels).sum(), hidden)


def batched(f):
    hidden, weight, labels = inputs()
    out = f(hidden, weight, labels)
    grads(out, hidden, grad_outputs=torch.ones(3, *out.shape), is_grads_batched=True)


def vectorised(f):
    hidden, weight, labels = inputs()
    torch.autograd.functional.jacobian(lambda x: f(x, weight, labels), hidden, vectorize=True)


def func_grad(f):
    hidden, weight, labels = inputs()
    torch.func.grad(lambda x: f(x, weight, labels).sum())(hidden)


def func_grad_of_another(f):
    hidden, weight, labels = inputs()
    torch.func.grad(lambda x: f(hidden, weight, labels).sum() * x)(torch.tensor(1.0))


def func_vmap(f):
    hidden, weight, labels = (t.detach() for t in inputs())
    torch.func.vmap(lambda x: f(x, weight, labels))(hidden.expand(2, N, H))


def func_jvp(f):
    hidden, weight, labels = (t.detach() for t in inputs())
    torch.func.jvp(lambda x: f(x, weight, labels), (hidden,), (hidden,))


def dual(f):
    hidden, weight, labels = inputs()
    with forward_ad.dual_level():
        f(forward_ad.make_dual(hidden, hidden.detach()), weight, labels)


def dual_without_grad(f):
    hidden, weight, labels = (t.detach() for t in inputs())
    with forward_ad.dual_level(), torch.no_grad():
        f(forward_ad.make_dual(hidden, hidden), weight, labels)


def jit_trace(f):
    hidden, weight, labels = (t.detach() for t in inputs())
    torch.jit.trace(f, (hidden, weight, labels))


# To the subject of the error.
REFUSED = {
    penalty: "second derivatives",
    backward_with_graph: "second derivatives",
    hessian: "second derivatives",
    double_check: "second derivatives",
    batched: "batched gradients",
    vectorised: "batched gradients",
    func_grad: "torch.func transforms",
    func_grad_of_another: "torch.func transforms",
    func_vmap: "torch.func transforms",
    func_jvp: "torch.func transforms",
    dual: "forward-mode derivatives",
    dual_without_grad: "forward-mode derivatives",
    jit_trace: "torch.jit.trace",
}
