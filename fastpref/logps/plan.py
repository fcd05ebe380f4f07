"""How the head is computed: which strategy, in which tiles, at what predicted cost.

| strategy     | when                                   | FLOPs      | extra memory               |
| forward-only | nothing needs a gradient               | 2NHV       | one tile                   |
| frozen       | only the hidden states need a gradient | 4NHV       | one tile and u [N, H]      |
| stash        | the head trains and D fits the budget  | 6NHV       | D [N, V], in hidden's dtype |
| recompute    | the head trains and D does not fit     | 8NHV       | one tile                   |
| mixed        | a fraction f of D fits                 | (8-2f)NHV  | that fraction              |

By columns (columns.py) u = D W takes 2NHK in place of 2NHV; so does dW, for which D [N, K] is kept.
"""

from __future__ import annotations

import functools
import math
import os
from dataclasses import dataclass

import torch

from fastpref.backends import native
from fastpref.backends.column_choice import HEAD_MARGIN
from fastpref.validation import check_number

STRATEGIES = ("auto", "forward-only", "frozen", "stash", "recompute", "mixed")
PRECISIONS = ("exact", "fast")
FUSED = (None, True, False)

# Bytes of the logits tile per vocabulary entry, the same for every strategy, so that policy and
# reference see the same tiles. 480 is 120 fp32 rows or 240 bf16 rows: on two Zen 5 cores the bf16
# GEMM then runs at 95 % of its rate for tall matrices. A GPU needs more rows to read the weight
# seldom enough: 2048 in fp32.
_TILE_BYTES_PER_COLUMN = {"cpu": 480, "cuda": 8192}
# On a GPU the tile is in memory beside D while the head trains, so it has at most 256 MiB, or 512
# rows if those are more. Reading the weight once per 512 rows takes a third of their product's time
# and overlaps with it.
_GPU_TILE_BYTES = 2**28
_GPU_LEAST_BYTES_PER_COLUMN = 2048
# Tiles of a GPU's GEMM have this many rows; a block of one row more costs as much as a whole tile.
_GPU_ROWS = 128
_MIN_ROWS = 16
_MIN_COLUMNS = 256
_COLUMNS_STEP = 128  # whole GEMM tiles, and rows that start at multiples of 16 bytes
# Up to this hidden size the logit-free forward pass is expected to beat a library GEMM followed by
# a pass over the tile: predicted 9 to 15 % faster at H <= 896, equal at 2304, 3 % slower at 4096.
_FUSED_HIDDEN_SIZE = 2304
_FUSED_BYTES = 2**27  # what that kernel keeps at most
# Tokens that share a choice of columns. More tokens need more columns; with fewer, rows of the
# weight are packed more often.
_COLUMN_TOKENS = 512
# Blocks of columns that share a pass over the weight, for their mean distributions.
BLOCKS_TOGETHER = 8
# Tokens whose D a logit-free product makes for columns: for each call the weight is packed again.
_LOGIT_FREE_TOKENS = 1024
_PACKED_BYTES = (
    2**24
)  # of an operand that the native product packs whole (WHOLE in csrc/product.cpp)


@dataclass(frozen=True)
class HeadPlan:
    """What `plan_head` decided. Sizes in tokens and vocabulary entries, memory in bytes."""

    strategy: str
    tokens: int
    hidden_size: int
    vocab_size: int
    precision: str
    block_tokens: int  # rows of a forward tile, which is block_tokens x vocab_size
    block_vocab: int  # columns of a backward tile, which is tokens x block_vocab
    stash_tokens: int  # tokens whose D is kept for the backward pass
    logit_free: bool  # whether the product folds its logits itself, and there is no tile of them
    flops: int  # predicted, forward and backward together
    extra_bytes: int  # predicted peak beyond the inputs and the returned gradients
    column_tokens: int = 0  # tokens that share a choice of columns; 0: the gradients are exact
    columns: int = 0  # of these tokens: on a GPU as planned, on a CPU as their D needs
    d_tokens: int = 0  # tokens whose D is whole before columns are chosen
    head_columns: bool = False  # whether dW takes columns, so that D [N, columns] is kept

    def __str__(self) -> str:
        columns = f", {self.columns} columns" if self.column_tokens else ""
        return (
            f"{self.strategy} ({self.precision}): N={self.tokens} H={self.hidden_size} "
            f"V={self.vocab_size}, {'one kernel' if self.logit_free else 'tiles'}, "
            f"tile {self.block_tokens} x {self.vocab_size}, backward tile "
            f"{self.tokens} x {self.block_vocab}, stash {self.stash_tokens} tokens{columns}, "
            f"{self.flops / 1e9:.1f} GFLOP, {self.extra_bytes / 2**20:.1f} MiB extra"
        )


@functools.cache
def default_memory_budget(device: torch.device | str = "cpu") -> int:
    """A sixteenth of the device's memory, in bytes: constant for a machine, so that the choice of
    strategy, and with it the last bit of dW, does not depend on what else is running."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory // 16
    if device.type == "cpu" and hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 16
    return 2**30


def tile_dtype(compute: torch.dtype, precision: str) -> torch.dtype:
    """dtype of the logits tile: fp32 for 16-bit inputs, unless the precision is "fast"."""
    half = compute in (torch.bfloat16, torch.float16)
    return torch.float32 if half and precision == "exact" else compute


def check_plan_options(
    strategy: str, memory_budget: int | None, precision: str, fused: bool | None
) -> None:
    """Raise ValueError for a value that `plan_head` does not know."""
    if strategy not in STRATEGIES:
        raise ValueError(f"strategy: got {strategy!r}, expected one of {', '.join(STRATEGIES)}")
    if precision not in PRECISIONS:
        raise ValueError(f"precision: got {precision!r}, expected one of {', '.join(PRECISIONS)}")
    counts = isinstance(memory_budget, int) and not isinstance(memory_budget, bool)
    if memory_budget is not None and not (counts and memory_budget > 0):
        raise ValueError(
            f"memory_budget: got {memory_budget!r}, expected a number of bytes above 0"
        )
    if not (fused is None or isinstance(fused, bool)):
        hint = ""
        if fused == "match":
            hint = (
                ": None has its meaning, as a pass without gradients takes the product of the same "
                "call with gradients unless strategy='forward-only'"
            )
        raise ValueError(f"fused: got {fused!r}, expected None, True or False{hint}")


def check_tolerance(name: str, tolerance: float | None) -> None:
    """Raise ValueError unless the relative error of a gradient is None or in (0, 1)."""
    if tolerance is None:
        return
    check_number(name, tolerance)
    if not 0 < tolerance < 1:
        raise ValueError(f"{name}: got {tolerance}, expected a number between 0 and 1, or None")


def _columns(vocab: int, tokens: int, tolerance: float | None, head: float | None) -> int:
    """The expected number of columns that meets both tolerances; `head`: of the head's matrices.

    A fit to a language model of 49,152 entries: 10 % at 5e-3, 23 % at 1.5e-3. dW needs as many
    as u does, but for the margin.
    """
    least = min(tolerance or math.inf, (head or math.inf) / HEAD_MARGIN)
    share: float = 0.08 * (0.01 / least) ** 0.55
    # The labels' columns are always kept, and some must be left to be drawn.
    return min(vocab, max(math.ceil(share * vocab), tokens + tokens // 4 + 1))


def _tile_budget(vocab_size: int, kind: str, budget: int) -> int:
    tile = _TILE_BYTES_PER_COLUMN.get(kind, 480) * vocab_size
    if kind == "cuda":
        tile = min(tile, max(_GPU_TILE_BYTES, _GPU_LEAST_BYTES_PER_COLUMN * vocab_size))
    return min(tile, budget)


def _even_rows(rows: int, tokens: int) -> int:
    """The rows of a block: at most these, in whole tiles of a GPU's GEMM and equally many in each
    block, so that no short one is left for the end."""
    units, most = -(-tokens // _GPU_ROWS), max(rows // _GPU_ROWS, 1)
    return min(rows, -(-units // -(-units // most)) * _GPU_ROWS)


def stash_room(
    vocab_size: int,
    dtype: torch.dtype,
    device: torch.device | str,
    strategy: str = "auto",
    memory_budget: int | None = None,
) -> int:
    """The number of tokens whose D fits the budget beside the tile; "stash" ignores the budget."""
    budget = default_memory_budget(device) if memory_budget is None else memory_budget
    tile = _tile_budget(vocab_size, torch.device(device).type, budget)
    return _room(vocab_size * dtype.itemsize, strategy, budget - tile)


def _room(row_bytes: int, strategy: str, budget: int) -> int:
    if strategy in ("stash", "recompute"):
        return 2**62 if strategy == "stash" else 0
    return max(budget, 0) // max(row_bytes, 1)


def plan_head(
    tokens: int,
    hidden_size: int,
    vocab_size: int,
    dtype: torch.dtype,
    *,
    device: torch.device | str = "cpu",
    hidden_grad: bool = True,
    weight_grad: bool = True,
    memory_budget: int | None = None,
    strategy: str = "auto",
    precision: str = "exact",
    fused: bool | None = None,
    at_once: bool = False,
    gradient_tolerance: float | None = None,
    head_gradient_tolerance: float | None = None,
) -> HeadPlan:
    """Choose the strategy and the tiles of one call of `linear_token_logps`.

    tokens, hidden_size, vocab_size: N (labelled tokens only), H and V.
    dtype: the compute dtype, which is the one of hidden.
    hidden_grad, weight_grad: what needs a gradient (weight_grad: the weight or the bias).
    memory_budget: bytes for the tile and the stash; None is `default_memory_budget(device)`.
    strategy: "auto", or one to force. Forcing matters for a trainable head only: without one the
        call is forward-only or frozen whatever is named.
    fused: whether the logit-free product is taken, which some backends have. None: by a pass
        without gradients that asks for strategy="forward-only", on a GPU, up to a hidden size.
    at_once: whether that product can multiply D while it makes it, which `native`'s does.
    gradient_tolerance, head_gradient_tolerance: as in `linear_token_logps`.

    Raises ValueError for an unknown strategy or precision, a budget that is not positive, and a
    strategy that cannot give the gradients that are needed.
    """
    check_plan_options(strategy, memory_budget, precision, fused)
    check_tolerance("gradient_tolerance", gradient_tolerance)
    check_tolerance("head_gradient_tolerance", head_gradient_tolerance)
    for name, size in (
        ("tokens", tokens),
        ("hidden_size", hidden_size),
        ("vocab_size", vocab_size),
    ):
        if size < 0:
            raise ValueError(f"{name}: got {size}, expected a size of at least 0")
    if weight_grad and strategy in ("forward-only", "frozen"):
        raise ValueError(
            f"strategy: {strategy!r} gives no gradient for the head, whose weight or bias requires "
            "one; use 'auto', 'stash', 'recompute' or 'mixed', or detach the head"
        )
    if weight_grad and head_gradient_tolerance is not None and strategy not in ("auto", "stash"):
        raise ValueError(
            f"strategy: {strategy!r} makes D again in the backward pass and does not support "
            "head_gradient_tolerance, which keeps D's columns; expected 'auto' or 'stash'"
        )
    kind = torch.device(device).type
    budget = default_memory_budget(device) if memory_budget is None else memory_budget
    tile_budget = _tile_budget(vocab_size, kind, budget)
    sizes = tokens, hidden_size, vocab_size, dtype, kind
    grads = bool(hidden_grad), bool(weight_grad)
    tolerances = (
        gradient_tolerance if hidden_grad and tokens else None,
        head_gradient_tolerance if weight_grad and tokens else None,
    )
    settings = strategy, precision, fused, at_once, budget, tile_budget
    return _plan(*sizes, *grads, *settings, *tolerances)


@functools.lru_cache(maxsize=1024)  # a few batch shapes come again and again
def _plan(
    n: int,
    h: int,
    v: int,
    dtype: torch.dtype,
    kind: str,
    hidden_grad: bool,
    weight_grad: bool,
    strategy: str,
    precision: str,
    fused: bool | None,
    at_once: bool,
    budget: int,
    tile_budget: int,
    tolerance: float | None,
    head_tolerance: float | None,
) -> HeadPlan:
    """`plan_head` with its defaults filled in."""
    item = dtype.itemsize
    head_columns = head_tolerance is not None
    by_columns = head_columns or tolerance is not None
    chosen, stash = ("frozen" if hidden_grad else "forward-only"), 0
    if head_columns:
        chosen = "stash"
    elif weight_grad:
        fits = _room(v * item, strategy, budget - tile_budget)
        chosen = strategy
        if strategy == "auto":
            # Below an eighth the saved GEMM does not pay for the memory it holds until backward.
            chosen = "stash" if fits >= n else "mixed" if fits * 8 >= n else "recompute"
        stash = 0 if chosen == "recompute" else min(fits, n)
        if chosen == "mixed" and stash == n and strategy == "mixed":
            stash = n // 2  # named by the caller although all of D would fit

    if fused is None:
        asked = chosen == strategy == "forward-only"
        fused = asked and kind == "cuda" and h <= _FUSED_HIDDEN_SIZE
    logit_free = fused and (item == 2 or (at_once and dtype == torch.float32))
    at_once = at_once and logit_free and not by_columns
    # The logit-free product does not round logits; the backward pass must not either.
    precision = "exact" if logit_free else precision
    tile_size = tile_dtype(dtype, precision).itemsize
    forward_item = item if logit_free else tile_size  # that product writes D
    # Whether there is no tile beside the stash.
    in_stash = weight_grad and not head_columns and stash == n and forward_item == item
    rows = max(1, min(n, max(tile_budget // max(forward_item * v, 1), _MIN_ROWS)))
    if kind == "cuda" and rows < n:
        rows = _even_rows(rows, n)
    if at_once or (logit_free and (in_stash or by_columns)):
        rows = max(n, 1)
    column_tokens = multiplied = d_tokens = 0
    if by_columns:
        column_tokens = d_tokens = min(n, _COLUMN_TOKENS)
        if logit_free:
            d_tokens = n if in_stash else min(n, _LOGIT_FREE_TOKENS)
        else:
            # The tiles of logits are those of exact gradients, so that log-probs are the same bits.
            d_tokens = rows * max(_COLUMN_TOKENS // rows, 1)
            column_tokens = min(n, d_tokens, _COLUMN_TOKENS)
        multiplied = _columns(v, column_tokens, tolerance, head_tolerance)
    # Half a tile in backward, where c X stands beside it.
    columns = max(1, min(v, max(tile_budget // max(2 * tile_size * n, 1), _MIN_COLUMNS)))
    if columns < v:
        columns -= columns % _COLUMNS_STEP
    tile_bytes = 0 if in_stash else rows * v * forward_item
    if by_columns:
        tile_bytes = 0 if logit_free or forward_item == item else tile_bytes
        tile_bytes += 0 if stash == n else min(d_tokens, n) * v * item
        tile_bytes += multiplied * (column_tokens + h) * item + 8 * 8 * v  # G, W[S, J], the choice
        blocks = -(-n // max(column_tokens, 1))
        together = min(blocks, BLOCKS_TOGETHER)
        # q of the blocks that wait, and of all that dW needs; beside them those of one pass.
        tile_bytes += max(item, 4) * v * ((blocks if head_columns else together) + together)
    if at_once:
        token_bytes = native.scratch_bytes_of_token(h, v, item, extras=False, projects=True)
        tile_bytes = min(n * token_bytes, native.SCRATCH_BYTES)
        tile_bytes += min(4 * n * h, _PACKED_BYTES) + native.SLICE * 4 * h  # packed operands
    elif logit_free and not by_columns:
        # Two numbers for each token and each 128 entries of the vocabulary, in launches.
        tile_bytes = tile_bytes if hidden_grad or weight_grad else 0
        tile_bytes += min(8 * n * -(-v // 128), _FUSED_BYTES)
    states = n * h * item  # of the hidden states, and of everything in their shape
    u_bytes = states if hidden_grad else 0
    flops = 2 * n * h * v
    if hidden_grad:
        flops += 2 * n * h * (v if tolerance is None else multiplied)
    extra = tile_bytes + u_bytes
    if head_columns:
        flops += 2 * n * h * multiplied
        extra += (
            n * multiplied * item + states + (h * v * 4 if item == 2 else 0)
        )  # D, c X, the sums
    elif weight_grad:
        flops += 2 * n * h * v + 2 * (n - stash) * h * v
        backward_tile = n * columns * tile_size if stash < n else 0
        extra = max(extra, u_bytes + backward_tile + states) + stash * v * item  # states: c X
    extra += states  # X is copied when prompts are dropped
    return HeadPlan(
        strategy=chosen,
        tokens=n,
        hidden_size=h,
        vocab_size=v,
        precision=precision,
        block_tokens=rows,
        block_vocab=columns,
        stash_tokens=stash,
        logit_free=logit_free,
        flops=flops,
        extra_bytes=extra,
        column_tokens=column_tokens,
        columns=multiplied,
        d_tokens=d_tokens,
        head_columns=head_columns,
    )
