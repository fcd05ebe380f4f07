"""The logit-free product in Triton: token log-probs, and D for a pass with gradients.

The kernels are in forward_kernels.py, their configurations in forward_config.py.
"""

from __future__ import annotations

import functools
import math

import torch
from fastpref.kernels.forward_config import (
    DTYPES,
    SHIPPED,
    Case,
    Config,
    arch_name,
    config,
    grad_config,
    has_config,
    launch_tokens,
    padded_bias,
    rows_are_aligned,
    with_aligned_rows,
)
from fastpref.kernels.forward_kernels import (
    TILES,
    bases,
    by_descriptor,
    by_pointer,
    combine,
    finish,
)
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

__all__ = [
    "SHIPPED",
    "Case",
    "Config",
    "config",
    "fused_logps",
    "launch_tokens",
    "logit_free_reason",
]

LOG2E = math.log2(math.e)


@functools.cache
def _device(device: torch.device) -> tuple[str, int]:
    """The architecture and the number of multiprocessors."""
    if device.type != "cuda":  # the interpreter
        return "sm_90", 3
    properties = torch.cuda.get_device_properties(device)
    return arch_name(properties), properties.multi_processor_count


def _blocks(size: int, block: int) -> int:
    return -(-size // block)  # triton.cdiv takes microseconds


def logit_free_reason(
    weight: Tensor,  # [V, H]
    transform,
    with_d: bool = True,
    required: bool = False,
) -> str | None:
    """Why `fused_logps` does not take this head, with D or without; None: it does.

    Where it is required and writes no D, it takes GPUs and alignments that no kernel is made for.
    """
    if weight.dtype not in DTYPES:
        return f"the weight is {str(weight.dtype)[6:]}, neither bfloat16 nor float16"
    if with_d and weight.dtype != torch.bfloat16:
        return "the weight is float16, whose exponents are too few for an unnormalised D"
    if weight.stride(1) != 1:
        return "the weight's rows are not contiguous"
    if transform.scale == 0:
        return "the scale is 0"  # 0 * -inf, where the vocabulary is padded
    if required and not with_d:
        return None
    if not rows_are_aligned(weight):
        return "the weight's rows do not start at multiples of 16 bytes"
    arch = _device(weight.device)[0]
    if not has_config(arch) or (with_d and grad_config(arch, softcap=False, hidden_size=0) is None):
        return f"no kernel is made for this GPU, {arch}"
    return None


def fused_logps(
    x: Tensor,  # [N, H]
    weight: Tensor,  # [V, H]
    labels: Tensor,  # [N] int64
    bias: Tensor | None,  # [V], of any floating dtype
    transform,
    stats,
    d: Tensor | None = None,  # [N, V] bfloat16
    row_scale: Tensor | None = None,  # [N] float32
    chosen: Config | None = None,
) -> None:
    """Fill stats.lse and stats.logps, fp32, for the logits x weight^T + bias; nothing else.

    With d and row_scale, row_scale d is D, the gradient of the log-probs in the logits before the
    transform. Only where `logit_free_reason` has no reason. A negative label is an ignored row,
    whose statistics mean nothing; V or more gives NaN. chosen replaces what `config` would choose.
    Launches on the current device and stream, without host synchronisation; all memory is torch's.
    """
    assert x.dtype == weight.dtype
    (n, hidden), vocab = x.shape, weight.shape[0]
    if n == 0:
        return
    labels = labels.contiguous()
    aligned = rows_are_aligned(weight)
    if x.stride(1) != 1 or aligned:
        x = with_aligned_rows(x)
    arch, multiprocessors = _device(x.device)
    capped = transform.softcap is not None
    if chosen is None and d is not None:
        chosen = grad_config(arch, softcap=capped, hidden_size=hidden)
    if chosen is None:
        head = {"softcap": capped, "bias": bias is not None, "aligned": aligned}
        chosen = config(arch, hidden, vocab, x.dtype, **head)
    c = (transform.softcap if capped else transform.scale) * LOG2E / transform.temperature
    k = 2 * LOG2E * transform.scale / transform.softcap if capped else 0.0
    tiles = _blocks(vocab, chosen.block_n)
    bias = padded_bias(bias, weight, tiles * chosen.block_n, transform.scale)
    shape = {
        "BLOCK_M": chosen.block_m,
        "BLOCK_N": chosen.block_n,
        "BLOCK_K": chosen.block_k,
        "GROUP": chosen.group(hidden),
        "SOFTCAP": capped,
        "NEGATIVE": transform.scale < 0,
        "HALVES": chosen.halves,
    }
    most = launch_tokens(chosen, n, vocab)
    # Of each token r and s of each tile and the label's logit; base, largest exponent, normaliser.
    numbers = 2 * tiles + (1 if d is None else 4)
    scratch = torch.empty(numbers * most, device=x.device, dtype=torch.float32)
    stride_d = 0 if d is None else d.stride(0)
    if chosen.descriptors:
        weight_desc = _descriptor(weight, chosen.block_n, chosen.block_k)
    for start in range(0, n, most):
        part, label = x[start : start + most], labels[start : start + most]
        count = part.shape[0]
        work = _blocks(count, chosen.block_m) * tiles
        rows_d = None if d is None else d[start : start + most]
        if rows_d is not None:
            bases[(_blocks(count, 4),)](
                part, weight, label, bias, scratch[(2 * tiles + 1) * count :],
                count, vocab, hidden, part.stride(0), weight.stride(0), c, k,
                ROWS=4, BLOCK=256, SOFTCAP=capped, num_warps=4,
            )  # fmt: skip
        if chosen.descriptors:
            by_descriptor[(min(work, multiprocessors * chosen.per_sm),)](
                _descriptor(part, chosen.block_m, chosen.block_k), weight_desc,
                label, bias, scratch, rows_d, stride_d, count, vocab, hidden, c, k,
                **shape, FLATTEN=chosen.flatten, **chosen.options(),
            )  # fmt: skip
        else:
            by_pointer[(work,)](
                part, weight, label, bias, scratch, rows_d, stride_d, count, vocab, hidden,
                part.stride(0), weight.stride(0), c, k,
                **shape, EVEN_H=hidden % chosen.block_k == 0, **chosen.options(),
            )  # fmt: skip
        combine[(_blocks(count, 32),)](
            scratch, label, stats.lse[start:], stats.logps[start:], count, vocab, tiles, c, k,
            ROWS=32, TILES=TILES, SOFTCAP=capped, KEEP=rows_d is not None, num_warps=4,
        )  # fmt: skip
        if rows_d is not None and row_scale is not None:
            finish[(count,)](
                scratch, label, stats.logps[start:], rows_d, row_scale[start:], stride_d, count,
                vocab, tiles, transform.scale / transform.temperature, k,
                BLOCK_N=chosen.block_n, BLOCK=1024, SOFTCAP=capped, num_warps=4,
            )  # fmt: skip


def _descriptor(matrix: Tensor, rows: int, columns: int) -> TensorDescriptor:
    return TensorDescriptor(matrix, list(matrix.shape), [matrix.stride(0), 1], [rows, columns])
