"""The tile primitives in CUDA C++ (csrc/cuda/, module fastpref._cuda): NVIDIA GPUs from Ampere on.

The module is built where nvcc is found when fastpref is installed. As with `native`, tensors cross
the boundary as addresses, so it links no torch; its launches are on torch's current stream of the
tensors' device, allocate nothing and wait for nothing. It has a CUDA runtime of its own beside
torch's: both work in the device's primary context, where addresses and streams mean the same.

The products are torch's.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastpref.backends import cuda_forward, triton
from fastpref.backends.cuda_forward import linear_logps as linear_grad  # it takes D's memory, too
from fastpref.backends.cuda_module import describe, launch, problem, rows_of, vector, why_not
from fastpref.backends.gemm import linear, outer, project, scale_rows
from fastpref.backends.tile import Stats, Transform

NAME = "cuda"
KEEPS_LOGITS = True
__all__ = [
    "CLOSED_FORMS",
    "KEEPS_LOGITS",
    "NAME",
    "describe",
    "fold",
    "fold_grad",
    "fused_is_fast",
    "grad",
    "keeps_logits",
    "linear",
    "linear_grad",
    "linear_logps",
    "outer",
    "pair_loss",
    "problem",
    "project",
    "scale_rows",
    "why_not",
]

# As PAIR_FORMS in csrc/cuda/launch.h, by which they are numbered.
_PAIR_FORMS = (
    "sigmoid",
    "sigmoid_norm",
    "ipo",
    "hinge",
    "exo_pair",
    "robust",
    "nca_pair",
    "bco_pair",
    "sppo_hard",
    "apo_zero",
    "apo_down",
    "discopop",
    "cpo",
    "simpo",
    "alphapo",
    "orpo",
)
CLOSED_FORMS = frozenset(_PAIR_FORMS)


def _tile(tile: Tensor, labels: Tensor, col0: int, transform: Transform) -> tuple:
    address, dtype, stride = rows_of(tile, tile)
    assert labels.shape[0] == tile.shape[0]
    return (
        address,
        dtype,
        *tile.shape,
        stride,
        col0,
        vector(labels, tile, torch.int64),
        transform.scale,
        transform.softcap or 0.0,
        1.0 / transform.temperature,
    )


def _fold(
    tile: Tensor,
    labels: Tensor,
    col0: int,
    stats: Stats,
    transform: Transform,
    exact: Tensor | None,
    out: tuple[int, int, int],
) -> None:
    launch(
        "fold",
        tile.device,
        *_tile(tile, labels, col0, transform),
        *(vector(t, tile) for t in stats[:-1]),
        vector(stats.argmax, tile, torch.int64),
        vector(exact, tile),
        *out,
    )


def fold(tile: Tensor, labels: Tensor, col0: int, stats: Stats, transform: Transform) -> None:
    """As `eager.fold`."""
    _fold(tile, labels, col0, stats, transform, None, (0, 0, 0))


def fold_grad(
    tile: Tensor,
    labels: Tensor,
    stats: Stats,
    transform: Transform,
    out: Tensor | None,
    target: Tensor | None = None,
) -> None:
    """`fold` of whole rows [n, V] and `grad` into out [n, V], reading each logit once.

    out may be the tile's own memory, as in `eager.grad`; None leaves `grad` out, and the statistics
    are the same to the last bit. target [n]: the labels' exact logits, which take the place of the
    tile's as in `Stats.replace_target`.
    """
    address = (0, 0, 0) if out is None else rows_of(out, tile)
    _fold(tile, labels, 0, stats, transform, target, address)


def grad(
    tile: Tensor,
    labels: Tensor,
    col0: int,
    lse: Tensor,
    logps: Tensor,
    out: Tensor,
    transform: Transform,
    coef: Tensor | None = None,
    entropy: Tensor | None = None,
    entropy_coef: Tensor | None = None,
) -> None:
    """As `eager.grad`."""
    assert (entropy is None) == (entropy_coef is None)
    launch(
        "grad",
        tile.device,
        *_tile(tile, labels, col0, transform),
        *(vector(t, tile) for t in (lse, logps, coef, entropy, entropy_coef)),
        *rows_of(out, tile),
    )


def pair_loss(
    logps: Tensor,
    sequence_ids: Tensor,
    pairs: int,
    ref_logps: Tensor | None,
    *,
    loss_type: str,
    beta: float,
    label_smoothing: float,
    lengths: Tensor | None,
    weight: Tensor | None,
    margin: Tensor | None,
    option: float = 0.0,
    shape: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `native.pair_loss`, for every loss in CLOSED_FORMS; one launch, whatever the order of the
    tokens. option: discopop_tau or simpo_gamma; shape: AlphaPO's alpha."""
    loss, coef = logps.new_empty(()), torch.empty_like(logps)
    sequences, rewards, slopes = (logps.new_empty(2 * pairs) for _ in range(3))
    starts = sequence_ids.new_empty(2 * pairs + 1)
    launch(
        "pair_loss",
        logps.device,
        _PAIR_FORMS.index(loss_type),
        logps.shape[0],
        pairs,
        vector(logps, logps),
        vector(sequence_ids, logps, torch.int64),
        *(vector(t, logps) for t in (ref_logps, lengths, weight, margin)),
        beta,
        label_smoothing,
        option,
        shape,
        *(vector(t, logps) for t in (loss, sequences, rewards, coef)),
        vector(starts, logps, torch.int64),
        vector(slopes, logps),
        clusters=False,
    )
    return loss, sequences, rewards, coef


def fused_is_fast(weight: Tensor) -> bool:
    """Whether `linear_logps` has a kernel made for this GPU and for this weight's alignment."""
    if cuda_forward.why_not(weight) is None:
        return True
    return triton.why_not(weight.device, weight.dtype) is None and triton.fused_is_fast(weight)


def linear_logps(
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    stats: Stats,
    transform: Transform,
) -> None:
    """As `triton.linear_logps`, which it is but for Hopper GPUs. ValueError, with the reason, where
    neither can run."""
    own = cuda_forward.why_not(weight, transform)
    if own is None:
        cuda_forward.linear_logps(x, weight, labels, bias, stats, transform)
        return
    reason = triton.why_not(x.device, x.dtype)
    if reason is not None:
        raise ValueError(f"fused: got True, expected False: {own}; and not in Triton: {reason}")
    triton.linear_logps(x, weight, labels, bias, stats, transform)


def keeps_logits(weight: Tensor, transform: Transform, extras: tuple[str, ...] = ()) -> bool:
    """Whether `linear_grad` takes this head; `linear_logps` then has its bits, and the extras."""
    return cuda_forward.why_no_grad(weight, transform) is None
