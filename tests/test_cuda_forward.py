"""The CUDA forward pass for Hopper against the float64 oracle: on such a GPU, or emulated on the
CPU, where copies and products are functions but the pipeline between them is the GPU's.
"""

from __future__ import annotations

import math

import machine
import oracle
import pytest
import torch
from forward_problem import TRANSFORMS, check, confident, head

from fastpref.backends import cuda_forward, cuda_module
from fastpref.backends.tile import Stats, Transform

DEVICE = machine.device_of("cuda")
SENTINEL = 7.0


@pytest.fixture(autouse=True, scope="module")
def _works():
    reason = machine.why_not("cuda", [torch.bfloat16])
    if reason is not None:
        pytest.skip(reason)
    if machine.HAS_GPU and not cuda_module.forward_works(torch.cuda.current_device()):
        pytest.skip("it is for sm_90")


def run(x, weight, labels, bias=None, **transform):
    """(logps, lse) on the CPU; nothing may be written beside them."""
    n = x.shape[0]
    room = [torch.full((n + 300,), SENTINEL, device=DEVICE) for _ in range(2)]
    stats = Stats(*[None] * 3, lse=room[1][:n], logps=room[0][:n])
    moved = (None if t is None else t.to(DEVICE) for t in (x, weight, labels, bias))
    x, weight, labels, bias = moved
    assert cuda_forward.why_not(weight, Transform(**transform)) is None
    cuda_forward.linear_logps(x, weight, labels, bias, stats, Transform(**transform))
    assert all((r[n:] == SENTINEL).all() for r in room)
    return stats.logps.cpu(), stats.lse.cpu()


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_matches_the_oracle(dtype, transform):
    x, weight, labels = head(37, 72, 300, dtype)
    labels[:2] = torch.tensor([0, 299])
    for bias in (None, torch.randn(300).to(dtype)):
        given = (x, weight, labels, bias)
        check(run(*given, **transform), *given, **transform)


SHAPES = [(700, 200, 900), (1, 8, 1), (257, 64, 128), (300, 136, 129)]


@pytest.mark.parametrize("n, hidden, vocab", SHAPES)
def test_many_tiles(n, hidden, vocab):
    """More tiles than clusters, which take their own by turns, and more depth than stages."""
    given = head(n, hidden, vocab)
    check(run(*given), *given)


def test_bitwise_repeatable_and_independent_of_the_batch():
    x, weight, labels = head(300, 64, 300)
    logps, lse = run(x, weight, labels)
    for rows in (slice(0, 300), slice(0, 1), slice(77, 300)):
        some = run(x[rows], weight, labels[rows])
        assert torch.equal(some[0], logps[rows]) and torch.equal(some[1], lse[rows])


def test_several_launches(monkeypatch):
    """More tokens than the scratch memory takes at once."""
    from fastpref.kernels import forward_config

    given = head(300, 64, 300)
    whole = run(*given)
    monkeypatch.setattr(forward_config, "_MAX_PARTIALS", 1)
    assert all(torch.equal(*pair) for pair in zip(whole, run(*given), strict=True))


def test_no_tokens():
    logps, lse = run(*head(0, 64, 300))
    assert logps.shape == lse.shape == (0,)


@pytest.mark.parametrize("softcap", [None, 30.0])
def test_labels_out_of_range_are_nan(softcap):
    x, weight, labels = head(12, 64, 300)
    labels[:5] = torch.tensor([300, 383, -1, 2**33 + 5, 2**62])
    logps, lse = run(x, weight, labels, softcap=softcap)
    assert logps[:5].isnan().all() and lse.isfinite().all()
    check((logps[5:], lse[5:]), x[5:], weight, labels[5:], softcap=softcap)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_broken_row_spoils_only_itself(bad):
    x, weight, labels = head(20, 64, 300)
    clean = run(x, weight, labels)
    x[3, 5] = bad
    logps, lse = run(x, weight, labels)
    assert logps[3].isnan() and not lse[3].isfinite()
    others = torch.arange(20) != 3
    assert torch.equal(logps[others], clean[0][others])
    assert torch.equal(lse[others], clean[1][others])


def test_logits_of_minus_infinity():
    """A bias of -inf takes entries out of the vocabulary, whole tiles of them too."""
    x, weight, labels = head(20, 64, 500)
    bias = torch.zeros(500)
    bias[:300] = -math.inf
    labels[:10], labels[10:] = 300 + labels[:10] % 200, labels[10:] % 300
    logps, lse = run(x, weight, labels, bias)
    check((logps[:10], lse[:10]), x[:10], weight, labels[:10], bias)
    assert (logps[10:] == -math.inf).all()
    check(run(x, weight, labels, bias, softcap=5.0), x, weight, labels, bias, softcap=5.0)


def test_confident_tokens():
    x, weight, labels = confident(32, 64, 600)
    logps, _ = run(x, weight, labels)
    truth = oracle.linear_logps(x, weight, labels)
    assert (logps <= 0).all()
    oracle.assert_within(logps, truth, 4e-6 + 1e-5 * truth.abs())


def test_rows_of_larger_tensors():
    """The states are copied where their rows are not aligned; a weight is refused."""
    wide_x, wide_w, labels = head(20, 96, 300)
    weight = wide_w[:, 8:72]
    for x in (wide_x[:, 8:72], wide_x[:, 3:67], wide_x[:, :64].t().contiguous().t()):
        check(run(x, weight, labels), x, weight, labels)
    assert "16 bytes" in cuda_forward.why_not(wide_w[:, 3:67])
    assert "16 bytes" in cuda_forward.why_not(torch.zeros(4, 9, dtype=torch.bfloat16))
    assert "float32" in cuda_forward.why_not(torch.zeros(4, 8))
    assert "scale" in cuda_forward.why_not(weight, Transform(scale=0.0))


def test_the_backend_takes_it():
    """linear_token_logps with fused=True, under the backend's name."""
    from fastpref import linear_token_logps

    x, weight, labels = (t.to(DEVICE) for t in head(40, 64, 300))
    logps = linear_token_logps(x, weight, labels, backend="cuda", fused=True)
    truth = oracle.linear_logps(x.cpu(), weight.cpu(), labels.cpu())
    oracle.assert_within(logps.cpu(), truth, 1e-4)
