"""Token log-probabilities: shapes, strides, dtypes, budgets, and what is refused."""

from __future__ import annotations

import functools
import math

import machine
import oracle
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import fastpref.logps.plan
import fastpref.logps.prepared
from fastpref import linear_token_logps, sequence_logps, token_logps
from fastpref.backends.stats import EXTRAS
from fastpref.logps.sequences import segment_sums, sorted_sums

B, T, H, V = 3, 5, 6, 37


def _inputs(dtype=torch.float32):
    hidden, weight = torch.randn(B, T, H).to(dtype), torch.randn(V, H).to(dtype)
    labels = torch.randint(V, (B, T))
    labels[0, :2] = labels[2, 3:] = -100
    return hidden, weight, labels, torch.randn(V).to(dtype)


def _grads(hidden, weight, labels, bias, **options):
    leaves = [t.requires_grad_() for t in (hidden, weight, bias)]
    logps = linear_token_logps(hidden, weight, labels, bias, **options)
    coef = torch.arange(1.0, logps.numel() + 1).view(logps.shape).to(logps.dtype)
    return logps, *torch.autograd.grad((logps * coef).sum(), leaves)


def _strided(t: torch.Tensor, how: str) -> torch.Tensor:
    """The same values with other strides."""
    if how == "transposed":
        return t.transpose(0, -1).contiguous().transpose(0, -1)
    wide = t.new_full((*t.shape[:-1], 2 * t.shape[-1] + 1), 7)
    part = wide[..., :-1:2] if how == "every other" else wide[..., 1 : t.shape[-1] + 1]
    return part.copy_(t)


@pytest.mark.few
@pytest.mark.parametrize("how", ["transposed", "slice", "every other"])
@pytest.mark.parametrize("which", ["hidden", "weight", "labels", "bias"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_strides(backend, dtype, which, how):
    inputs = dict(zip(("hidden", "weight", "labels", "bias"), _inputs(dtype), strict=True))
    expected = _grads(**inputs, backend=backend)
    inputs = {k: t.detach() for k, t in inputs.items()}
    inputs[which] = _strided(inputs[which], how)
    for a, b in zip(_grads(**inputs, backend=backend), expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_expanded_inputs(backend, dtype):
    """Strides of 0: one hidden state for all tokens, one row for the whole vocabulary."""
    hidden, weight, labels, _ = _inputs(dtype)
    options = {"backend": backend}
    one = hidden[:1, :1].expand(B, T, H)
    torch.testing.assert_close(
        linear_token_logps(one, weight, labels, **options),
        linear_token_logps(one.contiguous(), weight, labels, **options),
    )
    uniform = linear_token_logps(hidden, weight[:1].expand(V, H), labels, **options)
    oracle.assert_within(uniform, torch.where(labels < 0, 0.0, -math.log(V)), 1e-5)
    row = torch.randn(V).to(dtype).expand(T, V).requires_grad_()
    (grad,) = torch.autograd.grad(token_logps(row, labels[1], **options).sum(), row)
    z = row.detach().double().requires_grad_()
    (truth,) = torch.autograd.grad(oracle.token_stats(z, labels[1]).logps.sum(), z)
    oracle.assert_within(grad, truth, 0.01 if dtype == torch.bfloat16 else 1e-5)


@pytest.mark.parametrize("shape", [(), (4,), (2, 3), (2, 1, 3)])
def test_leading_dimensions(backend, shape):
    hidden, weight = torch.randn(*shape, H), torch.randn(V, H)
    labels = torch.randint(V, shape)
    stats = linear_token_logps(hidden, weight, labels, extras=EXTRAS, backend=backend)
    assert {t.shape for t in stats} == {labels.shape}
    truth = oracle.linear_logps(hidden, weight, labels)
    oracle.assert_within(stats.logps, truth, 1e-5)
    logits = hidden @ weight.t()
    oracle.assert_within(token_logps(logits, labels, backend=backend), truth, 1e-5)


@pytest.mark.parametrize("shape", [(0,), (0, 5), (2, 0), (2, 3)])
@pytest.mark.parametrize("trains", ["hidden", "weight", "all"])
def test_no_labelled_token(backend, shape, trains):
    """A zero that is connected to the graph, with zero gradients of the right shapes."""
    hidden = torch.randn(*shape, H).requires_grad_(trains != "weight")
    weight, bias = (torch.randn(s).requires_grad_(trains != "hidden") for s in [(V, H), (V,)])
    labels = torch.full(shape, -100)
    leaves = [t for t in (hidden, weight, bias) if t.requires_grad]
    stats = linear_token_logps(hidden, weight, labels, bias, extras=EXTRAS, backend=backend)
    assert {t.shape for t in stats} == {labels.shape}
    loss = stats.logps.sum() + stats.entropy.sum()
    assert loss == 0 and not any(t.any() for t in stats)
    for leaf, grad in zip(leaves, torch.autograd.grad(loss, leaves), strict=True):
        assert grad.shape == leaf.shape and not grad.any()
    logits = torch.randn(*shape, V, requires_grad=True)
    logps = token_logps(logits, labels, backend=backend)
    (grad,) = torch.autograd.grad(logps.sum(), logits)
    assert not logps.any() and not grad.any()


@pytest.mark.parametrize("ignore_index", [-100, -1, 0, 36, V + 3])
def test_ignored_tokens_are_as_good_as_absent(backend, ignore_index):
    """Whatever marks them, and whatever lies in their hidden states."""
    hidden, weight, labels, bias = _inputs()
    labels = torch.where(labels < 0, ignore_index, labels)
    kept = labels != ignore_index
    hidden[~kept] = math.nan
    options = dict(ignore_index=ignore_index, backend=backend)
    logps, dhidden, dweight, dbias = _grads(hidden, weight, labels, bias, **options)
    coef = torch.arange(1.0, B * T + 1).view(B, T)[kept]
    rows = hidden.detach()[kept].requires_grad_()
    alone = linear_token_logps(rows, weight, labels[kept], bias, backend=backend)
    expected = torch.autograd.grad((alone * coef).sum(), [rows, weight, bias])
    assert torch.equal(logps[kept], alone) and not logps[~kept].any()
    for got, want in zip((dhidden[kept], dweight, dbias), expected, strict=True):
        torch.testing.assert_close(got, want)
    assert not dhidden[~kept].any()
    logits = hidden.detach() @ weight.detach().t()
    ready = token_logps(logits, labels, ignore_index=ignore_index, backend=backend)
    oracle.assert_within(ready, oracle.token_stats(logits, labels, ignore_index).logps, 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_token_indices(backend, dtype):
    hidden, weight, labels, bias = _inputs(dtype)
    indices = (labels.reshape(-1) != -100).nonzero()[:, 0]
    expected = _grads(hidden, weight, labels, bias, backend=backend)
    hidden, weight, bias = (t.detach() for t in (hidden, weight, bias))
    got = _grads(hidden, weight, labels, bias, backend=backend, token_indices=indices)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_autocast(backend):
    """fp32 master weights under bf16 autocast: as in bf16, and dW leaves its product in fp32."""
    n, h = machine.sized(backend, 300, 30), 64
    kind = torch.get_default_device().type
    hidden = torch.randn(n, h)
    weight, labels = torch.randn(999, h) * 0.4, torch.randint(999, (n,))
    bias, coef = torch.randn(999).bfloat16().float(), torch.randn(n)

    def run(function, dtype=None):
        leaves = [t.detach().to(dtype or t.dtype).requires_grad_() for t in (hidden, weight, bias)]
        logps = function(leaves[0], leaves[1], labels, leaves[2])
        return [logps.detach(), *torch.autograd.grad((logps * coef.to(logps)).sum(), leaves)]

    ours = functools.partial(linear_token_logps, backend=backend)
    with torch.autocast(kind, torch.bfloat16):
        got, eager = run(ours), run(oracle.eager_logps)
    rounded = [t.bfloat16().double() for t in (hidden, weight, bias)]
    leaves = [t.requires_grad_() for t in rounded]
    logps = oracle.linear_logps(leaves[0], leaves[1], labels, leaves[2])
    truth = [logps.detach(), *torch.autograd.grad((logps * coef.double()).sum(), leaves)]
    for a, b, c in zip(got, eager, truth, strict=True):
        assert a.dtype == torch.float32
        oracle.assert_no_worse(a, b, c, torch.bfloat16)
    assert torch.equal(got[0], run(ours, torch.bfloat16)[0])
    dweight = got[2]
    assert (dweight != dweight.bfloat16()).float().mean() > 0.9, "dW was rounded to bf16"


class _Largest(TorchDispatchMode):
    """The size in bytes of the largest tensor that any operation returned."""

    bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(t, torch.Tensor):
                self.bytes = max(self.bytes, t.numel() * t.element_size())
        return out


@pytest.mark.few
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "share, trains, strategy",
    [
        (0, "hidden", "frozen"),
        (0, "nothing", "forward-only"),
        (0, "all", "recompute"),
        (2.4, "all", "mixed"),
        (40, "all", "stash"),
    ],
)
def test_memory_budget(backend, monkeypatch, dtype, share, trains, strategy):
    """It decides the strategy and bounds the largest tensor; the results stay the same.

    share: of the budget, in bytes for each of the logits.
    """
    n, vocab, h = machine.sized(backend, (500, 5000, 32), (34, 768, 8))
    # A tile of a quarter of the tokens in fp32, on any device.
    monkeypatch.setattr(fastpref.logps.plan, "_TILE_BYTES_PER_COLUMN", {"cpu": n, "cuda": n})
    budget = max(1, int(share * n * vocab))
    hidden, weight = torch.randn(n, h).to(dtype), torch.randn(vocab, h).to(dtype)
    labels, plans = torch.randint(vocab, (n,)), []
    real = fastpref.logps.prepared.plan_head

    def plan_head(*args, **kwargs):
        plans.append(real(*args, **kwargs))
        return plans[-1]

    monkeypatch.setattr(fastpref.logps.prepared, "plan_head", plan_head)
    hidden.requires_grad_(trains in ("all", "hidden"))
    weight.requires_grad_(trains == "all")
    options = dict(backend=backend, memory_budget=budget)
    with _Largest() as largest:
        logps = linear_token_logps(hidden, weight, labels, **options)
        if trains != "nothing":
            logps.sum().backward()
    plan = plans[0]
    assert (plan.strategy, plan.tokens) == (strategy, n)
    head = vocab * h * max(dtype.itemsize, 4)  # dW, or the slices of W that are widened
    stash = plan.stash_tokens * vocab * dtype.itemsize
    tile = max(plan.block_tokens * vocab, n * plan.block_vocab) * 4
    assert largest.bytes <= max(head, stash, tile)
    assert strategy == "stash" or largest.bytes < n * vocab * dtype.itemsize
    free = linear_token_logps(hidden, weight, labels, backend=backend)
    oracle.assert_within(logps, free.detach(), 2e-5)


def _bad(**changes):
    good = dict(
        hidden=torch.randn(B, T, H), weight=torch.randn(V, H), labels=torch.zeros(B, T).long()
    )
    return {**good, **changes}


long = torch.zeros(B, T).long()
trained = torch.randn(V, H, requires_grad=True)


@pytest.mark.parametrize(
    "name, changes",
    [
        ("hidden", {"hidden": torch.randn(B, T, H + 1)}),
        ("hidden", {"hidden": torch.zeros(B, T, H).long()}),
        ("hidden", {"hidden": torch.tensor(1.0)}),
        ("weight", {"weight": torch.randn(V)}),
        ("weight", {"weight": torch.randn(0, H)}),
        ("weight", {"weight": torch.randn(V, H).to_sparse()}),
        ("weight", {"weight": torch.randn(V, H).bfloat16()}),
        ("weight", {"weight": torch.randn(V, H, device="meta")}),
        ("bias", {"bias": torch.randn(V + 1)}),
        ("bias", {"bias": torch.randn(V, 1)}),
        ("bias", {"bias": torch.zeros(V).long()}),
        ("labels", {"labels": long[:, 1:]}),
        ("labels", {"labels": long.int()}),
        ("labels", {"labels": long.float()}),
        ("labels", {"labels": long + V}),
        ("labels", {"labels": long - 1}),
        ("labels", {"labels": long - 100, "ignore_index": -1}),
        ("scale", {"scale": math.nan}),
        ("softcap", {"softcap": 0.0}),
        ("softcap", {"softcap": -30.0}),
        ("temperature", {"temperature": 0.0}),
        ("temperature", {"temperature": math.inf}),
        ("extras", {"extras": ["entropy", "top2"]}),
        ("extras", {"extras": None}),
        ("ignore_index", {"ignore_index": None}),
        ("ignore_index", {"ignore_index": -100.0}),
        ("strategy", {"strategy": "stashed"}),
        ("strategy", {"strategy": "frozen", "weight": trained}),
        ("memory_budget", {"memory_budget": 0}),
        ("memory_budget", {"memory_budget": True}),
        ("precision", {"precision": "bf16"}),
        ("backend", {"backend": "cublas"}),
        ("token_indices", {"token_indices": torch.tensor([0.0])}),
        ("token_indices", {"token_indices": torch.tensor([[0]])}),
        ("token_indices", {"token_indices": torch.tensor([B * T])}),
        ("token_indices", {"token_indices": torch.tensor([-1])}),
        ("token_indices", {"token_indices": torch.tensor([0] * B * T)}),
        ("token_indices", {"token_indices": torch.tensor([0])}),  # the others are labelled, too
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_bad_input_of_linear_token_logps(name, changes):
    with pytest.raises(ValueError, match=f"^{name}: .*(expected|gives)"):
        linear_token_logps(**_bad(**changes))


@pytest.mark.parametrize(
    "name, changes",
    [
        ("logits", {"logits": torch.zeros(B, T, V).long()}),
        ("logits", {"logits": torch.randn(B, T, 0)}),
        ("logits", {"logits": torch.randn(B, T, V).to_sparse()}),
        ("ignore_index", {"ignore_index": None}),
        ("labels", {"labels": long[0]}),
        ("labels", {"labels": long.int()}),
        ("labels", {"labels": long + V}),
        ("labels", {"labels": long - 1}),
        ("softcap", {"softcap": 0.0}),
        ("backend", {"backend": "cublas"}),
    ],
)
def test_bad_input_of_token_logps(name, changes):
    with pytest.raises(ValueError, match=f"^{name}: .*expected"):
        token_logps(**{"logits": torch.randn(B, T, V), "labels": long, **changes})


def test_the_message_says_what_came_and_what_was_expected():
    with pytest.raises(ValueError, match=r"labels: got 40, .* in \[0, 37\)"):
        linear_token_logps(**_bad(labels=long + 40))
    with pytest.raises(ValueError, match=r"hidden: got shape \(3, 5, 7\), expected .*6"):
        linear_token_logps(**_bad(hidden=torch.randn(B, T, 7)))


@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_sequence_logps(average, dtype):
    labels = _inputs()[2]
    labels[1] = -100
    logps = torch.randn(B, T, dtype=dtype).requires_grad_()
    truth = oracle.sequence_sums(logps.double(), labels)
    if average:
        truth = truth / (labels >= 0).sum(1).clamp(min=1)
    padded = sequence_logps(logps, labels, average=average)
    assert padded.dtype == dtype and padded[1] == 0
    torch.testing.assert_close(padded.double(), truth, rtol=1e-6, atol=0)
    order = torch.randperm(B * T)
    ids = torch.arange(B).repeat_interleave(T)[order]
    flat = logps.reshape(-1)[order], labels.reshape(-1)[order]
    packed = sequence_logps(*flat, sequence_ids=ids, num_sequences=B, average=average)
    torch.testing.assert_close(packed, padded)
    (grad,) = torch.autograd.grad(packed.sum(), logps)
    torch.testing.assert_close(grad, torch.autograd.grad(padded.sum(), logps)[0])
    assert not grad[labels < 0].any()


@pytest.mark.parametrize("n, size", [(40, 7), (5, 1), (0, 3), (0, 0)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_sums_without_atomics(n, size, dtype):
    """What runs on a GPU, where index_add adds in any order."""
    ids = torch.randint(max(size - 1, 1), (n,))  # the last sequence is empty
    vectors = [torch.randn(n, dtype=dtype).requires_grad_() for _ in range(2)]
    sums, truth = (f(vectors, ids, size) for f in (sorted_sums, segment_sums))
    torch.testing.assert_close(sums, truth)
    weights = torch.randn(size, dtype=dtype)
    grads = (torch.autograd.grad((s[1] * weights).sum(), vectors[1])[0] for s in (sums, truth))
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("bad", [-1, 3])
def test_sums_with_an_id_out_of_range(bad):
    (sums,) = sorted_sums([torch.ones(3)], torch.tensor([0, bad, 1]), 3)
    assert sums.isnan().all()


@pytest.mark.parametrize(
    "name, arguments",
    [
        ("token_logps", {"token_logps": torch.randn(B)}),
        ("token_logps", {"token_logps": torch.randn(B, T), "sequence_ids": long}),
        ("labels", {"token_logps": torch.randn(B, T)}),
        ("ignore_index", {"token_logps": torch.randn(B, T), "labels": long, "ignore_index": None}),
        ("labels", {"token_logps": torch.randn(B, T), "labels": long[:, 1:]}),
        ("sequence_ids", {"token_logps": torch.randn(B), "sequence_ids": torch.tensor([0])}),
        ("sequence_ids", {"token_logps": torch.randn(2), "sequence_ids": torch.tensor([0, -1])}),
        ("sequence_ids", {"token_logps": torch.randn(2), "sequence_ids": torch.tensor([0.0, 1])}),
        (
            "sequence_ids",
            {
                "token_logps": torch.randn(2),
                "sequence_ids": torch.tensor([0, 2]),
                "num_sequences": 2,
            },
        ),
    ],
)
def test_bad_input_of_sequence_logps(name, arguments):
    with pytest.raises(ValueError, match=f"^{name}: .*expected"):
        sequence_logps(**arguments)


@pytest.mark.parametrize("columns", [72, 70, 81])
def test_autocast_of_a_part_of_a_weight(backend, columns):
    """The copy that is multiplied lies otherwise than the weight: its alignment is what counts."""
    device = torch.get_default_device()
    hidden = torch.randn(9, columns)
    weight = torch.randn(40, columns + 10)[:, :columns].requires_grad_()
    labels = torch.randint(40, (9,))
    with torch.autocast(device.type, torch.bfloat16):
        logps = linear_token_logps(hidden, weight, labels, backend=backend)
    truth = oracle.linear_logps(hidden.bfloat16(), weight.bfloat16(), labels)
    oracle.assert_within(logps, truth, 1e-3)
    logps.sum().backward()
    assert weight.grad.isfinite().all()
