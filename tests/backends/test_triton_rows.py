# ruff: noqa: I001  triton_interpret has to come before triton
"""What is Triton's own about the row kernels: the functions that they are made of, and where they
cannot run. tests/backends/test_gpu_rows.py has the rest."""

from __future__ import annotations

import math
import subprocess
import sys

import oracle
import pytest
import torch
from triton_interpret import DEVICE, INTERPRETED

import triton
import triton.language as tl
from fastpref.backends import triton as backend
from fastpref.kernels import rows

EPS = torch.finfo(torch.float32).eps
DTYPES = [torch.float32, torch.bfloat16, torch.float16]

pytestmark = pytest.mark.skipif(backend.problem() is not None, reason=str(backend.problem()))


@triton.jit
def _call_tanh(x, value, slope, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    t, d = rows._tanh(tl.load(x + i))
    tl.store(value + i, t)
    tl.store(slope + i, d)


@triton.jit
def _call_minus_expm1(x, out, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    tl.store(out + i, rows.minus_expm1(tl.load(x + i)))


def _points(top: float) -> torch.Tensor:
    """2^14 numbers from 0 to top, half of them evenly spaced and half by their magnitude."""
    even = torch.linspace(0, top, 2**13)
    return torch.cat([even, top * 2.0 ** torch.linspace(-40, 0, 2**13)]).to(DEVICE)


def test_tanh():
    x = _points(60.0)
    x = torch.cat([x, -x])
    value, slope = torch.empty_like(x), torch.empty_like(x)
    _call_tanh[(1,)](x, value, slope, len(x), num_warps=8, enable_fp_fusion=False)
    truth = torch.tanh(x.double())
    oracle.assert_within(value, truth, 5 * EPS * truth.abs())
    sech2 = 1 / torch.cosh(x.double()) ** 2
    oracle.assert_within(slope, sech2, 4 * EPS * (1 + x.double().abs()) * sech2 + 1e-12)
    edges = torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan, 1e30, -1e30, 1e-40] * 2)
    edges = edges.to(DEVICE)
    with backend._on(DEVICE):
        _call_tanh[(1,)](edges, value, slope, len(edges), num_warps=1, enable_fp_fusion=False)
    torch.testing.assert_close(value[:8], torch.tanh(edges[:8]), equal_nan=True)


def test_minus_expm1():
    x = -_points(100.0)
    out = torch.empty_like(x)
    _call_minus_expm1[(1,)](x, out, len(x), num_warps=8, enable_fp_fusion=False)
    truth = -torch.expm1(x.double())
    oracle.assert_within(out, truth, 2 * EPS * truth)
    edges = torch.tensor([0.0, -0.0, -math.inf, math.nan], device=DEVICE)
    with backend._on(DEVICE):
        _call_minus_expm1[(1,)](edges, out, 4, num_warps=1, enable_fp_fusion=False)
    assert out[:3].tolist() == [0, 0, 1] and out[3].isnan()


def test_what_it_refuses():
    reason = backend.unavailable_reason(DEVICE, torch.float64)
    assert reason is not None and "float64" in reason and "backend='eager'" in reason
    assert "meta" in str(backend.unavailable_reason(torch.device("meta"), torch.float32))
    for dtype in DTYPES:
        assert backend.unavailable_reason(DEVICE, dtype) is None
    assert triton.__version__ in backend.describe()


NOWHERE = """
import os, sys
os.environ.pop("TRITON_INTERPRET", None)
{missing}
import torch
from fastpref.backends import triton as backend
cpu = torch.device("cpu")
reason = backend.unavailable_reason(cpu, torch.float32)
print(backend.problem(), "|", reason, "|", "triton" in sys.modules)
"""


@pytest.mark.parametrize("missing", ["", "sys.modules['triton'] = None"], ids=["here", "missing"])
def test_where_it_cannot_run(missing):
    """Without interpreter and GPU it says so, and does not import triton to find out."""
    code = NOWHERE.format(missing=missing)
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    problem, reason, imported = run.stdout.strip().split(" | ")
    if missing:
        assert problem == reason and "pip install triton" in problem
    elif INTERPRETED:
        assert problem == reason == "torch finds no GPU" and imported == "False"
    else:
        assert problem == "None" and "no kernels for cpu tensors" in reason
