"""The heads that the GPU mode measures, and the bare products that make their roofline."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

import fastpref

from . import gpu_peers
from .problem import HeadProblem

DTYPE = torch.bfloat16


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
    """A letter, or N,H,V with or without a softcap; either with another number of tokens, a/1024.

    Raises ValueError for anything else.
    """
    name, _, tokens = text.partition("/")
    shape = SHAPES.get(name)
    if shape is None:
        sizes = name.split(",")
        if len(sizes) not in (3, 4):
            raise ValueError(f"shape: got {text}, expected a letter, a/1024 or N,H,V")
        n, h, v = map(int, sizes[:3])
        shape = Shape(name, n, h, v, float(sizes[3]) if len(sizes) == 4 else None)
    return shape.with_tokens(int(tokens)) if tokens else shape


class Products:
    """The head's bare products on the data at hand.

    D is the real one: nearly all of it is tiny, on which a GPU runs faster than on random numbers.
    """

    def __init__(self, problem: HeadProblem):
        self._x = x = problem.hidden.detach().flatten(0, 1)
        self._w = w = problem.weight.detach()
        labels, cap = problem.labels.flatten(), problem.softcap
        self._z, self._d = (x.new_empty(x.shape[0], w.shape[0]) for _ in range(2))
        self._u, self._dw = torch.empty_like(x), torch.empty_like(w)
        for a in range(0, x.shape[0], 512):
            block = slice(a, a + 512)
            z = gpu_peers.capped(x[block] @ w.t(), cap).float()
            d = z.softmax(1).neg_()
            d.scatter_add_(1, labels[block, None], torch.ones_like(d[:, :1]))
            self._d[block] = d if cap is None else d * (1 - (z / cap).square())

    def _calls(self) -> dict[str, Callable[[], object]]:
        x, w, d = self._x, self._w, self._d
        return {
            "X W^T": lambda: torch.mm(x, w.t(), out=self._z),
            "D W": lambda: torch.mm(d, w, out=self._u),
            "D^T X": lambda: torch.mm(d.t(), x, out=self._dw),
        }

    def together(self, count: int) -> Callable[[], object]:
        """The first so many, one after the other: what no exact method can go below."""
        calls = list(self._calls().values())[:count]
        return lambda: [call() for call in calls]

    def single(self) -> dict[str, tuple[int, Callable[[], object]]]:
        """Each with its number of rows, and the first one in float32 for the rows of a tile, as
        precision="exact" has it where torch can do that."""
        n = self._x.shape[0]
        out = {name: (n, call) for name, call in self._calls().items()}
        if self._x.is_cuda and torch.version.hip is None:
            sizes = *self._x.shape, self._w.shape[0]
            x = self._x[: fastpref.plan_head(*sizes, DTYPE, device="cuda").block_tokens]
            wide = torch.empty(x.shape[0], self._w.shape[0], device=x.device)
            out["X W^T in float32"] = (
                x.shape[0],
                lambda: torch.mm(x, self._w.t(), out_dtype=torch.float32, out=wide),
            )
        return out
