"""fastpref.patch_trl: the numbers of TRL's fused head, and putting it in and out."""

from __future__ import annotations

import contextlib
import inspect
import types

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("trl")

import oracle  # noqa: E402
import tiny  # noqa: E402
import trl.kernels.chunked_logprob as trl_kernel  # noqa: E402
from trl.trainer import utils  # noqa: E402

import fastpref  # noqa: E402
from fastpref.integrations import trl as ours  # noqa: E402

pytestmark = pytest.mark.usefixtures("unpatched")

N, H, V = 64, 32, 128
EXTRAS = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")


@pytest.fixture
def apply():
    """What TRL's fused head calls once it is patched."""
    with fastpref.patch_trl():
        yield utils._ChunkedLogProbFunction.apply


def problem(*grads, bias=False, dtype=torch.float32):
    """hidden, weight, bias or None, labels; grads: which of the first three need a gradient."""
    shapes = (N, H), (V, H), (V,)
    tensors = [torch.randn(shape, dtype=dtype) for shape in shapes]
    for i in grads:
        tensors[i].requires_grad_()
    if not bias:
        tensors[2] = None
    return (*tensors, torch.randint(0, V, (N,)))


def truth(hidden, weight, bias, labels, temperature=1.0, softcap=None, scale=1.0):
    """The five outputs in float64."""
    z = oracle.logits(hidden, weight, bias, scale, softcap, temperature)
    s = oracle.token_stats(z, labels)
    return s.logps, s.entropy, s.log_sum_sq_probs, s.mean_logit, s.is_top1


def check(outputs, expected, tolerance=1e-5):
    for name, given, wanted in zip(("log_probs", *EXTRAS), outputs, expected, strict=False):
        if wanted.dtype == torch.bool:
            assert given.dtype == torch.bool and torch.equal(given, wanted)
        else:
            assert given.dtype == torch.float32
            torch.testing.assert_close(
                given.double(), wanted, rtol=tolerance, atol=tolerance, msg=name
            )


# ---- what TRL's own tests of the operation claim ------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_all_outputs(apply, temperature):
    given = problem(0, 1)
    outputs = apply(*given, temperature, 32)
    check(outputs, truth(*given, temperature))
    assert [t.requires_grad for t in outputs] == [True, True, False, False, False]


@pytest.mark.parametrize("scale, softcap", [(0.5, None), (1.0, 30.0), (0.5, 30.0)])
def test_logit_scale_and_softcap(apply, scale, softcap):
    given = problem()
    check(apply(*given, 0.7, 32, softcap, scale), truth(*given, 0.7, softcap, scale))


def test_only_the_outputs_asked_for(apply):
    given = problem()
    outputs = apply(*given, 1.0, 32, None, 1.0, ("log_probs", "mean_logits"))
    assert [t is None for t in outputs] == [False, True, True, False, True]
    torch.testing.assert_close(outputs[3].double(), truth(*given)[3], rtol=1e-5, atol=1e-5)


def test_top1_is_the_first_of_equals(apply):
    hidden, weight, _, _ = problem()
    weight[V // 2 :] = weight[: V // 2]
    first = (hidden @ weight.t()).argmax(-1) % (V // 2)
    labels = torch.where(torch.arange(N) % 2 == 0, first, first + V // 2)
    assert torch.equal(apply(hidden, weight, None, labels, 1.0, 32)[4], labels == first)


@pytest.mark.parametrize("coefs", [(1.0, 0.0), (0.0, 1.0), (2.0, 0.5)])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_gradients(apply, temperature, coefs):
    given = problem(0, 1, 2, bias=True)
    out = apply(*given, temperature, 32, 30.0, 0.5)
    wanted = truth(*given, temperature, 30.0, 0.5)
    grads = [
        torch.autograd.grad(sum(c * t.sum() for c, t in zip(coefs, o[:2], strict=True)), given[:3])
        for o in (out, wanted)
    ]
    for g, w in zip(*grads, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bias", [False, True])
def test_bfloat16_is_closer_to_the_truth_than_trl(apply, bias):
    given = problem(0, 1, *([2] if bias else []), bias=bias, dtype=torch.bfloat16)
    wanted = truth(*given)
    inputs = [t for t in given[:3] if t is not None]
    expected = torch.autograd.grad(wanted[0].sum(), inputs)
    errors = []
    for function in (apply, trl_kernel.ChunkedLogProbFunction.apply):
        out = function(*given, 1.0, 32)
        grads = torch.autograd.grad(out[0].sum(), inputs)
        errors.append([(g.double() - e).abs().max() for g, e in zip(grads, expected, strict=True)])
        errors[-1].append((out[0] - wanted[0]).abs().max())
    for mine, theirs in zip(*errors, strict=True):
        assert mine <= 1.05 * theirs
    assert errors[0][-1] < 1e-4 < errors[1][-1]  # fp32 logits


def test_bfloat16_states_and_float32_head(apply):
    hidden, weight, _, labels = problem(1)
    hidden = hidden.bfloat16().requires_grad_()
    outputs = apply(hidden, weight, None, labels, 1.0, 32)
    check(outputs[:1], truth(hidden, weight.bfloat16(), None, labels)[:1], 1e-4)
    grads = torch.autograd.grad(outputs[0].sum(), (hidden, weight))
    assert [g.dtype for g in grads] == [torch.bfloat16, torch.float32]


def test_autocast_uses_the_rounded_states_in_both_passes(apply):
    weight = torch.randn(V, H)
    labels = torch.randint(0, V, (N,))
    hidden = torch.linspace(1.0, 2.0, N * H).view(N, H).bfloat16().float()
    results = []
    for shift in (0.0, 1e-4):  # which bf16 does not see
        x, w = (hidden + shift).requires_grad_(), weight.clone().requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logps = apply(x, w, None, labels, 1.0, 32)[0]
        results.append((logps, torch.autograd.grad(logps.sum(), w)[0]))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b) and a.dtype == torch.float32


@pytest.mark.parametrize("grads", [(0,), (1,), (2,), (0, 2)])
def test_partly_frozen(apply, grads):
    given = problem(*grads, bias=True)
    inputs = [given[i] for i in grads]
    out = torch.autograd.grad(apply(*given, 1.0, 32)[0].sum(), inputs)
    expected = torch.autograd.grad(truth(*given)[0].sum(), inputs)
    for g, w in zip(out, expected, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-5, atol=1e-5)


def test_torch_compile(apply):
    given = problem(0, 1)

    def loss(*inputs):
        logps, entropy, *_ = utils._ChunkedLogProbFunction.apply(*inputs, 0.8, 32)
        return (logps + 0.1 * entropy).sum()

    out = torch.compile(loss, backend="aot_eager", fullgraph=True)(*given)
    torch.testing.assert_close(out, loss(*given))
    compiled, plain = (torch.autograd.grad(t, given[:2]) for t in (out, loss(*given)))
    torch.testing.assert_close(compiled, plain)


# ---- the fused head -----------------------------------------------------------------------------


def fused_outputs(model, labels, **kwargs):
    out = model(input_ids=labels.clamp(min=1), labels=labels, fused_lm_head=True, **kwargs)
    out.loss.backward()
    grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    return out, grads


def test_fused_head_skips_ignored_tokens_on_a_cpu(monkeypatch):
    model = tiny.model()
    utils.add_fused_lm_head(model, temperature=0.7, outputs=("log_probs", *EXTRAS))
    labels = torch.randint(3, 200, (3, 9))
    labels[0, :5] = labels[2, 7:] = -100
    theirs, their_grads = fused_outputs(model, labels)
    rows = []
    real = ours.FusedLogProbs.apply

    def apply(self, hidden, *args):
        rows.append(hidden.shape[0])
        return real(self, hidden, *args)

    monkeypatch.setattr(ours.FusedLogProbs, "apply", apply)
    with fastpref.patch_trl():  # the model was made before
        mine, my_grads = fused_outputs(model, labels)
    assert rows == [int((labels[:, 1:] != -100).sum())]
    for name in ("loss", "log_probs", *EXTRAS, "label_mask"):
        torch.testing.assert_close(mine[name], theirs[name], rtol=1e-5, atol=1e-5)
        assert mine[name].dtype == theirs[name].dtype
    assert len(my_grads) == len(their_grads)
    for a, b in zip(my_grads, their_grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_no_label_gives_a_zero_loss_in_the_graph():
    model = tiny.model()
    utils.add_fused_lm_head(model)
    with fastpref.patch_trl():
        out, grads = fused_outputs(model, torch.full((2, 5), -100))
    assert out.loss == 0
    assert len(grads) == len(list(model.parameters()))
    assert all(not g.any() for g in grads)


class Partitioned:
    """Stands for DeepSpeed ZeRO-3: a parameter that is whole only inside `gather`."""

    def __init__(self, *parameters):
        self.whole = [(p, p.data) for p in parameters]
        self.entered = 0
        for p in parameters:
            p.ds_status = "NOT_AVAILABLE"
        self.part()

    def part(self):
        for p, data in self.whole:
            p.data = data.new_empty(0)

    @contextlib.contextmanager
    def gather(self, *_):
        self.entered += 1
        for p, data in self.whole:
            p.data = data
        try:
            yield
        finally:
            self.part()


@pytest.mark.parametrize("options", [{}, {"strategy": "recompute"}, {"entropy": True}], ids=str)
def test_a_head_that_is_gathered_for_each_pass(monkeypatch, options):
    options = dict(options)
    coef = 0.3 if options.pop("entropy", False) else 0.0
    hidden, weight, bias, labels = problem(0, bias=True)
    weight, bias = torch.nn.Parameter(weight), torch.nn.Parameter(bias)
    with fastpref.patch_trl(**options):
        apply = utils._ChunkedLogProbFunction.apply
        whole = apply(hidden, weight, bias, labels, 1.0, 32)
        expected = torch.autograd.grad((whole[0] + coef * whole[1]).sum(), (hidden, weight, bias))
        zero3 = Partitioned(weight, bias)
        monkeypatch.setattr(utils, "maybe_gather_lm_head_ctx", zero3.gather)
        with zero3.gather():
            out = apply(hidden, weight, bias, labels, 1.0, 32)
        assert weight.numel() == 0
        got = torch.autograd.grad((out[0] + coef * out[1]).sum(), (hidden, weight, bias))
    assert zero3.entered == 2 and weight.numel() == 0
    for g, w in zip(got, expected, strict=True):
        assert torch.equal(g, w)


# ---- patching -----------------------------------------------------------------------------------


def names():
    return utils._ChunkedLogProbFunction, utils._use_triton


def test_a_seed_draws_the_columns():
    found = []
    for seed in (0, 0, 1):
        torch.manual_seed(0)
        hidden = torch.randn(64, H, requires_grad=True)
        weight, labels = torch.randn(2048, H), torch.randint(0, 2048, (64,))
        with fastpref.patch_trl(gradient_tolerance=0.3, gradient_seed=seed):
            out = utils._ChunkedLogProbFunction.apply(hidden, weight, None, labels, 1.0, 32)
        found += torch.autograd.grad(out[0].sum(), hidden)
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


def test_unpatch_restores_trl():
    before = names()
    handle = fastpref.patch_trl(precision="fast", memory_budget=2**20)
    assert names() != before and "precision='fast'" in repr(handle)
    fastpref.unpatch_trl()
    assert names() == before
    fastpref.unpatch_trl()
    assert names() == before


def test_context_managers_nest():
    before = names()
    with fastpref.patch_trl() as outer:
        first = names()
        with fastpref.patch_trl(precision="fast"):
            assert utils._ChunkedLogProbFunction.options["precision"] == "fast"
        assert names() == first and outer is not None
        with pytest.raises(KeyError), fastpref.patch_trl():
            raise KeyError
        assert names() == first
    assert names() == before
    with outer:  # again
        assert names() == first
    assert names() == before


def test_accelerators_that_compile_for_one_shape_keep_every_position():
    with fastpref.patch_trl():
        assert [utils._use_triton(torch.device(d)) for d in ("cpu", "cuda", "mps", "meta")] == [
            True, True, True, False,
        ]  # fmt: skip


@pytest.mark.parametrize(
    "options, message",
    [
        ({"precision": "half"}, "precision: got 'half'"),
        ({"strategy": "none"}, "strategy: got 'none'"),
        ({"memory_budget": -1}, "memory_budget: got -1"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        fastpref.patch_trl(**options)
    assert utils._ChunkedLogProbFunction is trl_kernel.ChunkedLogProbFunction


def other(arguments):
    """An autograd function whose forward takes these."""

    def forward(*_): ...

    names = [inspect.Parameter(name, 1) for name in ("ctx", *arguments)]
    forward.__signature__ = inspect.Signature(names)
    return types.SimpleNamespace(forward=forward)


@pytest.mark.parametrize("change", ["no head", "no function", "arguments", "outputs"])
def test_another_trl_is_refused(monkeypatch, change):
    """The contract, not the version, decides."""
    monkeypatch.setattr(ours, "_originals", {})
    message = "no fused output head"
    if change == "no head":  # TRL 1.14 and older
        monkeypatch.delattr(utils, "add_fused_lm_head")
    elif change == "no function":
        monkeypatch.delattr(utils, "_ChunkedLogProbFunction")
    elif change == "arguments":
        changed = other((*ours._PARAMETERS, "dropout"))
        monkeypatch.setattr(utils, "_ChunkedLogProbFunction", changed)
        message = "has the arguments .*, dropout; expected"
    else:
        monkeypatch.setattr(trl_kernel, "OPTIONAL_OUTPUTS", (*EXTRAS, "kl"))
        message = "has the outputs .*, kl; expected"
    with pytest.raises(RuntimeError, match=message):
        fastpref.patch_trl()


def test_trl_1_15_has_no_cpu_path_of_its_own(monkeypatch):
    """There the function is None without Triton, and positions are always dropped."""
    monkeypatch.setattr(ours, "_originals", {})
    monkeypatch.delattr(utils, "_use_triton")
    monkeypatch.setattr(utils, "_ChunkedLogProbFunction", None)
    with fastpref.patch_trl():
        assert isinstance(utils._ChunkedLogProbFunction, ours.FusedLogProbs)
        assert not hasattr(utils, "_use_triton")
    assert utils._ChunkedLogProbFunction is None


def test_without_trl(monkeypatch):
    def missing(name):
        raise ModuleNotFoundError("No module named 'trl'", name="trl")

    monkeypatch.setattr(ours.importlib, "import_module", missing)
    with pytest.raises(ImportError, match="patch_trl: .*pip install"):
        ours.patch_trl()
