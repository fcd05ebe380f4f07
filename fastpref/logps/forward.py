"""The forward pass over the head: token log-probabilities, and their gradient's parts, from tiles.

It is token-outer: a tile [n, V] is whole, so the statistics of its tokens and u = D W are final
when the tile is done. Each output is written once; only the [N] statistics are accumulated. The
backward pass is in backward.py.

The raw logits are dora_scale * (x W^T + lora_hidden lora_B^T) + bias. The second product is that of
a LoRA adapter on the head, whose A has already been applied; dora_scale is DoRA's factor of each
vocabulary entry. Neither is ever merged into a copy of the weight.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastpref.backends.stats import Stats
from fastpref.backends.tile import Backend, Transform
from fastpref.logps.columns import ColumnBlock, ColumnOptions, Sampler
from fastpref.logps.plan import HeadPlan, tile_dtype
from fastpref.logps.vocab_parallel import VocabShard


class TokenStats(NamedTuple):
    """Per-token outputs, each shaped like the labels and 0 (False) where the label is ignored.

    logps: log-probability of the label. entropy: of the distribution, in nats (differentiable).
    mean_logit: mean over the vocabulary of the transformed logits. is_top1: the label is the first
    argmax. log_sum_sq_probs: log of the sum of squared probabilities. None: not requested.
    """

    logps: Tensor
    entropy: Tensor | None = None
    mean_logit: Tensor | None = None
    is_top1: Tensor | None = None
    log_sum_sq_probs: Tensor | None = None


class LinearCall(NamedTuple):
    """What one call of the linear function needs besides its tensors."""

    plan: HeadPlan
    transform: Transform
    extras: tuple[str, ...]
    backend: Backend
    hidden_grad: bool  # of the hidden states, or of lora_hidden
    weight_grad: bool  # of any tensor of the head
    columns: ColumnOptions | None = None  # where gradients take columns
    shard: VocabShard | None = None  # where other processes have other rows of the head


class HeadInputs(NamedTuple):
    """What the head multiplies."""

    x: Tensor  # [N, H]
    lora_hidden: Tensor | None = None  # [N, r], with an adapter

    def rows(self, start: int, stop: int) -> HeadInputs:
        """The inputs of the tokens [start, stop)."""
        lora = self.lora_hidden
        return HeadInputs(
            _block(self.x, start, stop), None if lora is None else _block(lora, start, stop)
        )


class HeadTensors(NamedTuple):
    """The tensors of the head: its weight, and a bias or an adapter if it has one."""

    weight: Tensor  # [V, H]
    bias: Tensor | None = None  # [V]
    lora_B: Tensor | None = None  # [V, r]
    dora_scale: Tensor | None = None  # [V]

    def part(self, a: int, b: int) -> HeadTensors:
        """The head of the vocabulary entries [a, b)."""
        return HeadTensors(*(None if t is None else t[a:b] for t in self))  # type: ignore[arg-type]

    def to(self, dtype: torch.dtype) -> HeadTensors:
        """The head with its matrices in the compute dtype; they are copied only under autocast."""
        if self.weight.dtype == dtype and self.lora_B is None:
            return self
        lora_B = None if self.lora_B is None else self.lora_B.to(dtype)
        return self._replace(weight=self.weight.to(dtype), lora_B=lora_B)


class HeadGrads(NamedTuple):
    """Memory for the gradients of a `HeadTensors`, in its shapes; None: not wanted."""

    weight: Tensor | None = None
    bias: Tensor | None = None
    lora_B: Tensor | None = None
    dora_scale: Tensor | None = None


class Saved(NamedTuple):
    """What the forward pass leaves for the backward pass.

    D [N, V] is the gradient of the log-probs in x W^T. Where there is a row_scale, the rows of u, v
    and stash lack it as a factor.
    """

    u: Tensor | None  # [N, H] = D W
    v: Tensor | None  # [N, r] = D lora_B
    stash: Tensor  # [S, V], D of the first S tokens
    lse: Tensor  # [N]
    row_scale: Tensor | None = None  # [N]
    columns: tuple[ColumnBlock, ...] = ()  # in place of the stash, where dW takes columns


def _outputs(stats: Stats, labels: Tensor, vocab: int, extras: tuple[str, ...]) -> TokenStats:
    return TokenStats(
        logps=stats.logps,
        entropy=stats.entropy() if "entropy" in extras else None,
        mean_logit=stats.mean_logit(vocab) if "mean_logit" in extras else None,
        is_top1=None if stats.argmax is None else stats.argmax.eq(labels),
        log_sum_sq_probs=stats.log_sum_sq_probs() if "log_sum_sq_probs" in extras else None,
    )


def write_logits(
    call: LinearCall,
    inputs: HeadInputs,  # of n tokens
    head: HeadTensors,  # of v vocabulary entries
    tile: Tensor,  # [n, v]
) -> None:
    """Write the raw logits of these tokens and vocabulary entries."""
    x, lora_hidden = inputs
    if not tile.shape[1]:  # a shard of no rows
        return
    call.backend.linear(x, head.weight, tile, head.bias if head.dora_scale is None else None)
    if lora_hidden is not None and head.lora_B is not None:
        tile.addmm_(lora_hidden.to(tile.dtype), head.lora_B.to(tile.dtype).t())
    if head.dora_scale is not None:
        tile *= head.dora_scale
        if head.bias is not None:
            tile += head.bias


def _target_logits(
    call: LinearCall,
    inputs: HeadInputs,  # of n tokens
    head: HeadTensors,
    labels: Tensor,  # [n]
) -> Tensor:
    """The labels' transformed logits [n] in fp32: H multiplications each."""
    inside = labels.clamp(0, head.weight.shape[0] - 1)
    raw = (inputs.x.float() * head.weight.index_select(0, inside).float()).sum(1)
    if inputs.lora_hidden is not None and head.lora_B is not None:
        raw += (inputs.lora_hidden.float() * head.lora_B.index_select(0, inside).float()).sum(1)
    if head.dora_scale is not None:
        raw *= head.dora_scale.index_select(0, inside).float()
    if head.bias is not None:
        raw += head.bias.index_select(0, inside).float()
    return call.transform(raw.masked_fill(inside != labels, torch.nan))[0]


def padded_rows(n: int, columns: int, dtype: torch.dtype) -> tuple[int, int]:
    """The shape of n rows that each start at a multiple of 16 bytes, as GEMMs like it."""
    step = 16 // dtype.itemsize
    return n, -(-columns // step) * step


def _rows(x: Tensor, n: int, columns: int, dtype: torch.dtype) -> Tensor:
    shape = padded_rows(n, columns, dtype)
    rows = x.new_empty(shape, dtype=dtype)
    return rows if shape[1] == columns else rows[:, :columns]


def _block(t: Tensor, a: int, b: int) -> Tensor:
    """Rows [a, b). t itself where they are all of its rows: a view costs the host a launch."""
    return t if a == 0 and b == t.shape[0] else t[a:b]


def in_place(tile: Tensor, dtype: torch.dtype) -> Tensor:
    """The memory of a tile's rows, seen as rows of a narrower dtype that start where they start."""
    if tile.dtype == dtype:
        return tile
    return tile.view(dtype)[:, : tile.shape[1]]


def _project_at_once(
    call: LinearCall,
    x: Tensor,  # [N, H]
    head: HeadTensors,
    labels: Tensor,  # [N]
    stats: Stats,  # [N]
    saved: Saved,
    row_scale: Tensor,  # [N]
) -> None:
    """The logit-free pass of a backend that multiplies D while it makes it: only D of the stashed
    tokens ever stands in memory."""
    backend, weight, transform = call.backend, head.weight, call.transform
    n, stashed = x.shape[0], saved.stash.shape[0]
    if stashed > 0:
        tokens = _block(x, 0, stashed), weight, _block(labels, 0, stashed), head.bias
        scale = _block(row_scale, 0, stashed)
        rows = stats.rows(0, stashed)
        backend.logit_free_forward(*tokens, rows, transform, saved.stash, scale)
        if saved.u is not None:
            backend.project(saved.stash, weight, _block(saved.u, 0, stashed))
    if stashed == n:
        return
    row_scale[stashed:] = 1.0  # u of the other tokens is whole
    others = x[stashed:], weight, labels[stashed:], head.bias, stats.rows(stashed, n), transform
    backend.logit_free_forward(*others, u=None if saved.u is None else saved.u[stashed:])


def _write_d(
    call: LinearCall,
    inputs: HeadInputs,  # of n tokens
    head: HeadTensors,
    labels: Tensor,  # [n]
    stats: Stats,  # [n]
    d: Tensor,  # [n, V]
    row_scale: Tensor | None,  # [n], with the logit-free product
    buffer: Tensor | None,  # [plan.block_tokens, V], for logits wider than d
) -> None:
    """Write the statistics, and D without dora_scale."""
    backend, transform = call.backend, call.transform
    if row_scale is not None:
        head_tensors = head.weight, labels, head.bias
        backend.logit_free_forward(inputs.x, *head_tensors, stats, transform, d, row_scale)
        return
    n = d.shape[0]
    for a in range(0, n, call.plan.block_tokens):
        b = min(a + call.plan.block_tokens, n)
        block, rows, y, part = inputs.rows(a, b), stats.rows(a, b), labels[a:b], d[a:b]
        tile = part if buffer is None else buffer[: b - a]
        write_logits(call, block, head, tile)
        exact = tile.dtype == rows.lse.dtype
        target = None if exact else _target_logits(call, block, head, y)
        backend.fold_grad(tile, y, rows, transform, part, target)


def _by_columns(
    call: LinearCall,
    inputs: HeadInputs,
    head: HeadTensors,
    labels: Tensor,  # [N]
    stats: Stats,  # [N]
    saved: Saved,
) -> Saved:
    """The pass with gradients from columns of D: u, and what dW needs of D. v stays exact."""
    plan, backend, (x, _), columns = call.plan, call.backend, inputs, call.columns
    assert columns is not None
    n, vocab, stashed = x.shape[0], head.weight.shape[0], plan.stash_tokens
    count = None if x.device.type == "cpu" else plan.columns
    options = columns, backend, head.weight, head.dora_scale, count, plan.head_columns
    sampler = Sampler(*options)
    tile_type = x.dtype if plan.logit_free else tile_dtype(x.dtype, plan.precision)
    wide = tile_type != x.dtype
    buffer = _rows(x, min(plan.block_tokens, n), vocab, tile_type) if wide else None
    block_d = None if stashed == n else _rows(x, min(plan.d_tokens, n), vocab, x.dtype)
    scale = saved.row_scale
    for start in range(0, n, plan.d_tokens):
        stop = min(start + plan.d_tokens, n)
        d = saved.stash[start:stop] if block_d is None else block_d[: stop - start]
        rows = None if scale is None else scale[start:stop]
        block, y = inputs.rows(start, stop), labels[start:stop]
        _write_d(call, block, head, y, stats.rows(start, stop), d, rows, buffer)
        for a in range(start, stop, plan.column_tokens):
            part = slice(a, min(a + plan.column_tokens, stop))
            row_scale = None if scale is None else scale[part]
            u = None if saved.u is None else saved.u[part]
            part_d = d[a - start : part.stop - start]
            sampler.add(part_d, labels[part], stats.lse[part], row_scale, u)
        if head.dora_scale is not None:
            d *= head.dora_scale
        if saved.v is not None and head.lora_B is not None:
            backend.project(d, head.lora_B, saved.v[start:stop])
        if block_d is not None and start < stashed:
            saved.stash[start:stop].copy_(d[: stashed - start])
    return saved._replace(columns=sampler.finish())


def forward_pass(
    call: LinearCall,
    inputs: HeadInputs,
    head: HeadTensors,
    labels: Tensor,  # [N]
    stash: Tensor | None = None,  # [plan.stash_tokens, V]
) -> tuple[TokenStats, Saved]:
    """The outputs [N], and what the backward pass needs.

    stash: memory for the stashed D, if the caller has it already.
    """
    plan, extras, backend, transform = call.plan, call.extras, call.backend, call.transform
    x, lora_hidden = inputs
    n, vocab = x.shape[0], head.weight.shape[0]
    vocab_size = vocab if call.shard is None else call.shard.vocab_size
    head = head.to(x.dtype)
    with_grads = call.hidden_grad or call.weight_grad
    # The logit-free product writes D at once, but for a factor of each row.
    tile_type = x.dtype if plan.logit_free else tile_dtype(x.dtype, plan.precision)
    stats_type = torch.float64 if x.dtype == torch.float64 else torch.float32
    stats = Stats.empty(n, x.device, stats_type, extras)
    u = torch.empty_like(x) if call.hidden_grad else None
    v = torch.empty_like(lora_hidden) if call.hidden_grad and lora_hidden is not None else None
    if stash is None:
        stash = _rows(x, plan.stash_tokens, vocab, x.dtype)
    row_scale = torch.empty_like(stats.lse) if plan.logit_free and with_grads else None
    saved = Saved(u, v, stash, stats.lse, row_scale)
    if plan.logit_free and not with_grads:
        backend.logit_free_forward(x, head.weight, labels, head.bias, stats, transform)
        return _outputs(stats, labels, vocab_size, extras), saved
    if call.columns is not None:
        saved = _by_columns(call, inputs, head, labels, stats, saved)
        return _outputs(stats, labels, vocab_size, extras), saved
    if row_scale is not None and backend.PROJECTS_AT_ONCE:
        _project_at_once(call, x, head, labels, stats, saved, row_scale)
        return _outputs(stats, labels, vocab_size, extras), saved
    all_stashed = plan.stash_tokens == n

    def project(d: Tensor, start: int, stop: int) -> None:
        if not vocab:  # a shard of no rows
            for t in (u, v):
                if t is not None:
                    t[start:stop].zero_()
            return
        if u is not None:
            backend.project(d, head.weight, _block(u, start, stop))
        if v is not None and head.lora_B is not None:
            backend.project(d, head.lora_B, _block(v, start, stop))

    in_stash = all_stashed and tile_type == x.dtype  # and so without a tile of its own
    buffer = stash if in_stash else _rows(x, min(plan.block_tokens, n), vocab, tile_type)
    for start in range(0, n, plan.block_tokens):
        stop = min(start + plan.block_tokens, n)
        block, rows, y = (
            inputs.rows(start, stop),
            stats.rows(start, stop),
            _block(labels, start, stop),
        )
        stashed = _block(stash, start, min(stop, plan.stash_tokens))
        whole = stashed.shape[0] == stop - start
        # D overwrites the logits, in the stash itself where the two have the same width.
        tile = stashed if whole and tile_type == x.dtype else _block(buffer, 0, stop - start)
        d = None
        if u is not None or stashed.shape[0] > 0:
            d = stashed if whole else in_place(tile, x.dtype)
        if row_scale is not None:
            scale = None if d is None else _block(row_scale, start, stop)
            backend.logit_free_forward(
                block.x, head.weight, y, head.bias, rows, transform, d, scale
            )
        else:
            write_logits(call, block, head, tile)
            exact = tile.dtype == rows.lse.dtype
            if call.shard is not None:
                call.shard.fold_grad(backend, tile, y, rows, transform, d)
            else:
                target = None if exact else _target_logits(call, block, head, y)
                backend.fold_grad(tile, y, rows, transform, d, target)
            if d is not None and head.dora_scale is not None:
                d *= head.dora_scale
        if d is None:
            continue
        if not all_stashed:
            project(d, start, stop)
        if not whole:
            stashed.copy_(d[: stashed.shape[0]])
    del buffer
    if all_stashed:
        project(stash, 0, n)  # one tall product is faster than many flat ones
    return _outputs(stats, labels, vocab_size, extras), saved
