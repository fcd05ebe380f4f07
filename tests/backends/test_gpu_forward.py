"""The forward pass without logits, of Triton and of CUDA, against the float64 oracle. Without a GPU
they run in Triton's interpreter and in tests/support/cuda_emulate, where copies and products are
functions but the pipeline between them is the GPU's."""

from __future__ import annotations

import importlib.util
import math

import machine
import oracle
import pytest
import torch
from fastpref.kernels import forward_config
from forward_problem import TRANSFORMS, Forward, check, confident, head


def configs():
    """On a GPU what it ships with; the interpreter knows no warps, stages or loop flattening."""
    if importlib.util.find_spec("triton") is None:
        return [None]
    from fastpref.kernels.forward import SHIPPED, _device

    if not machine.INTERPRETED:
        arch = _device(machine.device_of("triton"))[0]
        return list(dict.fromkeys(c.config for c in SHIPPED if c.arch == arch)) or [None]
    sizes = ("descriptors", "block_m", "block_n", "block_k", "halves")
    return list({tuple(getattr(c.config, k) for k in sizes): c.config for c in SHIPPED}.values())


def name(forward):
    chosen = forward.chosen
    if chosen is None:
        return forward.backend
    words = [forward.backend, "descriptors" if chosen.descriptors else "pointers"]
    words += [f"{chosen.block_m}x{chosen.block_n}x{chosen.block_k}"]
    return "-".join(words + ["flat"] * chosen.flatten + ["halves"] * chosen.halves)


CONFIGS = configs()
EVERY = [*(Forward("triton", c) for c in CONFIGS), Forward("cuda")]
DEFAULT = [Forward("triton"), Forward("cuda")]
# Some descriptors and some pointers, where every configuration would take the interpreter long.
SOME = (
    [*DEFAULT, Forward("triton", next(c for c in CONFIGS if c and not c.descriptors))]
    if machine.INTERPRETED
    else EVERY
)


@pytest.fixture(params=DEFAULT, ids=name)
def run(request):
    """The pass of each backend; with `over`, as other configurations compile it too."""
    reason = request.param.why_not()
    if reason is not None:
        pytest.skip(reason)
    return request.param


def over(forwards):
    return pytest.mark.parametrize("run", forwards, indirect=True, ids=name)


def _matches_the_oracle(run, dtype, transform):
    x, weight, labels = head(39, 72, 300, dtype)
    labels[:4] = torch.tensor([0, 299, -100, -1])
    for bias in (None, torch.randn(300).to(dtype)):
        given = (x, weight, labels, bias)
        check(run(*given, **transform), *given, **transform)


@over(EVERY)
@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_matches_the_oracle(run, transform):
    _matches_the_oracle(run, torch.bfloat16, transform)


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_float16_matches_the_oracle(run, transform):
    _matches_the_oracle(run, torch.float16, transform)


@over(SOME)
def test_no_tokens(run):
    logps, lse = run(*head(0, 64, 300))
    assert logps.shape == lse.shape == (0,)


@over(SOME)
@pytest.mark.parametrize("softcap", [None, 30.0])
def test_labels_out_of_range_are_nan(run, softcap):
    x, weight, labels = head(13, 64, 300)
    # 300 and 383 lie in the padding of the last tile where that has 128 entries, 511 of 256.
    labels[:6] = torch.tensor([300, 383, 511, 512, 2**33 + 5, 2**62])
    logps, lse = run(x, weight, labels, softcap=softcap)
    assert logps[:6].isnan().all() and lse.isfinite().all()
    check((logps[6:], lse[6:]), x[6:], weight, labels[6:], softcap=softcap)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_broken_row_spoils_only_itself(run, bad):
    x, weight, labels = head(20, 64, 300)
    clean = run(x, weight, labels)
    x[3, 5] = bad
    logps, lse = run(x, weight, labels)
    assert logps[3].isnan() and not lse[3].isfinite()
    others = torch.arange(20) != 3
    assert torch.equal(logps[others], clean[0][others])
    assert torch.equal(lse[others], clean[1][others])


@over(EVERY)
def test_logits_of_minus_infinity(run):
    """A bias of -inf takes entries out of the vocabulary, whole tiles of them too."""
    x, weight, labels = head(20, 64, 500)
    bias = torch.zeros(500)
    bias[:300] = -math.inf
    labels[:10], labels[10:] = 300 + labels[:10] % 200, labels[10:] % 300
    logps, lse = run(x, weight, labels, bias)
    check((logps[:10], lse[:10]), x[:10], weight[300:], labels[:10] - 300)
    assert (logps[10:] == -math.inf).all()
    check((logps[:10], lse[:10]), x[:10], weight, labels[:10], bias)
    capped = run(x, weight, labels, bias, softcap=5.0)  # -inf becomes -softcap
    check(capped, x, weight, labels, bias, softcap=5.0)


# Triton's sum of exponentials is fp32 next to 1; CUDA keeps what it is more than 1.
CONFIDENT = {"triton": 4e-6, "cuda": 1e-6}


@over(SOME)
def test_confident_tokens(run):
    """p from 0.9 to 1 - 1e-10, and log p <= 0."""
    x, weight, labels = confident(32, 64, 600)
    logps, _ = run(x, weight, labels)
    truth = oracle.linear_logps(x, weight, labels)
    assert (truth > -0.1).all() and (truth > -1e-9).any()
    assert (logps <= 0).all()
    oracle.assert_within(logps, truth, CONFIDENT[run.backend] + 1e-5 * truth.abs())


@over(SOME)
def test_bitwise_repeatable_and_independent_of_the_batch(run):
    # numpy's product, unlike a GPU's, depends on where in the tile a row is.
    n, start = (150, 128) if run.backend == "triton" and machine.INTERPRETED else (300, 77)
    x, weight, labels = head(n, 64, 300)
    logps, lse = run(x, weight, labels)
    for rows in (slice(0, n), slice(0, 1), slice(0, 70), slice(start, n)):
        some = run(x[rows], weight, labels[rows])
        assert torch.equal(some[0], logps[rows]) and torch.equal(some[1], lse[rows])


@over(SOME)
def test_several_launches(run, monkeypatch):
    """More tokens than the scratch memory takes at once."""
    interpreted = run.backend == "triton" and machine.INTERPRETED
    given = head(150 if interpreted else 300, 64, 300)
    whole = run(*given)
    monkeypatch.setattr(forward_config, "_MAX_PARTIALS", 1)
    parts = run(*given)
    assert all(torch.equal(*pair) for pair in zip(whole, parts, strict=True))
    check(parts, *given)
