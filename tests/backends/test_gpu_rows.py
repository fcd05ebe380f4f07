"""The row kernels for GPUs and pair_loss, of Triton and of CUDA, where the tests shared by all
backends do not look: inside blocks and at their edges, and memory around the rows. Without a GPU
they run in Triton's interpreter and in tests/support/cuda_emulate."""

from __future__ import annotations

import math

import machine
import oracle
import pytest
import torch

from fastpref import backends
from fastpref.backends.stats import EXTRAS, Stats
from fastpref.backends.tile import Transform
from fastpref.logps.forward import in_place

EPS = torch.finfo(torch.float32).eps
ALL = Transform(scale=-0.7, softcap=11.0, temperature=1.3)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
DEVICE = machine.device_of("triton")


@pytest.fixture(params=["triton", "cuda"])
def backend(request):
    """The module of each backend for GPUs."""
    reason = machine.why_not(request.param)
    if reason is not None:
        pytest.skip(reason)
    return backends._MODULES[request.param]


def _fold(backend, tile, labels, transform=Transform(), extras=EXTRAS, cuts=None) -> Stats:  # noqa: B008
    stats = Stats.empty(tile.shape[0], tile.device, torch.float32, extras)
    for name in Stats._fields:  # whatever the memory held before
        if getattr(stats, name) is not None:
            getattr(stats, name).fill_(-7 if name == "argmax" else math.nan)
    for a, b in cuts or [(0, tile.shape[1])]:
        backend.fold(tile[:, a:b], labels, a, stats, transform)
    return stats


def _truth(tile, labels, transform):
    t = transform
    z = oracle.transform(tile.cpu(), t.scale, t.softcap, t.temperature)
    return z, oracle.token_stats(z, labels.cpu())


def _rows(n, vocab, dtype, aligned=True):
    """Logits whose rows have neighbours on both sides that would spoil whoever reads them."""
    room = vocab + (-vocab % 16) + 16
    start, width = (8, room + 8) if aligned else (3, room + 5)
    memory = torch.full((n, width), math.nan, dtype=dtype, device=DEVICE)
    tile = memory[:, start : start + vocab]
    tile.copy_(torch.randn(n, vocab) * 4)
    return memory, tile


# A row of each number of lanes: less than a block, exactly one, some and a part of one more.
WIDTHS = [1, 17, 300, 1024, 2049, 4096, 5000, 16384, 40000]


@pytest.mark.parametrize("aligned", [True, False], ids=["aligned", "unaligned"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab", WIDTHS)
def test_blocks(backend, vocab, dtype, aligned):
    """fold and grad over rows of every length class, next to memory that is not theirs."""
    n = 3
    memory, tile = _rows(n, vocab, dtype, aligned)
    before = memory.clone()
    labels = torch.tensor([0, vocab - 1, vocab // 2], device=DEVICE)
    transform = ALL if vocab in (300, 5000) else Transform()
    z, truth = _truth(tile, labels, transform)
    stats = _fold(backend, tile, labels, transform)
    unit = 16 * EPS * float(z.abs().max())
    for name, got in {
        "logps": stats.logps,
        "entropy": stats.entropy(),
        "mean_logit": stats.mean_logit(vocab),
        "log_sum_sq_probs": stats.log_sum_sq_probs(),
    }.items():
        wanted = getattr(truth, name)
        oracle.assert_within(got.cpu(), wanted, unit + 8 * EPS * wanted.abs())
    assert torch.equal((stats.argmax == labels).cpu(), truth.is_top1)
    assert torch.equal(memory.isnan(), before.isnan())

    coef, entropy_coef = torch.randn(n, device=DEVICE), torch.randn(n, device=DEVICE)
    for extra in (None, entropy_coef):
        args = None if extra is None else stats.entropy(), extra
        outs = []
        for out_dtype in {dtype, torch.bfloat16 if dtype == torch.float32 else dtype}:
            wide, out = _rows(n, vocab, out_dtype, aligned)
            out.fill_(7)
            margin = wide.isnan()
            backend.grad(tile, labels, 0, stats.lse, stats.logps, out, transform, coef, *args)
            assert torch.equal(wide.isnan(), margin)
            copy = memory.clone()
            start = 8 if aligned else 3
            inplace = in_place(copy, out_dtype)[:, start * dtype.itemsize // out_dtype.itemsize :]
            inplace = inplace[:, :vocab]
            copied = copy[:, start : start + vocab]
            backend.grad(copied, labels, 0, stats.lse, stats.logps, inplace, transform, coef, *args)
            assert torch.equal(inplace, out)
            assert copy[:, :start].isnan().all() and copy[:, start + vocab :].isnan().all()
            outs.append(out)
        raw = tile.detach().cpu().double().requires_grad_()
        _, s = _truth(raw, labels, transform)
        total = (coef.cpu().double() * s.logps).sum()
        if extra is not None:
            total = total + (extra.cpu().double() * s.entropy).sum()
        wanted = torch.autograd.grad(total, raw)[0]
        for out in outs:
            kind = torch.finfo(out.dtype)
            bound = wanted.abs() * (kind.eps / 2 + 16 * EPS) + kind.smallest_normal
            oracle.assert_within(out.cpu(), wanted, bound + unit * float(wanted.abs().max() + 1))


def test_extras_cost_no_bit(backend):
    """A policy that logs its entropy and a reference that does not agree to the last bit."""
    for dtype in DTYPES:
        _, tile = _rows(2, 5000, dtype)
        labels = torch.tensor([7, 4999], device=DEVICE)
        for transform in (Transform(), ALL):
            full, plain = (
                _fold(backend, tile, labels, transform, extras) for extras in (EXTRAS, ())
            )
            for name in ("max", "sum", "target", "lse", "logps"):
                assert torch.equal(getattr(full, name), getattr(plain, name))


@pytest.mark.parametrize("cuts", [None, [(0, 60), (60, 61), (61, 300)]], ids=["whole", "tiles"])
def test_labels_that_are_not_there(backend, cuts):
    """Beyond the vocabulary: NaN, and no label's entry in the gradient. Negative: all zero."""
    memory, tile = _rows(5, 300, torch.float32)
    labels = torch.tensor([0, 299, 300, 2**40, -100], device=DEVICE)
    stats = _fold(backend, tile, labels, cuts=cuts)
    assert stats.logps.isnan().tolist()[:4] == [False, False, True, True]
    assert stats.lse.isfinite().all()
    out = torch.full_like(tile, 7.0)
    for a, b in cuts or [(0, 300)]:
        rest = stats.lse, stats.logps, out[:, a:b], Transform()
        backend.grad(tile[:, a:b], labels, a, *rest)
    p = torch.softmax(tile.double(), 1)
    for row, label in enumerate(labels.tolist()[:4]):
        if label < 300:
            p[row, label] -= 1
    p[4] = 0
    oracle.assert_within(out, -p, 1e-5)
    memory[4] = math.nan  # an ignored row is not even read
    assert torch.equal(_fold(backend, tile, labels, cuts=cuts).logps[:2], stats.logps[:2])
    backend.grad(tile, labels, 0, stats.lse, stats.logps, out, Transform())
    assert (out[4] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_of_nothing_but_minus_infinity(backend, dtype):
    """In one tile of several, in several lanes' blocks, and in the whole row."""
    _, tile = _rows(3, 3000, dtype)
    tile[0, :1500] = -math.inf
    tile[1, 100:] = -math.inf
    tile[2] = -math.inf
    labels = torch.tensor([2000, 99, 5], device=DEVICE)
    _, truth = _truth(tile[:2], labels[:2], Transform())
    for cuts in (None, [(0, 1500), (1500, 3000)], [(0, 100), (100, 2999), (2999, 3000)]):
        stats = _fold(backend, tile, labels, cuts=cuts)
        oracle.assert_within(stats.logps[:2].cpu(), truth.logps, 1e-5)
        oracle.assert_within(stats.entropy()[:2].cpu(), truth.entropy, 1e-5)
        assert stats.logps[2].isnan() and (stats.sum[2] == 0) and stats.argmax[2] == 0
        out = torch.full_like(tile, 7.0)
        backend.grad(tile, labels, 0, stats.lse, stats.logps, out, Transform())
        assert (out[0, :1500] == 0).all() and (out[1, 100:] == 0).all() and out[:2].isfinite().all()


on_a_gpu = pytest.mark.skipif(not machine.HAS_GPU, reason="one thread at a time runs here")


@on_a_gpu
@pytest.mark.parametrize("vocab", [8192, 49152, 128256, 262144])
@pytest.mark.parametrize("n", [1, 7, 300])
def test_no_thread_writes_over_what_another_one_reads(backend, n, vocab):
    """The narrower gradient in place, many times over: the bits of the one that is not in place."""
    _, tile = _rows(n, vocab, torch.float32)
    labels = torch.randint(vocab, (n,), device=DEVICE)
    for transform in (Transform(), ALL):
        stats = _fold(backend, tile, labels, transform, ())
        out = torch.empty(n, vocab, dtype=torch.bfloat16, device=DEVICE)
        backend.grad(tile, labels, 0, stats.lse, stats.logps, out, transform)
        for _ in range(20):
            memory = tile.clone()
            inplace = in_place(memory, torch.bfloat16)
            backend.grad(memory, labels, 0, stats.lse, stats.logps, inplace, transform)
            assert torch.equal(inplace, out)


@on_a_gpu
def test_in_a_cuda_graph(backend):
    """Nothing waits for the GPU and all runs on the current stream."""
    _, tile = _rows(8, 5000, torch.float32)
    labels, ids = torch.arange(8, device=DEVICE), torch.arange(8, device=DEVICE) // 2
    stats = Stats.empty(8, DEVICE, torch.float32, EXTRAS)
    out = torch.empty_like(tile)

    def run():
        backend.fold(tile, labels, 0, stats, ALL)
        backend.grad(tile, labels, 0, stats.lse, stats.logps, out, ALL)
        return backend.pair_loss(stats.logps, ids, 2, None, loss_type="sigmoid", **PLAIN)

    run()  # compiled before the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    tile.copy_(torch.randn(8, 5000))
    graph.replay()
    replayed = [t.clone() for t in (*captured, out, stats.lse)]
    assert all(torch.equal(a, b) for a, b in zip(replayed, (*run(), out, stats.lse), strict=True))


def _pair_problem(tokens, pairs, order):
    ids = torch.randint(2 * pairs, (tokens,)) if pairs else torch.zeros(tokens).long()
    if order == "sorted":
        ids = ids.sort().values
    return -torch.rand(tokens, device=DEVICE) * 8, ids.to(DEVICE)


@pytest.mark.parametrize("order", ["sorted", "shuffled"])
@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo"])
@pytest.mark.parametrize("tokens, pairs", [(0, 0), (0, 3), (1, 1), (5000, 3), (3000, 300)])
def test_pair_loss(backend, tokens, pairs, loss_type, order):
    """Any number of tokens and pairs: fewer and more than one block of either has."""
    logps, ids = _pair_problem(tokens, pairs, order)
    ipo = loss_type == "ipo"
    ref, weight, margin = torch.randn(2 * pairs) * 5, torch.rand(pairs), torch.randn(pairs)
    lengths = torch.bincount(ids.cpu(), minlength=2 * pairs).float()
    given = dict(
        loss_type=loss_type,
        beta=0.2,
        label_smoothing=0.0 if ipo else 0.1,
        lengths=lengths.to(DEVICE) if ipo else None,
        weight=weight.to(DEVICE),
        margin=None if ipo else margin.to(DEVICE),
    )
    loss, sequences, rewards, coef = (
        t.cpu() for t in backend.pair_loss(logps, ids, pairs, ref.to(DEVICE), **given)
    )
    x = logps.cpu().double().requires_grad_()
    sums = torch.zeros(2 * pairs, dtype=torch.float64).index_add(0, ids.cpu(), x)
    ratio = sums - ref.double()
    if ipo:
        n = lengths.clamp(min=1)
        per_pair = oracle.ipo(ratio[:pairs], ratio[pairs:], 0.2, n[:pairs], n[pairs:])
    else:
        per_pair = oracle.dpo(ratio[:pairs], ratio[pairs:], 0.2, 0.1, margin.double())
    truth = (weight * per_pair).sum() / max(pairs, 1)
    wanted = torch.autograd.grad(truth, x)[0] if tokens else x.detach()
    close = dict(rtol=1e-6, atol=1e-6, check_dtype=False)
    torch.testing.assert_close(loss, truth.detach(), **close)
    torch.testing.assert_close(sequences, sums.detach(), **close)
    torch.testing.assert_close(rewards, 0.2 * ratio.detach(), **close)
    torch.testing.assert_close(coef, wanted, rtol=2e-6, atol=1e-7, check_dtype=False)


PLAIN = dict(beta=0.1, label_smoothing=0.0, lengths=None, weight=None, margin=None)


def test_pair_loss_at_step_zero(backend):
    """Policy and reference with the same log-probs cancel exactly; so do two equal runs."""
    logps, ids = _pair_problem(2500, 6, "shuffled")
    for loss_type in ("sigmoid", "ipo"):
        _, sums, _, _ = backend.pair_loss(logps, ids, 6, None, loss_type=loss_type, **PLAIN)
        first, second = (
            backend.pair_loss(logps, ids, 6, sums, loss_type=loss_type, **PLAIN) for _ in range(2)
        )
        assert (first[2] == 0).all()
        assert float(first[0]) == torch.tensor(math.log(2) if loss_type == "sigmoid" else 25.0)
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_pair_loss_of_bad_tokens(backend):
    """A NaN spoils its own pair's gradient, an id that there is not its own token's."""
    logps, ids = _pair_problem(100, 3, "shuffled")
    clean = backend.pair_loss(logps, ids, 3, None, loss_type="sigmoid", **PLAIN)[3]
    ids[0], ids[1] = 6, -1
    ids[2] = 4  # the pair of sequence 1
    logps[2] = math.nan
    loss, sums, _, coef = backend.pair_loss(logps, ids, 3, None, loss_type="sigmoid", **PLAIN)
    assert loss.isnan() and sums.isnan().tolist() == [False] * 4 + [True, False]
    spoilt = (ids == 1) | (ids == 4)
    spoilt[:2] = True
    assert torch.equal(coef.isnan(), spoilt) and clean.isfinite().all()


def test_extreme_margins(backend):
    """The loss keeps its relative accuracy where it is tiny, and overflows nowhere."""
    ids = torch.arange(8, device=DEVICE)
    scores = torch.tensor([300.0, 2000.0, -300.0, -5000.0], device=DEVICE)
    logps = torch.cat([scores, torch.zeros(4, device=DEVICE)])
    weight = torch.zeros(4, device=DEVICE)
    for pair, x in enumerate(0.1 * scores.double()):
        options = PLAIN | {"weight": weight.index_fill(0, torch.tensor(pair, device=DEVICE), 4.0)}
        loss, _, _, coef = backend.pair_loss(logps, ids, 4, None, loss_type="sigmoid", **options)
        truth = -torch.nn.functional.logsigmoid(x)
        torch.testing.assert_close(loss.double(), truth, rtol=1e-6, atol=1e-40)
        slope = -0.1 * torch.sigmoid(-x)
        torch.testing.assert_close(coef[pair].double(), slope, rtol=1e-6, atol=1e-40)
