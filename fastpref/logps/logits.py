"""Token log-probabilities of ready logits: `token_logps`, with its autograd function."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fastpref import backends
from fastpref.backends.stats import Stats
from fastpref.backends.tile import Backend, Transform
from fastpref.logps.autograd import as_vector
from fastpref.logps.checks import check_labels, check_range
from fastpref.logps.first_order import (
    FirstOrderFunction,
    check_transforms,
    first_order,
    raise_for_inference,
)
from fastpref.logps.prepared import adjacent
from fastpref.validation import check_float, check_integer, is_traced


def token_logps(
    logits: Tensor,
    labels: Tensor,
    *,
    scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    ignore_index: int = -100,
    inplace_backward: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Log-probability of each label under ready logits, read once forward.

    Args:
        logits: [..., V], float64, float32, bfloat16 or float16.
        labels: [...] int64, aligned with logits.
        scale, softcap, temperature: applied to the logits as in `linear_token_logps`.
        ignore_index: the label of positions that do not count.
        inplace_backward: write the gradient over the logits, which halves the memory of the
            backward pass. Nobody may read the logits afterwards, and a second backward pass raises.
            Under torch.compile, which plans memory itself, it makes no difference.
        backend: "native", "cuda", "triton", "eager" or None for the fastest that works.

    Returns:
        [...] float32 (float64 for float64 logits), 0 where ignored and never above 0.

    Raises:
        ValueError: shapes or dtypes that do not fit together, a label outside [0, V).
    """
    transform = Transform(scale, softcap, temperature)
    check_transforms()
    check_float("logits", logits)
    check_integer("ignore_index", ignore_index)
    if logits.dim() < 1 or logits.shape[-1] == 0:
        raise ValueError(f"logits: got shape {tuple(logits.shape)}, expected [..., V] with V > 0")
    check_labels(labels, logits.shape[:-1], "logits without its last dimension", logits.device)
    flat = labels.reshape(-1)
    ignored = flat == ignore_index
    check_range(flat, logits.shape[-1], ignored)
    if inplace_backward and 0 in logits.stride() and logits.numel() > 1:
        raise ValueError(
            "inplace_backward: got True with expanded logits, whose rows share memory; expected "
            "logits of their own"
        )
    rows = adjacent(logits.reshape(-1, logits.shape[-1]))
    # Any other negative label must not pass for an ignored one: out of range, it gives NaN.
    y = flat.masked_fill(flat < 0, logits.shape[-1]).masked_fill(ignored, -1)
    if is_traced(logits):  # torch.compile plans the backward pass's memory itself
        op = torch.ops.fastpref.token_logps
        logps: Tensor = op(rows, y, scale, softcap, temperature, backend)[0]
    else:
        module = backends.choose(logits.device, logits.dtype, backend)
        options = transform, module, inplace_backward
        try:
            logps = TokenLogps.apply(rows, y, *options)  # type: ignore[no-untyped-call]
        except RuntimeError as error:
            raise_for_inference(error, logits=logits)
            raise
    return logps.view(labels.shape)


def _row_blocks(logits: Tensor, backend: Backend) -> Iterator[tuple[int, int]]:
    """Ranges of rows: 2^24 logits each for plain torch, whose temporaries have that size."""
    size = max(16, 2**24 // logits.shape[1]) if backend.NAME == "eager" else 2**62
    return ((a, min(a + size, logits.shape[0])) for a in range(0, logits.shape[0], size))


def logits_forward(
    logits: Tensor,  # [N, V]
    labels: Tensor,  # [N], negative: ignored
    transform: Transform,
    backend: Backend,
) -> tuple[Tensor, Tensor]:
    """The log-probs and the normalisers of ready logits [N], 0 where ignored."""
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    stats = Stats.empty(logits.shape[0], logits.device, dtype)
    for a, b in _row_blocks(logits, backend):
        backend.fold(logits[a:b], labels[a:b], 0, stats.rows(a, b), transform)
    ignored = labels < 0
    return stats.logps.masked_fill(ignored, 0.0), stats.lse.masked_fill(ignored, 0.0)


def logits_backward(
    logits: Tensor,  # [N, V]
    labels: Tensor,  # [N]
    lse: Tensor,  # [N]
    logps: Tensor,  # [N]
    dlogp: Tensor,  # [N]
    dlogits: Tensor,  # [N, V], which may be the logits
    transform: Transform,
    backend: Backend,
) -> None:
    """Write the gradient of ready logits."""
    for a, b in _row_blocks(logits, backend):
        rows = labels[a:b], 0, lse[a:b], logps[a:b]
        backend.grad(logits[a:b], *rows, dlogits[a:b], transform, dlogp[a:b])


class TokenLogps(FirstOrderFunction):
    """Ready logits and labels to log-probabilities [N], 0 where the label is negative."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,  # [N, V]
        labels: Tensor,  # [N]
        transform: Transform,
        backend: Backend,
        inplace: bool,
    ) -> Tensor:
        logps, lse = logits_forward(logits, labels, transform, backend)
        if ctx.needs_input_grad[0]:  # a copy of the output, which the caller may change in place
            ctx.save_for_backward(logits, labels, lse, logps.clone())
        ctx.transform, ctx.backend, ctx.inplace, ctx.used = transform, backend, inplace, False
        return logps

    @staticmethod
    @first_order
    def backward(ctx: Any, dlogp: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.used:
            raise RuntimeError(
                "token_logps: inplace_backward=True overwrote the logits in the first backward "
                "pass; a second one needs inplace_backward=False"
            )
        logits, labels, lse, logps = ctx.saved_tensors
        ctx.used = ctx.inplace
        # .data is the same memory outside of the graph: a gradient must not depend on the logits.
        dlogits = logits.data if ctx.inplace else torch.empty_like(logits)
        rows = labels, lse, logps, as_vector(dlogp)
        logits_backward(logits.data, *rows, dlogits, ctx.transform, ctx.backend)
        if ctx.inplace:  # another backward pass that reads the logits must raise
            torch.autograd.graph.increment_version(logits)
        return dlogits, None, None, None, None
