"""What test_gpu_forward.py leaves of Triton's forward pass: what it takes, how it is compiled and
its accuracy. On a GPU, or in Triton's interpreter."""

from __future__ import annotations

import math
from types import SimpleNamespace

import oracle
import pytest
import torch
from forward_problem import Forward, check, head
from triton_interpret import DEVICE, INTERPRETED

# isort: split
# After the import that skips this file where triton is missing.
from fastpref.kernels import forward, forward_config
from fastpref.kernels.forward import config, fused_logps, logit_free_reason

from fastpref import linear_token_logps
from fastpref.backends.tile import Transform

run = Forward("triton")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias_dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_dtypes(dtype, bias_dtype):
    x, weight, labels = head(20, 64, 512, dtype)
    given = (x, weight, labels, torch.randn(512).to(bias_dtype))
    check(run(*given), *given)


@pytest.mark.parametrize("vocab", [1, 2, 127, 128, 256, 257])
@pytest.mark.parametrize("n", [1, 130])
def test_any_vocabulary(n, vocab):
    given = head(n, 64, vocab)
    check(run(*given), *given)
    check(run(*given, softcap=5.0), *given, softcap=5.0)


@pytest.mark.parametrize("hidden", [1, 7, 8, 33, 40, 128, 136])
def test_any_hidden_size(hidden):
    given = head(9, hidden, 300)  # odd sizes are not aligned: the pointer kernel
    check(run(*given), *given)


def test_rows_of_larger_tensors():
    wide_x, wide_w, labels = head(20, 96, 300)
    for start in (0, 8, 3):  # 3 elements are 6 bytes: no descriptors
        x, weight = wide_x[:, start : start + 64], wide_w[:, start : start + 64]
        check(run(x, weight, labels), x, weight, labels)
    labels = torch.randint(300, (40,))[::2]
    check(run(wide_x, wide_w, labels), wide_x, wide_w, labels)


@pytest.mark.parametrize("hidden", [64, 60])
def test_the_layout_of_hidden_does_not_matter(hidden):
    x, weight, labels = head(20, 64, 300)
    x, weight = x[:, :hidden].contiguous(), weight[:, :hidden]
    logps, lse = run(x, weight, labels)
    check((logps, lse), x, weight, labels)
    for odd in (x.t().contiguous().t(), torch.nn.functional.pad(x, (3, 2))[:, 3:-2]):
        assert odd.stride() != x.stride()
        got = run(odd, weight, labels)
        assert torch.equal(got[0], logps) and torch.equal(got[1], lse)


@pytest.mark.parametrize("shift", [-1000.0, 1000.0])
def test_logits_far_from_zero(shift):
    x, weight, labels = head(20, 64, 300)
    bias = torch.full((300,), shift)
    check(run(x, weight, labels, bias), x, weight, labels, bias)


def test_long_sequences_are_within_a_thousandth_of_a_nat():
    x, weight, labels = head(512, 64, 500)
    logps, _ = run(x, weight, labels)
    truth = oracle.linear_logps(x, weight, labels)
    assert abs(float(logps.double().sum() - truth.sum())) < 1e-3


def test_no_worse_than_eager():
    x, weight, labels = head(128, 96, 500)
    logps, _ = run(x, weight, labels)
    truth = oracle.linear_logps(x, weight, labels)
    eager = oracle.eager_logps(x, weight, labels)
    oracle.assert_no_worse(logps, eager, truth, torch.float32)


@pytest.mark.parametrize("n", [1, 64, 500])
def test_the_configuration_is_chosen_from_the_head_alone(n, monkeypatch):
    asked = []

    def spy(*args, **kwargs):
        asked.append((args, kwargs))
        return config(*args, **kwargs)

    monkeypatch.setattr(forward, "config", spy)
    run(*head(n, 64, 256))
    ((arch, *rest), given), *more = asked
    assert not more and rest == [64, 256, torch.bfloat16]
    assert given == {"softcap": False, "bias": False, "aligned": True}


def test_alignment_and_gpu():
    """Asked for and without D any alignment and GPU will do; else those that a kernel is for."""
    memory = torch.zeros(17 * 72, dtype=torch.bfloat16, device=DEVICE)
    aligned, odd = memory[: 16 * 72].view(16, 72), memory[: 16 * 71].view(16, 71)
    plain, known = Transform(), forward_config.has_config(forward._device(DEVICE)[0])
    assert (logit_free_reason(aligned, plain, with_d=False) is None) == known
    for weight in (odd, memory[1 : 16 * 72 + 1].view(16, 72)):
        for given in (dict(with_d=False), dict(with_d=True), dict(with_d=True, required=True)):
            assert "16 bytes" in logit_free_reason(weight, plain, **given)
        assert logit_free_reason(weight, plain, with_d=False, required=True) is None
    assert forward_config.has_config("gfx942") and not forward_config.has_config("gfx1100")


def test_gpus_without_a_kernel(monkeypatch):
    weight = torch.zeros(16, 72, dtype=torch.bfloat16, device=DEVICE)
    monkeypatch.setattr(forward, "_device", lambda device: ("gfx1100", 3))
    assert "no kernel is made" in logit_free_reason(weight, Transform(), with_d=False)
    assert logit_free_reason(weight, Transform(), with_d=False, required=True) is None
    monkeypatch.setattr(forward, "_device", lambda device: ("sm_100", 3))  # no registers for D
    assert "no kernel is made" in logit_free_reason(weight, Transform(), with_d=True)
    assert logit_free_reason(weight, Transform(), with_d=False) is None


def test_says_why_not():
    x, weight, labels = head(4, 64, 300)
    plain = Transform()
    assert logit_free_reason(weight.to(DEVICE), plain, with_d=False) is None
    for required in (False, True):
        given = dict(with_d=False, required=required)
        assert "float32" in logit_free_reason(weight.float(), plain, **given)
        assert "not contiguous" in logit_free_reason(weight.t().contiguous().t(), plain, **given)
        assert "scale is 0" in logit_free_reason(weight, Transform(scale=0.0), **given)
    assert "float16" in logit_free_reason(weight.half(), plain, with_d=True)
    x, weight, labels = (t.to(DEVICE) for t in (x, weight, labels))
    with pytest.raises(ValueError, match="^fused: got True, expected None or False: the scale is"):
        linear_token_logps(x, weight, labels, backend="triton", fused=True, scale=0.0)


@pytest.mark.skipif(INTERPRETED, reason="needs a GPU")
def test_captured_in_a_graph():
    x, weight, labels = (t.to(DEVICE) for t in head(300, 1024, 5000))
    stats = SimpleNamespace(
        logps=torch.empty(300, device=DEVICE), lse=torch.empty(300, device=DEVICE)
    )
    fused_logps(x, weight, labels, None, Transform(), stats)  # compiled before the capture
    want = stats.logps.clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        fused_logps(x, weight, labels, None, Transform(), stats)
    stats.logps.zero_()
    graph.replay()
    assert torch.equal(stats.logps, want)


@pytest.mark.skipif(INTERPRETED, reason="needs a GPU")
def test_more_than_two_to_the_31_weights():
    if torch.cuda.get_device_properties(DEVICE).total_memory < 16e9:
        pytest.skip("needs 16 GB")
    torch.manual_seed(0)
    weight = torch.zeros(2**31 // 4096 + 300, 4096, device=DEVICE, dtype=torch.bfloat16)
    weight[-300:] = torch.randn(300, 4096).bfloat16().to(DEVICE) / 16
    x = torch.randn(40, 4096).bfloat16()
    labels = weight.shape[0] - 300 + torch.randint(300, (40,))
    logps, lse = run(x, weight, labels)
    z = oracle.logits(x, weight[-300:].cpu())
    rest = torch.full((40, 1), math.log(weight.shape[0] - 300)).double()
    truth = torch.logsumexp(torch.cat([z, rest], 1), 1)
    oracle.assert_within(lse, truth, 1e-4)
    at = (labels - (weight.shape[0] - 300))[:, None]
    oracle.assert_within(logps, z.gather(1, at)[:, 0] - truth, 1e-4)
