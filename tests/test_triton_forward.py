"""The fused forward pass against the float64 oracle: on a GPU, or in Triton's interpreter."""

from __future__ import annotations

import math
from types import SimpleNamespace

import oracle
import pytest
import torch
from forward_problem import TRANSFORMS, check, confident, head
from triton_interpret import DEVICE, INTERPRETED

# isort: split
# After the import that skips this file where triton is missing.
from fastpref.kernels import forward, forward_config
from fastpref.kernels.forward import SHIPPED, config, fused_logps, why_not

from fastpref.backends.tile import Transform

# numpy says where it divides by zero or subtracts infinities; the results are what is tested.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def configs():
    """On a GPU what it ships with; the interpreter knows no warps, stages or loop flattening."""
    if not INTERPRETED:
        arch = forward._device(DEVICE)[0]
        return list(dict.fromkeys(c.config for c in SHIPPED if c.arch == arch)) or [None]
    sizes = ("descriptors", "block_m", "block_n", "block_k", "halves")
    return list({tuple(getattr(c.config, k) for k in sizes): c.config for c in SHIPPED}.values())


def name(chosen):
    if chosen is None:
        return "default"
    words = ["descriptors" if chosen.descriptors else "pointers"]
    words += [f"{chosen.block_m}x{chosen.block_n}x{chosen.block_k}"]
    return "-".join(words + ["flat"] * chosen.flatten + ["halves"] * chosen.halves)


CONFIGS = configs()
# Some descriptors and some pointers, where every configuration would take the interpreter long.
SOME = (
    [None, next((c for c in CONFIGS if c and not c.descriptors), None)] if INTERPRETED else CONFIGS
)
SENTINEL = 7.0


def run(x, weight, labels, bias=None, chosen=None, **transform):
    """(logps, lse) on the CPU; nothing may be written beside them."""
    n = x.shape[0]
    room = [torch.full((n + 300,), SENTINEL, device=DEVICE) for _ in range(2)]
    stats = SimpleNamespace(logps=room[0][:n], lse=room[1][:n])
    moved = [None if t is None else t.to(DEVICE) for t in (x, weight, labels, bias)]
    fused_logps(*moved, Transform(**transform), stats, chosen=chosen)
    assert all((r[n:] == SENTINEL).all() for r in room)
    return stats.logps.cpu(), stats.lse.cpu()


@pytest.mark.parametrize("chosen", CONFIGS, ids=name)
@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_matches_the_oracle(chosen, transform):
    x, weight, labels = head(37, 72, 300)
    labels[:4] = torch.tensor([0, 299, -100, -1])
    bias = torch.randn(300).bfloat16()
    for b in (None, bias):
        given = (x, weight, labels, b)
        check(run(*given, chosen=chosen, **transform), *given, **transform)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias_dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_dtypes(dtype, bias_dtype):
    x, weight, labels = head(20, 64, 512, dtype)
    given = (x, weight, labels, torch.randn(512).to(bias_dtype))
    check(run(*given), *given)


@pytest.mark.parametrize("vocab", [1, 2, 127, 128, 256, 257])
@pytest.mark.parametrize("n", [1, 130])
def test_any_vocabulary(n, vocab):
    given = head(n, 64, vocab)
    check(run(*given), *given)
    check(run(*given, softcap=5.0), *given, softcap=5.0)


@pytest.mark.parametrize("hidden", [1, 7, 8, 33, 40, 128, 136])
def test_any_hidden_size(hidden):
    given = head(9, hidden, 300)  # odd sizes are not aligned: the pointer kernel
    check(run(*given), *given)


@pytest.mark.parametrize("chosen", SOME, ids=name)
def test_no_tokens(chosen):
    logps, lse = run(*head(0, 64, 300), chosen=chosen)
    assert logps.shape == lse.shape == (0,)


def test_rows_of_larger_tensors():
    wide_x, wide_w, labels = head(20, 96, 300)
    for start in (0, 8, 3):  # 3 elements are 6 bytes: no descriptors
        x, weight = wide_x[:, start : start + 64], wide_w[:, start : start + 64]
        check(run(x, weight, labels), x, weight, labels)
    labels = torch.randint(300, (40,))[::2]
    check(run(wide_x, wide_w, labels), wide_x, wide_w, labels)


@pytest.mark.parametrize("hidden", [64, 60])
def test_the_layout_of_hidden_does_not_matter(hidden):
    x, weight, labels = head(20, 64, 300)
    x, weight = x[:, :hidden].contiguous(), weight[:, :hidden]
    logps, lse = run(x, weight, labels)
    check((logps, lse), x, weight, labels)
    for odd in (x.t().contiguous().t(), torch.nn.functional.pad(x, (3, 2))[:, 3:-2]):
        assert odd.stride() != x.stride()
        got = run(odd, weight, labels)
        assert torch.equal(got[0], logps) and torch.equal(got[1], lse)


@pytest.mark.parametrize("chosen", SOME, ids=name)
@pytest.mark.parametrize("softcap", [None, 30.0])
def test_labels_out_of_range_are_nan(chosen, softcap):
    x, weight, labels = head(12, 64, 300)
    # 300 and 511 lie in the padding of the last tile.
    labels[:5] = torch.tensor([300, 511, 512, 2**33 + 5, 2**62])
    logps, lse = run(x, weight, labels, chosen=chosen, softcap=softcap)
    assert logps[:5].isnan().all() and lse.isfinite().all()
    check((logps[5:], lse[5:]), x[5:], weight, labels[5:], softcap=softcap)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_broken_row_spoils_only_itself(bad):
    x, weight, labels = head(20, 64, 300)
    clean = run(x, weight, labels)
    x[3, 5] = bad
    logps, lse = run(x, weight, labels)
    assert logps[3].isnan() and not lse[3].isfinite()
    others = torch.arange(20) != 3
    assert torch.equal(logps[others], clean[0][others])
    assert torch.equal(lse[others], clean[1][others])


@pytest.mark.parametrize("chosen", CONFIGS, ids=name)
def test_logits_of_minus_infinity(chosen):
    """A bias of -inf takes entries out of the vocabulary, whole tiles of them too."""
    x, weight, labels = head(20, 64, 500)
    bias = torch.zeros(500)
    bias[:300] = -math.inf
    labels[:10], labels[10:] = 300 + labels[:10] % 200, labels[10:] % 300
    logps, lse = run(x, weight, labels, bias, chosen=chosen)
    check((logps[:10], lse[:10]), x[:10], weight[300:], labels[:10] - 300)
    assert (logps[10:] == -math.inf).all()
    check((logps[:10], lse[:10]), x[:10], weight, labels[:10], bias)
    capped = run(x, weight, labels, bias, chosen=chosen, softcap=5.0)  # -inf becomes -softcap
    check(capped, x, weight, labels, bias, softcap=5.0)


@pytest.mark.parametrize("shift", [-1000.0, 1000.0])
def test_logits_far_from_zero(shift):
    x, weight, labels = head(20, 64, 300)
    bias = torch.full((300,), shift)
    check(run(x, weight, labels, bias), x, weight, labels, bias)


@pytest.mark.parametrize("chosen", SOME, ids=name)
def test_confident_tokens(chosen):
    """p from 0.9 to 1 - 1e-10: log p <= 0, its error what the sum in fp32 loses next to 1."""
    x, weight, labels = confident(32, 64, 600)
    logps, _ = run(x, weight, labels, chosen=chosen)
    truth = oracle.linear_logps(x, weight, labels)
    assert (truth > -0.1).all() and (truth > -1e-9).any()
    assert (logps <= 0).all()
    oracle.assert_within(logps, truth, 4e-6 + 1e-5 * truth.abs())


def test_long_sequences_are_within_a_thousandth_of_a_nat():
    x, weight, labels = head(512, 64, 500)
    logps, _ = run(x, weight, labels)
    truth = oracle.linear_logps(x, weight, labels)
    assert abs(float(logps.double().sum() - truth.sum())) < 1e-3


def test_no_worse_than_eager():
    x, weight, labels = head(128, 96, 500)
    logps, _ = run(x, weight, labels)
    truth = oracle.linear_logps(x, weight, labels)
    eager = oracle.eager_logps(x, weight, labels)
    oracle.assert_no_worse(logps, eager, truth, torch.float32)


@pytest.mark.parametrize("chosen", SOME, ids=name)
def test_a_tokens_result_does_not_depend_on_the_batch(chosen):
    x, weight, labels = head(150, 64, 300)
    logps, lse = run(x, weight, labels, chosen=chosen)
    # numpy's product, unlike a GPU's, depends on where in the tile a row is.
    for rows in (slice(0, 1), slice(0, 70), slice(128 if INTERPRETED else 77, 150)):
        some = run(x[rows], weight, labels[rows], chosen=chosen)
        assert torch.equal(some[0], logps[rows]) and torch.equal(some[1], lse[rows])


@pytest.mark.parametrize("chosen", SOME, ids=name)
def test_several_launches(chosen, monkeypatch):
    """More tokens than the scratch memory takes at once."""
    given = head(300, 64, 300)
    whole = run(*given, chosen=chosen)
    monkeypatch.setattr(forward_config, "_MAX_PARTIALS", 1)
    parts = run(*given, chosen=chosen)
    assert all(torch.equal(*pair) for pair in zip(whole, parts, strict=True))
    check(parts, *given)


@pytest.mark.parametrize("n", [1, 64, 500])
def test_the_configuration_is_chosen_from_the_head_alone(n, monkeypatch):
    asked = []

    def spy(*args, **kwargs):
        asked.append((args, kwargs))
        return config(*args, **kwargs)

    monkeypatch.setattr(forward, "config", spy)
    run(*head(n, 64, 256))
    ((arch, *rest), given), *more = asked
    assert not more and rest == [64, 256, torch.bfloat16]
    assert given == {"softcap": False, "bias": False, "aligned": True}


def test_made_for_this_weight():
    """What is asked before this pass is chosen unasked."""
    memory = torch.zeros(17 * 72, dtype=torch.bfloat16, device=DEVICE)
    known = forward_config.has_config(forward._device(DEVICE)[0])
    assert forward.made_for(memory[: 16 * 72].view(16, 72)) == known
    assert not forward.made_for(memory[1 : 16 * 72 + 1].view(16, 72))
    assert not forward.made_for(memory[: 16 * 71].view(16, 71))
    assert forward_config.has_config("gfx942") and not forward_config.has_config("gfx1100")


def test_says_why_not():
    x, weight, labels = head(4, 64, 300)
    plain = Transform()
    assert why_not(x, weight, plain) is None
    assert "float32" in why_not(x.float(), weight.float(), plain)
    assert "float16" in why_not(x, weight.half(), plain)
    assert "not contiguous" in why_not(x, weight.t().contiguous().t(), plain)
    assert "scale is 0" in why_not(x, weight, Transform(scale=0.0))
    with pytest.raises(ValueError, match="the fused forward pass cannot run: the scale is 0"):
        run(x, weight, labels, scale=0.0)


@pytest.mark.skipif(INTERPRETED, reason="needs a GPU")
def test_captured_in_a_graph():
    x, weight, labels = (t.to(DEVICE) for t in head(300, 1024, 5000))
    stats = SimpleNamespace(
        logps=torch.empty(300, device=DEVICE), lse=torch.empty(300, device=DEVICE)
    )
    fused_logps(x, weight, labels, None, Transform(), stats)  # compiled before the capture
    want = stats.logps.clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        fused_logps(x, weight, labels, None, Transform(), stats)
    stats.logps.zero_()
    graph.replay()
    assert torch.equal(stats.logps, want)


@pytest.mark.skipif(INTERPRETED, reason="needs a GPU")
def test_more_than_two_to_the_31_weights():
    if torch.cuda.get_device_properties(DEVICE).total_memory < 16e9:
        pytest.skip("needs 16 GB")
    torch.manual_seed(0)
    weight = torch.zeros(2**31 // 4096 + 300, 4096, device=DEVICE, dtype=torch.bfloat16)
    weight[-300:] = torch.randn(300, 4096).bfloat16().to(DEVICE) / 16
    x = torch.randn(40, 4096).bfloat16()
    labels = weight.shape[0] - 300 + torch.randint(300, (40,))
    logps, lse = run(x, weight, labels)
    z = oracle.logits(x, weight[-300:].cpu())
    rest = torch.full((40, 1), math.log(weight.shape[0] - 300)).double()
    truth = torch.logsumexp(torch.cat([z, rest], 1), 1)
    oracle.assert_within(lse, truth, 1e-4)
    at = (labels - (weight.shape[0] - 300))[:, None]
    oracle.assert_within(logps, z.gather(1, at)[:, 0] - truth, 1e-4)
