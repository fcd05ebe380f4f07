"""Errors for what our autograd functions do not support in autograd, torch.func and torch.jit.

The kernels compute first derivatives alone. Without these errors a second derivative, a tangent or
a batch of gradients would be lost or wrong in silence.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor

_PLAIN = (
    "compute these log-probs with plain torch: logits = torch.nn.functional.linear(hidden, weight) "
    "and -torch.nn.functional.cross_entropy(logits, labels, reduction='none')"
)
_TWICE = (
    "fastpref: second derivatives through the log-probs (create_graph=True, as for a gradient "
    f"penalty) are not implemented; {_PLAIN}"
)
_FORWARD_MODE = f"fastpref: forward-mode derivatives (jvp) are not implemented; {_PLAIN}"
_FUNC = (
    "fastpref: torch.func transforms (grad, vmap, jvp, ...) are not implemented; use "
    f"torch.autograd.grad for gradients, or {_PLAIN}"
)
_BATCHED = (
    "fastpref: batched gradients (is_grads_batched=True, vectorize=True) are not implemented; pass "
    "one gradient at a time"
)
_TRACE = (
    "fastpref: torch.jit.trace and torch.jit.script cannot record the kernels; use torch.export or "
    "torch.compile"
)

Grads = tuple[Tensor | None, ...]


def check_transforms() -> None:
    """Raise NotImplementedError under a transform of torch.func and under torch.jit.trace."""
    if torch.compiler.is_compiling():
        return
    if torch._C._are_functorch_transforms_active():
        raise NotImplementedError(_FUNC)
    if torch._C._get_tracing_state() is not None:
        raise NotImplementedError(_TRACE)


class FirstOrderFunction(torch.autograd.Function):
    """An autograd function without forward-mode derivatives."""

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> NoReturn:
        raise NotImplementedError(_FORWARD_MODE)


def check_first_order(*douts: Tensor | None) -> None:
    """Raise NotImplementedError in a backward pass that is differentiated or batched.

    Such a pass would return gradients without a graph: a second derivative would be 0 wherever
    unused inputs are allowed, as in torch.autograd.functional.hessian.
    """
    if torch.is_grad_enabled():  # with create_graph=True alone
        raise NotImplementedError(_TWICE)
    if not all(dout is None or torch._C._has_storage(dout) for dout in douts):
        raise NotImplementedError(_BATCHED)


def first_order(backward: Callable[..., Grads]) -> Callable[..., Grads]:
    """Decorate the backward of a `FirstOrderFunction` with `check_first_order`."""

    @functools.wraps(backward)
    def checked(ctx: Any, *douts: Tensor | None) -> Grads:
        check_first_order(*douts)
        return backward(ctx, *douts)

    return checked


def raise_for_inference(error: RuntimeError, **tensors: Tensor | None) -> None:
    """Name the argument in torch's error for an inference tensor that a backward pass needs.

    Does nothing for any other error.
    """
    if "nference tensor" not in str(error):
        return
    names = [name for name, t in tensors.items() if t is not None and t.is_inference()]
    raise RuntimeError(
        f"{' and '.join(names) or 'an argument'}: got a tensor made under torch.inference_mode(), "
        "which a backward pass cannot use; expected its clone(), or one made under torch.no_grad()"
    ) from error
