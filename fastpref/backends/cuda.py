"""The tile primitives in CUDA C++ (csrc/cuda/, module fastpref._cuda): NVIDIA GPUs from Ampere on.

The module is built where nvcc is found when fastpref is installed. As with `native`, tensors cross
the boundary as addresses, so it links no torch; its launches are on torch's current stream of the
tensors' device, allocate nothing and wait for nothing. It has a CUDA runtime of its own beside
torch's: both work in the device's primary context, where addresses and streams mean the same.

The products are torch's, but for the logit-free one on Hopper GPUs (cuda_forward.py).
"""
# ruff: noqa: F401  the imports complete the contract, `fastpref.backends.tile.Backend`

from __future__ import annotations

import torch
from torch import Tensor

from fastpref.backends.column_choice import choose_columns
from fastpref.backends.columns import (
    column_sums,
    gather_columns,
    project_rows,
    weighted_rows,
)
from fastpref.backends.cuda_forward import logit_free_forward, logit_free_reason
from fastpref.backends.cuda_module import (
    describe,
    launch,
    problem,
    rows_of,
    unavailable_reason,
    vector,
)
from fastpref.backends.gemm import linear, outer, project, scale_rows
from fastpref.backends.stats import Stats
from fastpref.backends.tile import PAIR_FORMS, Transform

NAME = "cuda"
LOGIT_FREE_BY_DEFAULT = True
PROJECTS_AT_ONCE = False

CLOSED_FORMS = frozenset(PAIR_FORMS)


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


def _statistics(stats: Stats, tile: Tensor) -> tuple[int, ...]:
    return *(vector(t, tile) for t in stats[:-1]), vector(stats.argmax, tile, torch.int64)


def fold(tile: Tensor, labels: Tensor, col0: int, stats: Stats, transform: Transform) -> None:
    """As `Backend.fold`."""
    rows = _tile(tile, labels, col0, transform)
    launch("fold", tile.device, *rows, *_statistics(stats, tile), 0, 0, 0, 0)


def fold_grad(
    tile: Tensor,
    labels: Tensor,
    stats: Stats,
    transform: Transform,
    d: Tensor | None,
    target: Tensor | None = None,
) -> None:
    """As `Backend.fold_grad`, reading each logit once."""
    rows = _tile(tile, labels, 0, transform)
    address = (0, 0, 0) if d is None else rows_of(d, tile)
    exact = vector(target, tile)
    launch("fold", tile.device, *rows, *_statistics(stats, tile), exact, *address)


def grad(
    tile: Tensor,
    labels: Tensor,
    col0: int,
    lse: Tensor,
    logps: Tensor,
    d: Tensor,
    transform: Transform,
    dlogp: Tensor | None = None,
    entropy: Tensor | None = None,
    dentropy: Tensor | None = None,
) -> None:
    """As `Backend.grad`."""
    assert (entropy is None) == (dentropy is None)
    launch(
        "grad",
        tile.device,
        *_tile(tile, labels, col0, transform),
        *(vector(t, tile) for t in (lse, logps, dlogp, entropy, dentropy)),
        *rows_of(d, tile),
    )


def pair_loss(
    logps: Tensor,
    sequence_ids: Tensor,
    pairs: int,
    ref_logps: Tensor | None,
    loss_type: str,
    beta: float,
    label_smoothing: float,
    lengths: Tensor | None,
    weight: Tensor | None,
    margin: Tensor | None,
    option: float = 0.0,
    shape: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `Backend.pair_loss`: one launch, whatever the order of the tokens."""
    loss, dlogp = logps.new_empty(()), torch.empty_like(logps)
    sequences, rewards, slopes = (logps.new_empty(2 * pairs) for _ in range(3))
    starts = sequence_ids.new_empty(2 * pairs + 1)
    launch(
        "pair_loss",
        logps.device,
        PAIR_FORMS.index(loss_type),
        logps.shape[0],
        pairs,
        vector(logps, logps),
        vector(sequence_ids, logps, torch.int64),
        *(vector(t, logps) for t in (ref_logps, lengths, weight, margin)),
        beta,
        label_smoothing,
        option,
        shape,
        *(vector(t, logps) for t in (loss, sequences, rewards, dlogp)),
        vector(starts, logps, torch.int64),
        vector(slopes, logps),
        clusters=False,
    )
    return loss, sequences, rewards, dlogp
