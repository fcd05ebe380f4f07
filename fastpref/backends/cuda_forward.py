"""The forward pass without logits of the cuda backend: csrc/cuda/forward.cu, for Hopper (sm_90)."""

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


def linear_logps(
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    stats: Stats,
    transform: Transform,
) -> None:
    """As `triton.linear_logps`, where `why_not` has no reason.

    labels that are negative or V and more give NaN.
    """
    assert x.dtype == weight.dtype and cuda_module.MODULE.forward_tile == _TILE.block_n
    (n, hidden), vocab = x.shape, weight.shape[0]
    x, labels = with_aligned_rows(x), labels.contiguous()
    tiles = -(-vocab // _TILE.block_n)
    bias = padded_bias(bias, weight, tiles * _TILE.block_n, transform.scale)
    most = launch_tokens(_TILE, n, vocab)
    scratch = torch.empty((2 * tiles + 1) * most, device=x.device, dtype=torch.float32)
    for start in range(0, n, max(most, 1)):
        rows = slice(start, start + most)
        part = x[rows]
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
            cuda_module.vector(stats.lse[rows], x),
            cuda_module.vector(stats.logps[rows], x),
            clusters=False,
        )
