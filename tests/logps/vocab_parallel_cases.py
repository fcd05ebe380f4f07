"""Run by test_vocab_parallel.py in each of several processes: a head in parts against float64."""

from __future__ import annotations

from types import SimpleNamespace

import oracle
import pytest
import torch
from torch import distributed as dist

from fastpref import linear_kto_loss, linear_preference_loss
from fastpref.backends.stats import EXTRAS
from fastpref.logps import linear_token_logps, vocab_parallel
from fastpref.logps.vocab_parallel import VocabParallelWeight

T, H, V = 8, 16, 37
# Of each process's rows: even, uneven, and a process in the middle or at the end that has none.
BOUNDS = {
    2: [(0, 19, 37), (0, 30, 37), (0, 37, 37), (0, 0, 37)],
    3: [(0, 13, 26, 37), (0, 20, 20, 37), (0, 18, 36, 37)],
}


def problem(seed: int, dtype=torch.float64, sequences=6, r=3) -> SimpleNamespace:
    g = torch.Generator().manual_seed(seed)

    def draw(*shape, size=1.0):
        return (torch.randn(*shape, generator=g, dtype=torch.float64) * size).to(dtype)

    labels = torch.randint(0, V, (sequences, T), generator=g)
    labels[torch.rand(labels.shape, generator=g) < 0.3] = -100
    return SimpleNamespace(
        hidden=draw(sequences, T, H), weight=draw(V, H, size=0.5), labels=labels,
        bias=draw(V), lora_hidden=draw(sequences, T, r), lora_B=draw(V, r, size=0.3),
        dora_scale=1 + draw(V, size=0.1), dlogp=draw(sequences, T), dentropy=draw(sequences, T),
    )  # fmt: skip


def leaf(t):
    return t.clone().requires_grad_()


def shard(p, bounds, names=("weight",)):
    """This process's rows of the head, as leaves; the weight is made a VocabParallelWeight."""
    a, b = bounds[dist.get_rank()], bounds[dist.get_rank() + 1]
    return a, {name: leaf(getattr(p, name)[a:b]) for name in names}


def same_everywhere(t):
    every = [None] * dist.get_world_size()
    dist.all_gather_object(every, t.detach().contiguous().view(-1).tolist())
    return all(each == every[0] for each in every)


def truth(p, names, transform):
    """Statistics and gradients in float64, of the whole head."""
    tensors = {name: leaf(getattr(p, name).double()) for name in ("hidden", "weight", *names)}
    raw = tensors["hidden"] @ tensors["weight"].t()
    if "lora_B" in names:
        raw = raw + tensors["lora_hidden"] @ tensors["lora_B"].t()
    if "dora_scale" in names:
        raw = raw * tensors["dora_scale"]
    if "bias" in names:
        raw = raw + tensors["bias"]
    stats = oracle.token_stats(oracle.transform(raw, **transform), p.labels)
    return tensors, stats


TRANSFORM = {"scale": 0.7, "softcap": 4.0, "temperature": 1.3}
CASES = [
    ("plain", (), {}, {}),
    ("bias", ("bias",), TRANSFORM, {"strategy": "recompute"}),
    ("adapter", ("bias", "lora_hidden", "lora_B", "dora_scale"), TRANSFORM, {"strategy": "stash"}),
    ("mixed", ("lora_hidden", "lora_B"), {}, {"strategy": "mixed"}),
    ("blocks", ("bias",), {}, {"memory_budget": 3000}),
]


def against_oracle(bounds, backend, dtype, tolerance):
    """Log-probs, extras and all gradients, with gradients of the entropy and without."""
    for seed, (case, names, transform, options) in enumerate(CASES):
        for entropy in (False, True):
            p = problem(seed, dtype)
            tensors, stats = truth(p, names, transform)
            loss = (stats.logps * p.dlogp.double()).sum()
            if entropy:
                loss = loss + (stats.entropy * p.dentropy.double()).sum()
            loss.backward()
            head_names = [n for n in ("weight", *names) if n != "lora_hidden"]
            start, head = shard(p, bounds, head_names)
            stop = start + head["weight"].shape[0]
            inputs = {n: leaf(getattr(p, n)) for n in ("hidden", *names) if n not in head_names}
            weight = VocabParallelWeight(head["weight"], start, V)
            rest = {n: t for n, t in head.items() if n != "weight"}
            lora = {n: t for n, t in inputs.items() if n != "hidden"}
            out = linear_token_logps(
                inputs["hidden"], weight, p.labels, **rest, **lora, **transform, **options,
                backend=backend, extras=EXTRAS,
            )  # fmt: skip
            for name in ("logps", "entropy", "mean_logit", "log_sum_sq_probs"):
                got = getattr(out, name)
                torch.testing.assert_close(
                    got.double(), getattr(stats, name), rtol=tolerance, atol=tolerance, msg=name
                )
                assert same_everywhere(got), name
            assert torch.equal(out.is_top1, stats.is_top1)
            ours = (out.logps * p.dlogp).sum()
            if entropy:
                ours = ours + (out.entropy * p.dentropy).sum()
            ours.backward()
            for name, t in inputs.items():
                label = f"{case}: d{name}"
                assert_near(t.grad, tensors[name].grad, tolerance, label)
                assert same_everywhere(t.grad), label
            for name, t in head.items():
                assert_near(t.grad, tensors[name].grad[start:stop], tolerance, f"{case}: d{name}")


def assert_near(got, expected, tolerance, label):
    assert got.shape == expected.shape, label
    bound = tolerance * (1 + float(expected.abs().max() if expected.numel() else 0))
    error = float((got.double() - expected).abs().max() if got.numel() else 0)
    assert error <= bound, f"{label}: error {error:.3g} above {bound:.3g}"


def ties(bounds):
    """Equal maxima in the rows of several processes: the first one is the argmax."""
    weight = torch.zeros(V, H, dtype=torch.float64)
    hidden = torch.ones(V, H, dtype=torch.float64)
    a, b = bounds[dist.get_rank()], bounds[dist.get_rank() + 1]
    out = linear_token_logps(
        hidden, VocabParallelWeight(weight[a:b], a, V), torch.arange(V), extras="is_top1"
    )
    assert out.is_top1.tolist() == [True] + [False] * (V - 1)


def masked(bounds):
    """Vocabulary entries that a bias of -inf takes out, a whole process's among them."""
    p = problem(9)
    p.bias[:20] = -torch.inf
    labels = p.labels.clamp(min=20)
    a, b = bounds[dist.get_rank()], bounds[dist.get_rank() + 1]
    hidden = leaf(p.hidden)
    weight = VocabParallelWeight(p.weight[a:b], a, V)
    out = linear_token_logps(hidden, weight, labels, p.bias[a:b], extras=("entropy",))
    z = oracle.logits(leaf(p.hidden), p.weight, p.bias)
    stats = oracle.token_stats(z, labels)
    torch.testing.assert_close(out.logps, stats.logps)
    torch.testing.assert_close(out.entropy, stats.entropy)
    out.logps.sum().backward()
    assert hidden.grad.isfinite().all()


def losses(bounds):
    """Losses over the head in parts are those over the whole head."""
    for options in (
        {"loss_type": "sigmoid"}, {"loss_type": "ipo"}, {"loss_type": "sigmoid", "nll_weight": 0.3},
        {"loss_type": "sigmoid", "use_weighting": True}, {"loss_type": "simpo", "ref": None},
    ):  # fmt: skip
        p = problem(5, torch.float32)
        ref = torch.linspace(-9, -4, 6)
        ref = options.pop("ref", ref)
        start, head = shard(p, bounds)
        hidden, hidden_2, whole = leaf(p.hidden), leaf(p.hidden), leaf(p.weight)
        nll = {"nll_labels": p.labels} if "nll_weight" in options else {}
        weight = VocabParallelWeight(head["weight"], start, V)
        ours = linear_preference_loss(hidden, weight, p.labels, ref, **nll, **options)
        one = linear_preference_loss(hidden_2, whole, p.labels, ref, **nll, **options)
        ours.loss.backward()
        one.loss.backward()
        torch.testing.assert_close(ours.loss, one.loss)
        torch.testing.assert_close(hidden.grad, hidden_2.grad, rtol=1e-4, atol=1e-6)
        grad = whole.grad[start : start + head["weight"].shape[0]]
        torch.testing.assert_close(head["weight"].grad, grad, rtol=1e-4, atol=1e-6)
        assert same_everywhere(ours.loss) and same_everywhere(hidden.grad)
    p = problem(6, torch.float32)
    a, b = bounds[dist.get_rank()], bounds[dist.get_rank() + 1]
    desirable = torch.tensor([True, False] * 3)
    arguments = {"desirable": desirable, "ref_logps": torch.full((6,), -8.0), "kl": torch.tensor(0)}
    weight = VocabParallelWeight(p.weight[a:b], a, V)
    ours = linear_kto_loss(p.hidden, weight, p.labels, **arguments)
    one = linear_kto_loss(p.hidden, p.weight, p.labels, **arguments)
    torch.testing.assert_close(ours.loss, one.loss)


def own_tokens(bounds):
    """Processes with tokens of their own, one of them with none that is labelled."""
    p = problem(7, sequences=6)
    world, rank = dist.get_world_size(), dist.get_rank()
    sizes = {2: [6, 0], 3: [2, 0, 4]}[world]
    lines = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
    names = ("bias", "lora_hidden", "lora_B")
    for entropy in (False, True):
        for mean in (False, True):
            tensors, stats = truth(p, names, {})
            loss = (stats.logps * p.dlogp).sum()
            loss = loss + (stats.entropy * p.dentropy).sum() if entropy else loss
            loss.backward()
            start, head = shard(p, bounds, ("weight", "bias", "lora_B"))
            rows = head.pop("weight")
            weight = VocabParallelWeight(rows, start, V, None, True, mean)
            hidden, lora_hidden = leaf(p.hidden[lines]), leaf(p.lora_hidden[lines])
            out = linear_token_logps(
                hidden, weight, p.labels[lines], **head, lora_hidden=lora_hidden, extras="entropy"
            )
            torch.testing.assert_close(out.logps, stats.logps[lines])
            ours = (out.logps * p.dlogp[lines]).sum()
            ours = ours + (out.entropy * p.dentropy[lines]).sum() if entropy else ours
            ours.backward()
            torch.testing.assert_close(hidden.grad, tensors["hidden"].grad[lines])
            torch.testing.assert_close(lora_hidden.grad, tensors["lora_hidden"].grad[lines])
            factor = world if mean else 1
            for name, t in {"weight": rows, **head}.items():
                expected = tensors[name].grad[start : start + t.shape[0]]
                torch.testing.assert_close(t.grad * factor, expected)


def no_label(bounds):
    """Batches without a label: zero gradients, and no process waits for another."""
    for gathers in (False, True):
        p = problem(8)
        start, head = shard(p, bounds)
        hidden = leaf(p.hidden)
        weight = VocabParallelWeight(head["weight"], start, V, None, gathers)
        labels = torch.full_like(p.labels, -100)
        out = linear_preference_loss(hidden, weight, labels, torch.full((6,), -8.0))
        out.loss.backward()
        assert float(out.loss.detach()) == 0
        for t in (hidden, head["weight"]):
            assert t.grad is not None and not t.grad.any()


def backward_twice(bounds):
    """A second backward pass over the same graph adds the same gradients."""
    for strategy in ("stash", "recompute"):
        for gathers in (False, True):
            p = problem(2)
            start, head = shard(p, bounds)
            hidden, rows = leaf(p.hidden), head["weight"]
            weight = VocabParallelWeight(rows, start, V, None, gathers, gathers)
            out = linear_token_logps(hidden, weight, p.labels, strategy=strategy)
            out.sum().backward(retain_graph=True)
            once = [t.grad.clone() for t in (hidden, rows)]
            out.sum().backward()
            for t, grad in zip((hidden, rows), once, strict=True):
                torch.testing.assert_close(t.grad, 2 * grad)


def communication(bounds):
    """One MAX and one SUM in the forward pass, one SUM of dX in the backward pass."""
    p = problem(3)
    calls = []
    original = dist.all_reduce

    def all_reduce(t, op=dist.ReduceOp.SUM, **kwargs):
        calls.append((op, tuple(t.shape)))
        return original(t, op, **kwargs)

    vocab_parallel.dist.all_reduce = all_reduce
    try:
        start, head = shard(p, bounds)
        hidden = leaf(p.hidden)
        out = linear_token_logps(hidden, VocabParallelWeight(head["weight"], start, V), p.labels)
        n = int((p.labels >= 0).sum())
        assert calls == [(dist.ReduceOp.MAX, (n,)), (dist.ReduceOp.SUM, (3, n))]
        calls.clear()
        out.sum().backward()
        assert calls == [(dist.ReduceOp.SUM, (n, H))]
    finally:
        vocab_parallel.dist.all_reduce = original


def refused(bounds):
    p = problem(4, torch.float32)
    a, b = bounds[dist.get_rank()], bounds[dist.get_rank() + 1]
    weight = VocabParallelWeight(p.weight[a:b], a, V)
    for options, message in (
        ({"fused": True}, "^fused: got True with the vocabulary divided"),
        ({"precision": "fast"}, "^precision: got 'fast' with the vocabulary divided"),
        ({"gradient_tolerance": 0.01}, "^gradient_tolerance: got 0.01 with the vocabulary"),
        ({"head_gradient_tolerance": 0.01}, "^head_gradient_tolerance: got 0.01 with the voc"),
    ):
        with pytest.raises(ValueError, match=message):
            linear_token_logps(p.hidden, weight, p.labels, **options)
    with pytest.raises(ValueError, match=r"^labels: got 37, expected .* in \[0, 37\)"):
        linear_token_logps(p.hidden, weight, p.labels.masked_fill(p.labels == 5, V))
    with pytest.raises(ValueError, match=r"^vocab_start: got rows \[30, 67\)"):
        VocabParallelWeight(p.weight, 30, V)
    with pytest.raises(ValueError, match="^mean_gradient: got True with gathers_tokens=False"):
        VocabParallelWeight(p.weight[a:b], a, V, mean_gradient=True)
    if bounds[1] < V:
        overlapping = VocabParallelWeight(p.weight, 0, V)
        with pytest.raises(ValueError, match="^vocab_start: a label is in the rows of [23] proc"):
            linear_token_logps(p.hidden, overlapping, p.labels)


def every_case(processes):
    for bounds in BOUNDS[processes]:
        against_oracle(bounds, "eager", torch.float64, 1e-10)
        ties(bounds)
        masked(bounds)
        own_tokens(bounds)
        no_label(bounds)
        backward_twice(bounds)
    against_oracle(bounds, None, torch.float32, 3e-5)
    against_oracle(BOUNDS[processes][1], None, torch.bfloat16, 4e-2)
    losses(BOUNDS[processes][1])
    communication(bounds)
    refused(BOUNDS[processes][0])
