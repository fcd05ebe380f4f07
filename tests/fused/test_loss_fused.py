"""Every loss from hidden states: against the papers' formulas on float64 logits."""

from __future__ import annotations

import loss_formulas
import oracle
import pytest
import torch
import torch.nn.functional as F

from fastpref import (
    FusedLinearPreferenceLoss,
    LossOptions,
    backends,
    dpo_loss,
    linear_preference_loss,
    linear_token_logps,
    sequence_logps,
)
from fastpref.losses import LOSS_TYPES, Loss, Pairs
from fastpref.losses.tokens import ld_sequence_logps, ld_weights, wpo_weights

P, T, H, V = 3, 7, 8, 23
OWN = {"exo_pair": {"label_smoothing": 0.01}, "alphapo": {"alpha": 0.25}}
MIX = {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]}  # MPO


def batch(dtype=torch.float64):
    """hidden, weight, labels, ref_logps; ragged, with an empty answer and one of one token."""
    hidden = torch.randn(2 * P, T, H, dtype=dtype).requires_grad_()
    weight = (torch.randn(V, H, dtype=dtype) * 0.5).requires_grad_()
    labels = torch.randint(V, (2 * P, T))
    labels[:, :2] = -100
    labels[1, 3:] = -100
    labels[2 * P - 1] = -100
    labels[P, 5:] = -100
    return hidden, weight, labels, -30 * torch.rand(2 * P, dtype=dtype)


def formula(options, hidden, weight, labels, ref_logps, nll_labels=None, **given):
    """The loss by the papers' formulas, all in float64."""
    options = dict(options)
    z = oracle.logits(hidden, weight)
    whole = labels if nll_labels is None else torch.where(labels < 0, nll_labels, labels)
    logps = oracle.token_stats(z, whole).logps
    alpha = options.pop("ld_alpha", None)
    weighted = options.pop("use_weighting", False)
    names = options.pop("loss_type", "sigmoid")
    names = [names] if isinstance(names, str) else list(names)
    factors = options.pop("loss_weights", [1.0] * len(names))
    nll = options.pop("nll_weight", sum({"cpo": 1.0, "orpo": 1.0}.get(n, 0.0) for n in names))
    answers = logps * (labels >= 0)
    sums = answers.sum(1) if alpha is None else loss_formulas.ld_sums(answers, labels, alpha)
    lengths = (labels >= 0).sum(1).clamp(min=1)
    reference = torch.zeros(2 * P) if ref_logps is None else ref_logps
    p = loss_formulas.data(
        w=sums[:P], l=sums[P:], rw=reference[:P], rl=reference[P:],
        nw=lengths[:P], nl=lengths[P:], **options, **given,
    )  # fmt: skip
    counted = ((labels if nll_labels is None else nll_labels) >= 0)[:P]
    mean_nll = -(logps[:P] * counted).sum() / counted.sum()
    wpo = loss_formulas.wpo(logps, z.softmax(-1), labels) if weighted else 1.0
    total = nll * mean_nll
    alone = {"cpo": "cpo_preference", "orpo": "orpo_preference"}
    for name, factor in zip(names, factors, strict=True):
        if name == "sft":
            total = total + factor * mean_nll
        else:
            each = getattr(loss_formulas, alone.get(name, name))(p)
            total = total + factor * (wpo * each).mean()
    return total


def check(options, arguments, reference=True, rtol=1e-9, **given):
    hidden, weight, labels, ref_logps = arguments
    ref_logps = ref_logps if reference else None
    out = linear_preference_loss(hidden, weight, labels, ref_logps, **options, **given)
    want = formula(options, hidden, weight, labels, ref_logps, **given)
    close = dict(rtol=rtol, atol=rtol)
    torch.testing.assert_close(out.loss.double(), want, **close)
    grads = torch.autograd.grad(out.loss, [hidden, weight])
    for a, b in zip(grads, torch.autograd.grad(want, [hidden, weight]), strict=True):
        torch.testing.assert_close(a.double(), b.double(), rtol=rtol, atol=rtol * float(b.norm()))
    return out


CASES = [
    *({"loss_type": name, **OWN.get(name, {})} for name in LOSS_TYPES if name != "orpo"),
    MIX,
    {"loss_type": ["ipo", "sft"]},
    {"nll_weight": 0.3},
    {"loss_type": "simpo", "beta": 2.0, "nll_weight": 1.0},
    {"loss_type": "cpo", "nll_weight": 0.0},
    {"ld_alpha": 0.3},
    {"ld_alpha": 0.0, "loss_type": "ipo", "nll_weight": 1.0},
    {"use_weighting": True},
    {"use_weighting": True, **MIX},
    {"use_weighting": True, "ld_alpha": 0.5, "loss_type": "simpo"},
    {"f_divergence_type": "js_divergence", "loss_type": ["sigmoid", "sft"]},
]


def shown(value):
    return "-".join(map(str, value.values()))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("options", CASES, ids=shown)
def test_from_hidden_states(options, dtype):
    """Ragged answers, one of one token and one empty: values and both gradients."""
    reference = LossOptions(**options).reference != "none"
    rtol = 1e-9 if dtype == torch.float64 else 1e-4
    check(options, batch(dtype), reference, rtol)


def test_orpo():
    """Its odds are infinite for an answer without tokens, so those of the formula have some."""
    hidden, weight, labels, _ = batch()
    labels[2 * P - 1, 3] = 5
    check({"loss_type": "orpo"}, (hidden, weight, labels, None), False)
    out = linear_preference_loss(*batch()[:3], loss_type="orpo")
    assert out.loss.isfinite() and out.nll_loss > 0


@pytest.mark.parametrize("name", ["sigmoid", "ipo", "sppo_hard", "simpo"])
def test_weights_margins_and_soft_labels(name):
    arguments, reference = batch(), name != "simpo"
    soft = torch.rand(P, dtype=torch.float64)
    check({"loss_type": name}, arguments, reference, soft_labels=soft)
    if name in ("sigmoid", "simpo"):
        margin = torch.randn(P)
        check({"loss_type": name}, arguments, reference, soft_labels=soft, margin=margin)
    given = {} if reference else {"ref_logps": None}
    hidden, weight, labels, ref_logps = arguments
    call = dict(zip(("hidden", "weight", "labels", "ref_logps"), arguments, strict=True)) | given
    one = linear_preference_loss(**call, loss_type=name, soft_labels=soft)
    parts = [
        linear_preference_loss(
            **call, loss_type=name, soft_labels=soft, pair_weight=torch.eye(P)[i] * w
        ).loss
        for i, w in enumerate((0.5, 2.0, 1.0))
    ]
    weighted = linear_preference_loss(
        **call, loss_type=name, soft_labels=soft, pair_weight=torch.tensor([0.5, 2.0, 1.0])
    )
    torch.testing.assert_close(sum(parts), weighted.loss)
    assert weighted.loss != one.loss


def test_nll_of_the_prompt():
    hidden, weight, labels, ref_logps = batch()
    whole = torch.full_like(labels, -100)
    whole[:P] = torch.randint(V, (P, T))
    whole = torch.where((labels >= 0) & (whole >= 0), labels, whole)
    options = {"loss_type": "sigmoid", "nll_weight": 0.7}
    out = check(options, (hidden, weight, labels, ref_logps), nll_labels=whole)
    plain = linear_preference_loss(hidden, weight, labels, ref_logps, **options)
    assert out.nll_loss != plain.nll_loss and torch.equal(out.chosen_logps, plain.chosen_logps)
    # Labels of the rejected answers are not read, and statistics are of the answers alone.
    more = whole.clone()
    more[P:] = torch.where(labels[P:] >= 0, labels[P:], 3)
    extra = linear_preference_loss(
        hidden, weight, labels, ref_logps, nll_labels=more, extras=["entropy"], **options
    )
    torch.testing.assert_close(extra.loss, out.loss)
    assert not extra.stats.entropy[labels < 0].any() and extra.stats.log_sum_sq_probs is None
    logits = F.linear(hidden, weight)
    again = dpo_loss(logits, labels, ref_logps, nll_labels=whole, nll_weight=0.7)
    torch.testing.assert_close(again.loss, out.loss)
    index = ((labels >= 0) | (whole >= 0)).view(-1).nonzero()[:, 0]
    known = linear_preference_loss(
        hidden, weight, labels, ref_logps, nll_labels=whole, token_indices=index, **options
    )
    assert torch.equal(known.loss, out.loss)


@pytest.mark.parametrize("options", CASES, ids=shown)
def test_flat_form(options):
    """The same numbers from tokens in any order of sequences."""
    hidden, weight, labels, ref_logps = batch()
    reference = None if LossOptions(**options).reference == "none" else ref_logps
    padded = linear_preference_loss(hidden, weight, labels, reference, **options)
    ids = torch.arange(2 * P).repeat_interleave(T).view(2 * P, T)
    # Sequence by sequence, but in another order: a sequence's own tokens keep theirs.
    order = torch.randperm(2 * P)
    flat = linear_preference_loss(
        hidden[order].reshape(-1, H),
        weight,
        labels[order].reshape(-1),
        reference,
        sequence_ids=ids[order].reshape(-1),
        num_sequences=2 * P,
        **options,
    )
    torch.testing.assert_close(flat[:5], padded[:5])


def test_ld_weights():
    labels = torch.tensor([[-100, 1, 1, -100, 1, 1], [-100, -100, 1, 1, -100, -100]])
    expected = torch.tensor([[1, 1, 1, 1, 0.25, 0.25], [1.0] * 6])
    assert torch.equal(ld_weights(labels, 0.25), expected)
    ids = torch.tensor([[0] * 6, [1] * 6])
    interleaved = torch.stack([labels, ids], -1).transpose(0, 1).reshape(-1, 2)
    flat = ld_weights(
        interleaved[:, 0].contiguous(), 0.25, sequence_ids=interleaved[:, 1].contiguous(),
        num_sequences=2,
    )  # fmt: skip
    assert torch.equal(flat.view(6, 2).T, expected)
    logps = torch.randn(2, 6)
    torch.testing.assert_close(ld_sequence_logps(logps, labels, 1.0), sequence_logps(logps, labels))


def test_reference_inside():
    """With ld_alpha the reference's sums are weighed, too; at the same model the loss is ln 2."""
    hidden, weight, labels, _ = batch(torch.float32)
    same = dict(ref_hidden=hidden.detach(), ref_weight=weight.detach())
    for options in ({"ld_alpha": 0.3}, {"use_weighting": False, "nll_weight": 0.0}):
        out = linear_preference_loss(hidden, weight, labels, **same, **options)
        assert not out.chosen_rewards.any() and not out.rejected_rewards.any()
        torch.testing.assert_close(out.loss, torch.tensor(2.0).log())
    whole = torch.where(torch.arange(2 * P)[:, None] < P, labels.clamp(min=1), -100)
    whole = torch.where((labels >= 0) & (whole >= 0), labels, whole)
    out = linear_preference_loss(
        hidden, weight, labels, **same, nll_labels=whole, nll_weight=1.0, beta=0.5
    )
    assert not out.chosen_rewards.any()


def test_a_plain_loss_of_a_pair_takes_the_closed_form(monkeypatch):
    if backends.native.problem():
        pytest.skip(backends.native.problem())
    calls, real = [], backends.native.pair_loss
    monkeypatch.setattr(backends.native, "pair_loss", lambda *a: calls.append(a[4]) or real(*a))
    arguments = batch(torch.float32)
    extra = {"margin": torch.rand(P), "pair_weight": torch.rand(P)}
    for options in (
        {},
        {"label_smoothing": 0.1, **extra},
        {"loss_type": ["ipo"]},
        {"loss_type": "hinge"},
    ):
        linear_preference_loss(*arguments, **options)
    assert calls == ["sigmoid", "sigmoid", "ipo", "hinge"]
    others = (
        {"soft_labels": torch.ones(P)}, {"ld_alpha": 0.5}, {"use_weighting": True}, MIX,
        {"nll_weight": 0.1}, {"f_divergence_type": "forward_kl"}, {"loss_weights": [0.5]},
        {"loss_type": "aot"}, {"loss_type": own_dpo},
    )  # fmt: skip
    for options in others:
        linear_preference_loss(*arguments, **options)
    assert len(calls) == 4


# ---- losses of one's own ----


def own_dpo(pairs: Pairs):
    return F.softplus(-pairs.beta * (pairs.chosen - pairs.rejected))


def own_by_token(pairs: Pairs):
    chosen, rejected = pairs.mean_logps()
    return pairs.expected(F.softplus, rejected - chosen)


def test_a_loss_of_ones_own():
    hidden, weight, labels, ref_logps = batch()
    arguments = hidden, weight, labels, ref_logps
    own = linear_preference_loss(*arguments, loss_type=own_dpo, beta=0.3)
    dpo = linear_preference_loss(*arguments, beta=0.3)
    torch.testing.assert_close(own[:5], dpo[:5])
    mixed = linear_preference_loss(*arguments, loss_type=[own_dpo, "sft"], loss_weights=[0.5, 2.0])
    want = 0.5 * linear_preference_loss(*arguments).loss + 2 * mixed.nll_loss
    torch.testing.assert_close(mixed.loss, want)
    free = linear_preference_loss(
        hidden, weight, labels, loss_type=own_by_token, reference_free=True,
        soft_labels=torch.full((P,), 0.75),
    )  # fmt: skip
    known = linear_preference_loss(
        hidden, weight, labels, loss_type="simpo", beta=1.0, simpo_gamma=0.0,
        soft_labels=torch.full((P,), 0.75),
    )  # fmt: skip
    torch.testing.assert_close(free.loss, known.loss)
    careful = Loss(own_dpo, options=frozenset(), reference="required")
    module = FusedLinearPreferenceLoss(careful, beta=0.3)
    torch.testing.assert_close(module(*arguments).loss, dpo.loss)
    with pytest.raises(ValueError, match="^margin: loss_type 'own_dpo' does not support it"):
        module(*arguments, margin=torch.zeros(P))
    for wrong in (lambda pairs: own_dpo(pairs).mean(), lambda pairs: 1.0):
        with pytest.raises(ValueError, match="^loss_type: .* returned .* expected a tensor"):
            linear_preference_loss(*arguments, loss_type=wrong)


def test_wpo_weights_are_public():
    hidden, weight, labels, _ = batch()
    stats = linear_token_logps(hidden, weight, labels, extras=["log_sum_sq_probs"])
    got = wpo_weights(stats.logps, stats.log_sum_sq_probs, labels)
    z = oracle.logits(hidden, weight)
    truth = loss_formulas.wpo(oracle.token_stats(z, labels).logps, z.softmax(-1), labels)
    torch.testing.assert_close(got, truth)
    assert not got.requires_grad
