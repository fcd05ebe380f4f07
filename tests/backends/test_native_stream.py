"""Outputs of 32 MiB and more, which the native kernels write past the caches."""

from __future__ import annotations

import pytest
import torch

from fastpref.backends import native
from fastpref.backends.stats import Stats
from fastpref.backends.tile import Transform

pytestmark = pytest.mark.skipif(native.problem() is not None, reason=str(native.problem()))
DTYPES = [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_large_gradient_is_written_past_the_caches(dtype):
    """From 32 MiB on: the same bits as over the logits, and as in parts, which are smaller."""
    torch.manual_seed(0)
    n, vocab = (72, 120_003) if dtype == torch.float32 else (144, 120_003)
    logits = torch.randn(n, -(-vocab // 16) * 16 + 16).to(dtype)[:, 3 : vocab + 3]
    labels, lse, logps = torch.randint(vocab, (n,)), torch.full((n,), 12.0), -torch.rand(n)
    labels[5] = -100
    found = []
    for step, beside in ((n, True), (n // 4, True), (n, False)):
        d = torch.empty_like(logits) if beside else logits.clone()
        tile = logits if beside else d
        for a in range(0, n, step):
            part = slice(a, a + step)
            rows = labels[part], 0, lse[part], logps[part]
            native.grad(tile[part], *rows, d[part], Transform())
        found.append(d)
    assert found[0].nbytes >= 2**25
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_large_d_is_written_past_the_caches(dtype):
    """From 32 MiB on: the same bits as in parts, which are smaller."""
    torch.manual_seed(0)
    n, vocab = (72, 120_003) if dtype == torch.float32 else (144, 120_003)
    x, weight = torch.randn(n, 8).to(dtype), torch.randn(vocab, 8).to(dtype)
    labels = torch.randint(vocab, (n,))
    stride = -(-vocab // 16) * 16
    found = []
    for step in (n, n // 4):
        d, scale = torch.full((n, stride), 7.0, dtype=dtype), torch.empty(n)
        stats = Stats.empty(n, x.device, torch.float32, ())
        for a in range(0, n, step):
            part = slice(a, a + step)
            head = x[part], weight, labels[part], None, stats.rows(a, a + step), Transform()
            native.logit_free_forward(*head, d[part, :vocab], scale[part])
        assert (d[:, vocab:] == 7).all()
        found.append((d, scale, stats.logps, stats.lse))
    assert found[0][0].nbytes >= 2**25
    assert all(torch.equal(whole, parts) for whole, parts in zip(*found, strict=True))
