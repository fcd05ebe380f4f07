"""The plan of a call: which strategy, which tiles, and at what cost."""

from __future__ import annotations

import pytest
import torch

from fastpref import plan_head
from fastpref.logps.plan import STRATEGIES, default_memory_budget

N, H, V = 1000, 512, 32000
UNIT = N * H * V


def _plan(dtype=torch.bfloat16, **options):
    return plan_head(N, H, V, dtype, **options)


@pytest.mark.parametrize(
    "strategy, hidden, weight, flops",
    [
        ("forward-only", False, False, 2),
        ("frozen", True, False, 4),
        ("stash", True, True, 6),
        ("recompute", True, True, 8),
        ("stash", False, True, 4),
        ("recompute", False, True, 6),
    ],
)
def test_flops(strategy, hidden, weight, flops):
    """DESIGN.md, section 1."""
    options = dict(hidden_grad=hidden, weight_grad=weight, memory_budget=2**33)
    plan = _plan(strategy=strategy if weight else "auto", **options)
    assert (plan.strategy, plan.flops) == (strategy, flops * UNIT)


def test_mixed_costs_what_its_fraction_says():
    plan = _plan(strategy="mixed")
    share = plan.stash_tokens / N
    assert 0 < share < 1 and plan.flops == round((8 - 2 * share) * UNIT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_budget_chooses(dtype):
    """More memory, more of D; stash exactly where all of it fits, recompute where little does."""
    d = N * V * dtype.itemsize
    seen, previous = [], 10**18
    for budget in (1, d // 20, d // 4, d // 2, 2 * d):
        plan = _plan(dtype, memory_budget=budget)
        assert plan.flops <= previous
        assert plan.stash_tokens == N if plan.strategy == "stash" else plan.stash_tokens < N
        assert plan.stash_tokens * V * dtype.itemsize <= budget
        previous = plan.flops
        if plan.strategy not in seen:
            seen.append(plan.strategy)
    assert seen == ["recompute", "mixed", "stash"]


@pytest.mark.parametrize("budget", [1, 10**6, 10**8, None])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(0, 4, 9), (1, 1, 1), (7, 3, 5), (9, 64, 300000), (5000, 8, 17)])
def test_tiles_fit(shape, dtype, budget):
    n, h, v = shape
    for weight_grad in (False, True):
        plan = plan_head(n, h, v, dtype, memory_budget=budget, weight_grad=weight_grad)
        assert 1 <= plan.block_tokens <= max(n, 1) and 1 <= plan.block_vocab <= v
        assert 0 <= plan.stash_tokens <= n
        assert plan.flops >= 0 and plan.extra_bytes >= 0
        if budget is not None and n:  # 16 rows and 256 columns are the least that make sense
            assert plan.block_tokens <= max(16, budget // (v * 2))
            assert plan.block_vocab <= max(256, budget // (n * 2))


def test_sizes_are_not_32_bit():
    plan = plan_head(2**20, 2**13, 2**18, torch.bfloat16, strategy="stash")
    assert plan.flops == 6 * 2**51 and plan.extra_bytes > 2**39


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_exact_tiles_are_fp32(dtype):
    exact, fast = (_plan(dtype, precision=p, weight_grad=False) for p in ("exact", "fast"))
    assert fast.block_tokens == 2 * exact.block_tokens  # of the same memory
    assert _plan(torch.float32).block_tokens == _plan(torch.float32, precision="fast").block_tokens


def test_a_policy_and_its_reference_have_the_same_tiles():
    plans = [
        _plan(hidden_grad=hidden, weight_grad=weight, strategy=strategy)
        for hidden, weight, strategy in [
            (False, False, "auto"),
            (True, False, "auto"),
            (True, True, "stash"),
            (True, True, "recompute"),
            (True, True, "mixed"),
        ]
    ]
    assert len({p.block_tokens for p in plans}) == 1


def test_the_prediction_is_the_memory_of_the_large_buffers():
    frozen = _plan(weight_grad=False)
    assert frozen.extra_bytes == frozen.block_tokens * V * 4 + 2 * N * H * 2  # u, a copy of X
    stash = _plan(strategy="stash")
    assert N * V * 2 < stash.extra_bytes < N * V * 2 * 1.5
    assert _plan(strategy="recompute").extra_bytes < N * V * 2 / 2


# N, H, V, and the GB of D, dW and everything in the shape of X that an H200 may need: the peak of a
# backward pass, which a tile in the forward pass must not exceed by much.
GPU_HEADS = [
    (8192, 4096, 128256, 3.36),
    (8192, 896, 151936, 2.85),
    (4096, 2304, 256000, 3.34),
    (16384, 576, 49152, 1.93),
    (2048, 8192, 128256, 2.73),
]


@pytest.mark.parametrize("n, h, v, most", GPU_HEADS)
def test_gpu_tiles_are_small_beside_the_stash(n, h, v, most):
    plan = plan_head(n, h, v, torch.bfloat16, device="cuda", memory_budget=2**33)
    forward = plan.block_tokens * v * 4 + n * v * 2 + 2 * n * h * 2
    backward = n * v * 2 + v * h * 2 + 3 * n * h * 2
    assert plan.strategy == "stash" and max(forward, backward) / 1e9 < most
    assert forward <= plan.extra_bytes <= 1.1 * forward
    # Whole tiles of a GPU's GEMM, in blocks that are equally long but for the last.
    assert plan.block_tokens % 128 == 0 and plan.block_tokens >= 512
    blocks = -(-n // plan.block_tokens)
    assert blocks * plan.block_tokens - n < 128 * blocks


@pytest.mark.parametrize("n", [1, 127, 129, 512, 1000, 5000])
def test_gpu_blocks_of_few_tokens(n):
    plan = plan_head(n, 64, 128256, torch.bfloat16, device="cuda", memory_budget=2**33)
    assert plan.block_tokens == n if n <= 512 else plan.block_tokens in (384, 512)


@pytest.mark.parametrize("h, small", [(896, True), (4096, False)])
def test_the_logit_free_product_unasked(h, small):
    """On a GPU, for the fastest pass without gradients, in 16 bits, up to a hidden size."""

    def logit_free(dtype=torch.bfloat16, device="cuda", strategy="forward-only", grad=False):
        given = dict(device=device, strategy=strategy, memory_budget=2**33)
        return plan_head(100, h, V, dtype, hidden_grad=grad, weight_grad=False, **given).logit_free

    assert logit_free() == small
    assert not logit_free(torch.float32) and not logit_free(device="cpu")
    assert not logit_free(strategy="auto") and not logit_free(grad=True)


def test_report():
    text = str(_plan(strategy="recompute"))
    assert "recompute" in text and f"V={V}" in text and "GFLOP" in text and "MiB" in text


def test_the_default_budget_is_a_property_of_the_machine():
    assert default_memory_budget() == default_memory_budget("cpu") > 2**20
    assert _plan() == _plan(memory_budget=default_memory_budget())


@pytest.mark.parametrize("strategy", ["forward-only", "frozen"])
def test_a_trainable_head_cannot_be_frozen(strategy):
    with pytest.raises(ValueError, match="^strategy: .*detach the head"):
        _plan(strategy=strategy)


@pytest.mark.parametrize(
    "name, options",
    [
        ("strategy", {"strategy": "chunked"}),
        ("precision", {"precision": "tf32"}),
        ("memory_budget", {"memory_budget": 0}),
        ("memory_budget", {"memory_budget": -1}),
        ("fused", {"fused": "match"}),
    ],
)
def test_bad_input(name, options):
    with pytest.raises(ValueError, match=f"^{name}: got .*expected"):
        _plan(**options)
    assert set(STRATEGIES) >= {"auto", "stash", "recompute", "mixed", "frozen", "forward-only"}
