"""The losses of sequence log-probabilities, and the closed forms of a backend's pair_loss."""

from __future__ import annotations

import math
import warnings
from collections import defaultdict
from types import SimpleNamespace

import machine
import oracle
import pytest
import torch

from fastpref import backends, preference_loss

P = 5
LOSSES = {
    "dpo": {},
    "cdpo": {"label_smoothing": 0.2},
    "margin": {"label_smoothing": 0.1, "margin": True},
    "ipo": {"loss_type": "ipo"},
    "ipo sum": {"loss_type": "ipo", "ipo_normalization": "sum"},
}


def _pairs(dtype=torch.float64, size=20.0):
    """chosen, rejected, ref_chosen, ref_rejected [P]; lengths, weight, margin."""
    logps = [-torch.rand(P, dtype=dtype) * size for _ in range(4)]
    lengths = [torch.randint(1, 30, (P,)).to(dtype) for _ in range(2)]
    return logps, lengths, torch.rand(P, dtype=dtype), torch.randn(P, dtype=dtype)


def _options(name, lengths, margin) -> dict:
    options = dict(LOSSES[name])
    if options.pop("margin", False):
        options["margin"] = margin
    if options.get("loss_type") == "ipo" and "ipo_normalization" not in options:
        options.update(chosen_lengths=lengths[0], rejected_lengths=lengths[1])
    return options


def _truth(name, chosen, rejected, lengths, margin, beta):
    """One loss per pair, from the log-ratios."""
    if name.startswith("ipo"):
        lengths = lengths if name == "ipo" else (1, 1)
        return oracle.ipo(chosen, rejected, beta, *lengths)
    options = LOSSES[name]
    offset = margin if options.get("margin") else 0.0
    return oracle.dpo(chosen, rejected, beta, options.get("label_smoothing", 0.0), offset)


@pytest.mark.parametrize("reference_free", [False, True], ids=["reference", "free"])
@pytest.mark.parametrize("weighted", [False, True], ids=["mean", "weighted"])
@pytest.mark.parametrize("beta", [0.01, 0.1, 2.0])
@pytest.mark.parametrize("name", LOSSES)
def test_preference_loss(name, beta, weighted, reference_free):
    logps, lengths, weight, margin = _pairs()
    logps = [t.requires_grad_() for t in logps]
    references = [None, None] if reference_free else logps[2:]
    options = _options(name, lengths, margin) | {"weight": weight if weighted else None}
    got = preference_loss(
        *logps[:2], *references, beta=beta, reference_free=reference_free, **options
    )
    ratios = (
        logps[:2] if reference_free else [a - b for a, b in zip(logps, logps[2:], strict=False)]
    )
    each = _truth(name, *ratios, lengths, margin, beta)
    truth = (each * weight if weighted else each).sum() / P
    close = dict(rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(got.loss, truth, **close)
    for reward, ratio in zip(got[1:], ratios, strict=True):
        torch.testing.assert_close(reward, beta * ratio.detach(), **close)
        assert not reward.requires_grad
    leaves = logps[:2] if reference_free else logps  # a reference may be learned, too
    expected = torch.autograd.grad(truth, leaves)
    for a, b in zip(torch.autograd.grad(got.loss, leaves), expected, strict=True):
        torch.testing.assert_close(a, b, **close)


def _has_closed_form(tiles, name):
    closed_forms = backends._MODULES[machine.backend_of(tiles)].CLOSED_FORMS
    return LOSSES[name].get("loss_type", "sigmoid") in closed_forms


@pytest.mark.only_if(lambda tiles, name, **_: _has_closed_form(tiles, name))
@pytest.mark.parametrize("weighted", [False, True], ids=["mean", "weighted"])
@pytest.mark.parametrize("reference_free", [False, True], ids=["reference", "free"])
@pytest.mark.parametrize("name", LOSSES)
def test_closed_form(tiles, name, reference_free, weighted):
    """A backend's pair_loss: the same loss, rewards and coefficients as by autograd, in fp32."""
    beta, tokens = 0.3, 200
    _, lengths, weight, margin = _pairs(torch.float32)
    logps = -torch.rand(tokens) * 3
    ids = torch.randint(2 * P, (tokens,))
    ids[ids == 7] = 0  # a sequence without a token
    reference = None if reference_free else -torch.rand(2 * P) * 60
    options = _options(name, lengths, margin)
    loss, sequences, rewards, coef = tiles.pair_loss(
        logps,
        ids,
        P,
        reference,
        loss_type=options.get("loss_type", "sigmoid"),
        beta=beta,
        label_smoothing=options.get("label_smoothing", 0.0),
        lengths=torch.cat(lengths) if "chosen_lengths" in options else None,
        weight=weight if weighted else None,
        margin=options.get("margin"),
    )
    exact = logps.double().requires_grad_()
    sums = torch.zeros(2 * P, dtype=torch.float64).index_add(0, ids, exact)
    ratios = sums if reference is None else sums - reference
    each = _truth(name, ratios[:P], ratios[P:], lengths, margin, beta)
    truth = (each * weight if weighted else each).sum() / P
    (expected,) = torch.autograd.grad(truth, exact)
    for got, want in ((loss, truth), (sequences, sums), (rewards, beta * ratios), (coef, expected)):
        torch.testing.assert_close(got.double(), want, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("gap", [1e4, -1e4, 0.0])
@pytest.mark.parametrize("name", LOSSES)
def test_extreme_log_ratios(name, gap, dtype):
    """Finite losses and gradients where the policy is 10^4 nats away from the reference."""
    _, lengths, _, margin = _pairs(dtype)
    chosen = torch.full((P,), gap, dtype=dtype).requires_grad_()
    rejected = torch.full((P,), -gap, dtype=dtype).requires_grad_()
    zero = torch.zeros(P, dtype=dtype)
    options = _options(name, lengths, margin)
    got = preference_loss(chosen, rejected, zero, zero, beta=1.0, **options)
    truth = _truth(name, chosen.double(), rejected.double(), lengths, margin, 1.0).mean()
    torch.testing.assert_close(got.loss.double(), truth, rtol=1e-5, atol=1e-12)
    grads = torch.autograd.grad(got.loss, [chosen, rejected])
    expected = torch.autograd.grad(truth, [chosen, rejected])
    for a, b in zip(grads, expected, strict=True):
        assert a.isfinite().all()
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-12)


@pytest.mark.only_if(lambda tiles, name, **_: _has_closed_form(tiles, name))
@pytest.mark.parametrize("gap", [1e4, -1e4, 0.0])
@pytest.mark.parametrize("name", LOSSES)
def test_extreme_log_ratios_in_closed_form(tiles, name, gap):
    _, lengths, _, margin = _pairs(torch.float32)
    chosen, rejected = torch.full((P,), gap), torch.full((P,), -gap)
    options = _options(name, lengths, margin)
    loss, _, _, coef = tiles.pair_loss(
        torch.cat([chosen, rejected]),
        torch.arange(2 * P),
        P,
        None,
        loss_type=options.get("loss_type", "sigmoid"),
        beta=1.0,
        label_smoothing=options.get("label_smoothing", 0.0),
        lengths=torch.cat(lengths) if "chosen_lengths" in options else None,
        weight=None,
        margin=options.get("margin"),
    )
    exact = [t.double().requires_grad_() for t in (chosen, rejected)]
    truth = _truth(name, *exact, lengths, margin, 1.0).mean()
    torch.testing.assert_close(loss.double(), truth.detach(), rtol=1e-5, atol=1e-12)
    expected = torch.cat(torch.autograd.grad(truth, exact)).float()
    torch.testing.assert_close(coef, expected, rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize("name", LOSSES)
def test_no_pairs(name):
    empty = [torch.zeros(0, requires_grad=True) for _ in range(2)]
    options = _options(name, [torch.zeros(0)] * 2, torch.zeros(0))
    got = preference_loss(*empty, torch.zeros(0), torch.zeros(0), **options)
    assert got.loss == 0 and got.loss.requires_grad
    assert all(g.shape == (0,) for g in torch.autograd.grad(got.loss, empty))
    assert got.chosen_rewards.shape == got.rejected_rewards.shape == (0,)


def test_no_tokens_in_an_answer():
    """IPO's token mean of an empty answer is 0, not 0/0."""
    zero = torch.zeros(1)
    options = dict(loss_type="ipo", chosen_lengths=zero, rejected_lengths=zero)
    assert preference_loss(zero, zero, zero, zero, beta=0.5, **options).loss == 1


def _trl():
    """TRL's DPOTrainer, or skip; what TRL and its dependencies warn of on import is theirs."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trl = pytest.importorskip("trl", exc_type=ImportError)
        return trl.DPOTrainer


@pytest.mark.parametrize("beta", [0.1, 0.5])
@pytest.mark.parametrize("name, loss_type", [("dpo", "sigmoid"), ("ipo", "ipo")])
def test_trl(name, loss_type, beta):
    """TRL's own _compute_loss on our log-probs: the same loss, rewards and gradients to 1e-6."""
    trainer, length, prompt = _trl(), 12, 4
    token_logps = (-torch.rand(2 * P, length - 1) * 3).requires_grad_()
    mask = torch.zeros(2 * P, length).long()
    for row, end in enumerate(torch.randint(prompt + 1, length + 1, (2 * P,))):
        mask[row, prompt:end] = 1
    shifted = mask[:, 1:]
    reference = -torch.rand(2 * P) * 30

    def model(**inputs):
        return SimpleNamespace(
            log_probs=token_logps * shifted,  # TRL's fused head gives 0 where the label is ignored
            entropy=torch.ones(2 * P, length - 1),
            mean_logits=torch.zeros(2 * P, length - 1),
            is_top1=torch.zeros(2 * P, length - 1, dtype=torch.bool),
        )

    same = {"gather": lambda t: t, "gather_for_metrics": lambda t: t}
    metrics = {"train": defaultdict(list), "eval": defaultdict(list)}
    stub = SimpleNamespace(
        model=SimpleNamespace(training=True),
        accelerator=SimpleNamespace(device=torch.device("cpu"), **same),
        aux_loss_enabled=False,
        ld_alpha=None,
        precompute_ref_logps=True,
        f_divergence_type="reverse_kl",
        loss_types=[loss_type],
        loss_weights=[1.0],
        beta=beta,
        label_smoothing=0.0,
        use_weighting=False,
        args=SimpleNamespace(),
        _metrics=metrics,
        _total_train_tokens=0,
        _tp_size=1,
    )
    inputs = {
        "input_ids": torch.zeros(2 * P, length).long(),
        "attention_mask": torch.ones(2 * P, length).long(),
        "completion_mask": mask,
        "ref_chosen_logps": reference[:P],
        "ref_rejected_logps": reference[P:],
    }
    theirs = trainer._compute_loss(stub, model, inputs, False)
    sums, counts = (token_logps * shifted).sum(1), mask.sum(1)
    options = dict(chosen_lengths=counts[:P], rejected_lengths=counts[P:])
    ours = preference_loss(
        sums[:P], sums[P:], reference[:P], reference[P:], loss_type=loss_type, beta=beta, **options
    )
    close = dict(rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(ours.loss, theirs, **close)
    ratios = (sums - reference).detach().double()
    formula = _truth(name, ratios[:P], ratios[P:], (counts[:P], counts[P:]), None, beta).mean()
    torch.testing.assert_close(ours.loss.double(), formula, **close)
    for a, b in zip(
        torch.autograd.grad(ours.loss, token_logps, retain_graph=True),
        torch.autograd.grad(theirs, token_logps),
        strict=True,
    ):
        torch.testing.assert_close(a, b, **close)
    logged = {k: v[0] for k, v in metrics["train"].items() if k.startswith("rewards")}
    margins = ours.chosen_rewards - ours.rejected_rewards
    mine = {
        "rewards/chosen": ours.chosen_rewards.mean(),
        "rewards/rejected": ours.rejected_rewards.mean(),
        "rewards/margins": margins.mean(),
        "rewards/accuracies": (margins > 0).float().mean(),
    }
    assert logged == pytest.approx({k: float(v) for k, v in mine.items()}, rel=1e-5)


vector, matrix = torch.zeros(P), torch.zeros(P, 1)


@pytest.mark.parametrize(
    "name, changes",
    [
        ("loss_type", {"loss_type": "dpo"}),
        ("beta", {"beta": 0.0}),
        ("beta", {"beta": -0.1}),
        ("beta", {"beta": math.nan}),
        ("label_smoothing", {"label_smoothing": 0.5}),
        ("label_smoothing", {"label_smoothing": -0.1}),
        ("label_smoothing", {"loss_type": "ipo", "label_smoothing": 0.1}),
        ("margin", {"loss_type": "ipo", "margin": vector}),
        ("ipo_normalization", {"ipo_normalization": "sum"}),
        ("ipo_normalization", {"loss_type": "ipo", "ipo_normalization": "mean"}),
        ("chosen_lengths", {"loss_type": "ipo"}),
        ("rejected_lengths", {"loss_type": "ipo", "chosen_lengths": vector}),
        ("chosen_logps", {"chosen_logps": matrix}),
        ("rejected_logps", {"rejected_logps": matrix}),
        ("ref_chosen_logps", {"ref_chosen_logps": vector[1:]}),
        ("ref_rejected_logps", {"ref_rejected_logps": matrix}),
        ("weight", {"weight": vector[1:]}),
        ("margin", {"margin": matrix}),
        ("reference_free", {"reference_free": True}),
        ("ref_chosen_logps|ref_logps", {"ref_chosen_logps": None}),
        ("ref_rejected_logps|ref_logps", {"ref_rejected_logps": None}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_bad_input(name, changes):
    good = {
        k: vector
        for k in ("chosen_logps", "rejected_logps", "ref_chosen_logps", "ref_rejected_logps")
    }
    arguments = {**good, **changes}
    with pytest.raises(ValueError, match=f"^({name}): .*(expected|support)"):
        preference_loss(**arguments)
