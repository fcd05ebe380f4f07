"""Every loss against its paper's formula in float64: values, gradients, and extreme inputs."""

from __future__ import annotations

import loss_formulas
import pytest
import torch

from fastpref import LossOptions, preference_loss
from fastpref.losses import LOSS_TYPES

P = 5
NEEDED = {"exo_pair": {"label_smoothing": 0.01}, "alphapo": {"alpha": 0.25}}
BATCH = ("sft", "cpo", "orpo")  # their NLL is a mean over all tokens of the batch
PAIRED = [name for name in LOSS_TYPES if not name.startswith("aot")]


def inputs(dtype=torch.float64, size=20.0):
    """w, l, rw, rl [P] and the lengths nw, nl."""
    logps = {key: -torch.rand(P, dtype=dtype) * size for key in ("w", "l", "rw", "rl")}
    lengths = {key: torch.randint(1, 30, (P,)) for key in ("nw", "nl")}
    return {**logps, **lengths}


def run(name, given, **options):
    """Our loss; options of the loss and inputs per pair go in together."""
    options = {**NEEDED.get(name, {}), **options}
    free = LossOptions(name, **NEEDED.get(name, {})).reference == "none"
    references = (None, None) if free else (given["rw"], given["rl"])
    return preference_loss(
        given["w"],
        given["l"],
        *references,
        loss_type=name,
        chosen_lengths=given["nw"],
        rejected_lengths=given["nl"],
        **options,
    )


def truth(name, given, weight=None, **options):
    """The mean of the formula over the pairs."""
    p = loss_formulas.data(**given, **NEEDED.get(name, {}), **options)
    if name in BATCH and weight is not None:  # each answer's own share of the NLL
        shares = -p.w * len(p.w) / p.nw.sum()
        rest = {"cpo": loss_formulas.cpo_preference, "orpo": loss_formulas.orpo_preference}
        each = shares + (rest[name](p) if name in rest else 0)
    else:
        each = loss_formulas.LOSSES[name](p)
    return (each if weight is None else each * weight.double()).mean()


OPTIONS: list[tuple[str, dict]] = [
    *((name, {}) for name in LOSS_TYPES),
    *((name, {"beta": 1.7}) for name in LOSS_TYPES),
    *(
        (name, {"label_smoothing": 0.2})
        for name in ("sigmoid", "sigmoid_norm", "robust", "aot", "aot_unpaired", "cpo", "simpo",
                     "alphapo")
    ),
    ("ipo", {"ipo_normalization": "sum"}),
    ("discopop", {"discopop_tau": 0.5}),
    ("simpo", {"simpo_gamma": 0.0}),
    ("alphapo", {"simpo_gamma": -0.4}),
    *(
        (name, {"f_divergence_type": kind, "f_alpha_divergence_coef": coef})
        for name in ("sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust", "discopop",
                     "sft")
        for kind, coef in (("forward_kl", 0.5), ("js_divergence", 0.5), ("alpha_divergence", 0.5),
                           ("alpha_divergence", -1.0), ("alpha_divergence", 1.0))
    ),
]  # fmt: skip


def compare(got, want, leaves, rtol, atol):
    torch.testing.assert_close(got.double(), want, rtol=rtol, atol=atol)
    grads = torch.autograd.grad(got, leaves, allow_unused=True)
    expected = torch.autograd.grad(want, leaves, allow_unused=True)
    for a, b in zip(grads, expected, strict=True):
        zero = torch.zeros(P, dtype=torch.float64)
        a, b = (zero if t is None else t.double() for t in (a, b))
        torch.testing.assert_close(a, b, rtol=rtol, atol=atol)


def shown(value):
    return value if isinstance(value, str) else "-".join(map(str, value.values()))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("name, options", OPTIONS, ids=shown)
def test_formula(name, options, dtype):
    # Small log-ratios where exp of them is taken.
    given = inputs(dtype, 3.0 if "f_divergence_type" in options or name == "discopop" else 20.0)
    leaves = [given[key].requires_grad_() for key in ("w", "l", "rw", "rl")]
    got = run(name, given, **options)
    tolerance = 1e-10 if dtype == torch.float64 else 2e-5
    size = 1.0 if dtype == torch.float64 else max(1.0, float(got.loss.detach().abs()))
    compare(got.loss, truth(name, given, **options), leaves, tolerance, tolerance * size)
    assert not got.chosen_rewards.requires_grad and got.loss.dtype == dtype


TAKES_MARGIN = ["sigmoid", "sigmoid_norm", "hinge", "exo_pair", "robust", "discopop", "cpo",
                "simpo", "alphapo"]  # fmt: skip
TAKES_SOFT = ["sigmoid", "sigmoid_norm", "hinge", "ipo", "sppo_hard", "cpo", "simpo", "alphapo",
              "orpo"]  # fmt: skip


@pytest.mark.parametrize("name", LOSS_TYPES)
def test_weights_margins_and_soft_labels(name):
    given = inputs(size=3.0 if name == "discopop" else 20.0)
    leaves = [given[key].requires_grad_() for key in ("w", "l", "rw", "rl")]
    values = {
        "weight": torch.rand(P, dtype=torch.float64),
        "margin": torch.randn(P, dtype=torch.float64),
        "soft_labels": torch.rand(P, dtype=torch.float64),
    }
    takes = {
        "weight": name in PAIRED, "margin": name in TAKES_MARGIN, "soft_labels": name in TAKES_SOFT
    }  # fmt: skip
    for key, value in values.items():
        if takes[key]:
            extra = {key: value}
            compare(
                run(name, given, **extra).loss, truth(name, given, **extra), leaves, 1e-10, 1e-10
            )
        else:
            with pytest.raises(ValueError, match=f"^{key}: loss_type '{name}' does not support"):
                run(name, given, **{key: value})
    together = {key: value for key, value in values.items() if takes[key]}
    compare(run(name, given, **together).loss, truth(name, given, **together), leaves, 1e-10, 1e-10)


def test_soft_labels_are_label_smoothing_by_pair():
    given = inputs()
    for name in ("sigmoid", "sigmoid_norm", "cpo", "simpo"):
        smooth = run(name, given, label_smoothing=0.2)
        soft = run(name, given, soft_labels=torch.full((P,), 0.8, dtype=torch.float64))
        torch.testing.assert_close(smooth.loss, soft.loss)
        certain = run(name, given, soft_labels=torch.ones(P))
        torch.testing.assert_close(certain.loss, run(name, given).loss)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("chosen, rejected", [(1e4, -1e4), (-1e4, 1e4), (-1e4, -1e4), (0.0, 0.0)])
@pytest.mark.parametrize("name", [n for n in LOSS_TYPES if n not in ("simpo", "alphapo", "orpo")])
def test_log_ratios_of_ten_thousand_nats(name, chosen, rejected, dtype):
    """Finite, and the formula's values and gradients."""
    logps = {"w": min(chosen, 0.0), "l": min(rejected, 0.0)}
    logps |= {"rw": logps["w"] - chosen, "rl": logps["l"] - rejected}
    given = {key: torch.full((P,), value, dtype=dtype) for key, value in logps.items()}
    given |= {key: torch.arange(1, P + 1) for key in ("nw", "nl")}
    leaves = [given[key].requires_grad_() for key in ("w", "l")]
    for beta in (0.1, 1.0):
        got = run(name, given, beta=beta)
        assert got.loss.isfinite() and got.chosen_rewards.isfinite().all()
        compare(got.loss, truth(name, given, beta=beta), leaves, 1e-5, 1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("kind", ["forward_kl", "js_divergence", "alpha_divergence"])
@pytest.mark.parametrize("name", ["sigmoid", "sigmoid_norm", "hinge", "exo_pair", "robust",
                                  "discopop"])  # fmt: skip
def test_divergences_of_extreme_ratios_are_finite(name, kind, dtype):
    for ratio in (1e4, -1e4, 100.0, -100.0):
        zero = torch.zeros(P, dtype=dtype)
        given = {key: zero.clone().requires_grad_() for key in ("w", "l")}
        given |= {"rw": zero - ratio, "rl": zero, "nw": torch.ones(P), "nl": torch.ones(P)}
        loss = run(name, given, f_divergence_type=kind).loss
        grads = torch.autograd.grad(loss, [given["w"], given["l"]])
        assert loss.isfinite() and all(g.isfinite().all() for g in grads), (name, kind, ratio)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("name", ["simpo", "alphapo", "orpo", "cpo", "sft"])
def test_extreme_log_probs_without_a_reference(name, dtype):
    """Mean log-probs from certainty to 10^4 nats a token, and answers of no token at all."""
    for chosen, rejected, *lengths in (
        (-1e4, -1e4, 1, 1), (-1e-3, -1e4, 1, 1), (-1e4, -1e-3, 1, 1), (0.0, -5.0, 1, 2),
        (-5.0, 0.0, 2, 1), (0.0, 0.0, 0, 0), (-3.0, 0.0, 1, 0), (0.0, -3.0, 0, 1),
    ):  # fmt: skip
        given = {"w": torch.tensor([chosen, -1.0]), "l": torch.tensor([rejected, -2.0])}
        given = {key: t.to(dtype).requires_grad_() for key, t in given.items()}
        leaves = list(given.values())
        given |= {key: torch.tensor([n, 3]) for key, n in zip(("nw", "nl"), lengths, strict=True)}
        given |= {"rw": None, "rl": None}
        if name == "sft":
            given |= {"rw": torch.zeros(2, dtype=dtype), "rl": torch.zeros(2, dtype=dtype)}
        loss = run(name, given).loss
        grads = torch.autograd.grad(loss, leaves, allow_unused=True)
        assert loss.isfinite() and all(g is None or g.isfinite().all() for g in grads)
        if name in ("simpo", "cpo", "sft") and all(lengths):
            torch.testing.assert_close(loss.double(), truth(name, given), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", LOSS_TYPES)
def test_no_pairs_and_one_pair(name):
    for size in (0, 1):
        given = {k: v[:size] for k, v in inputs(torch.float32).items()}
        leaves = [given[key].requires_grad_() for key in ("w", "l")]
        got = run(name, given)
        grads = torch.autograd.grad(got.loss, leaves, allow_unused=True)
        assert all(g is None or (g.isfinite().all() and g.shape == (size,)) for g in grads)
        assert got.chosen_rewards.shape == got.rejected_rewards.shape == (size,)
        assert got.loss == 0 if size == 0 else got.loss.isfinite()


def test_rewards():
    """beta times the log-ratios for every loss with a reference, whatever the divergence."""
    given = inputs()
    raw = 0.1 * (given["w"] - given["rw"]), 0.1 * (given["l"] - given["rl"])
    for name in LOSS_TYPES:
        own = {
            "cpo": (given["w"], given["l"]),
            "simpo": (given["w"] / given["nw"], given["l"] / given["nl"]),
            "orpo": (given["w"] / given["nw"], given["l"] / given["nl"]),
            "alphapo": [
                (1 - torch.exp(-0.25 * given[a] / given[n])) / 0.25
                for a, n in (("w", "nw"), ("l", "nl"))
            ],
        }.get(name)
        expected = raw if own is None else [0.1 * t for t in own]
        got = run(name, given)
        torch.testing.assert_close(list(got[1:]), list(expected))
    js = run("ipo", given, f_divergence_type="js_divergence")
    torch.testing.assert_close(js.chosen_rewards, raw[0])
    free = preference_loss(given["w"], given["l"], reference_free=True)
    torch.testing.assert_close(free.chosen_rewards, 0.1 * given["w"])
