"""Heads for the tests of the forward pass without logits, what runs it, and what its results have
to be."""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

import machine
import oracle
import torch

from fastpref.backends import cuda_forward, cuda_module
from fastpref.backends.stats import Stats
from fastpref.backends.tile import Transform

TRANSFORMS = {
    "plain": {},
    "negative scale, temperature": {"scale": -0.7, "temperature": 0.7},
    "softcap": {"softcap": 30.0},
    "softcap, negative scale, temperature": {"scale": -2.0, "softcap": 5.0, "temperature": 1.5},
}
SENTINEL = 7.0


def head(n, hidden, vocab, dtype=torch.bfloat16, spread=4.0):
    """Hidden states and a weight whose logits have this standard deviation, and labels."""
    x = torch.randn(n, hidden).to(dtype)
    weight = (torch.randn(vocab, hidden) * spread / hidden**0.5).to(dtype)
    return x, weight, torch.randint(vocab, (n,))


class Forward(NamedTuple):
    """The pass of a backend for GPUs. chosen: how Triton's is compiled, if not as it chooses."""

    backend: str
    chosen: Any = None

    def why_not(self) -> str | None:
        """Why it cannot run here, or None. Without a GPU it is interpreted or emulated."""
        reason = machine.why_not(self.backend, [torch.bfloat16])
        if reason is None and self.backend == "cuda" and machine.HAS_GPU:
            if not cuda_module.forward_works(torch.cuda.current_device()):
                reason = "it is for sm_90"
        return reason

    def __call__(self, x, weight, labels, bias=None, **transform):
        """(logps, lse) on the CPU; nothing may be written beside them."""
        n, device, transform = x.shape[0], machine.device_of(self.backend), Transform(**transform)
        room = [torch.full((n + 300,), SENTINEL, device=device) for _ in range(2)]
        stats = Stats(*[None] * 3, lse=room[1][:n], logps=room[0][:n])
        x, weight, *rest = (None if t is None else t.to(device) for t in (x, weight, labels, bias))
        if self.backend == "cuda":
            assert cuda_forward.logit_free_reason(weight, transform, with_d=False) is None
            cuda_forward.logit_free_forward(x, weight, *rest, stats, transform)
        else:
            # Not before it is known that there is triton: the tests of CUDA alone need none.
            from fastpref.kernels.forward import fused_logps

            with warnings.catch_warnings():
                # numpy, in the interpreter, says where it divides by zero or subtracts infinities;
                # the results are what is tested.
                warnings.simplefilter("ignore", RuntimeWarning)
                fused_logps(x, weight, *rest, transform, stats, chosen=self.chosen)
        assert all((r[n:] == SENTINEL).all() for r in room)
        return stats.logps.cpu(), stats.lse.cpu()


def check(got, x, weight, labels, bias=None, more=0.0, **transform):
    """Within fp32's rounding of the row's largest logit; labels may be ignored (negative)."""
    logps, lse = got
    z = oracle.logits(x, weight, bias, **transform)
    truth = oracle.token_stats(z, labels.clamp(min=-100).where(labels >= 0, -100))
    largest = z.abs().where(z.isfinite(), 0.0).amax(1)
    bound = 3e-6 * (1 + largest) + more
    kept = labels >= 0
    oracle.assert_within(logps[kept], truth.logps[kept], bound[kept])
    oracle.assert_within(lse, torch.logsumexp(z, 1), bound)
    assert (logps[kept] <= 0).all()


def confident(n, hidden, vocab):
    """Rows whose label is ahead of all others, by 9 to 30."""
    x, weight, _ = head(n, hidden, vocab, spread=0.5)
    weight[:n] = 0
    weight[:n, :n] = torch.eye(n) * 8
    x[:, :n] = torch.diag(torch.linspace(9, 30, n) / 8)
    return x, weight, torch.arange(n)
