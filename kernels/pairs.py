"""pair_loss: token log-probs to the loss, the rewards and d loss / d logp, in one launch.

One program does it all: a launch costs more than the work, which is a few microseconds for a batch
of ordinary size. Tokens may come in any order. A block of them looks at the range of its sequence
ids and adds up each sequence in it; sorted tokens, as batches have them, make that a few sequences
per block. Shuffled ones take up to 2P sums per block: milliseconds for 65536 tokens of 64 pairs,
whose head takes a hundred times as long.

Sums run in float64, in one order: exact to float32, and the same on every run.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _log1p(x):
    """log(1 + x) of 0 <= x <= 1 in float64, without losing a small x in the sum."""
    return tl.where(x < 1e-5, x * (1.0 - 0.5 * x), tl.log(1.0 + x))


@triton.jit(
    do_not_specialize=["tokens", "pairs"],
    do_not_specialize_on_alignment=[
        "ref_logps",
        "lengths",
        "weight",
        "margin",
        "loss",
        "sequences",
        "rewards",
        "slopes",
    ],
)
def pair_loss(
    # inputs
    logps,  # [N]
    sequence_ids,  # [N]
    ref_logps,  # [2P] or None
    lengths,  # [2P] or None
    weight,  # [P] or None
    margin,  # [P] or None
    # outputs
    loss,  # []
    sequences,  # [2P]
    rewards,  # [2P]
    slopes,  # [2P] scratch, d loss / d sum
    dlogp,  # [N]
    # shapes
    tokens,  # N
    pairs,  # P
    # options
    beta,
    option,
    IPO: tl.constexpr,
    TOKENS: tl.constexpr,
    SEQUENCES: tl.constexpr,
):
    """As `Backend.pair_loss`. option: the label smoothing, and for IPO 1 / (2 beta).

    A token whose id is not in [0, 2P) counts nowhere and has a dlogp of NaN.
    """
    lane = tl.arange(0, SEQUENCES)
    token = tl.arange(0, TOKENS)
    for first in range(0, 2 * pairs, SEQUENCES):
        last = tl.minimum(first + SEQUENCES, 2 * pairs) - 1
        sums = tl.zeros((SEQUENCES,), tl.float64)
        for start in range(0, tokens, TOKENS):
            inside = start + token < tokens
            ids = tl.load(sequence_ids + start + token, mask=inside, other=-1)
            mine = (ids >= first) & (ids <= last)
            ids = tl.where(mine, ids, -1).to(tl.int32)
            x = tl.load(logps + start + token, mask=mine, other=0.0).to(tl.float64)
            low = tl.min(tl.where(mine, ids, last + 1), 0)
            high = tl.max(ids, 0)
            for s in range(low, high + 1):
                part = tl.sum(tl.where(ids == s, x, 0.0), 0)
                sums += tl.where(first + lane == s, part, 0.0)
        tl.store(sequences + first + lane, sums.to(tl.float32), mask=first + lane <= last)
    tl.debug_barrier()  # what one thread has stored another one loads

    total = tl.zeros((SEQUENCES,), tl.float64)
    count = tl.maximum(pairs, 1).to(tl.float64)
    for start in range(0, pairs, SEQUENCES):
        pair = start + lane
        inside = pair < pairs
        # The sums as their float32 values: policy and reference cancel to exactly 0 at step 0.
        chosen = tl.load(sequences + pair, mask=inside, other=0.0).to(tl.float64)
        rejected = tl.load(sequences + pairs + pair, mask=inside, other=0.0).to(tl.float64)
        if ref_logps is not None:
            chosen -= tl.load(ref_logps + pair, mask=inside, other=0.0).to(tl.float64)
            rejected -= tl.load(ref_logps + pairs + pair, mask=inside, other=0.0).to(tl.float64)
        tl.store(rewards + pair, (chosen * beta).to(tl.float32), mask=inside)
        tl.store(rewards + pairs + pair, (rejected * beta).to(tl.float32), mask=inside)
        factor = tl.full((SEQUENCES,), 1.0, tl.float64) / count
        if weight is not None:
            factor *= tl.load(weight + pair, mask=inside, other=0.0).to(tl.float64)
        per_chosen = factor
        per_rejected = factor
        if lengths is not None:
            n = tl.load(lengths + pair, mask=inside, other=1.0).to(tl.float64)
            n = tl.where(n < 1, 1.0, n)
            chosen /= n
            per_chosen = factor / n
            n = tl.load(lengths + pairs + pair, mask=inside, other=1.0).to(tl.float64)
            n = tl.where(n < 1, 1.0, n)
            rejected /= n
            per_rejected = factor / n
        d = chosen - rejected
        if IPO:
            x = d - option
            value = x * x
            slope = 2.0 * x
        else:
            x = d * beta
            if margin is not None:
                x -= tl.load(margin + pair, mask=inside, other=0.0).to(tl.float64)
            small = tl.exp(-tl.abs(x))
            # -(1 - e) log sigmoid(x) - e log sigmoid(-x), with log sigmoid(-x) = log sigmoid(x) - x
            value = tl.where(x < 0, -x, 0.0) + _log1p(small) + option * x
            slope = (option - tl.where(x < 0, 1.0, small) / (1.0 + small)) * beta
        total += tl.where(inside, factor * value, 0.0)
        tl.store(slopes + pair, (slope * per_chosen).to(tl.float32), mask=inside)
        tl.store(slopes + pairs + pair, (-slope * per_rejected).to(tl.float32), mask=inside)
    tl.store(loss, tl.sum(total, 0).to(tl.float32))
    tl.debug_barrier()

    for start in range(0, tokens, TOKENS):
        inside = start + token < tokens
        ids = tl.load(sequence_ids + start + token, mask=inside, other=-1)
        known = (ids >= 0) & (ids < 2 * pairs)
        c = tl.load(slopes + ids, mask=known, other=float("nan"))
        tl.store(dlogp + start + token, c, mask=inside)
