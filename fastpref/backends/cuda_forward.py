"""The product that keeps its logits to itself: csrc/cuda/forward.cu, for Hopper (sm_90)."""

from __future__ import annotations

import torch
from torch import Tensor

from fastpref.backends import cuda_module
from fastpref.backends.tile import Stats, Transform
from fastpref.kernels.forward_config import (
    DTYPES,
    Config,
    launch_tokens,
    padded_bias,
    rows_are_aligned,
    with_aligned_rows,
)

# Tokens of a cluster and entries of the vocabulary: what a launch's scratch memory is counted in.
_TILE = Config(descriptors=True, block_m=256, block_n=128, block_k=64, warps=12, stages=6)


def why_not(weight: Tensor, transform: Transform | None = None) -> str | None:
    """Why this head cannot go through the kernel, or None."""
    if weight.dtype not in DTYPES:
        return f"the weight is {str(weight.dtype)[6:]}, neither bfloat16 nor float16"
    if weight.stride(1) != 1 or not rows_are_aligned(weight):
        return "the weight's rows do not start at multiples of 16 bytes"
    if transform is not None and transform.scale == 0:
        return "the scale is 0"  # 0 * -inf, where the vocabulary is padded
    if not cuda_module.forward_works(cuda_module.index_of(weight.device)):
        return "it is compiled for sm_90a, and this is another GPU"
    return None


def why_no_grad(weight: Tensor, transform: Transform) -> str | None:
    """Why this head's gradient cannot come from the kernel, or None."""
    if weight.dtype == torch.float16:
        return "the weight is float16, whose numbers do not reach far enough"
    return why_not(weight, transform)


def linear_logps(
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    stats: Stats,
    transform: Transform,
    out: Tensor | None = None,
    factor: Tensor | None = None,
) -> None:
    """As `triton.linear_logps`, where `why_not` has no reason; and what the extras need of stats,
    where it has room for that. labels that are negative or V and more give NaN.

    With out [N, V], whose rows start at multiples of 16 bytes, and factor [N] the same to the last
    bit, and D of `eager.grad` as factor out; where `why_no_grad` has no reason.
    """
    if out is not None:
        assert out.dtype == x.dtype and out.shape == (x.shape[0], weight.shape[0])
        assert rows_are_aligned(out) and (out.stride(1) == 1 or out.shape[1] == 1)
    assert x.dtype == weight.dtype and cuda_module.MODULE.forward_tile == _TILE.block_n
    (n, hidden), vocab = x.shape, weight.shape[0]
    x, labels = with_aligned_rows(x), labels.contiguous()
    tiles = -(-vocab // _TILE.block_n)
    bias = padded_bias(bias, weight, tiles * _TILE.block_n, transform.scale)
    extras = stats.weighted is not None or stats.argmax is not None
    numbers = 6 if extras else 2  # of each token and tile
    most = launch_tokens(_TILE, n, vocab * numbers // 2)
    scratch = torch.empty((numbers * tiles + 2) * most, device=x.device, dtype=torch.float32)
    for start in range(0, n, max(most, 1)):
        rows = slice(start, start + most)
        part, part_of = x[rows], stats.rows(start, min(start + most, n))
        cuda_module.launch(
            "forward",
            x.device,
            part.data_ptr(),
            weight.data_ptr(),
            cuda_module.DTYPES[x.dtype],
            part.shape[0],
            vocab,
            hidden,
            x.stride(0),
            weight.stride(0),
            cuda_module.vector(labels[rows], x, torch.int64),
            transform.scale,
            transform.softcap or 0.0,
            1.0 / transform.temperature,
            cuda_module.vector(bias, x),
            cuda_module.vector(scratch, x),
            cuda_module.vector(part_of.sum, x) if extras else 0,
            *(cuda_module.vector(t, x) for t in part_of[3:-1]),
            cuda_module.vector(part_of.argmax, x, torch.int64),
            0 if out is None else out[rows].data_ptr(),
            0 if out is None else out.stride(0),
            0 if factor is None else cuda_module.vector(factor[rows], x),
            clusters=False,
        )
