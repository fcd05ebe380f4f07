"""The logit-free product in CUDA C++: csrc/cuda/forward.cu, for Hopper GPUs (sm_90)."""

from __future__ import annotations

import torch
from torch import Tensor

from fastpref.backends import cuda_module
from fastpref.backends.stats import Stats
from fastpref.backends.tile import Transform
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


def logit_free_reason(
    weight: Tensor,
    transform: Transform,
    extras: tuple[str, ...] = (),
    with_d: bool = True,
    required: bool = False,
) -> str | None:
    """As `Backend.logit_free_reason`; the kernel has the statistics of all extras."""
    if weight.dtype not in DTYPES:
        return f"the weight is {str(weight.dtype)[6:]}, neither bfloat16 nor float16"
    if with_d and weight.dtype == torch.float16:
        return "the weight is float16, whose exponents are too few for an unnormalised D"
    if weight.stride(1) != 1 or not rows_are_aligned(weight):
        return "the weight's rows do not start at multiples of 16 bytes"
    if transform.scale == 0:
        return "the scale is 0"  # 0 * -inf, where the vocabulary is padded
    if not cuda_module.forward_works(cuda_module.index_of(weight.device)):
        return "it is compiled for sm_90a, and this is another GPU"
    return None


def logit_free_forward(
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    stats: Stats,
    transform: Transform,
    d: Tensor | None = None,
    row_scale: Tensor | None = None,
    u: Tensor | None = None,
) -> None:
    """As `Backend.logit_free_forward`: the same statistics with d and without.

    Labels that are negative or V and more give NaN.
    """
    if d is not None:
        assert d.dtype == x.dtype and d.shape == (x.shape[0], weight.shape[0])
        assert rows_are_aligned(d) and (d.stride(1) == 1 or d.shape[1] == 1)
    assert u is None and x.dtype == weight.dtype
    assert cuda_module.MODULE.forward_tile == _TILE.block_n
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
            0 if d is None else d[rows].data_ptr(),
            0 if d is None else d.stride(0),
            0 if row_scale is None else cuda_module.vector(row_scale[rows], x),
            clusters=False,
        )
