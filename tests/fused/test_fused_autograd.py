"""What autograd and its relatives ask of the fused losses: what plain torch gives, or one line."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from autograd_uses import REFUSED, H, N, V, grads, inputs

from fastpref import dpo_loss, linear_ipo_loss, linear_kto_loss, linear_preference_loss

S, T = 4, N // 4


def batch(hidden, weight, labels):
    return hidden.view(S, T, H), weight, labels.view(S, T)


def ref(labels):
    return torch.zeros(S, device=labels.device)


def closed_form_with_stats(hidden, weight, labels):
    out = linear_preference_loss(*batch(hidden, weight, labels), ref(labels), extras=["entropy"])
    return out.loss + 0.1 * out.stats.entropy.sum()


def ipo(hidden, weight, labels):
    return linear_ipo_loss(*batch(hidden, weight, labels), ref(labels)).loss


def through_autograd(hidden, weight, labels):
    return linear_preference_loss(
        *batch(hidden, weight, labels), ref(labels), loss_type=["sigmoid", "hinge"], nll_weight=0.1
    ).loss


def of_logits(hidden, weight, labels):
    hidden, weight, labels = batch(hidden, weight, labels)
    return dpo_loss(F.linear(hidden, weight), labels, ref(labels)).loss


def of_logits_in_place(hidden, weight, labels):
    hidden, weight, labels = batch(hidden, weight, labels)
    logits = F.linear(hidden, weight)
    return dpo_loss(logits, labels, ref(labels), inplace_backward=True).loss


def kto(hidden, weight, labels):
    desirable = torch.arange(S, device=labels.device) % 2 == 0
    return linear_kto_loss(*batch(hidden, weight, labels), desirable, ref(labels), kl=0.1).loss


LOSSES = [closed_form_with_stats, ipo, through_autograd, of_logits, of_logits_in_place, kto]
losses = pytest.mark.parametrize("loss", LOSSES, ids=lambda f: f.__name__)


@losses
@pytest.mark.parametrize("use", REFUSED, ids=lambda f: f.__name__)
@pytest.mark.filterwarnings("ignore:`torch.jit.*` is deprecated:DeprecationWarning")
def test_what_the_kernels_cannot_do_is_one_sentence(loss, use):
    with pytest.raises(NotImplementedError, match=f"^fastpref: {REFUSED[use]}"):
        use(loss)


@losses
def test_two_backward_passes(loss):
    hidden, weight, labels = inputs()
    value = loss(hidden, weight, labels)
    first = grads(value, hidden, weight, retain_graph=True)
    if loss is of_logits_in_place:
        with pytest.raises(RuntimeError, match="a second one needs inplace_backward=False"):
            grads(value, hidden, weight)
        return
    second = grads(value, hidden, weight)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        grads(value, hidden, weight)


@losses
@pytest.mark.parametrize("device", ["meta", "fake"])
def test_tensors_without_values(loss, device):
    from torch._subclasses.fake_tensor import FakeTensorMode

    def run(device):
        hidden, weight = torch.empty(N, H, device=device), torch.empty(V, H, device=device)
        labels = torch.empty(N, dtype=torch.int64, device=device)
        value = loss(hidden.requires_grad_(), weight.requires_grad_(), labels)
        value.backward()
        assert value.shape == () and weight.grad.shape == (V, H) and hidden.grad.shape == (N, H)

    if device == "meta":
        run("meta")
    else:
        with FakeTensorMode():
            run("cpu")


@losses
def test_export(loss):
    class Module(torch.nn.Module):
        def forward(self, *tensors):
            return loss(*tensors)

    tensors = tuple(t.detach() for t in inputs())
    graph = torch.export.export(Module(), tensors).module()
    other = torch.randn(N, H), tensors[1], torch.randint(V, (N,))
    torch.testing.assert_close(graph(*other), loss(*other))


@pytest.mark.parametrize("trains", ["hidden", "weight", "both"])
def test_a_reference_of_inference_mode(trains):
    """Log-probs of a reference that ran under torch.inference_mode are ordinary constants."""
    hidden, weight, labels = inputs()
    with torch.inference_mode():
        logps = torch.linspace(-9, -7, S)
    hidden.requires_grad_(trains != "weight")
    weight.requires_grad_(trains != "hidden")
    leaves = [t for t in (hidden, weight) if t.requires_grad]
    for loss_type in ("sigmoid", "ipo", "hinge"):
        value = linear_preference_loss(
            *batch(hidden, weight, labels), logps, loss_type=loss_type
        ).loss
        assert all(g.isfinite().all() for g in grads(value, *leaves))
