"""Heads for the tests of the forward pass without logits, and what its results have to be."""

from __future__ import annotations

import oracle
import torch

TRANSFORMS = {
    "plain": {},
    "negative scale, temperature": {"scale": -0.7, "temperature": 0.7},
    "softcap": {"softcap": 30.0},
    "softcap, negative scale, temperature": {"scale": -2.0, "softcap": 5.0, "temperature": 1.5},
}


def head(n, hidden, vocab, dtype=torch.bfloat16, spread=4.0):
    """Hidden states and a weight whose logits have this standard deviation, and labels."""
    x = torch.randn(n, hidden).to(dtype)
    weight = (torch.randn(vocab, hidden) * spread / hidden**0.5).to(dtype)
    return x, weight, torch.randint(vocab, (n,))


def check(got, x, weight, labels, bias=None, **transform):
    """Within fp32's rounding of the row's largest logit; labels may be ignored (negative)."""
    logps, lse = got
    z = oracle.logits(x, weight, bias, **transform)
    truth = oracle.token_stats(z, labels.clamp(min=-100).where(labels >= 0, -100))
    largest = z.abs().where(z.isfinite(), 0.0).amax(1)
    bound = 3e-6 * (1 + largest)
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
