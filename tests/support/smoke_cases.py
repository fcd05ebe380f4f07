"""The cases of gpu_smoke.py: calls with every option, each compared with float64."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import fastpref
from fastpref import backends
from fastpref.backends.tile import Transform

BETA = 0.1
# Relative error of gradients; log-probs are held to a hundredth of a nat, or to 1e-4 of it.
TOLERANCE = {torch.float32: 2e-4, torch.bfloat16: 2e-2, torch.float16: 4e-3}
# Of the vocabulary: rows that start at 16 bytes, rows that do not, and rows of several blocks.
VOCABULARIES = (1000, 1003, 20011)


@dataclass(frozen=True)
class Case:
    backend: str
    dtype: torch.dtype
    vocab: int
    softcap: float | None
    mode: str  # trainable, frozen, forward-only
    options: tuple[tuple[str, Any], ...]
    bias: bool = False
    loss_type: str = "sigmoid"

    def __str__(self) -> str:
        parts = [self.backend, str(self.dtype)[6:], f"V={self.vocab}", self.mode, self.loss_type]
        parts += ["bias"] if self.bias else []
        parts += [f"softcap={self.softcap:g}"] if self.softcap is not None else []
        return " ".join([*parts, *(f"{k}={v}" for k, v in self.options)])


@dataclass
class Problem:
    """Ragged sequences with ignored tokens; float64 results of the same numbers."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    labels: Tensor
    indices: Tensor
    ref: Tensor
    logps: Tensor
    grads: list[Tensor]  # of hidden, weight, bias


def problem(case: Case, device: torch.device, tokens: int = 21, size: int = 72) -> Problem:
    generator = torch.Generator().manual_seed(1)
    hidden = 2 * torch.randn(4, tokens, size, generator=generator)
    weight = torch.randn(case.vocab, size, generator=generator) / 4
    bias = torch.randn(case.vocab, generator=generator) if case.bias else None
    labels = torch.randint(case.vocab, (4, tokens), generator=generator)
    labels[:, -1] = torch.tensor([0, case.vocab - 1, 0, case.vocab - 1])
    for i, start in enumerate((0, 7, 3, 12)):
        labels[i, :start] = -100
    ref = 5 * torch.randn(4, generator=generator) - 100
    given = [t if t is None else t.to(device, case.dtype) for t in (hidden, weight, bias)]
    labels, ref = labels.to(device), ref.to(device)
    indices = (labels.flatten() != -100).nonzero()[:, 0]
    exact = [t if t is None else t.double().requires_grad_() for t in given]
    logits = exact[0] @ exact[1].t()
    if exact[2] is not None:
        logits = logits + exact[2]
    if case.softcap is not None:
        logits = case.softcap * torch.tanh(logits / case.softcap)
    logps = logits.log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    logps = logps.masked_fill(labels < 0, 0.0)
    sums, reference = logps.sum(1), ref.double()
    if case.loss_type == "ipo":
        counts = (labels >= 0).sum(1)
        sums, reference = sums / counts, reference / counts
    chosen, rejected = (sums - reference).chunk(2)
    if case.loss_type == "ipo":
        loss = (chosen - rejected - 0.5 / BETA).square().mean()
    else:
        loss = -torch.nn.functional.logsigmoid(BETA * (chosen - rejected)).mean()
    loss.backward()
    for t in given:
        if t is not None:
            t.requires_grad_(case.mode == "trainable")
    given[0].requires_grad_(case.mode != "forward-only")
    grads = [t.grad for t in exact if t is not None]
    return Problem(*given, labels, indices, ref, logps.detach(), grads)


def logit_free(backend: str, weight: Tensor, with_d: bool, softcap: float | None = None) -> bool:
    """Whether fused=True is possible."""
    transform, module = Transform(softcap=softcap), backends._MODULES[backend]
    return module.logit_free_reason(weight, transform, with_d=with_d, required=True) is None


def run(case: Case, p: Problem) -> tuple[Tensor, list[Tensor]]:
    """The loss, or the log-probs of a pass without gradients, and the gradients."""
    options = dict(case.options, softcap=case.softcap, backend=case.backend)
    options["token_indices"] = p.indices
    if options.get("fused"):
        with_d = case.mode != "forward-only"
        options["fused"] = logit_free(case.backend, p.weight, with_d, case.softcap)
    if case.mode == "forward-only":
        with torch.no_grad():
            return fastpref.linear_token_logps(p.hidden, p.weight, p.labels, p.bias, **options), []
    leaves = [t for t in (p.hidden, p.weight, p.bias) if t is not None and t.requires_grad]
    for t in leaves:
        t.grad = None
    out = fastpref.linear_preference_loss(
        p.hidden, p.weight, p.labels, p.ref, bias=p.bias, beta=BETA, loss_type=case.loss_type,
        **options,
    )  # fmt: skip
    out.loss.backward()
    sums = torch.cat([out.chosen_logps, out.rejected_logps])
    return sums, [t.grad for t in leaves if t.grad is not None]


# The largest errors so far, by backend, dtype and precision, and what was compared.
worst: dict[tuple[str, str], float] = {}


def _note(case: Case, what: str, error: float) -> None:
    precision = dict(case.options).get("precision", "exact")
    key = f"{case.backend} {str(case.dtype)[6:]} {precision}", what
    worst[key] = max(error, worst.get(key, 0.0))


def check(case: Case, p: Problem, result: tuple[Tensor, list[Tensor]]) -> None:
    logps, grads = result
    exact = p.logps if case.mode == "forward-only" else p.logps.sum(1)
    fast = dict(case.options).get("precision") == "fast"
    off = (logps.double() - exact).abs().max().item()
    _note(case, "log-probs", off)
    limit = (0.5 if fast else 1e-3) * (1 if case.mode == "forward-only" else 4)
    assert off < limit, f"log-probs off by {off:.2e} nat"
    tolerance = TOLERANCE[case.dtype] * (2 if fast else 1)
    for name, got, wanted in zip(("hidden", "weight", "bias"), grads, p.grads, strict=False):
        off = ((got.double() - wanted).norm() / wanted.norm()).item()
        _note(case, f"d{name}", off)
        assert off < tolerance, f"the gradient of {name} is off by {off:.2e}"


def cases(names: list[str], few: bool) -> Iterator[Case]:
    """With few, every option and every dtype once or twice; else their combinations."""
    ways: list[tuple[str, dict[str, Any]]] = [
        ("trainable", {"strategy": "stash", "fused": False}),
        ("trainable", {"strategy": "recompute"}),
        ("trainable", {"strategy": "mixed"}),
        ("trainable", {"strategy": "stash", "fused": True}),
        ("frozen", {"fused": False}),
        ("frozen", {"fused": True}),
        ("forward-only", {"fused": False}),
        ("forward-only", {"fused": True, "strategy": "forward-only"}),
    ]
    dtypes = (torch.bfloat16, torch.float32, torch.float16)
    for backend in names:
        combinations = itertools.product(ways, dtypes, VOCABULARIES, (None, 20.0))
        for i, ((mode, options), dtype, vocab, softcap) in enumerate(combinations):
            if few and i % 7:  # 7 shares no factor with any of the options' periods
                continue
            if options.get("fused") and dtype == torch.float32:
                continue  # the logit-free product is for 16-bit inputs
            precision = "fast" if i % 3 == 2 and dtype != torch.float32 else "exact"
            chosen = tuple({**options, "precision": precision}.items())
            yield Case(backend, dtype, vocab, softcap, mode, chosen, bias=i % 4 in (1, 2))
        for mode, options in (ways[0], ways[4]):
            for dtype in dtypes[:2]:
                chosen = tuple(options.items())
                yield Case(backend, dtype, 1003, None, mode, chosen, loss_type="ipo")
