"""The native module: what it computes bit by bit, and its boundary."""

from __future__ import annotations

import math
import os
from pathlib import Path

import oracle
import pytest
import torch

import fastpref
from fastpref.backends import native
from fastpref.backends.stats import EXTRAS, Stats
from fastpref.backends.tile import Transform

needs_native = pytest.mark.skipif(native.problem() is not None, reason=str(native.problem()))


def _bits(t: torch.Tensor) -> torch.Tensor:
    return t.view({2: torch.int16, 4: torch.int32}[t.element_size()])


@needs_native
def test_it_is_the_build_that_was_asked_for():
    """`make sanitize` would prove nothing with the ordinary module."""
    module = Path(native._cpu.__file__)
    assert module.parent == Path(fastpref.__file__).parent
    for name in os.environ.get("FASTPREF_EXPECT_SANITIZED", "").split():
        assert f"__{name}_init".encode() in module.read_bytes()


@needs_native
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_16_bit_number_is_read_exactly(dtype):
    codes = torch.arange(-(2**15), 2**15, dtype=torch.int16)[:, None]
    tile, labels = codes.view(dtype), torch.zeros(2**16, dtype=torch.int64)
    stats = Stats.empty(2**16, tile.device, torch.float32)
    native.fold(tile, labels, 0, stats, Transform())
    assert torch.equal(stats.target.nan_to_num(12345), tile[:, 0].float().nan_to_num(12345))


@needs_native
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_rounding_is_to_nearest_even(dtype):
    """D of a label with log-prob -inf is 1, so grad writes the coefficients themselves."""
    random = torch.randint(-(2**31), 2**31 - 1, (2**17,)).to(torch.int32).view(torch.float32)
    exponent = torch.randint(-26, 18, (2**17,))
    near = torch.randn(2**17) * 2.0**exponent  # where fp16 lives: subnormals to overflow
    # Halfway between two neighbours, and next to it.
    base = torch.arange(0, 2**15, dtype=torch.int16).view(dtype).float()
    ties = (base[1:] + base[:-1]) / 2
    up, down = torch.nextafter(ties, ties + 1), torch.nextafter(ties, ties - 1)
    values = torch.cat([random, near, ties, -ties, up, down])
    n = values.shape[0]
    out = torch.empty(n, 2, dtype=dtype)
    one, labels = torch.full((n,), -torch.inf), torch.zeros(n, dtype=torch.int64)
    native.grad(torch.zeros(n, 2), labels, 0, -one, one, out, Transform(), values)
    expected = values.to(dtype)
    assert torch.equal(out[:, 0].isnan(), expected.isnan())
    kept = ~expected.isnan()
    assert torch.equal(_bits(out[:, 0])[kept], _bits(expected)[kept])


@needs_native
@pytest.mark.parametrize("softcap", [None, 20.0])
def test_exponential_and_hyperbolic_tangent(softcap):
    """Over their whole range, through the probabilities of a two-entry vocabulary."""
    z = torch.linspace(-120, 120, 200_001)
    tile = torch.stack([torch.zeros_like(z), z], 1)
    n, labels = z.shape[0], torch.zeros(z.shape[0], dtype=torch.int64)
    zero, out = torch.zeros(n), torch.empty(n, 2)
    # lse 0 and coefficient -1: the second entry is exp(z) d z / d raw.
    native.grad(tile, labels, 0, zero, zero, out, Transform(softcap=softcap), -torch.ones(n))
    raw = z.double()
    if softcap is None:
        truth, sane = raw.exp(), (z < 88) & (z > -87)
    else:
        tanh = torch.tanh(raw / softcap)
        truth, sane = (softcap * tanh).exp() * (1 - tanh**2), z.abs() < 60
    relative = (out[:, 1].double() - truth)[sane] / truth[sane]
    assert relative.abs().max() < (2e-7 if softcap is None else 2e-3)
    assert (out[z < -88][:, 1] < 1e-30).all() or softcap
    stats = Stats.empty(n, z.device, torch.float32)
    native.fold(tile, labels + 1, 0, stats, Transform(softcap=softcap))
    oracle.assert_within(stats.target, oracle.transform(raw, softcap=softcap), 1e-5)


@needs_native
@pytest.mark.parametrize("softcap", [1.0, 30.0])
def test_hyperbolic_tangent_of_small_numbers(softcap):
    """It is exact relative to its size, however small, and where its two formulas meet."""
    z = torch.logspace(-9, 2, 100_001) * torch.tensor([1.0, -1.0])[torch.arange(100_001) % 2]
    tile, n = torch.stack([z, z], 1), z.shape[0]
    stats = Stats.empty(n, z.device, torch.float32)
    labels = torch.zeros(n, dtype=torch.int64)
    native.fold(tile, labels, 0, stats, Transform(softcap=softcap))
    truth = oracle.transform(z, softcap=softcap)
    oracle.assert_within(stats.target, truth, 4e-7 * truth.abs())


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_threads(threads, dtype):
    """More threads than rows, fewer, none to spare: the same bits."""
    n, vocab = 13, 3001
    tile, labels = (torch.randn(n, vocab) * 5).to(dtype), torch.randint(vocab, (n,))
    results = []
    for count in (1, 2, 5, 32, 64):
        threads(count)
        stats = Stats.empty(n, tile.device, torch.float32, EXTRAS)
        native.fold(tile, labels, 0, stats, Transform(softcap=9.0))
        out = torch.full_like(tile, torch.nan)
        args = stats.lse, stats.logps, out, Transform(softcap=9.0), torch.ones(n)
        native.grad(tile, labels, 0, *args, stats.entropy(), torch.ones(n))
        results.append([*stats, out])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@needs_native
def test_the_sizes_that_memory_is_planned_with():
    assert (native.COLUMN_BLOCK, native.SLICE) == (native._cpu.column_block, native._cpu.slice)


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("trains", [False, True])
def test_a_block_of_minus_infinity_beside_an_unlikely_label(dtype, trains):
    """The row has no base for that block, and its normaliser is far from 0."""
    hidden, weight = torch.ones(1, 1).to(dtype), torch.full((1100, 1), -300.0).to(dtype)
    weight[0] = -900  # the label
    bias = torch.zeros(1100).to(dtype)
    bias[512:1024] = -math.inf
    hidden.requires_grad_()
    weight.requires_grad_(trains)
    options = {"backend": "native", "fused": True}
    logps = fastpref.linear_token_logps(hidden, weight, torch.tensor([0]), bias, **options)
    logps.sum().backward()
    for t in (logps, hidden.grad, weight.grad if trains else logps):
        assert t.isfinite().all()
    oracle.assert_within(logps.detach(), torch.tensor([-600 - math.log(587)]), 1e-3)


@needs_native
@pytest.mark.parametrize("trains", [False, True])
@pytest.mark.parametrize("vocab", [1, 40, 1100])
@pytest.mark.parametrize("label_logit", [-2e4, 600.0, 800.0, 2e4])
def test_a_label_beside_which_nothing_else_is_possible(label_logit, vocab, trains):
    """No other exponential is above 0, however far the label's logit is from 0."""
    hidden = torch.ones(1, 1, requires_grad=True)
    weight = torch.full((vocab, 1), label_logit - 200).requires_grad_(trains)
    weight.data[vocab // 2] = label_logit
    for bias in (None, torch.full((vocab,), -math.inf).index_fill(0, torch.tensor(vocab // 2), 0)):
        options = {"backend": "native", "fused": True, "extras": ["entropy", "is_top1"]}
        out = fastpref.linear_token_logps(
            hidden, weight, torch.tensor([vocab // 2]), bias, **options
        )
        gradients = torch.autograd.grad(out.logps.sum(), [hidden, weight] if trains else [hidden])
        assert out.logps == 0 and out.is_top1 and abs(out.entropy) < 1e-6
        assert not any(g.any() for g in gradients)


# Logits of a row over blocks of 512, as functions of the columns' numbers; 3 is the label.
_ROWS = {
    "nan beside the label": lambda j: torch.where(j == 5, math.nan, 0.0),
    "nan in another block": lambda j: torch.where(j == 700, math.nan, 0.0),
    "nan label": lambda j: torch.where(j == 3, math.nan, 0.0),
    "inf": lambda j: torch.where(j == 700, math.inf, 0.0),
    "inf label": lambda j: torch.where(j == 3, math.inf, 0.0),
    "-inf label": lambda j: torch.where(j == 3, -math.inf, -900.0),
    "-inf label and block": lambda j: torch.where((j == 3) | (j >= 512), -math.inf, -900.0),
    "all -inf": lambda j: torch.full_like(j, -math.inf, dtype=torch.float32),
    "-inf but for the label": lambda j: torch.where(j == 3, 0.0, -math.inf),
    "-inf but for another": lambda j: torch.where(j == 700, 0.0, -math.inf),
    "1e4": lambda j: (j % 3 - 1) * 1e4,
    "1e30": lambda j: torch.where(j == 3, 1e30, torch.where(j == 700, -1e30, 0.0)),
    "-1e30 label": lambda j: torch.where(j == 3, -1e30, torch.where(j == 700, 1e30, 0.0)),
    "label of 1e-300": lambda j: torch.where(j == 3, -690.0, 0.0),
    "at the limit": lambda j: torch.where(j == 3, 0.0, torch.where(j == 700, 83.2, 83.1)),
}


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("trains", [False, True])
@pytest.mark.parametrize("row", _ROWS)
def test_rows_of_extreme_logits(row, trains, dtype):
    """As float64 has them, and no number where that has none."""
    vocab = 1100
    bias = _ROWS[row](torch.arange(vocab)).float().to(dtype)
    inputs = [torch.randn(1, 2).to(dtype), (torch.randn(vocab, 2) * 0.3).to(dtype)]
    found = []
    for name, wide in (("eager", torch.float64), ("eager", dtype), ("native", dtype)):
        hidden, weight = (t.to(wide).requires_grad_() for t in inputs)
        weight.requires_grad_(trains)
        options = {"backend": name} | ({"fused": True} if name == "native" else {})
        logps = fastpref.linear_token_logps(
            hidden, weight, torch.tensor([3]), bias.to(wide), **options
        )
        leaves = [hidden, weight] if trains else [hidden]
        found.append([logps.detach(), *torch.autograd.grad(logps.sum(), leaves)])
    for truth, theirs, ours in zip(*found, strict=True):
        finite = truth.isfinite()
        assert torch.equal(ours.isfinite(), finite)
        if finite.any():
            allowed = 2 * (theirs - truth)[finite].abs().max() + 1e-5 * (
                1 + truth[finite].abs().max()
            )
            oracle.assert_within(ours[finite], truth[finite], float(allowed))


@needs_native
def test_the_names_of_the_losses():
    assert native.PAIR_FORMS == native._cpu.pair_forms


@needs_native
def test_what_the_module_refuses():
    """Codes that it does not know; everything else is checked in Python, where the tensors are."""
    n = torch.zeros(4, dtype=torch.int64)
    x, p = torch.zeros(4, 4), torch.zeros(4).data_ptr()
    fold = [x.data_ptr(), 3, 4, 4, 4, 0, n.data_ptr(), 1.0, 0.0, 1.0, *[p] * 5, 0, 0, 0, 0, 1]
    with pytest.raises(ValueError, match="dtype"):
        native._cpu.fold(*fold)
    with pytest.raises(ValueError, match="tile"):
        native._cpu.fold(*[x.data_ptr(), 0, -1, *fold[3:]])
    with pytest.raises(ValueError, match="loss"):
        native._cpu.pair_loss(16, 0, 0, *[0] * 6, *[0.1] * 4, *[0] * 4)
    with pytest.raises(TypeError):
        native._cpu.fold(x)


@needs_native
@pytest.mark.parametrize(
    "tile, labels",
    [
        (torch.zeros(4, 8).t(), torch.zeros(8).long()),  # columns that are not adjacent
        (torch.zeros(4, 8), torch.zeros(3).long()),  # a label too few
        (torch.zeros(4, 8), torch.zeros(4).int()),
        (torch.zeros(4, 8), torch.zeros(8).long()[::2]),
        (torch.zeros(4, 8, device="meta"), torch.zeros(4).long()),
    ],
)
def test_what_the_boundary_refuses(tile, labels):
    stats = Stats.empty(tile.shape[0], torch.device("cpu"), torch.float32)
    with pytest.raises(AssertionError):
        native.fold(tile, labels, 0, stats, Transform())
    with pytest.raises(AssertionError):
        out = torch.zeros_like(tile)
        native.grad(tile, labels, 0, stats.max, stats.sum, out, Transform())
