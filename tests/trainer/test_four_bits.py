"""4-bit layers keep their gradients after a forward pass in evaluation mode."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from fastpref.trainer.four_bits import keep_gradients

bitsandbytes = pytest.importorskip("bitsandbytes")


@pytest.fixture
def layer():
    torch.manual_seed(0)
    layer = bitsandbytes.nn.Linear4bit(
        64, 64, bias=False, compute_dtype=torch.float32, quant_type="nf4"
    )
    layer.load_state_dict({"weight": torch.randn(64, 64)})
    return layer.to("cpu")


def output_and_gradient(layer):
    x = torch.linspace(-1, 1, 128).view(2, 64).requires_grad_()
    out = layer(x)
    out.square().sum().backward()
    return out.detach(), x.grad


@pytest.mark.parametrize("first", ["keep_gradients", "evaluation"])
def test_layers_train_after_an_evaluation(layer, first):
    layer.train()
    wanted = output_and_gradient(layer)
    steps = [lambda: keep_gradients(layer), lambda: layer.eval()(torch.ones(2, 64))]
    for step in steps if first == "keep_gradients" else reversed(steps):
        with torch.no_grad():  # evaluation repacks the weight on a CPU with AVX512-BF16 alone
            step()
    layer.train()
    for got, exact in zip(output_and_gradient(layer), wanted, strict=True):
        # The scales of weights that were repacked stay rounded to bfloat16.
        limit = 1e-6 if first == "keep_gradients" else 1e-2
        assert (got - exact).norm() <= limit * exact.norm()


def test_weights_that_cannot_be_unpacked_are_refused(monkeypatch):
    state = SimpleNamespace(packing_format_for_cpu=True)
    packed = torch.nn.Linear(1, 1)
    packed.support_avx512bf16_for_cpu = True
    packed.weight.quant_state = state
    monkeypatch.delattr(
        "bitsandbytes.functional._convert_weight_packed_for_cpu_inverse", raising=False
    )
    with pytest.raises(ValueError, match="repacked for inference.*expected a model that has only"):
        keep_gradients(packed)
