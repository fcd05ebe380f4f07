"""Output heads that DeepSpeed's ZeRO-3 divides, with hooks that do what ZeRO-3's do."""

from __future__ import annotations

import copy

import pytest
import torch

pytest.importorskip("transformers")

import tiny  # noqa: E402

from fastpref import linear_preference_loss  # noqa: E402
from fastpref.heads import install_head_forward  # noqa: E402

IDS = torch.arange(24).view(2, 12) * 7 % 180 + 6


class Partitioned:
    """Divides a layer's weight: it is there within the layer's own forward and backward pass.

    As with ZeRO-3, the weight is emptied in between, and its gradient is taken away when it has the
    whole shape, before the weight is emptied again.
    """

    def __init__(self, layer):
        self.weight, self.log = layer.weight, []
        self.weight.ds_id, self.weight.ds_shape = 0, self.weight.shape
        self.whole, self.gradient = self.weight.data, None
        layer.register_forward_pre_hook(lambda *_: self.gather("forward"))
        layer.register_forward_hook(self.after_forward)
        if self.weight.requires_grad:
            self.weight.register_post_accumulate_grad_hook(self.after_backward)
        self.free()

    def gather(self, where):
        self.weight.data = self.whole
        self.log.append(where)

    def free(self):
        self.weight.data = torch.empty(0, dtype=self.whole.dtype)

    def after_forward(self, layer, inputs, outputs):
        for tensor in outputs:
            if isinstance(tensor, torch.Tensor) and tensor.requires_grad:
                tensor.register_hook(lambda gradient: self.gather("backward"))
        self.free()

    def after_backward(self, weight):
        assert weight.shape == self.whole.shape
        self.gradient, weight.grad = weight.grad, None
        self.free()


def step(model, strategy):
    def head_fn(hidden, head, aux_loss):
        out = linear_preference_loss(
            hidden, head.weight, IDS.roll(-1, 1), torch.tensor([-60.0, -58.0]),
            strategy=strategy, **head.options(hidden),
        )  # fmt: skip
        return {"loss": out.loss, "rewards": (out.chosen_rewards, None)}

    found = model(input_ids=IDS, attention_mask=torch.ones_like(IDS), head_fn=head_fn)
    if found["loss"].requires_grad:
        found["loss"].backward()
    assert found["rewards"][1] is None
    return found["loss"].detach()


def made(tied=False):
    model = tiny.model(tie_word_embeddings=tied)
    install_head_forward(model)
    return model


@pytest.mark.parametrize("strategy", ["stash", "recompute"])
def test_the_gradient_arrives_while_the_weight_is_whole(strategy):
    one, model = made(), made()
    model.load_state_dict(copy.deepcopy(one.state_dict()))
    there = Partitioned(model.lm_head)
    for _ in range(2):  # the layer's own forward is back after a step
        there.log.clear()
        assert step(model, strategy) == step(one, strategy)
        assert there.log == ["forward", "backward"] and model.lm_head.weight.numel() == 0
        assert torch.equal(there.gradient, one.lm_head.weight.grad)
        gradients = [p.grad for p in model.model.parameters()]
        for expected, found in zip(one.model.parameters(), gradients, strict=True):
            assert torch.equal(expected.grad, found)
        one.zero_grad()
        model.zero_grad()
    assert "forward" not in vars(model.lm_head)


def test_a_frozen_head_and_a_step_without_gradients():
    model = made().requires_grad_(False)
    expected = step(model, "auto")
    there = Partitioned(model.lm_head)
    assert step(model, "auto") == expected and there.log == ["forward"]


def test_an_adapter_on_the_head():
    from peft import get_peft_model

    lora = tiny.lora(target_modules=["lm_head"], init_lora_weights=False)
    one, model = (get_peft_model(tiny.model(), lora) for _ in range(2))
    model.load_state_dict(copy.deepcopy(one.state_dict()))
    for each in (one, model):
        install_head_forward(each)
    head, whole = model.get_base_model().lm_head, one.get_base_model().lm_head
    names = "base_layer", "lora_A.default", "lora_B.default"
    divided = {name: Partitioned(head.get_submodule(name)) for name in names}
    assert step(model, "auto") == step(one, "auto")
    for name, there in divided.items():
        expected = whole.get_submodule(name).weight.grad
        assert expected is None if name == names[0] else torch.equal(expected, there.gradient)
