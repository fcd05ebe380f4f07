"""fastpref.integrations.liger against float64 formulas and, where it is installed, Liger itself."""

from __future__ import annotations

import importlib.util

import oracle
import pytest
import torch
import torch.nn.functional as F

from fastpref.integrations import liger as ours

B, T, H, V = 6, 7, 16, 37
BETA, EPSILON, TAU, ALPHA, GAMMA = 0.3, 0.1, 0.07, 0.7, 0.4

MISSING = [name for name in ("liger_kernel", "triton") if not importlib.util.find_spec(name)]
liger = None
if not MISSING:
    import liger_kernel.chunked_loss as liger


class Batch:
    """Inputs with a head of its own for the reference, gradients wanted for the first three."""

    def __init__(self, dtype=torch.float32):
        self.weight = (torch.randn(V, H) * 0.5).to(dtype).requires_grad_()
        self.input = torch.randn(B, T, H).to(dtype).requires_grad_()
        self.bias = torch.randn(V).to(dtype).requires_grad_()
        self.target = torch.randint(0, V, (B, T))
        self.target[0, :2] = self.target[3, 4:] = self.target[4, 1:3] = -100
        self.ref_input = torch.randn(B, T, H).to(dtype)
        self.ref_weight = (torch.randn(V, H) * 0.5).to(dtype)
        self.ref_bias = torch.randn(V).to(dtype)
        self.good = torch.tensor([True, False, True, True, False, False])

    @property
    def policy(self):
        return self.weight, self.input, self.target, self.bias

    @property
    def reference(self):
        return self.ref_input, self.ref_weight, self.ref_bias

    def grads(self, loss):
        inputs = self.weight, self.input, self.bias
        return torch.autograd.grad(1.7 * loss, inputs)

    def means(self):
        """The mean logit of either half, ignored positions too."""
        z = oracle.logits(self.input, self.weight, self.bias)
        return z[: B // 2].mean(), z[B // 2 :].mean()

    def sums(self, average=False, reference=False):
        head = self.reference if reference else (self.input, self.weight, self.bias)
        hidden, weight, bias = head
        tokens = oracle.linear_logps(hidden, weight, self.target, bias)
        sums = oracle.sequence_sums(tokens, self.target)
        return sums / (self.target != -100).sum(1) if average else sums

    def nll(self, target=None):
        target = self.target if target is None else target
        z = oracle.logits(self.input, self.weight, self.bias)[: B // 2]
        return F.cross_entropy(z.reshape(-1, V), target[: B // 2].reshape(-1))


def log_sig(x):
    return F.logsigmoid(x)


def smoothed(x, e=EPSILON):
    return -(1 - e) * log_sig(x) - e * log_sig(-x)


# From the papers and Liger's documentation: c, r are log-ratios of B / 2 pairs, x = beta (c - r).
DPO = {
    "sigmoid": lambda c, r, x: -log_sig(x),
    "hinge": lambda c, r, x: torch.relu(1 - x),
    "exo_pair": lambda c, r, x: (
        x.sigmoid() * (log_sig(x) - torch.log(torch.tensor(1 - EPSILON)))
        + (-x).sigmoid() * (log_sig(-x) - torch.log(torch.tensor(EPSILON)))
    ),
    "nca_pair": lambda c, r, x: (
        -log_sig(BETA * c) - 0.5 * log_sig(-BETA * c) - 0.5 * log_sig(-BETA * r)
    ),
    "robust": lambda c, r, x: (
        (-(1 - EPSILON) * log_sig(x) + EPSILON * log_sig(-x)) / (1 - 2 * EPSILON)
    ),
    "bco_pair": lambda c, r, x: -log_sig(BETA * c) - log_sig(-BETA * r),
    "sppo_hard": lambda c, r, x: (c - 0.5 / BETA) ** 2 + (r + 0.5 / BETA) ** 2,
    "apo_zero": lambda c, r, x: 1 - (BETA * c).sigmoid() + (BETA * r).sigmoid(),
    "apo_down": lambda c, r, x: (BETA * c).sigmoid() + 1 - x.sigmoid(),
    "discopop": lambda c, r, x: (
        -log_sig(x) * (1 - (x / TAU).sigmoid()) + (-x).exp() * (x / TAU).sigmoid()
    ),
}
OPTIONS = {
    "exo_pair": {"label_smoothing": EPSILON},
    "robust": {"label_smoothing": EPSILON},
    "discopop": {"discopop_tau": TAU},
}


def close(given, wanted, tolerance=2e-5):
    for g, w in zip(given, wanted, strict=True):
        torch.testing.assert_close(g.double(), w.double(), rtol=tolerance, atol=tolerance)


def check(name, batch, options, args, loss, aux, **later):
    """Our class against the given truth and against Liger's class of that name."""
    module = getattr(ours, name)(compiled=False, **options)
    mine, mine_aux = module(*args, **later)
    assert mine.dtype == torch.float32 and mine.shape == ()
    assert not any(t.requires_grad for t in mine_aux)
    close([mine, *mine_aux], [loss, *aux])
    grads = batch.grads(mine)
    close(grads, batch.grads(loss))
    if liger is not None and not later:
        theirs, theirs_aux = getattr(liger, name)(compiled=False, **options)(*args)
        close([mine, *mine_aux], [theirs, *theirs_aux])
        assert [t.shape for t in mine_aux] == [t.shape for t in theirs_aux]
        close(grads, batch.grads(theirs))


@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize("nll", [False, True])
@pytest.mark.parametrize("loss_type", DPO)
def test_dpo(loss_type, nll, average):
    batch = Batch()
    policy, ref = batch.sums(average), batch.sums(average, reference=True).detach()
    c, r = (policy - ref).chunk(2)
    nll_loss = batch.nll() if nll else torch.zeros(())
    loss = ALPHA * nll_loss + DPO[loss_type](c, r, BETA * (c - r)).mean()
    aux = *policy.chunk(2), *batch.means(), nll_loss, BETA * c, BETA * r
    options = dict(
        beta=BETA, alpha=ALPHA, compute_nll_loss=nll, average_log_prob=average, loss_type=loss_type
    )
    args = *batch.policy, *batch.reference
    check(
        "LigerFusedLinearDPOLoss", batch, {**options, **OPTIONS.get(loss_type, {})}, args, loss, aux
    )


def test_dpo_without_reference():
    batch = Batch()
    c, r = batch.sums().chunk(2)
    loss = -log_sig(BETA * (c - r)).mean()
    aux = c, r, *batch.means(), torch.zeros(()), BETA * c, BETA * r
    check(
        "LigerFusedLinearDPOLoss",
        batch,
        dict(beta=BETA, use_ref_model=False),
        batch.policy,
        loss,
        aux,
    )


@pytest.mark.parametrize("average", [False, True])
def test_given_reference_log_probs(average):
    batch = Batch()
    policy, ref = batch.sums(average), batch.sums(average, reference=True).detach()
    c, r = (policy - ref).chunk(2)
    loss = -log_sig(BETA * (c - r)).mean()
    aux = *policy.chunk(2), *batch.means(), torch.zeros(()), BETA * c, BETA * r
    options = dict(beta=BETA, average_log_prob=average)
    check("LigerFusedLinearDPOLoss", batch, options, batch.policy, loss, aux, ref_logps=ref.float())


@pytest.mark.parametrize("loss_type", ["ipo", "sigmoid_norm", "aot", "aot_unpaired"])
@pytest.mark.parametrize("average", [False, True])
def test_losses_that_liger_refuses(loss_type, average):
    batch = Batch()
    policy, ref = batch.sums(average), batch.sums(average, reference=True).detach()
    lengths = torch.ones(B) if average else (batch.target != -100).sum(1)
    c, r = (policy - ref).chunk(2)
    mean_c, mean_r = ((policy - ref) / lengths).chunk(2)
    (pc, pr), (rc, rr) = policy.chunk(2), ref.chunk(2)
    losses = {
        "ipo": (mean_c - mean_r - 1 / (2 * BETA)) ** 2,
        "sigmoid_norm": -log_sig(BETA * (mean_c - mean_r)),
        "aot": smoothed(BETA * ((pc - pr).sort().values - (rc - rr).sort().values)),
        "aot_unpaired": smoothed(BETA * (c.sort().values - r.sort().values)),
    }
    e = EPSILON if "aot" in loss_type else 0.0
    module = ours.LigerFusedLinearDPOLoss(
        beta=BETA, loss_type=loss_type, label_smoothing=e, average_log_prob=average
    )
    mine, _ = module(*batch.policy, *batch.reference)
    close(
        [mine, *batch.grads(mine)],
        [losses[loss_type].mean(), *batch.grads(losses[loss_type].mean())],
    )


@pytest.mark.parametrize("nll", [False, True])
@pytest.mark.parametrize("average", [False, True])
def test_cpo(nll, average):
    batch = Batch()
    c, r = batch.sums(average).chunk(2)
    nll_loss = batch.nll() if nll else torch.zeros(())
    loss = ALPHA * nll_loss + smoothed(BETA * (c - r)).mean()
    aux = c, r, *batch.means(), nll_loss, BETA * c, BETA * r
    options = dict(
        beta=BETA,
        alpha=ALPHA,
        label_smoothing=EPSILON,
        compute_nll_loss=nll,
        average_log_prob=average,
    )
    check("LigerFusedLinearCPOLoss", batch, options, batch.policy, loss, aux)


@pytest.mark.parametrize("nll", [False, True])
def test_simpo(nll):
    batch = Batch()
    c, r = batch.sums(average=True).chunk(2)
    nll_loss = batch.nll() if nll else torch.zeros(())
    loss = ALPHA * nll_loss + smoothed(BETA * (c - r) - GAMMA).mean()
    aux = c, r, *batch.means(), nll_loss, BETA * c, BETA * r
    options = dict(
        beta=BETA, alpha=ALPHA, label_smoothing=EPSILON, compute_nll_loss=nll, gamma=GAMMA
    )
    check("LigerFusedLinearSimPOLoss", batch, options, batch.policy, loss, aux)


@pytest.mark.parametrize("nll_target", [None, "prompt too", "other labels"])
@pytest.mark.parametrize("nll", [False, True])
def test_orpo(nll, nll_target):
    batch = Batch()
    args = batch.policy
    target = None
    if nll_target is not None:
        target = batch.target.clone()
        target[0, : 2 if nll_target == "prompt too" else 4] = 5
        args = *args, target
    c, r = batch.sums(average=True).chunk(2)
    odds = c - r - torch.log1p(-c.exp()) + torch.log1p(-r.exp())
    nll_loss = batch.nll(target) if nll else torch.zeros(())
    ratio = log_sig(odds).mean()
    loss = nll_loss - BETA * ratio
    aux = c, r, *batch.means(), nll_loss, BETA * c, BETA * r, ratio, odds.mean()
    check("LigerFusedLinearORPOLoss", batch, dict(beta=BETA, compute_nll_loss=nll), args, loss, aux)


def kto_truth(batch, average, ref, kl):
    logps = batch.sums(average)
    ratios = logps - ref
    sign = torch.where(batch.good, 1.0, -1.0)
    losses = 1 - torch.sigmoid(BETA * (ratios - kl) * sign)
    z = oracle.logits(batch.input, batch.weight, batch.bias).sum((1, 2))
    good = batch.good
    aux = [(t * m).sum() for t in (logps, z, BETA * ratios) for m in (good, ~good)]
    return losses, aux


@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize("reference", [False, True])
@pytest.mark.parametrize("kl", [None, 0.3])
def test_kto(average, reference, kl):
    batch = Batch()
    ref = batch.sums(average, reference=True).detach() if reference else 0.0
    losses, aux = kto_truth(batch, average, ref, kl or 0.0)
    args = batch.input, batch.weight, batch.target, batch.bias, batch.good
    args += batch.reference if reference else (None, None, None)
    args += (None if kl is None else torch.tensor(kl),)
    options = dict(beta=BETA, use_ref_model=reference, average_log_prob=average)
    check("LigerFusedLinearKTOLoss", batch, options, args, losses.mean(), aux)


def test_kto_takes_one_kl_for_each_sequence_and_class_weights():
    batch = Batch()
    ref = batch.sums(reference=True).detach()
    kl = torch.rand(B)
    losses, aux = kto_truth(batch, False, ref, kl)
    loss = (losses * torch.where(batch.good, 2.0, 0.5)).mean()
    args = batch.input, batch.weight, batch.target, batch.bias, batch.good
    options = dict(beta=BETA, use_ref_model=True, desirable_weight=2.0, undesirable_weight=0.5)
    check("LigerFusedLinearKTOLoss", batch, options, args, loss, aux, kl=kl, ref_logps=ref.float())


def test_bfloat16_sums_are_closer_to_the_truth():
    batch = Batch(torch.bfloat16)
    expected = torch.cat(batch.sums().chunk(2))
    _, (chosen, rejected, *_) = ours.LigerFusedLinearDPOLoss(use_ref_model=False)(*batch.policy)
    error = (torch.cat([chosen, rejected]).double() - expected).abs().max()
    assert error < 1e-3
    if liger is not None:
        module = liger.LigerFusedLinearDPOLoss(use_ref_model=False, compiled=False)
        _, (chosen, rejected, *_) = module(*batch.policy)
        assert error < (torch.cat([chosen, rejected]).double() - expected).abs().max()


def test_sequences_without_a_label_are_finite():
    """Where Liger divides 0 by 0."""
    batch = Batch()
    batch.target[[1, 4]] = -100
    batch.target[: B // 2] = -100
    for name in ("DPO", "CPO", "SimPO", "ORPO"):
        options = {"use_ref_model": False, "average_log_prob": True} if name == "DPO" else {}
        loss, aux = getattr(ours, f"LigerFusedLinear{name}Loss")(**options)(*batch.policy)
        assert torch.isfinite(loss) and all(torch.isfinite(t).all() for t in aux)
        assert all(torch.isfinite(g).all() for g in batch.grads(loss))


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("DPO", {"loss_type": "kto"}, "loss_type: got 'kto', expected one of sigmoid"),
        ("DPO", {"loss_type": "simpo"}, "loss_type: got 'simpo'"),
        ("DPO", {"label_smoothing": 0.1}, "label_smoothing: .*cDPO"),
        ("DPO", {"label_smoothing": 0.1, "loss_type": "hinge"}, "label_smoothing: "),
        ("DPO", {"discopop_tau": 0.1}, "discopop_tau: "),
        ("DPO", {"loss_type": "exo_pair"}, "label_smoothing: got 0"),
        ("DPO", {"loss_type": "robust", "label_smoothing": 0.5}, "label_smoothing: got 0.5"),
        ("DPO", {"beta": "large"}, "beta: got 'large'"),
        ("DPO", {"alpha": None}, "alpha: got None"),
        ("DPO", {"chunk_size": 0}, "chunk_size: got 0"),
        ("CPO", {"softcap": 30.0}, "softcap: not an option"),
        ("SimPO", {"gamma": "x"}, "gamma: got 'x'"),
        ("ORPO", {"precision": "half"}, "precision: got 'half'"),
        ("KTO", {"desirable_weight": "1"}, "desirable_weight: got '1'"),
    ],
)
def test_bad_options(name, options, message):
    with pytest.raises(ValueError, match=message):
        getattr(ours, f"LigerFusedLinear{name}Loss")(**options)


def test_bad_inputs():
    batch = Batch()
    dpo, kto = ours.LigerFusedLinearDPOLoss(), ours.LigerFusedLinearKTOLoss()
    ref = torch.zeros(B)
    for args, more, message in (
        (batch.policy, {}, "ref_input: got use_ref_model=True with no ref_input and no ref_logps"),
        ((*batch.policy, *batch.reference), {"ref_logps": ref}, "expected one of the two"),
        (batch.policy, {"ref_logps": ref[:3]}, r"ref_logps: got shape \(3,\), expected \[6\]"),
        ((batch.weight, batch.input[0], batch.target), {}, "_input: got shape"),
        ((batch.weight[:, 1:], batch.input, batch.target), {}, r"lin_weight: got shape \(37, 15\)"),
        ((batch.weight, batch.input[1:], batch.target[1:]), {}, "_input: got 5 sequences"),
    ):
        with pytest.raises(ValueError, match=message):
            dpo(*args, **more)
    inputs = batch.input, batch.weight, batch.target
    for more, message in (
        ({}, "preference_labels: got None"),
        ({"preference_labels": batch.good.long()}, "preference_labels: got int64"),
        ({"preference_labels": batch.good[1:]}, "preference_labels: got shape"),
        ({"preference_labels": batch.good, "kl": torch.ones(2)}, "kl: got shape"),
        ({"preference_labels": batch.good, "ref_logps": ref}, "ref_input: got use_ref_model=False"),
    ):
        with pytest.raises(ValueError, match=message):
            kto(*inputs, **more)
    with pytest.raises(ValueError, match="nll_target: got shape"):
        ours.LigerFusedLinearORPOLoss()(*batch.policy, nll_target=batch.target[:, 1:])


@pytest.mark.skipif(liger is None, reason=f"not installed: {', '.join(MISSING)}")
@pytest.mark.parametrize("name", ours.__all__)
def test_signatures_begin_with_ligers(name):
    import inspect

    for method in ("__init__", "forward"):
        mine, theirs = (
            [
                (p.name, p.default, p.kind)
                for p in inspect.signature(getattr(getattr(m, name), method)).parameters.values()
            ]
            for m in (ours, liger)
        )
        assert mine[: len(theirs)] == theirs
