"""torch.compile: no graph break, and the results of the ordinary call."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import machine
import pytest
import torch
from paths import search_path

import fastpref

P, T, H, V = 2, 6, 16, 51
DEVICES = ["cpu", "cuda"] if machine.HAS_GPU else ["cpu"]


@pytest.fixture(params=DEVICES)
def device(request):
    """Each device, as the default one. The fastest backend runs on it: the operators choose."""
    with torch.device(request.param):
        yield request.param


def _ref(hidden):
    return torch.linspace(-30, -20, 2 * P, device=hidden.device)


def _inputs(dtype=torch.float32, t=T, ragged=True):
    torch.manual_seed(t)
    hidden = torch.randn(2 * P, t, H).to(dtype).requires_grad_()
    weight = torch.randn(V, H).to(dtype).requires_grad_()
    bias = torch.randn(V).to(dtype).requires_grad_()
    labels = torch.randint(V, (2 * P, t))
    if ragged:
        labels[:, :2] = -100
        labels[1] = -100
    return hidden, weight, bias, labels


def _dpo(hidden, weight, bias, labels, index=None):
    out = fastpref.linear_dpo_loss(
        hidden, weight, labels, _ref(hidden), bias=bias, softcap=9.0, token_indices=index
    )
    return out.loss, out.chosen_rewards, out.rejected_logps


def _ipo_with_entropy(hidden, weight, bias, labels, index=None):
    out = fastpref.linear_ipo_loss(
        hidden,
        weight,
        labels,
        reference_free=True,
        bias=bias,
        extras=("entropy", "is_top1"),
        token_indices=index,
    )
    assert out.stats is not None
    return out.loss + 0.1 * out.stats.entropy.sum(), out.stats.is_top1


def _little_memory(hidden, weight, bias, labels, index=None):
    out = fastpref.linear_dpo_loss(
        hidden,
        weight,
        labels,
        _ref(hidden),
        bias=bias,
        strategy="recompute",
        token_indices=index,
    )
    return (out.loss,)


def _reference_inside(hidden, weight, bias, labels, index=None):
    ref = hidden.detach() * 1.1, weight.detach()
    out = fastpref.linear_dpo_loss(
        hidden, weight, labels, bias=bias, ref_hidden=ref[0], ref_weight=ref[1]
    )
    return out.loss, out.chosen_rewards


def _ready_logits(hidden, weight, bias, labels, index=None):
    logits = torch.nn.functional.linear(hidden, weight, bias)
    return (fastpref.dpo_loss(logits, labels, _ref(hidden), temperature=0.9).loss,)


STEPS = [_dpo, _ipo_with_entropy, _little_memory, _reference_inside, _ready_logits]
DTYPES = [torch.float32, torch.bfloat16]
# Each step in each dtype, and with and without token_indices; the two in turn, as compiling takes
# seconds. The fast tests have the first step once.
CASES = [
    pytest.param(
        step,
        dtype,
        (i + j) % 2 == 1,
        id=f"{step.__name__}-{dtype}-{(i + j) % 2}",
        marks=[pytest.mark.slow] * (i + j > 0),
    )
    for i, step in enumerate(STEPS)
    for j, dtype in enumerate(DTYPES)
]


def _run(step, inputs, index, wanted=(0, 1, 2)):
    out = step(*inputs, index)
    return out, torch.autograd.grad(out[0], [inputs[i] for i in wanted])


def _compare(step, compiled, inputs, index=None, wanted=(0, 1, 2)):
    expected, grads = _run(step, inputs, index, wanted)
    got, got_grads = _run(compiled, inputs, index, wanted)
    half = inputs[0].dtype == torch.bfloat16
    for a, b in zip((*got, *got_grads), (*expected, *grads), strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        torch.testing.assert_close(a, b, rtol=2e-2 if half else 1e-5, atol=1e-3 if half else 1e-5)


@pytest.mark.parametrize("step, dtype, known", CASES)
def test_no_graph_break(device, step, dtype, known):
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for ragged in (True, False):
        inputs = _inputs(dtype, ragged=ragged)
        index = (inputs[3].view(-1) != -100).nonzero()[:, 0] if known else None
        _compare(step, compiled, inputs, index)


@pytest.mark.slow
@pytest.mark.parametrize("device", DEVICES)
def test_inductor(device):
    """In a process of its own: what it imports does not get on with what other tests import."""
    program = (
        f"import torch, test_compile as t; torch.set_default_device('{device}'); "
        "t._compare(t._dpo, torch.compile(t._dpo, fullgraph=True), t._inputs())"
    )
    run = [sys.executable, "-c", program]
    env = {**os.environ, "PYTHONPATH": search_path(Path(__file__).parent)}
    result = subprocess.run(run, env=env, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-2000:]


def test_sequences_of_any_length_share_a_graph(device):
    graphs = []

    def count(graph, example_inputs):
        graphs.append(graph)
        return graph

    compiled = torch.compile(_dpo, fullgraph=True, dynamic=True, backend=count)
    for t in (5, 6, 9, 17):
        inputs = _inputs(t=t)
        torch.testing.assert_close(compiled(*inputs)[0], _dpo(*inputs)[0])
    assert len(graphs) <= 2


@pytest.mark.parametrize(
    "frozen",
    [pytest.param((0,), marks=pytest.mark.slow), (1, 2)],
    ids=["frozen head", "frozen body"],
)
def test_only_what_needs_a_gradient_gets_one(device, frozen):
    inputs = _inputs()
    for i in range(3):
        inputs[i].requires_grad_(i in frozen)
    _compare(_dpo, torch.compile(_dpo, fullgraph=True, backend="aot_eager"), inputs, None, frozen)


def test_without_gradients_and_under_autocast(device):
    def logps(hidden, weight, labels):
        with torch.autocast(device, torch.bfloat16):
            return fastpref.linear_token_logps(hidden, weight, labels)

    compiled = torch.compile(logps, fullgraph=True, backend="aot_eager")
    hidden, weight, _, labels = _inputs()
    with torch.no_grad():
        assert torch.equal(compiled(hidden, weight, labels), logps(hidden, weight, labels))
    loss, expected = compiled(hidden, weight, labels).sum(), logps(hidden, weight, labels).sum()
    grads = torch.autograd.grad(loss, (hidden, weight))
    for a, b in zip(grads, torch.autograd.grad(expected, (hidden, weight)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("known", [False, True], ids=["", "token_indices"])
@pytest.mark.parametrize("weight_grad", [False, True])
def test_the_operators_keep_their_contract(device, weight_grad, known):
    hidden, weight, bias, labels = _inputs()
    weight.requires_grad_(weight_grad)
    bias.requires_grad_(weight_grad)
    flat = labels.view(-1)
    index = (flat != -100).nonzero()[:, 0] if known else None
    options = (
        1.0,
        None,
        1.0,
        -100,
        "auto",
        None,
        "exact",
        0,
        None,
        None,
        None,
        0,
        "entropy",
        True,
        weight_grad,
    )
    # Without token_indices the rows beyond the labelled ones hold whatever memory held.
    checks = ("test_schema", "test_faketensor") + (("test_autograd_registration",) if known else ())
    torch.library.opcheck(
        torch.ops.fastpref.linear_token_logps,
        (hidden.view(-1, H), None, weight, bias, None, None, flat, index, *options),
        test_utils=checks,
    )


@pytest.mark.slow  # eager calls check them as well
def test_bad_shapes_still_raise():
    hidden, weight, bias, labels = _inputs()
    with pytest.raises(Exception, match="labels: got shape"):
        torch.compile(_dpo, backend="aot_eager")(hidden, weight, bias, labels[:, 1:])


def test_bad_labels_still_raise():
    hidden, weight, bias, labels = _inputs()
    labels[0, 3] = V
    with pytest.raises(ValueError, match="labels: got 51"):
        torch.compile(_dpo, backend="aot_eager")(hidden, weight, bias, labels)
