"""Run by test_sharded_heads.py in each of several processes: heads that DTensors divide."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import tiny
import torch
from torch import distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor

from fastpref import linear_preference_loss
from fastpref.heads import install_head_forward, vocab_parallel_token_logps, vocab_parallel_weight
from fastpref.logps import linear_token_logps

H = 8


def drawn(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def fsdp_shards(vocab):
    """Each process has pairs of its own; the head's gradient is FSDP2's, the mean."""
    torch.manual_seed(0)
    world, rank = dist.get_world_size(), dist.get_rank()
    whole = nn.Linear(H, vocab, bias=False, dtype=torch.float64)
    layer = fully_shard(copy.deepcopy(whole))
    hidden, labels = drawn(world, 4, 5, H), torch.randint(0, vocab, (world, 4, 5))
    labels[:, :, :2] = -100
    if world > 2:
        labels[1] = -100  # a process without a label
    ref = torch.full((4,), -6.0)
    total = 0.0
    leaves = [hidden[i].clone().requires_grad_() for i in range(world)]
    for i in range(world):
        total = total + linear_preference_loss(leaves[i], whole.weight, labels[i], ref).loss / world
    total.backward()
    own = hidden[rank].clone().requires_grad_()
    weight = vocab_parallel_weight(layer.weight, gathers_tokens=True)
    loss = linear_preference_loss(own, weight, labels[rank], ref).loss
    loss.backward()
    torch.testing.assert_close(own.grad, leaves[rank].grad * world)
    torch.testing.assert_close(layer.weight.grad.full_tensor(), whole.weight.grad)
    for module in (whole, layer):  # a step of an optimiser on the shards
        torch.optim.AdamW(module.parameters(), lr=0.1).step()
    torch.testing.assert_close(layer.weight.full_tensor(), whole.weight)
    return layer.weight.to_local().shape[0]


def tensor_parallel_shards():
    """The same tokens everywhere, with uneven rows and a bias."""
    torch.manual_seed(1)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tp",))
    whole, hidden, labels = drawn(11, H), drawn(6, H), torch.randint(0, 11, (6,))
    sharded = distribute_tensor(whole, mesh, [Shard(0)]).requires_grad_()
    x, y, w = hidden.clone().requires_grad_(), hidden.clone().requires_grad_(), whole.clone()
    w.requires_grad_()
    weight = vocab_parallel_weight(sharded, gathers_tokens=False)
    out = linear_token_logps(x, weight, labels)
    expected = linear_token_logps(y, w, labels)
    (out.sum() + expected.sum()).backward()
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(x.grad, y.grad)
    torch.testing.assert_close(sharded.grad.full_tensor(), w.grad)
    start, rows = weight.vocab_start, weight.local.shape[0]
    by_function = vocab_parallel_token_logps(
        hidden, whole[start : start + rows], labels, vocab_start=start, vocab_size=11
    )
    torch.testing.assert_close(by_function, expected.detach())
    with pytest.raises(ValueError, match=r"^weight: got a DTensor .* placement Shard\(0\)"):
        vocab_parallel_weight(distribute_tensor(whole, mesh, [Shard(1)]), gathers_tokens=False)
    with pytest.raises(ValueError, match="^weight: got a Tensor of shape"):
        vocab_parallel_weight(whole, gathers_tokens=False)


def tp_plan(folder):
    """transformers' own plan: the loss and all gradients are those of the whole model."""
    from transformers import AutoModelForCausalLM

    def step(model):
        install_head_forward(model)
        ids = torch.arange(24).view(2, 12) * 7 % 180 + 6
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

        def head_fn(hidden, head, aux_loss):
            labels = ids.roll(-1, 1)
            ref = torch.tensor([-60.0, -58.0])
            return linear_preference_loss(
                hidden, head.weight, labels, ref, **head.options(hidden)
            ).loss

        loss = model(**inputs, head_fn=head_fn)
        loss.backward()
        return loss.detach()

    one = AutoModelForCausalLM.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, tp_plan="auto")
    expected, loss = step(one), step(model)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    truth = dict(one.named_parameters())
    for name, p in model.named_parameters():
        grad = p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad
        torch.testing.assert_close(grad, truth[name].grad, rtol=1e-3, atol=1e-5, msg=name)
    with pytest.raises(ValueError, match="^tensor parallelism gives several processes the same"):
        tiny.trainer(Path(folder).parent / "out", model)
    return type(model.lm_head.weight).__name__


def every_case(folder):
    rows = [fsdp_shards(vocab) for vocab in (11, 4)]
    tensor_parallel_shards()
    return rows, tp_plan(folder) if dist.get_world_size() == 2 else None


def saved_model(folder):
    tiny.model().save_pretrained(folder)
