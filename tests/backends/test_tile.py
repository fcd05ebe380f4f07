"""The tile primitives of each backend against float64."""

from __future__ import annotations

import math

import machine
import oracle
import pytest
import torch

from fastpref.backends.stats import EXTRAS, Stats
from fastpref.backends.tile import Transform
from fastpref.logps.forward import in_place

SHAPES = [(1, 1, 1), (7, 5, 3), (70, 4001, 64)]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
TRANSFORMS = {
    "plain": {},
    "negative": {"scale": -1.5},
    "all": {"scale": 0.7, "softcap": 11.0, "temperature": 1.3},
}


def _wide(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def _tile(n, vocab, dtype, spread=4.0):
    """Raw logits in rows that are a slice of wider ones, as a stash or a padded head gives them."""
    return (torch.randn(n, vocab + 3) * spread).to(dtype)[:, 1 : vocab + 1]


def _labels(n, vocab):
    return torch.randint(vocab, (n,))


def _few(tiles, n):
    return machine.sized(tiles.NAME, n, min(n, 6))


def _cuts(vocab):
    """Uneven vocabulary tiles, one of them empty and one a single column wide."""
    inner = sorted({0, vocab // 7, vocab // 7 + 1, vocab // 2, vocab})
    return list(zip([0, *inner], [*inner, vocab], strict=True))


def _fold(tiles, tile, labels, transform, cuts=None, extras=EXTRAS) -> Stats:
    stats = Stats.empty(tile.shape[0], tile.device, _wide(tile.dtype), extras)
    for a, b in cuts or [(0, tile.shape[1])]:
        tiles.fold(tile[:, a:b], labels, a, stats, transform)
    return stats


def _values(stats: Stats, labels, vocab) -> dict:
    return {
        "logps": stats.logps,
        "entropy": stats.entropy(),
        "mean_logit": stats.total / vocab,
        "log_sum_sq_probs": stats.log_sum_sq_probs(),
        "is_top1": stats.argmax == labels,
    }


def _assert_close(got, truth, dtype, unit=1.0):
    """Within some rounding errors of the statistics' dtype, at the size of the logits."""
    eps = torch.finfo(_wide(dtype)).eps
    torch.testing.assert_close(got.double(), truth, rtol=8 * eps, atol=16 * eps * unit)


@pytest.mark.parametrize("whole", [True, False], ids=["whole", "uneven"])
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n, vocab, _", SHAPES)
def test_fold(tiles, n, vocab, _, dtype, transform, whole):
    options, n = TRANSFORMS[transform], _few(tiles, n)
    tile, labels = _tile(n, vocab, dtype), _labels(n, vocab)
    z = oracle.transform(tile, **options)
    labels[n // 2 :] = z.argmax(1)[n // 2 :]  # half of the rows are right
    truth = oracle.token_stats(z, labels)
    before = tile.clone()
    stats = _fold(tiles, tile, labels, Transform(**options), None if whole else _cuts(vocab))
    got = _values(stats, labels, vocab)
    unit = float(z.abs().max())
    for name in ("logps", "entropy", "mean_logit", "log_sum_sq_probs"):
        _assert_close(got[name], getattr(truth, name), dtype, unit)
    _assert_close(stats.lse, torch.logsumexp(z, 1), dtype, unit)
    assert torch.equal(got["is_top1"], truth.is_top1)
    assert torch.equal(tile, before)
    assert (stats.logps <= 0).all()


@pytest.mark.parametrize("cuts", [None, [(0, 3), (3, 4), (4, 8)]], ids=["whole", "tiles"])
def test_the_first_of_equal_maxima_is_top1(tiles, cuts):
    tile = torch.tensor([[1.0, 5, 2, 5, 5, 0, 5, 1]]).repeat(3, 1)
    labels = torch.tensor([1, 3, 6])
    stats = _fold(tiles, tile, labels, Transform(), cuts)
    assert (stats.argmax == labels).tolist() == [True, False, False]


def _gradient_truth(tile, labels, options, coef, entropy_coef):
    """The gradient of sum(coef logp + entropy_coef entropy) in the raw logits, by autograd."""
    raw = tile.detach().clone().double().requires_grad_()
    stats = oracle.token_stats(oracle.transform(raw, **options), labels)
    total = (coef.double() * stats.logps).sum()
    if entropy_coef is not None:
        total = total + (entropy_coef.double() * stats.entropy).sum()
    return torch.autograd.grad(total, raw)[0]


@pytest.mark.parametrize("with_entropy", [False, True], ids=["logps", "entropy"])
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize(
    "dtype, out_dtype",
    [(d, d) for d in DTYPES]
    + [(torch.float32, torch.bfloat16), (torch.float32, torch.float16)]
    + [(torch.bfloat16, torch.float32), (torch.float16, torch.float32)],
    ids=str,
)
@pytest.mark.parametrize("n, vocab, _", SHAPES)
def test_grad(tiles, n, vocab, _, dtype, out_dtype, transform, with_entropy):
    """D in any dtype, rounded once, whole or in vocabulary tiles, in place or not."""
    options, wide, n = TRANSFORMS[transform], _wide(dtype), _few(tiles, n)
    tile, labels = _tile(n, vocab, dtype), _labels(n, vocab)
    labels[n // 3] = -1
    coef = torch.randn(n, dtype=wide)
    entropy_coef = torch.randn(n, dtype=wide) if with_entropy else None
    truth = _gradient_truth(tile, labels.clamp(min=0), options, coef, entropy_coef)
    truth[labels < 0] = 0
    # The tile's own statistics, rounded to their dtype: what is left is the error of grad.
    stats = oracle.token_stats(oracle.transform(tile, **options), labels.clamp(min=0))
    lse = torch.logsumexp(oracle.transform(tile, **options), 1).to(wide)
    logps, entropy = stats.logps.to(wide), stats.entropy.to(wide) if with_entropy else None
    args = Transform(**options), coef, entropy, entropy_coef

    out = torch.full((n, vocab + 5), math.nan, dtype=out_dtype)[:, 2 : vocab + 2]
    tiles.grad(tile, labels, 0, lse, logps, out, *args)
    unit = float(oracle.transform(tile, **options).abs().max()) * float(truth.abs().max() + 1)
    eps, finest = torch.finfo(wide).eps, torch.finfo(out_dtype)
    bound = truth.abs() * (finest.eps / 2 + 8 * eps) + 4 * eps * unit + finest.smallest_normal
    oracle.assert_within(out, truth, bound)

    pieces = torch.full_like(out, math.nan)
    for a, b in _cuts(vocab):
        tiles.grad(tile[:, a:b], labels, a, lse, logps, pieces[:, a:b], *args)
    oracle.assert_within(pieces, truth, bound)
    if out_dtype.itemsize <= dtype.itemsize:
        memory = torch.zeros(n, vocab + 3, dtype=dtype)
        memory[:, :vocab] = tile
        inplace = in_place(memory[:, :vocab], out_dtype)
        tiles.grad(memory[:, :vocab], labels, 0, lse, logps, inplace, *args)
        assert torch.equal(inplace, out)
        assert (memory[:, vocab:] == 0).all()  # nothing beyond the rows was touched


@pytest.mark.parametrize("masked", [[0], [1, 2, 3], list(range(0, 40)), list(range(40, 60))])
@pytest.mark.parametrize("cuts", [None, [(0, 40), (40, 41), (41, 60)]], ids=["whole", "tiles"])
def test_masked_vocabulary(tiles, masked, cuts):
    """Logits of -inf, of a whole vocabulary tile too, have probability 0 and add no NaN."""
    tile, labels = torch.randn(6, 60) * 3, torch.tensor([39, 41, 45, 50, 55, 59])
    tile[:, masked] = -math.inf
    labels[torch.isin(labels, torch.tensor(masked))] = 39 if 39 not in masked else 59
    truth = oracle.token_stats(tile, labels)
    stats = _fold(tiles, tile, labels, Transform(), cuts, ("entropy", "log_sum_sq_probs"))
    for name in ("logps", "entropy", "log_sum_sq_probs"):
        _assert_close(_values(stats, labels, 60)[name], getattr(truth, name), torch.float32, 10)
    out = torch.full_like(tile, math.nan)
    ones = torch.ones(6)
    args = stats.lse, stats.logps, out, Transform(), ones, stats.entropy(), ones
    tiles.grad(tile, labels, 0, *args)
    assert (out[:, masked] == 0).all()
    expected = _gradient_truth(tile, labels, {}, ones, ones)
    expected[:, masked] = 0  # autograd has 0 * inf there
    _assert_close(out, expected, torch.float32, 10)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_bad_logit_spoils_its_own_row_only(tiles, dtype, bad):
    tile, labels = _tile(5, 300, dtype), _labels(5, 300)
    clean = _fold(tiles, tile, labels, Transform())
    spoilt = tile.clone()
    spoilt[2, 170] = bad
    stats = _fold(tiles, spoilt, labels, Transform())
    assert stats.logps[2].isnan()
    others = [0, 1, 3, 4]
    assert torch.equal(stats.logps[others], clean.logps[others])
    out = torch.zeros_like(spoilt)
    tiles.grad(spoilt, labels, 0, stats.lse, stats.logps, out, Transform())
    assert out[2].isnan().any() and out[others].isfinite().all()


@pytest.mark.parametrize("bad", [0.0, math.nan, math.inf])
def test_ignored_rows_have_no_gradient(tiles, bad):
    tile, labels = torch.randn(4, 100), torch.tensor([3, -1, 99, -100])
    tile[1] = bad
    stats = _fold(tiles, tile, labels, Transform())
    out = torch.full_like(tile, math.nan)
    tiles.grad(tile, labels, 0, stats.lse, stats.logps, out, Transform())
    assert (out[[1, 3]] == 0).all() and out.isfinite().all()


@pytest.mark.few
@pytest.mark.parametrize("gap", [5.0, 9.0, 11.0, 14.0, 20.0, 100.0, 1e4])
@pytest.mark.parametrize("level", [0.0, 30.0, -30.0])
def test_saturated_rows(tiles, gap, level):
    """A confident label keeps its gradient: its log-prob is a difference to the maximum."""
    tile = torch.randn(8, 500) * 0.1 + level
    labels = _labels(8, 500)
    tile.scatter_(1, labels[:, None], level + gap)
    truth = oracle.token_stats(tile, labels).logps
    stats = _fold(tiles, tile, labels, Transform())
    logps = stats.logps
    eps = torch.finfo(torch.float32).eps
    assert (logps <= 0).all()
    oracle.assert_within(logps, truth, 4 * eps * (1 + truth.abs()))
    out = torch.full_like(tile, math.nan)
    tiles.grad(tile, labels, 0, stats.lse, logps, out, Transform())
    entry = out.gather(1, labels[:, None])[:, 0].double()
    torch.testing.assert_close(entry, -torch.expm1(logps.double()), rtol=2 * eps, atol=0)


PRODUCTS = [(d, d) for d in DTYPES] + [
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float32),
]


def _rows(n, h, dtype):
    return torch.randn(n, h + 3).to(dtype)[:, 2 : h + 2]


@pytest.mark.parametrize("product", ["linear", "project", "outer"])
@pytest.mark.parametrize("dtype, out_dtype", PRODUCTS, ids=str)
@pytest.mark.parametrize("n, vocab, h", [*SHAPES, (0, 5, 3)])
def test_products(tiles, n, vocab, h, dtype, out_dtype, product):
    """Sums in at least fp32 over the whole length, rounded once to the output's dtype."""
    a, b, length = {
        "linear": (_rows(n, h, dtype), _rows(vocab, h, dtype), h),
        "project": (_rows(n, vocab, dtype), _rows(vocab, h, dtype), vocab),
        "outer": (_rows(n, vocab, dtype), _rows(n, h, dtype), n),
    }[product]
    left = a.double().t() if product == "outer" else a.double()
    right = b.double().t() if product == "linear" else b.double()
    truth, size = left @ right, left.abs() @ right.abs()
    out = torch.full((truth.shape[0], truth.shape[1] + 2), math.nan, dtype=out_dtype)[:, :-2]
    getattr(tiles, product)(a, b, out)
    wide = torch.finfo(_wide(dtype)).eps
    once = torch.finfo(out_dtype).eps / 2 if out_dtype.itemsize == 2 else wide
    bound = once * truth.abs() * 1.01 + wide * math.sqrt(length + 4) * size + 1e-7 * (once > wide)
    oracle.assert_within(out, truth, bound)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_rows_that_lie_further_apart_than_an_int32_reaches(tiles, dtype):
    """Address arithmetic is 64-bit: three rows 2^30 + 3 elements apart, in memory that the system
    maps lazily, so that only the pages of the rows exist."""
    n, vocab, stride = 3, 1000, 2**30 + 3
    try:
        far = torch.empty(2 * stride + vocab, dtype=dtype).as_strided((n, vocab), (stride, 1))
    except RuntimeError:
        pytest.skip("this machine does not hand out so many addresses")
    near, labels = _tile(n, vocab, dtype), _labels(n, vocab)
    far.copy_(near)
    stats, expected = (_fold(tiles, t, labels, Transform()) for t in (far, near))
    assert torch.equal(stats.logps, expected.logps)
    for out in (torch.zeros_like(near), far):
        tiles.grad(far, labels, 0, expected.lse, expected.logps, out, Transform())
    assert torch.equal(out, far)
    tiles.grad(near, labels, 0, expected.lse, expected.logps, near, Transform())
    assert torch.equal(far, near)
    x = _rows(4, vocab, dtype)
    logits = torch.full((4, n), math.nan)
    same = logits.clone()
    tiles.linear(x, far, logits)
    tiles.linear(x, near, same)
    assert torch.equal(logits, same)
