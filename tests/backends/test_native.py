"""The native module: what it computes bit by bit, its boundary, and doing without it."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import machine
import oracle
import pytest
import torch

import fastpref
from fastpref import backends
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


def _fold_and_product() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    x, weight = (torch.randn(n, 20, generator=generator) for n in (9, 70))
    tile = torch.empty(9, 70)
    native.own_product(x, weight, tile)
    stats = Stats.empty(9, tile.device, torch.float32)
    native.fold(tile, torch.arange(9), 0, stats, Transform())
    d, index = torch.randn(9, 5000, generator=generator), torch.arange(6)
    *sums, row_sums = native.column_sums(d, None)
    g, rows, ones = torch.empty(9, 7), torch.empty(7, 20), torch.ones(6)
    rest = native.gather_columns(d, index, ones == 1, ones, 0 * ones, row_sums, g)
    mean = native.weighted_rows(torch.ones(70), weight)
    native.gather_rows(weight, index, mean, rows)
    return [tile, stats.logps, *sums, row_sums, g, rest, mean, rows]


@needs_native
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_forked_process_takes_one_thread(threads):
    """Its parent's threads are not there: OpenMP would wait for them for ever."""
    threads(2)
    here = _fold_and_product()
    receive, send = os.pipe()
    child = os.fork()
    if child == 0:
        signal.alarm(60)  # instead of waiting for ever
        same = all(torch.equal(a, b) for a, b in zip(here, _fold_and_product(), strict=True))
        os.write(send, b"same" if same and native._threads() == 1 else b"other")
        os._exit(0)
    os.close(send)
    assert os.waitpid(child, 0)[1] == 0
    assert os.read(receive, 8) == b"same"
    os.close(receive)
    assert native._threads() == 2


@needs_native
def test_products_with_more_threads_than_cores(threads):
    """The same bits with 2 to 64."""
    results = []
    for count in (1, 2, 3, 8, 64):
        threads(count)
        results.append(_fold_and_product())
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


KERNELS = ["portable", "neon", "avx2", "avx512", "avx512_bf16", "amx_bf16"]
CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def _needs_kernel(name, dtype):
    if native.problem() or name not in native._cpu.product_kernels(CODES[dtype]):
        pytest.skip(f"the processor has no kernel {name} for {dtype}")


def _operand(rows, k, transposed, dtype):
    """[rows, k] inside something larger, with either stride being 1."""
    t = torch.randn(k, rows + 2) if transposed else torch.randn(rows, k + 3)
    t = t.to(dtype)
    return t[:, :rows].t() if transposed else t[:, :k]


def _product(a, b, name, out_dtype, threads=1):
    """a b^T from the kernel, after a look at what is beside it."""
    out = torch.full((a.shape[0] + 1, b.shape[0] + 3), torch.nan, dtype=out_dtype)
    strides = a.data_ptr(), *a.stride(), b.data_ptr(), *b.stride(), CODES[a.dtype]
    sizes = out.data_ptr(), CODES[out_dtype], out.stride(0), a.shape[0], b.shape[0], a.shape[1]
    native._cpu.product(*strides, *sizes, name, threads)
    assert out[a.shape[0] :].isnan().all() and out[:, b.shape[0] :].isnan().all()
    return out[:-1, :-3]


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("dtype", CODES, ids=str)
@pytest.mark.parametrize(
    "m, n, k",
    [
        (1, 1, 1),
        (5, 63, 2),
        (7, 65, 513),
        (97, 130, 1031),
        (6, 64, 0),
        (150, 600, 31),
        (4, 9, 9001),
    ],
)
def test_product(threads, m, n, k, dtype, name):
    """Every combination of strides, edges in every direction, nothing written outside, and each
    result the same whatever the other rows, columns and threads are."""
    _needs_kernel(name, dtype)
    for transposed_a in (False, True):
        for transposed_b in (False, True):
            a, b = _operand(m, k, transposed_a, dtype), _operand(n, k, transposed_b, dtype)
            for out_dtype in {torch.float32, dtype}:
                out = _product(a, b, name, out_dtype)
                eps = torch.finfo(torch.float32).eps
                size = a.double().abs() @ b.double().abs().t()
                exact = a.double() @ b.double().t()
                bound = eps * (k + 4) ** 0.5 * size
                if out_dtype != torch.float32:  # rounded once
                    bound = bound + torch.finfo(dtype).eps * (exact.abs() + bound)
                oracle.assert_within(out, exact, bound)
                assert torch.equal(out, _product(a, b, name, out_dtype, 3))
                assert torch.equal(out[-1:], _product(a[-1:], b, name, out_dtype))
                assert torch.equal(out[:, n // 2 :], _product(a, b[n // 2 :], name, out_dtype))


@pytest.mark.parametrize("dtype", CODES, ids=str)
def test_product_of_a_long_sum(dtype, threads):
    """k beyond what is packed at once: sums wait for the rest, whatever the threads."""
    name = "avx2"
    _needs_kernel(name, dtype)
    a, b = (_operand(rows, 70_001, rows == 3, dtype) for rows in (9, 3))
    exact = a.double() @ b.double().t()
    for out_dtype in {torch.float32, dtype}:
        out = _product(a, b, name, out_dtype)
        bound = 2e-3 if out_dtype == torch.float32 else 2e-3 + torch.finfo(dtype).eps * exact.abs()
        oracle.assert_within(out, exact, bound)
        assert torch.equal(out, _product(a, b, name, out_dtype, 5))


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
def test_the_names_of_the_losses():
    assert native.PAIR_FORMS == native._cpu.pair_forms


@needs_native
def test_a_kernel_that_is_not_there():
    with pytest.raises(ValueError, match="no kernel named sse9"):
        _product(torch.zeros(2, 3), torch.zeros(2, 3), "sse9", torch.float32)


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


def test_forcing_a_backend(backend, monkeypatch):
    hidden, weight, labels = torch.randn(3, 4), torch.randn(5, 4), torch.tensor([0, 4, 2])
    seen = []

    def spy(module, real):
        def call(*args, **options):
            seen.append(module.NAME)
            real(*args, **options)

        return call

    for module in backends._MODULES.values():
        for name in ("fold_grad", "logit_free_forward"):
            monkeypatch.setattr(module, name, spy(module, getattr(module, name)))
    fastpref.linear_token_logps(hidden, weight, labels, backend=backend)
    monkeypatch.setenv("FASTPREF_BACKEND", backend)
    fastpref.linear_token_logps(hidden, weight, labels)
    assert backends.active(hidden.device) == backend
    monkeypatch.setenv("FASTPREF_BACKEND", "eager")
    fastpref.linear_token_logps(hidden, weight, labels, backend=backend)
    assert seen == [backend] * 3  # the argument wins
    monkeypatch.setenv("FASTPREF_BACKEND", "fast")
    with pytest.raises(ValueError, match="^FASTPREF_BACKEND: got 'fast', expected .*native"):
        fastpref.linear_token_logps(hidden, weight, labels)


@pytest.mark.parametrize("value", ["auto", ""])
def test_the_fastest_backend_that_works_is_chosen(monkeypatch, value):
    monkeypatch.setenv("FASTPREF_BACKEND", value)
    fastest = {"cpu": "native", "cuda": "triton"} if machine.HAS_GPU else {"cpu": "native"}
    for device, name in fastest.items():
        works = machine.why_not(name) is None
        assert backends.active(device) == (name if works else "eager")
        assert backends.active(device, torch.float64) == "eager"


def test_a_forced_backend_that_cannot_run_says_why(monkeypatch):
    wide = torch.randn(3, 4, dtype=torch.float64)
    labels = torch.zeros(3).long()
    with pytest.raises(RuntimeError, match="backend='native' cannot run here: "):
        fastpref.linear_token_logps(wide, wide, labels, backend="native")
    monkeypatch.setenv("FASTPREF_BACKEND", "native")
    with pytest.raises(RuntimeError, match="FASTPREF_BACKEND='native' cannot run here: "):
        fastpref.token_logps(wide, labels)
    with pytest.raises(RuntimeError, match="not built" if native.problem() else "meta"):
        backends.choose(torch.device("meta"), torch.float32)


def test_report():
    statuses = {s.name: s for s in backends.report()}
    assert list(statuses) == list(backends.NAMES)
    assert statuses["eager"].works and statuses["native"].works == (native.problem() is None)
    assert all(s.reason and s.devices for s in statuses.values())


MISSING = """
import sys, warnings
warnings.simplefilter("error")
sys.modules["fastpref._cpu"] = None  # what an import finds where it was not built
import torch, fastpref
from fastpref import backends
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    assert backends.active() == backends.active() == "eager"
assert len(said) == 1 and "plain torch" in str(said[0].message), said
x = torch.randn(4, 3, 8, requires_grad=True)
loss = fastpref.linear_dpo_loss(x, torch.randn(9, 8), torch.ones(4, 3).long(), torch.zeros(4)).loss
loss.backward()
try:
    backends.choose(torch.device("cpu"), torch.float32, "native")
except RuntimeError as error:
    assert "_cpu is not built" in str(error), error
else:
    raise AssertionError("native was forced and is missing")
assert not {"transformers", "triton", "datasets", "accelerate", "peft"} & set(sys.modules)
status = {s.name: s for s in backends.report()}["native"]
assert not status.works and "_cpu is not built" in status.reason and "compiler" in status.reason
print("ok")
"""


def test_without_the_module_eager_works_and_says_so():
    run = subprocess.run([sys.executable, "-c", MISSING], capture_output=True, text=True)
    assert run.stdout.strip() == "ok", run.stderr
