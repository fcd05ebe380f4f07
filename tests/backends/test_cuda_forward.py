"""What test_gpu_forward.py leaves of the CUDA forward pass for Hopper: its tiles, and what it
takes. On such a GPU, or emulated on the CPU."""

from __future__ import annotations

import machine
import oracle
import pytest
import torch
from forward_problem import Forward, check, head

from fastpref.backends import cuda_forward
from fastpref.backends.tile import Transform

DEVICE = machine.device_of("cuda")
run = Forward("cuda")


@pytest.fixture(autouse=True, scope="module")
def _works():
    reason = run.why_not()
    if reason is not None:
        pytest.skip(reason)


SHAPES = [(700, 200, 900), (1, 8, 1), (257, 64, 128), (300, 136, 129)]


@pytest.mark.parametrize("n, hidden, vocab", SHAPES)
def test_many_tiles(n, hidden, vocab):
    """More tiles than clusters, which take their own by turns, and more depth than stages."""
    given = head(n, hidden, vocab)
    check(run(*given), *given)


@pytest.mark.parametrize("softcap", [None, 30.0])
def test_negative_labels_are_nan(softcap):
    """As those beyond the vocabulary; Triton's pass promises nothing of them."""
    x, weight, labels = head(12, 64, 300)
    labels[:2] = torch.tensor([-1, -100])
    logps, lse = run(x, weight, labels, softcap=softcap)
    assert logps[:2].isnan().all() and lse.isfinite().all()
    check((logps, lse), x, weight, labels, softcap=softcap)


def test_rows_of_larger_tensors():
    """The states are copied where their rows are not aligned; a weight is refused."""
    wide_x, wide_w, labels = head(20, 96, 300)
    weight = wide_w[:, 8:72]
    for x in (wide_x[:, 8:72], wide_x[:, 3:67], wide_x[:, :64].t().contiguous().t()):
        check(run(x, weight, labels), x, weight, labels)
    plain, reason = Transform(), cuda_forward.logit_free_reason
    assert "16 bytes" in reason(wide_w[:, 3:67], plain)
    assert "16 bytes" in reason(torch.zeros(4, 9, dtype=torch.bfloat16), plain)
    assert "float32" in reason(torch.zeros(4, 8), plain)
    assert "scale" in reason(weight, Transform(scale=0.0))
    assert "float16" in reason(weight.half(), plain)
    assert reason(weight.half(), plain, with_d=False) is None


def test_the_backend_takes_it():
    """linear_token_logps with fused=True, under the backend's name."""
    from fastpref import linear_token_logps

    x, weight, labels = (t.to(DEVICE) for t in head(40, 64, 300))
    logps = linear_token_logps(x, weight, labels, backend="cuda", fused=True)
    truth = oracle.linear_logps(x.cpu(), weight.cpu(), labels.cpu())
    oracle.assert_within(logps.cpu(), truth, 1e-4)
