"""The one kernel of fold_grad, and the ways in which its blocks share a row."""

from __future__ import annotations

import machine
import oracle
import pytest
import torch

import fastpref
from fastpref import backends
from fastpref.backends import cuda, cuda_module, eager
from fastpref.backends.stats import EXTRAS, Stats
from fastpref.backends.tile import Transform
from fastpref.logps.forward import in_place

EPS = torch.finfo(torch.float32).eps
ALL = Transform(scale=-0.7, softcap=11.0, temperature=1.3)
DEVICE = machine.device_of("cuda")
PAIRS = [
    (torch.float32, torch.bfloat16),
    (torch.float32, torch.float16),
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float16),
    (torch.bfloat16, torch.float32),
]


@pytest.fixture(autouse=True)
def runs():
    reason = machine.why_not("cuda")
    if reason is not None:
        pytest.skip(reason)


def _rows(n, vocab, dtype, shift=0):
    """Rows next to numbers that would spoil whoever reads them; shift 0 starts them at 16 bytes."""
    width = vocab + (-vocab % 16) + 16 + (1 if shift else 0)
    memory = torch.full((n, width), torch.nan, dtype=dtype, device=DEVICE)
    return memory, memory[:, 8 + shift : 8 + shift + vocab]


def _stats(n, extras=EXTRAS):
    stats = Stats.empty(n, DEVICE, torch.float32, extras)
    for name in Stats._fields:
        if getattr(stats, name) is not None:
            getattr(stats, name).fill_(-7 if name == "argmax" else torch.nan)
    return stats


def _same_stats(a: Stats, b: Stats, rows):
    for name in Stats._fields:
        x, y = getattr(a, name), getattr(b, name)
        assert (x is None) == (y is None), name
        if x is not None:
            torch.testing.assert_close(x[rows], y[rows], rtol=0, atol=0, equal_nan=True, msg=name)


# Of a row: one warp, one block, clusters of 2, 4 and 8, the larger kernel, several turns.
VOCABS = [1, 31, 1000, 16385, 40000, 70001, 131077, 330001]


@pytest.fixture(params=[1, 8], ids=["one block", "cluster"])
def clusters(request, monkeypatch):
    """With and without clusters, as on GPUs before and after sm_90."""
    most = cuda_module.clusters_of(0) if machine.HAS_GPU else 8
    if request.param > most:
        pytest.skip("this GPU has no clusters of thread blocks")
    monkeypatch.setattr(cuda_module, "clusters_of", lambda index: request.param)


@pytest.mark.parametrize("vocab", VOCABS)
def test_fold_grad(clusters, vocab):
    """The statistics of fold to the last bit, D as exact as grad's; over the logits or not."""
    for k, (dtype, out_dtype) in enumerate(PAIRS if vocab < 50000 else PAIRS[:1]):
        n, transform = 3, (Transform(), ALL)[k % 2]
        extras = EXTRAS if vocab % 2 else ()
        shift = 1 if k == 4 else 0
        memory, tile = _rows(n, vocab, dtype, shift)
        tile.copy_(torch.randn(n, vocab, device=DEVICE) * 4)
        labels = torch.tensor([vocab - 1, -100, vocab // 2], device=DEVICE)
        stats, folded = _stats(n, extras), _stats(n, extras)
        wide, out = _rows(n, vocab, out_dtype, shift)
        cuda.fold(tile, labels, 0, folded, transform)
        cuda.fold_grad(tile, labels, stats, transform, out)
        _same_stats(stats, folded, [0, 2])
        assert int(wide.isnan().sum()) == wide.numel() - out.numel()  # nothing beyond the rows
        z = oracle.transform(tile.cpu(), transform.scale, transform.softcap, transform.temperature)
        truth = oracle.token_stats(z, labels.cpu())
        unit = 16 * EPS * float(z.abs().max())
        oracle.assert_within(stats.logps[::2].cpu(), truth.logps[::2], unit)
        raw = tile.cpu().double()
        wanted = torch.zeros_like(raw)
        lse, one = torch.logsumexp(z, 1), torch.ones(n, dtype=torch.float64)
        eager.grad(raw, labels.cpu(), 0, lse, truth.logps, wanted, transform, one)
        kind = torch.finfo(out_dtype)
        bound = wanted.abs() * (kind.eps / 2 + 16 * EPS) + kind.smallest_normal + unit
        oracle.assert_within(out.cpu(), wanted, bound)
        if out_dtype.itemsize <= dtype.itemsize:
            start = (8 + shift) * dtype.itemsize // out_dtype.itemsize
            inplace = in_place(memory, out_dtype)[:, start : start + vocab]
            if inplace.shape[1] == vocab:
                cuda.fold_grad(tile, labels, _stats(n, extras), transform, inplace)
                assert torch.equal(inplace, out)


@pytest.mark.parametrize("extras", [(), EXTRAS], ids=["plain", "extras"])
@pytest.mark.parametrize("transform", [Transform(), ALL], ids=["plain", "softcap"])
def test_an_exact_target(clusters, transform, extras):
    """As Stats.replace_target: the label's own logit, its rounded one, the maximum, a saturated row
    and a label that is not there."""
    n, vocab = 6, 3000
    exact_tile = torch.randn(n, vocab, device=DEVICE) * 3
    exact_tile[3, 17] = -90.0 if transform.scale < 0 else 90.0
    tile = _rows(n, vocab, torch.bfloat16)[1]
    tile.copy_(exact_tile)
    labels = torch.tensor([0, 2999, int(tile[2].float().argmax()), 17, 5000, 8], device=DEVICE)
    inside = labels.clamp(max=vocab - 1)
    raw = exact_tile.gather(1, inside[:, None])[:, 0]
    target = transform(raw.masked_fill(inside != labels, torch.nan))[0]
    target[5] = transform(tile[5, 8].float())[0]
    stats, wanted = _stats(n, extras), _stats(n, extras)
    out, d = torch.empty_like(tile), torch.empty_like(tile)
    cuda.fold_grad(tile, labels, stats, transform, out, target)
    eager.fold(tile, labels, 0, wanted, transform)
    wanted.replace_target(target)
    for name in Stats._fields[:-1]:
        got, want = getattr(stats, name), getattr(wanted, name)
        if want is not None:
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5, equal_nan=True, msg=name)
    # The tiny log-prob of a saturated row has its own accuracy.
    torch.testing.assert_close(stats.logps[3], wanted.logps[3], rtol=1e-4, atol=1e-12)
    cuda.grad(tile, labels, 0, stats.lse, stats.logps, d, transform)
    torch.testing.assert_close(out, d, rtol=1e-2, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("mode", ["stash", "recompute", "mixed", "frozen"])
@pytest.mark.parametrize("precision", ["exact", "fast"])
def test_margins_are_zero_at_step_zero(precision, mode):
    """A policy's pass writes D and a reference's does not; their log-probs are the same bits."""
    hidden = torch.randn(4, 9, 24, device=DEVICE).bfloat16().requires_grad_()
    weight = torch.randn(1003, 24, device=DEVICE).bfloat16().requires_grad_(mode != "frozen")
    labels = torch.randint(1003, (4, 9), device=DEVICE)
    labels[0, :4] = -100
    options = dict(backend="cuda", precision=precision, fused=False, softcap=9.0)
    policy = fastpref.linear_token_logps(
        hidden, weight, labels, strategy="auto" if mode == "frozen" else mode, **options
    )
    with torch.no_grad():
        reference = fastpref.linear_token_logps(hidden, weight, labels, **options)
    assert torch.equal(policy, reference)


def test_reads_and_writes_of_ready_logits(monkeypatch):
    """token_logps: a pass that reads in forward, one that reads and writes in place in backward."""
    passes = []
    for name in ("fold", "grad", "fold_grad"):
        real = getattr(cuda, name)
        monkeypatch.setattr(
            cuda, name, lambda *a, name=name, real=real: (passes.append((name, a)), real(*a))
        )
    logits = torch.randn(3, 5, 300, device=DEVICE).bfloat16().requires_grad_()
    inner = logits * 1
    labels = torch.randint(300, (3, 5), device=DEVICE)
    fastpref.token_logps(inner, labels, backend="cuda", inplace_backward=True).sum().backward()
    assert [name for name, _ in passes] == ["fold", "grad"]
    tile, out = passes[1][1][0], passes[1][1][5]
    assert tile.data_ptr() == out.data_ptr() == inner.data_ptr()


def test_the_passes_over_the_head_use_it(monkeypatch):
    """The same kernel whether D is wanted or not: margins are exactly 0 at step 0."""
    calls = []
    real = cuda.fold_grad
    monkeypatch.setattr(cuda, "fold_grad", lambda *a: (calls.append(a[4:]), real(*a)))
    hidden = torch.randn(40, 8, device=DEVICE).bfloat16().requires_grad_()
    weight = torch.randn(70, 8, device=DEVICE).bfloat16()
    labels = torch.randint(70, (40,), device=DEVICE)
    for precision, given in (("exact", False), ("fast", True)):
        options = dict(backend="cuda", precision=precision, fused=False)
        fastpref.linear_token_logps(hidden, weight, labels, **options)
        assert calls and all(d is not None for d, _ in calls)
        with torch.no_grad():
            fastpref.linear_token_logps(hidden, weight, labels, **options)
        assert calls.pop()[0] is None
        assert all((exact is not None) == given for _, exact in calls)
        calls.clear()


def test_it_says_what_it_is():
    status = next(s for s in backends.report() if s.name == "cuda")
    assert status.works and "CUDA" in status.reason
    assert "meta" in str(cuda.unavailable_reason(torch.device("meta"), torch.float32))
    assert "backend='eager'" in str(cuda.unavailable_reason(DEVICE, torch.float64))


def test_tanh():
    """To 4e-7 of its size, however small; 1 to the last bit from 8 on; edges as torch has them."""
    x = torch.cat([torch.linspace(0, 10, 1500), 10 * 2.0 ** torch.linspace(-60, 0, 1500)])
    x = torch.cat([x, -x, torch.tensor([0.0, torch.inf, -torch.inf, torch.nan, 1e30])]).to(DEVICE)
    stats = _stats(len(x), ())
    labels = torch.zeros(len(x), dtype=torch.int64, device=DEVICE)
    cuda.fold(x[:, None].contiguous(), labels, 0, stats, Transform(softcap=1.0))
    truth = torch.tanh(x.double())
    torch.testing.assert_close(stats.target.double(), truth, rtol=4e-7, atol=0, equal_nan=True)
    assert (stats.target[x >= 8] == 1).all() and (stats.target[x <= -8] == -1).all()
