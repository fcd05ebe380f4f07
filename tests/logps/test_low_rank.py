"""A LoRA or DoRA adapter on the head, never merged: against the merged head."""

from __future__ import annotations

import oracle
import pytest
import torch
from machine import sized

import fastpref
from fastpref import linear_token_logps

N, H, V, R = 23, 12, 301, 3
NAMES = ("hidden", "low", "weight", "bias", "up", "weight_scale")
PLANS = {
    "stash": {"strategy": "stash"},
    "recompute": {"strategy": "recompute", "memory_budget": 1},
    "mixed": {"strategy": "mixed", "memory_budget": 9 * V * 4},
}
KINDS = {"lora": NAMES[:3] + NAMES[4:5], "lora bias": NAMES[:5], "dora": NAMES}


def _problem(dtype, kind, n=N, vocab=V):
    torch.manual_seed(3)
    made = {
        "hidden": torch.randn(n, H),
        "low": torch.randn(n, R) * 0.3,
        "weight": torch.randn(vocab, H) * 0.7,
        "bias": torch.randn(vocab),
        "up": torch.randn(vocab, R),
        "weight_scale": 0.5 + torch.rand(vocab),
    }
    tensors = {k: made[k].to(dtype) for k in NAMES if k in KINDS[kind]}
    labels = torch.randint(vocab, (n,))
    labels[::5] = -100
    return tensors, labels


def _ours(t, labels, **options):
    return linear_token_logps(
        t["hidden"],
        t["weight"],
        labels,
        t.get("bias"),
        low_rank=(t["low"], t["up"]),
        weight_scale=t.get("weight_scale"),
        softcap=8.0,
        **options,
    )


def _merged_logits(t):
    t = {k: v.double() for k, v in t.items()}
    raw = t["hidden"] @ t["weight"].t() + t["low"] @ t["up"].t()
    raw = raw * t.get("weight_scale", 1.0) + t.get("bias", 0.0)
    return oracle.transform(raw, softcap=8.0)


def _gradients(value, tensors, wanted):
    return torch.autograd.grad(value, [tensors[k] for k in wanted])


# With a plain adapter, "head" is the same as "all" but for hidden and low.
@pytest.mark.only_if(lambda trains, kind, **_: trains != "head" or kind != "lora")
@pytest.mark.parametrize("trains", ["all", "adapter", "head"])
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_values_and_gradients(dtype, kind, plan, trains):
    tensors, labels = _problem(dtype, kind)
    wanted = [
        k
        for k in tensors
        if trains == "all"
        or (trains == "adapter" and k in ("hidden", "low", "up", "weight_scale"))
        or (trains == "head" and k in ("weight", "bias"))
    ]
    for k in wanted:
        tensors[k].requires_grad_()
    coef = torch.randn(N, dtype=torch.float64)
    logps = _ours(tensors, labels, **PLANS[plan])
    exact = {k: t.detach().double().requires_grad_(k in wanted) for k, t in tensors.items()}
    truth = oracle.token_stats(_merged_logits(exact), labels).logps
    eps = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    oracle.assert_within(logps, truth, 100 * eps)
    got = _gradients((logps * coef.to(logps.dtype)).sum(), tensors, wanted)
    want = _gradients((truth * coef).sum(), exact, wanted)
    for name, a, b in zip(wanted, got, want, strict=True):
        assert a.dtype == dtype, name
        rounding = {torch.float64: 1e-12, torch.float32: 3e-6}.get(dtype, 1e-2)
        assert float((a.double() - b).norm()) <= rounding * float(b.norm()), name


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_backend(kind, plan, backend):
    """In float32, on the backend's device; Triton interprets fewer rows."""
    tensors, labels = _problem(torch.float32, kind, n=sized(backend, N, 11))
    for t in tensors.values():
        t.requires_grad_()
    out = _ours(tensors, labels, extras=("entropy", "is_top1"), backend=backend, **PLANS[plan])
    exact = {k: t.detach().double().requires_grad_() for k, t in tensors.items()}
    truth = oracle.token_stats(_merged_logits(exact), labels)
    oracle.assert_within(out.logps, truth.logps, 1e-5)
    oracle.assert_within(out.entropy, truth.entropy, 1e-5)
    assert torch.equal(out.is_top1, truth.is_top1)
    coef = torch.linspace(-1, 2, labels.shape[0])
    got = _gradients((out.logps * coef).sum(), tensors, list(tensors))
    want = _gradients((truth.logps * coef).sum(), exact, list(exact))
    for name, a, b in zip(tensors, got, want, strict=True):
        assert float((a.double() - b).norm()) <= 3e-6 * float(b.norm()), name


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("extras", [(), ("entropy",)], ids=["logps", "entropy"])
def test_gradcheck(kind, extras):
    tensors, labels = _problem(torch.float64, kind, n=6, vocab=9)

    def function(*values):
        out = _ours(dict(zip(tensors, values, strict=True)), labels, extras=extras)
        return (out.logps, out.entropy) if extras else out

    assert torch.autograd.gradcheck(function, [t.requires_grad_() for t in tensors.values()])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_fast_mode_has_the_labels_logit_exact(dtype):
    tensors, labels = _problem(dtype, "dora")
    truth = oracle.token_stats(_merged_logits(tensors), labels).logps
    exact, fast = (_ours(tensors, labels, precision=p) for p in ("exact", "fast"))
    oracle.assert_within(exact, truth, 1e-5)
    oracle.assert_within(fast, truth, 0.05)
    assert (fast <= 0).all()


def test_under_autocast_and_compile():
    tensors, labels = _problem(torch.float32, "dora")
    for t in tensors.values():
        t.requires_grad_()

    def step(*values):
        return _ours(dict(zip(NAMES, values, strict=True)), labels).sum()

    values = list(tensors.values())
    plain = torch.autograd.grad(step(*values), values)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for a, b in zip(torch.autograd.grad(compiled(*values), values), plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        loss = step(*values)
    for a, b in zip(torch.autograd.grad(loss, values), plain, strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a, b, rtol=0.1, atol=0.1 * float(b.abs().max()))


def test_a_loss_with_an_adapter():
    tensors, labels = _problem(torch.float64, "lora", n=24)
    hidden, low = tensors["hidden"].view(4, 6, H), tensors["low"].view(4, 6, R)
    out = fastpref.linear_dpo_loss(
        hidden,
        tensors["weight"],
        labels.view(4, 6),
        low_rank=(low, tensors["up"]),
        softcap=8.0,
        ref_hidden=hidden,
    )
    sums = oracle.token_stats(_merged_logits(tensors), labels).logps.view(4, 6).sum(1)
    base = oracle.linear_logps(hidden, tensors["weight"], labels.view(4, 6), softcap=8.0).sum(1)
    ratios = sums - base
    torch.testing.assert_close(out.loss, oracle.dpo(ratios[:2], ratios[2:]).mean())


LORA_HIDDEN, LORA_B = torch.zeros(23, R), torch.zeros(V, R)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"lora_hidden": LORA_HIDDEN[:, :1], "lora_B": LORA_B}, "lora_hidden: got shape"),
        ({"lora_hidden": LORA_HIDDEN[:22], "lora_B": LORA_B}, "lora_hidden: got shape"),
        ({"lora_hidden": LORA_HIDDEN, "lora_B": LORA_B[1:]}, "lora_B: got shape"),
        ({"lora_hidden": LORA_HIDDEN, "lora_B": LORA_B[0, 0]}, "lora_B: got shape"),
        (
            {"lora_hidden": LORA_HIDDEN[:, :0], "lora_B": LORA_B[:, :0]},
            "lora_B: got shape .* r > 0",
        ),
        ({"low_rank": LORA_HIDDEN}, "low_rank: got Tensor, expected the pair"),
        ({"low_rank": (LORA_HIDDEN, LORA_B, None)}, "low_rank: got tuple, expected the pair"),
        ({"lora_hidden": LORA_HIDDEN}, "lora_B: got None, expected both"),
        ({"lora_B": LORA_B}, "lora_hidden: got None, expected both"),
        ({"low_rank": (LORA_HIDDEN, None)}, "lora_B: got None, .*low_rank"),
        ({"low_rank": (LORA_HIDDEN, LORA_B), "lora_B": LORA_B}, "low_rank: got it with"),
        ({"lora_hidden": LORA_HIDDEN.double(), "lora_B": LORA_B}, "lora_hidden: got float64"),
        ({"dora_scale": torch.zeros(V, 1)}, "dora_scale: got shape"),
        ({"dora_scale": torch.zeros(V, dtype=torch.int64)}, "dora_scale: got int64"),
        ({"dora_scale": torch.ones(V), "weight_scale": torch.ones(V)}, "weight_scale: got it with"),
    ],
)
def test_what_is_refused(change, message):
    tensors, labels = _problem(torch.float32, "lora")
    with pytest.raises(ValueError, match=f"^{message}"):
        linear_token_logps(tensors["hidden"], tensors["weight"], labels, **change)


def test_earlier_names():
    tensors, labels = _problem(torch.float32, "dora")
    hidden, weight, low, up = (tensors[k] for k in ("hidden", "weight", "low", "up"))
    scale, reference = tensors["weight_scale"], torch.zeros(1)
    new = dict(lora_hidden=low, lora_B=up, dora_scale=scale)
    old = dict(low_rank=(low, up), weight_scale=scale)
    one, other = (linear_token_logps(hidden, weight, labels, **given) for given in (new, old))
    assert one.equal(other)
    flat = dict(sequence_ids=torch.zeros_like(labels), num_sequences=2)
    for function, more in (
        (fastpref.linear_dpo_loss, {"ref_logps": torch.zeros(2), **flat}),
        (
            fastpref.linear_kto_loss,
            {"desirable": torch.tensor([True]), "ref_logps": reference}
            | {"kl": 0.0, "sequence_ids": flat["sequence_ids"]},
        ),
    ):
        one, other = (function(hidden, weight, labels, **more, **given) for given in (new, old))
        assert one.loss.equal(other.loss)
