"""Head problems: shapes, inputs like those of a trained model, and their exact results."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

BETA = 0.1
SENTENCE = 512  # tokens of a sequence, whose sum of log-probs has its error measured
_SPREAD = 2.0  # standard deviation of the logits
_SAMPLED_TOKENS = 32
_SAMPLED_ROWS = 64
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True)
class Shape:
    """The head of a model, and a number of labelled tokens."""

    name: str
    n: int
    h: int
    v: int
    softcap: float | None = None
    model: str = ""

    def with_tokens(self, n: int) -> Shape:
        return Shape(f"{self.name}/{n}", n, self.h, self.v, self.softcap, self.model)


SHAPES = {
    s.name: s
    for s in (
        Shape("a", 8192, 4096, 128256, model="Llama 3 8B"),
        Shape("b", 8192, 896, 151936, model="Qwen 2.5 0.5B"),
        Shape("c", 4096, 2304, 256000, softcap=30.0, model="Gemma 2 2B"),
        Shape("d", 16384, 576, 49152, model="SmolLM2 135M"),
        Shape("e", 2048, 8192, 128256, model="Llama 3 70B"),
    )
}


def parse_shape(text: str) -> Shape:
    """The shape of a text: a letter of `SHAPES`, or N,H,V or N,H,V,softcap.

    A slash and a number behind it, as in a/1024, replace the number of tokens. Raises ValueError
    for any other text, and for sizes that are not positive.
    """
    name, _, tokens = text.partition("/")
    shape = SHAPES.get(name)
    if shape is None:
        sizes = name.split(",")
        if len(sizes) not in (3, 4):
            raise ValueError(f"shape: got {text}, expected N,H,V or N,H,V,softcap")
        try:
            n, h, v = map(int, sizes[:3])
            softcap = float(sizes[3]) if len(sizes) == 4 else None
        except ValueError:
            raise ValueError(f"shape: got {text}, expected whole numbers for N,H,V") from None
        shape = Shape(name, n, h, v, softcap)
    if tokens:
        try:
            shape = shape.with_tokens(int(tokens))
        except ValueError:
            raise ValueError(f"shape: got {text}, expected a number behind the /") from None
    cap = shape.softcap
    if min(shape.n, shape.h, shape.v) < 1 or not (cap is None or 0 < cap < math.inf):
        raise ValueError(f"shape: got {text}, expected sizes of at least 1, and a softcap above 0")
    return shape


@dataclass
class HeadProblem:
    """The inputs of a loss.

    hidden: [2P, T, H], with a gradient. weight: [V, H]. labels: [2P, T], without ignored positions.
    ref_logps: [2P]. trainable: whether the weight needs a gradient. softcap: of the logits.
    """

    hidden: Tensor
    weight: Tensor
    labels: Tensor
    ref_logps: Tensor
    trainable: bool = True
    softcap: float | None = None

    def set_trainable(self, trainable: bool) -> None:
        self.trainable = trainable
        self.weight.requires_grad_(trainable)
        self.clear()

    def clear(self) -> None:
        self.hidden.grad = self.weight.grad = None

    def gradient_bytes(self) -> int:
        leaves = [self.hidden, self.weight] if self.trainable else [self.hidden]
        return sum(t.numel() * t.element_size() for t in leaves)


def check_tokens(n: int) -> int:
    """The number of sequences of N tokens, an even one. Raises ValueError if there is none."""
    sequences = max(2, n // SENTENCE)
    if n % sequences or sequences % 2:
        raise ValueError(f"N: got {n}, expected an even multiple of {SENTENCE}, or an even number")
    return sequences


def make_problem(
    n: int,
    h: int,
    v: int,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    softcap: float | None = None,
    *,
    zipf: bool = False,
    seed: int = 0,
) -> HeadProblem:
    """Random inputs whose labels have a probability of about a half.

    The other logits are normal with a standard deviation of 2; hidden leans towards its label's row
    of the head by as much as makes that logit equal, on average, to the logsumexp of the others.

    zipf: whether tokens are as unequally frequent as those of a language. A kernel that skips small
    gradients gains from rare tokens, and would be judged too badly on a vocabulary without them. So
    the logits get a term that follows Zipf's law, -log(rank), besides the normal one. The ranks are
    shuffled over the vocabulary, and labels are drawn by the same law.
    """
    generator = torch.Generator(device).manual_seed(seed)
    on: dict[str, Any] = {"generator": generator, "device": device}
    sequences = check_tokens(n)
    weight = torch.empty(v, h, dtype=dtype, device=device)
    for rows in weight.split(16384):
        rows.copy_(torch.randn(rows.shape, **on) / math.sqrt(h))
    target_logits = torch.full(
        (n,), math.log(v) + _SPREAD**2 / 2, device=device
    )  # the labels' logits
    if zipf:
        by_rank = torch.randperm(v, **on)  # the vocabulary, most frequent first
        prior = torch.empty(v, device=device)
        prior[by_rank] = -torch.arange(1, v + 1, device=device).log()
        mean = prior.mean().item()
        prior -= mean
        # One hidden dimension is constant and carries the prior; the others are the context.
        weight[:, 0] = (prior / math.sqrt(h)).to(dtype)
        ranks = ((v + 1) ** torch.rand(n, **on, dtype=torch.float64)).long() - 1
        labels = by_rank[ranks.clamp(0, v - 1)]
        target_logits.fill_(_SPREAD**2 / 2 - mean + math.log(sum(1 / i for i in range(1, v + 1))))
    else:
        labels = torch.randint(v, (n,), **on)
    if softcap is not None:
        target_logits = softcap * (target_logits / softcap).clamp(max=0.99).atanh()
    label_rows = weight[labels].float()
    if zipf:
        label_rows[:, 0] = 0
        target_logits -= prior[labels]
    hidden = target_logits[:, None] * label_rows / label_rows.square().sum(1, keepdim=True)
    hidden += _SPREAD * torch.randn(n, h, **on)
    if zipf:
        hidden[:, 0] = math.sqrt(h)
    hidden = hidden.to(dtype).view(sequences, -1, h).requires_grad_()
    # Near the policy's own sums, whose expectation this is, so that the loss is not saturated.
    ref = -1.1 * n / sequences + 5 * torch.randn(sequences, **on)
    return HeadProblem(hidden, weight, labels.view(sequences, -1), ref, softcap=softcap)


@dataclass
class Truth:
    """The exact results, in float64.

    logps: [N]. loss, dhidden, dweight: by whether the reference log-probs are used. dhidden:
    [n, H], the gradients of the hidden states of a sample of tokens. dweight: [R, H], those of a
    sample of rows of the head. tokens, rows: the indices of the sampled tokens and rows.
    """

    logps: Tensor
    tokens: Tensor
    rows: Tensor
    loss: dict[bool, float]
    dhidden: dict[bool, Tensor]
    dweight: dict[bool, Tensor]
    median_probability: float


def capped(logits: Tensor, softcap: float | None) -> Tensor:
    """The logits with the softcap, in their own dtype, as transformers computes it in Gemma 2."""
    return logits if softcap is None else torch.tanh(logits / softcap) * softcap


def dpo_loss(logps: Tensor, ref_logps: Tensor) -> Tensor:
    """The DPO loss of sequence log-probs [2P], as TRL and the paper write it."""
    chosen, rejected = (logps - ref_logps).chunk(2)
    return -torch.nn.functional.logsigmoid(BETA * (chosen - rejected)).mean()


def float64_truth(problem: HeadProblem, alive: Callable[[], None] = lambda: None) -> Truth:
    """The `Truth` of a problem, from one pass over blocks of tokens.

    alive: called after each block.
    """
    x = problem.hidden.detach().flatten(0, 1).double()
    w, y = problem.weight.detach().double(), problem.labels.flatten()
    n, cap = x.shape[0], problem.softcap
    size = 64 if x.device.type == "cpu" else 256
    tokens = torch.linspace(0, n - 1, min(_SAMPLED_TOKENS, n)).long().unique().to(x.device)
    step = max(1, len(w) // _SAMPLED_ROWS)
    rows = torch.cat([y[:_SAMPLED_ROWS], torch.arange(0, len(w), step, device=x.device)])
    rows = rows.unique()
    logps, d = x.new_empty(n), x.new_empty(n, len(rows))
    u = x.new_empty(len(tokens), x.shape[1])
    for start in range(0, n, size):
        block = slice(start, min(start + size, n))
        z = x[block] @ w.t()
        slope = None
        if cap is not None:
            tanh = (z / cap).tanh_()
            z, slope = cap * tanh, 1 - tanh.square()
            del tanh
        z -= z.logsumexp(1, keepdim=True)
        logps[block] = z.gather(1, y[block, None])[:, 0]
        z.exp_().neg_()  # from here on D, the gradient of the log-prob by the raw logits
        z.scatter_add_(1, y[block, None], torch.ones_like(z[:, :1]))
        if slope is not None:
            z *= slope
        d[block] = z[:, rows]
        in_block = ((tokens >= start) & (tokens < start + size)).nonzero()[:, 0]
        if len(in_block):
            u[in_block] = z[tokens[in_block] - start] @ w
        alive()
    loss, dhidden, dweight = {}, {}, {}
    for with_reference in (True, False):
        leaf = logps.detach().clone().requires_grad_()
        ref = problem.ref_logps.double() * with_reference
        value = dpo_loss(leaf.view_as(problem.labels).sum(1), ref)
        (c,) = torch.autograd.grad(value, leaf)
        loss[with_reference] = value.item()
        dhidden[with_reference] = c[tokens, None] * u
        dweight[with_reference] = (c[:, None] * d).t() @ x
    median = logps.exp().median().item()
    return Truth(logps, tokens, rows, loss, dhidden, dweight, median)


def logp_errors(
    problem: HeadProblem, truth: Truth, token_logps: Tensor | None, sums: Tensor
) -> dict[str, float | None]:
    """The errors of log-probs [2P, T] and of their sums [2P] against float64, in nats."""
    exact = truth.logps.view_as(problem.labels)
    out: dict[str, float | None] = {"logp_max": None, "logp_rms": None}
    if token_logps is not None:
        gap = token_logps.detach().double().view_as(exact) - exact
        out["logp_max"] = gap.abs().max().item()
        out["logp_rms"] = gap.square().mean().sqrt().item()
    out["sum_max"] = (sums.detach().double() - exact.sum(1)).abs().max().item()
    return out


def errors(
    problem: HeadProblem,
    truth: Truth,
    loss: float,
    token_logps: Tensor | None,
    sums: Tensor,
    with_reference: bool,
) -> dict[str, float | None]:
    """The errors of one call against float64; gradients are read from the problem."""
    out = logp_errors(problem, truth, token_logps, sums)
    out["loss"] = abs(loss - truth.loss[with_reference])

    def relative(actual: Tensor, expected: Tensor) -> float:
        return ((actual.double() - expected).norm() / expected.norm()).item()

    assert problem.hidden.grad is not None
    dhidden = problem.hidden.grad.flatten(0, 1)[truth.tokens]
    out["dhidden"] = relative(dhidden, truth.dhidden[with_reference])
    out["dweight"] = None
    if problem.trainable:
        assert problem.weight.grad is not None
        out["dweight"] = relative(problem.weight.grad[truth.rows], truth.dweight[with_reference])
    return out
