"""The native products: every kernel of the processor, and any number of threads."""

from __future__ import annotations

import os
import signal

import oracle
import pytest
import torch

from fastpref.backends import native
from fastpref.backends.stats import Stats
from fastpref.backends.tile import Transform

needs_native = pytest.mark.skipif(native.problem() is not None, reason=str(native.problem()))


def _fold_and_product() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    x, weight = (torch.randn(n, 20, generator=generator) for n in (9, 70))
    tile = torch.empty(9, 70)
    native.own_product(x, weight, tile)
    stats = Stats.empty(9, tile.device, torch.float32)
    native.fold(tile, torch.arange(9), 0, stats, Transform())
    d, index = torch.randn(9, 5000, generator=generator), torch.arange(6)
    *sums, row_sums = native.column_sums(d, None)
    g, u, ones = torch.empty(9, 7), torch.empty(9, 20), torch.ones(6)
    rest = native.gather_columns(d, index, ones == 1, ones, 0 * ones, row_sums, g)
    means = native.weighted_rows(torch.ones(2, 70), weight)
    native.project_rows(g, weight, index, means[0], torch.empty(7, 20), u)
    return [tile, stats.logps, *sums, row_sums, g, rest, means, u]


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
BF16_KERNELS = {"avx512_bf16", "amx_bf16"}  # which multiply bf16 and nothing else
CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def _needs_kernel(name, dtype):
    if native.problem() or name not in native._cpu.product_kernels(CODES[dtype]):
        pytest.skip(f"the processor has no kernel {name} for {dtype}")


def _operand(rows, k, transposed, dtype):
    """[rows, k] inside something larger, with either stride being 1."""
    t = torch.randn(k, rows + 2) if transposed else torch.randn(rows, k + 3)
    t = t.to(dtype)
    return t[:, :rows].t() if transposed else t[:, :k]


def _product(a, b, name, out_dtype, threads=1, index=None, last=None):
    """a b^T, or a b[:, index]^T, from the kernel, after a look at what is beside it."""
    out = torch.full((a.shape[0] + 1, b.shape[0] + 3), torch.nan, dtype=out_dtype)
    strides = a.data_ptr(), *a.stride(), b.data_ptr(), *b.stride(), CODES[a.dtype]
    sizes = out.data_ptr(), CODES[out_dtype], out.stride(0), a.shape[0], b.shape[0], a.shape[1]
    columns = (0 if t is None else t.data_ptr() for t in (index, last))
    native._cpu.product(*strides, *sizes, *columns, name, threads)
    assert out[a.shape[0] :].isnan().all() and out[:, b.shape[0] :].isnan().all()
    return out[:-1, :-3]


@pytest.mark.only_if(lambda name, dtype, **_: name not in BF16_KERNELS or dtype == torch.bfloat16)
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


@pytest.mark.only_if(lambda name, dtype, **_: name not in BF16_KERNELS or dtype == torch.bfloat16)
@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("dtype", CODES, ids=str)
@pytest.mark.parametrize("m, n, k", [(1, 1, 1), (7, 65, 513), (13, 130, 1031)])
def test_product_of_scattered_columns(m, n, k, dtype, name):
    """The bits of the product with these columns side by side."""
    _needs_kernel(name, dtype)
    b, last = _operand(n, 90, True, dtype), torch.randn(n).to(dtype)
    index = torch.randint(90, (k,))
    for transposed in (False, True):
        a = _operand(m, k, transposed, dtype)
        taken = b[:, index]
        assert torch.equal(
            _product(a, b, name, torch.float32, 2, index), _product(a, taken, name, torch.float32)
        )
        taken[:, -1] = last
        assert torch.equal(
            _product(a, b, name, dtype, 2, index, last), _product(a, taken, name, dtype)
        )


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
def test_a_kernel_that_is_not_there():
    with pytest.raises(ValueError, match="no kernel named sse9"):
        _product(torch.zeros(2, 3), torch.zeros(2, 3), "sse9", torch.float32)


@needs_native
def test_scattered_columns_need_a_stride():
    with pytest.raises(ValueError, match="stride of 1"):
        index = torch.arange(3)
        _product(torch.zeros(2, 3), torch.zeros(2, 3), "portable", torch.float32, 1, index)
