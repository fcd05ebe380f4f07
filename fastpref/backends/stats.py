"""`Stats`: what rows of logits are folded to; log-probs and extra outputs follow from it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

EXTRAS = ("entropy", "mean_logit", "is_top1", "log_sum_sq_probs")


class Stats(NamedTuple):
    """Running statistics of n rows, folded from tiles of their logits z, left to right.

    max, sum: the running maximum m and the sum of exp(z - m).
    target: the label's logit; NaN until the tile that holds it has been folded.
    lse, logps: the normaliser and the label's log-probability, never above 0.
    weighted: the sum of exp(z - m) (z - m); total: the sum of z; squared: the sum of exp(2(z - m)).
    argmax: the first index of the maximum.
    The last four are None unless an extra output needs them. float32, or float64 for float64 tiles.
    The memory is not initialised: the tile that starts at column 0 does that.
    """

    max: Tensor
    sum: Tensor
    target: Tensor
    lse: Tensor
    logps: Tensor
    weighted: Tensor | None = None
    total: Tensor | None = None
    squared: Tensor | None = None
    argmax: Tensor | None = None

    @classmethod
    def empty(cls, n: int, device: torch.device, dtype: torch.dtype, extras=()) -> Stats:
        sums = any(name in extras for name in ("entropy", "mean_logit", "log_sum_sq_probs"))
        # lse and logps leave the call, so they are tensors of their own. The others share one
        # allocation: on a GPU an allocation takes longer than a kernel on so few numbers.
        shared = torch.empty((6 if sums else 3, n), device=device, dtype=dtype)
        maximum, exp_sum, target, *extra_sums = shared.unbind()
        lse = torch.empty((n,), device=device, dtype=dtype)
        argmax = torch.empty_like(lse, dtype=torch.int64) if "is_top1" in extras else None
        weighted, total, squared = extra_sums if sums else (None, None, None)
        logps = torch.empty_like(lse)
        return cls(maximum, exp_sum, target, lse, logps, weighted, total, squared, argmax)

    def rows(self, start: int, stop: int) -> Stats:
        """A view of the rows [start, stop)."""
        if start == 0 and stop == self.lse.shape[0]:
            return self
        return Stats(*(None if t is None else t[start:stop] for t in self))  # type: ignore[arg-type]

    def finish(self) -> None:
        """Write lse and logps from max, sum and target."""
        log_sum = self.sum.log()
        torch.add(self.max, log_sum, out=self.lse)
        # (target - max) is exact where it matters, at saturated rows; target - lse is not. A
        # positive value can only be the rounding of a zero. `clamp` keeps NaN.
        torch.sub(self.target - self.max, log_sum, out=self.logps).clamp_(max=0.0)

    def replace_target(self, target: Tensor) -> None:
        """Put the exact logit of the label where a rounded one was, in the normaliser as well.

        With only the target exact, log-probabilities would come out above 0; with both, the error
        of a confident token falls to that of the other logits' tiny share.
        """
        # Where the label is the maximum its exact logit becomes the base, so that a saturated row
        # keeps the tiny share of the others: 1 + tiny, and not exp(rounding) + tiny.
        base = torch.where(self.target == self.max, target, self.max)
        shift = self.max - base
        rescale = shift.exp()
        old, new = self.target - self.max, target - base
        old_e, new_e = old.exp(), new.exp()
        others = (self.sum - old_e).clamp_min(0)
        if self.weighted is not None and self.squared is not None and self.total is not None:
            weighted = self.weighted - old_e * old
            self.weighted.copy_(rescale * (weighted + shift * others) + new_e * new)
            squared = (self.squared - old_e * old_e).clamp_min(0)
            self.squared.copy_(rescale * rescale * squared + new_e * new_e)
            self.total.add_(target - self.target)
        self.sum.copy_(rescale * others + new_e)
        self.max.copy_(base)
        self.target.copy_(target)
        self.finish()

    def entropy(self) -> Tensor:
        assert self.weighted is not None
        return self.sum.log() - self.weighted / self.sum

    def mean_logit(self, vocab: int) -> Tensor:
        assert self.total is not None
        return self.total / vocab

    def log_sum_sq_probs(self) -> Tensor:
        assert self.squared is not None
        return self.squared.log() - 2 * self.sum.log()
