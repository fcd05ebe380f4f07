"""Generated cases of the core against float64: shapes, dtypes, transforms, strategies, backends.

A case is all that follows from its number. `PYTHONPATH=.:tests:tests/support python
tests/support/core_cases.py NUMBER` shows one.
"""

from __future__ import annotations

import math
import random
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import loss_formulas
import oracle
import torch
from torch import Tensor

import fastpref
from fastpref import linear_preference_loss, linear_token_logps, preference_loss, token_logps
from fastpref.backends import native
from fastpref.losses import LOSS_TYPES

BACKENDS = ("eager", "native") if native.problem() is None else ("eager",)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
KINDS = ("hidden states", "hidden states", "adapter", "logits", "formula", "fused loss")
LABEL_SMOOTHING = {"exo_pair": 0.01}
FREE = ("cpo", "simpo", "alphapo", "orpo")


@dataclass(frozen=True)
class Error:
    """The errors of one result, as Euclidean norms.

    Attributes:
        ours, eager: of the package and of plain torch in the same dtype.
        luck: what rounding may add to ours in one case, where eager's is small by chance.
    """

    name: str
    ours: float
    eager: float
    luck: float

    @property
    def is_fault(self) -> bool:
        return not self.ours <= math.hypot(1.1 * self.eager, self.luck) + 1e-30


class Case:
    """One case.

    Attributes:
        description: its choices, by name.
    """

    def __init__(self, number: int) -> None:
        self.draw = random.Random(number)
        self.generator = torch.Generator().manual_seed(number)
        self.kind = self.draw.choice(KINDS)
        self.dtype = self.draw.choice(DTYPES)
        self.backend = self.draw.choice(BACKENDS)
        if self.dtype == torch.float64:
            self.backend = "eager"  # the one that computes in it
        self.description: dict[str, Any] = {
            "number": number, "kind": self.kind, "dtype": self.dtype, "backend": self.backend
        }  # fmt: skip

    def errors(self) -> Iterator[Error]:
        """Compute the results of the case, and yield the error of each."""
        compute = {
            "hidden states": self._head,
            "adapter": self._head,
            "logits": self._logits,
            "formula": self._formula,
            "fused loss": self._fused,
        }
        yield from compute[self.kind]()

    # ---- what is drawn ----

    def _pick(self, name: str, values: list) -> Any:
        self.description[name] = value = self.draw.choice(values)
        return value

    def _normal(self, *shape: int, spread: float = 1.0) -> Tensor:
        values = torch.randn(*shape, generator=self.generator, dtype=torch.float64) * spread
        return values.to(self.dtype)

    def _labels(self, rows: int, vocab: int) -> Tensor:
        labels = torch.randint(vocab, (rows,), generator=self.generator)
        ignored = torch.rand(rows, generator=self.generator) < self._pick(
            "ignored", [0.0, 0.4, 1.0]
        )
        return labels.masked_fill(ignored, -100)

    def _transforms(self) -> dict[str, float]:
        found = {
            "scale": self._pick("scale", [None, None, 0.3, -1.5]),
            "softcap": self._pick("softcap", [None, None, 2.0, 30.0]),
            "temperature": self._pick("temperature", [None, None, 0.5, 3.0]),
        }
        return {name: value for name, value in found.items() if value is not None}

    def _size(self, name: str, most: int) -> int:
        """Small and odd sizes more often than large ones."""
        return self._pick(name, [1, 2, 3, self.draw.randint(1, 16), self.draw.randint(1, most)])

    def _head_inputs(self, rows: int) -> tuple[Tensor, Tensor, Tensor | None]:
        vocab, width = self._size("vocab", 900), self._size("width", 96)
        spread = self._pick("spread", [0.05, 1.0, 4.0])
        hidden = self._normal(rows, width)
        weight = self._normal(vocab, width, spread=spread / width**0.5)
        bias = self._normal(vocab) if self._pick("bias", [False, False, True]) else None
        layout = self._pick("layout", ["contiguous", "transposed", "sliced"])
        if layout == "transposed":
            hidden, weight = hidden.t().contiguous().t(), weight.t().contiguous().t()
        elif layout == "sliced":
            hidden = torch.cat([hidden, hidden], 1)[:, :width]
            weight = weight.repeat_interleave(2, 0)[::2]
        return hidden, weight, bias

    def _strategy(self) -> dict[str, Any]:
        return {
            "strategy": self._pick("strategy", ["auto", "stash", "recompute", "mixed"]),
            "memory_budget": self._pick("memory_budget", [None, 1, 3000, 100_000]),
            "backend": self.backend,
        }

    # ---- the results ----

    def _compare(
        self, names: list[str], got: list[Tensor], eager: list[Tensor], truth: list[Tensor],
        size: float, gradient: Tensor, dlogp: Tensor, slope: float, factors: dict[str, Tensor],
    ) -> Iterator[Error]:  # fmt: skip
        """Compare the log-probabilities or the loss, which come first, and the gradients.

        Args:
            size: of the logits.
            gradient, dlogp: the exact gradients in the raw logits and in the log-probabilities.
            slope: of the logits' transform, at most.
            factors: what the gradient in the raw logits is multiplied by, by the results' names.
        """
        eps = torch.finfo(self.dtype).eps
        single = torch.finfo(torch.float64 if eps < 1e-10 else torch.float32).eps
        for name, ours, theirs, exact in zip(names, got, eager, truth, strict=True):
            if not bool(ours.isfinite().all()) and bool(theirs.isfinite().all()):
                yield Error(f"{name}, not finite,", math.inf, 0.0, 0.0)
                continue
            exact = exact.double()
            error, yardstick = (
                float((t.double().nan_to_num(0, 0, 0) - exact).norm()) for t in (ours, theirs)
            )
            # A log-probability is a difference of logits, whose rounding it keeps. A gradient is
            # the product of D, which is rounded to the dtype, and whose entries are differences.
            if name in ("logps", "loss"):
                luck = 8 * single * (float(exact.norm()) + size * exact.numel() ** 0.5)
            else:
                rounded = eps * float(gradient.norm())
                rounded += 8 * single * (1 + size) * slope * float(dlogp.norm())
                subnormal = torch.finfo(self.dtype).tiny * eps * exact.numel() ** 0.5
                luck = rounded * _largest(factors.get(name)) + 4 * subnormal
            yield Error(name, error, yardstick, luck)

    def _head(self) -> Iterator[Error]:
        rows = self._size("rows", 48)
        hidden, weight, bias = self._head_inputs(rows)
        labels, transforms = self._labels(rows, weight.shape[0]), self._transforms()
        tensors = {"hidden": hidden, "weight": weight, "bias": bias}
        if self.kind == "adapter":
            rank = self._pick("rank", [1, 3, 8])
            tensors["lora_hidden"] = self._normal(rows, rank)
            tensors["lora_B"] = self._normal(weight.shape[0], rank, spread=0.3)
            if self._pick("dora", [False, True]):
                tensors["dora_scale"] = self._normal(weight.shape[0]).abs() + 0.5
        frozen = self._pick("frozen", [(), ("weight", "bias"), ("hidden",)])
        sets = []
        for dtype in (self.dtype, self.dtype, torch.float64):
            leaves = {
                name: t.detach().to(dtype).requires_grad_(name not in frozen)
                for name, t in tensors.items()
                if t is not None
            }
            sets.append(leaves)
        ours, plain, exact = sets
        others = {k: v for k, v in ours.items() if k not in ("hidden", "weight", "bias")}
        got = linear_token_logps(
            ours["hidden"], ours["weight"], labels, ours.get("bias"), **transforms, **others,
            **self._strategy(),
        )  # fmt: skip
        raw = _product(exact)
        z = oracle.transform(raw, **transforms)
        truth = oracle.token_stats(z, labels).logps
        eager = _eager_logps(_product(plain), labels, transforms)
        coefficients = torch.randn(rows, generator=self.generator, dtype=torch.float64)
        results = []
        (gradient,) = torch.autograd.grad((truth * coefficients).sum(), raw, retain_graph=True)
        for leaves, logps in ((ours, got), (plain, eager), (exact, truth)):
            wanted = [t for t in leaves.values() if t.requires_grad]
            grads = torch.autograd.grad(
                (logps * coefficients.to(logps.dtype)).sum(), wanted, allow_unused=True
            )
            zeros = [
                torch.zeros_like(t) if g is None else g for t, g in zip(wanted, grads, strict=True)
            ]
            results.append([logps.detach(), *zeros])
        names = ["logps", *(f"d {name}" for name, t in ours.items() if t.requires_grad)]
        size = max(float(raw.detach().abs().max()), float(z.detach().abs().max()))
        dora = exact.get("dora_scale", torch.ones(1))
        factors = {
            "d hidden": exact["weight"] * dora[:, None], "d weight": exact["hidden"] * dora.max(),
            "d dora_scale": raw / dora,
        }  # fmt: skip
        if "lora_B" in exact:
            factors["d lora_hidden"] = exact["lora_B"] * dora[:, None]
            factors["d lora_B"] = exact["lora_hidden"] * dora.max()
        yield from self._compare(
            names, *results, size, gradient, coefficients[labels >= 0], _slope(transforms), factors
        )

    def _logits(self) -> Iterator[Error]:
        rows, vocab = self._size("rows", 48), self._size("vocab", 900)
        logits = self._normal(rows, vocab, spread=self._pick("spread", [0.1, 3.0, 20.0]))
        labels, transforms = self._labels(rows, vocab), self._transforms()
        ours, plain, exact = (
            logits.to(dtype, copy=True).requires_grad_()
            for dtype in (self.dtype, self.dtype, torch.float64)
        )
        inplace = self._pick("inplace", [False, True])
        call = {"inplace_backward": inplace, "backend": self.backend}
        got = token_logps(ours, labels, **transforms, **call)
        z = oracle.transform(exact, **transforms)
        truth = oracle.token_stats(z, labels).logps
        eager = _eager_logps(plain, labels, transforms)
        coefficients = torch.randn(rows, generator=self.generator, dtype=torch.float64)
        results = []
        for leaf, logps in ((ours, got), (plain, eager), (exact, truth)):
            values = logps.detach().clone()
            (grad,) = torch.autograd.grad((logps * coefficients.to(logps.dtype)).sum(), leaf)
            results.append([values, grad])
        size = max(float(logits.abs().max()), float(z.detach().abs().max()))
        yield from self._compare(
            ["logps", "d logits"], *results, size, results[2][1], coefficients[labels >= 0],
            _slope(transforms), {},
        )  # fmt: skip

    def _formula(self) -> Iterator[Error]:
        self.dtype = self.description["dtype"] = self.draw.choice([torch.float32, torch.float64])
        name, pairs = self._pick("loss", list(LOSS_TYPES)), self._size("pairs", 24)
        beta = self._pick("beta", [0.01, 0.1, 1.0])
        # The log of a negative number, where an answer has a mean log-probability of about 0.
        given = {key: -self._normal(pairs).abs() * 5 - 0.1 for key in ("w", "l", "rw", "rl")}
        lengths = {
            key: torch.randint(1, 30, (pairs,), generator=self.generator) for key in ("nw", "nl")
        }
        options = {"beta": beta}
        if name in LABEL_SMOOTHING:
            options["label_smoothing"] = LABEL_SMOOTHING[name]
        if name == "alphapo":
            options["alpha"] = 0.25
        results = []
        for dtype in (self.dtype, torch.float64):
            leaves = {key: t.to(dtype).requires_grad_() for key, t in given.items()}
            references = () if name in FREE else (leaves["rw"], leaves["rl"])
            if dtype is self.dtype and not results:
                loss = preference_loss(
                    leaves["w"], leaves["l"], *references, loss_type=name,
                    chosen_lengths=lengths["nw"], rejected_lengths=lengths["nl"], **options,
                ).loss  # fmt: skip
            else:
                p = loss_formulas.data(**leaves, **lengths, **options)
                loss = loss_formulas.LOSSES[name](p).mean()
            wanted = [leaves["w"], leaves["l"]]
            grads = torch.autograd.grad(loss, wanted, allow_unused=True)
            zeros = [
                torch.zeros_like(t) if g is None else g for t, g in zip(wanted, grads, strict=True)
            ]
            results.append([loss.detach(), *zeros])
        got, exact = results
        for title, ours, truth in zip(("loss", "d chosen", "d rejected"), got, exact, strict=True):
            eps = torch.finfo(self.dtype).eps
            error = float((ours.double() - truth).norm())
            yield Error(title, error, 0.0, 400 * eps * (1 + float(truth.norm())))

    def _fused(self) -> Iterator[Error]:
        pairs, length = self._size("pairs", 6), self._size("length", 12)
        rows = 2 * pairs * length
        hidden, weight, bias = self._head_inputs(rows)
        labels, transforms = self._labels(rows, weight.shape[0]), self._transforms()
        reference = -torch.rand(2 * pairs, generator=self.generator, dtype=torch.float64) * 20
        loss, beta = self._pick("loss", ["sigmoid", "ipo"]), self._pick("beta", [0.05, 0.5])
        shape = (2 * pairs, length)
        kept = (labels != -100).view(shape).sum(1)
        results = []
        for i, dtype in enumerate((self.dtype, self.dtype, torch.float64)):
            leaves = [t.detach().to(dtype).requires_grad_() for t in (hidden, weight)]
            offset = None if bias is None else bias.to(dtype)
            wide = torch.float64 if dtype == torch.float64 else torch.float32
            if i == 0:
                value = linear_preference_loss(
                    leaves[0].view(*shape, -1), leaves[1], labels.view(shape), reference.to(wide),
                    bias=offset, loss_type=loss, beta=beta, **transforms, **self._strategy(),
                ).loss  # fmt: skip
            else:
                raw = torch.nn.functional.linear(leaves[0], leaves[1], offset)
                if dtype == torch.float64 and i == 2:
                    logps = oracle.token_stats(oracle.transform(raw, **transforms), labels).logps
                else:
                    logps = _eager_logps(raw, labels, transforms)
                ratios = logps.view(shape).sum(1) - reference.to(logps.dtype)
                chosen, rejected = ratios[:pairs], ratios[pairs:]
                if loss == "ipo":
                    counts = kept.clamp(min=1).to(logps.dtype)
                    gap = chosen / counts[:pairs] - rejected / counts[pairs:]
                    value = (gap - 1 / (2 * beta)).square().mean()
                else:
                    value = oracle.log_sigmoid(beta * (chosen - rejected)).neg().mean()
            if i == 2:
                gradient, dlogp = torch.autograd.grad(value, (raw, logps), retain_graph=True)
            grads = torch.autograd.grad(value, leaves, allow_unused=True)
            zeros = [
                torch.zeros_like(t) if g is None else g for t, g in zip(leaves, grads, strict=True)
            ]
            results.append([value.detach(), *zeros])
        if not int(kept.sum()):  # a batch without a labelled token has a loss of 0 of its own
            assert all(not t.any() for t in results[0])
            return
        size = float(raw.detach().abs().max()) * max(1, length) * (10 if loss == "ipo" else 1)
        factors = {"d hidden": leaves[1], "d weight": leaves[0]}
        yield from self._compare(
            ["loss", "d hidden", "d weight"], *results, size, gradient, dlogp, _slope(transforms),
            factors,
        )  # fmt: skip


def _product(tensors: dict[str, Tensor]) -> Tensor:
    """Raw logits [rows, V] by plain torch, in the tensors' dtype."""
    raw = torch.nn.functional.linear(tensors["hidden"], tensors["weight"])
    if "lora_B" in tensors:
        raw = raw + tensors["lora_hidden"] @ tensors["lora_B"].t()
    if "dora_scale" in tensors:
        raw = raw * tensors["dora_scale"]
    return raw if "bias" not in tensors else raw + tensors["bias"]


def _slope(transforms: dict[str, float]) -> float:
    return abs(transforms.get("scale", 1.0)) / transforms.get("temperature", 1.0)


def _largest(factor: Tensor | None) -> float:
    """The largest norm of a row of a factor; 1 for none."""
    return 1.0 if factor is None else float(factor.detach().double().norm(dim=-1).max())


def _eager_logps(raw: Tensor, labels: Tensor, transforms: dict[str, float]) -> Tensor:
    """The yardstick: plain torch, with the softmax in fp32."""
    z = (raw if raw.dtype == torch.float64 else raw.float()) * transforms.get("scale", 1.0)
    cap = transforms.get("softcap")
    z = z if cap is None else cap * torch.tanh(z / cap)
    logps = torch.log_softmax(z / transforms.get("temperature", 1.0), -1)
    picked = logps.gather(-1, labels.clamp(min=0)[:, None])[:, 0]
    return torch.where(labels < 0, 0.0, picked)


def main() -> None:
    case = Case(int(sys.argv[1]))
    found = list(case.errors())
    print({"fastpref": fastpref.__version__, **case.description})
    for error in found:
        print("FAULT" if error.is_fault else "right", error)


if __name__ == "__main__":
    main()
