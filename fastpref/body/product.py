"""A linear layer whose products, forward and backward, are the native ones of CPUs.

The layer is Y = X W^T + b, and its gradients are dX = dY W and dW = dY^T X. All three are the
product A B^T for operands in some layout, so one autograd function computes them. Its backward
consists of the same function, which makes derivatives of any order right.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.parameter import Parameter

from fastpref.backends import native

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def unavailable_reason() -> str | None:
    """Why the native product cannot run on this machine, or None."""
    return native.problem()


def matrix_product(
    a: Tensor,  # [m, k]
    b: Tensor,  # [n, k]
    bias: Tensor | None = None,  # [n]
) -> Tensor:  # [m, n]
    """a b^T + bias by the native product, with gradients. The operands are read in place.

    The three tensors are on the CPU and have one dtype of DTYPES, which the result has as well. It
    is summed in fp32 and rounded once.
    """
    if torch.is_grad_enabled():
        if a.requires_grad or b.requires_grad or (bias is not None and bias.requires_grad):
            return _MatrixProduct.apply(a, b, bias)
    return _compute(a, b, bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`torch.nn.functional.linear` by the native product, under autocast as well.

    torch's own runs where the native product cannot: on other devices and dtypes, on subclasses of
    Tensor, inside torch.func and torch.jit.trace, with forward-mode derivatives.
    """
    if not _is_plain(x, weight, bias):
        return functional.linear(x, weight, bias)
    dtype = weight.dtype
    if torch.is_autocast_enabled("cpu"):
        dtype = torch.get_autocast_dtype("cpu")
    elif x.dtype != dtype or not (bias is None or bias.dtype == dtype):
        return functional.linear(x, weight, bias)  # whose error names the dtypes
    rows = x.reshape(-1, x.shape[-1]).to(dtype)
    bias = None if bias is None else bias.to(dtype)
    return matrix_product(rows, weight.to(dtype), bias).view(*x.shape[:-1], weight.shape[0])


def _is_plain(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether the native product can compute this layer."""
    tensors = (x, weight) if bias is None else (x, weight, bias)
    if not all(type(t) in (Tensor, Parameter) and t.device.type == "cpu" for t in tensors):
        return False
    return (
        all(t.dtype in DTYPES for t in tensors)
        and weight.dim() == 2
        and x.dim() >= 1
        and x.shape[-1] == weight.shape[1] > 0
        and not torch.compiler.is_compiling()
        and not torch._C._are_functorch_transforms_active()
        and torch._C._get_tracing_state() is None
        and torch.autograd.forward_ad._current_level < 0
    )


def _compute(a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    """a b^T + bias without gradients."""
    # A 16-bit result is rounded after the bias is added, as torch rounds it.
    wide = torch.float32 if bias is not None else a.dtype
    out = torch.empty(a.shape[0], b.shape[0], dtype=wide)
    if a.shape[1] == 0:
        out.zero_()
    elif out.numel():
        native.own_product(_with_unit_stride(a), _with_unit_stride(b), out)
    if bias is not None:
        out += bias
    return out.to(a.dtype)


def _with_unit_stride(t: Tensor) -> Tensor:
    t = t.resolve_neg()  # the product reads memory, to which a lazy negation has not been applied
    return t if 1 in t.stride() else t.clone(memory_format=torch.contiguous_format)


class _MatrixProduct(torch.autograd.Function):
    """a b^T + bias; an operand is kept only for the gradient of the other one."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
        need_a, need_b = ctx.needs_input_grad[:2]
        ctx.save_for_backward(a if need_b else None, b if need_a else None)
        return _compute(a, b, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads  # [m, n]
        if not torch._C._has_storage(grad):
            raise NotImplementedError(
                "fastpref: batched gradients (is_grads_batched=True) of a linear layer are not "
                "implemented; use cpu_linear='torch'"
            )
        need_a, need_b, need_bias = ctx.needs_input_grad
        a, b = ctx.saved_tensors
        return (
            matrix_product(grad, b.t()) if need_a else None,
            matrix_product(grad.t(), a.t()) if need_b else None,
            grad.sum(0) if need_bias else None,
        )
