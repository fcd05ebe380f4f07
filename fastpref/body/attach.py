"""Which linear layers of a model run on the native product, and the context in which they do.

A layer is an instance of another class while it is on the native product, and of its own class
again afterwards. Its parameters, names, hooks and place in the model stay, so that saved, copied
and merged models know nothing of it.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fastpref.body.product import DTYPES, linear
from fastpref.body.rates import Shape, speedup

LEAST_SPEEDUP = 1.2
# Weights with fewer elements are left to torch: most of their time is not the product's.
LEAST_ELEMENTS = 2**16

Speedup = Callable[[Shape, torch.dtype], float]


def _reduce(self: Any, protocol: Any) -> Any:
    """`__reduce_ex__` of an attached layer: its copies and pickles are of its own class.

    Nothing would restore the class of a copy.
    """
    # Protocol 0 names the class as an argument; later ones require it to be the object's.
    reduced: Any = nn.Module.__reduce_ex__(self, 0)
    function, (_, *arguments), *state = reduced
    return function, (type(self).__base__, *arguments), *state


class NativeLinear(nn.Linear):
    """A Linear layer on the native product."""

    __reduce_ex__ = _reduce

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight, self.bias)


@functools.cache
def _native_conv(own_class: Any) -> type[nn.Module]:
    """`NativeLinear`, for transformers' Conv1D: a linear layer whose weight is [in, out]."""

    class NativeConv1D(own_class):  # type: ignore[misc]
        __reduce_ex__ = _reduce

        def forward(self, x: Tensor) -> Tensor:
            return linear(x, self.weight.t(), self.bias)

    return NativeConv1D


def _native_class(module: nn.Module) -> type[nn.Module] | None:
    """The class that a layer has on the native product; None for other modules.

    Subclasses, and layers with a forward of their own, compute something else.
    """
    if "forward" in vars(module):
        return None
    own_class: Any = type(module)
    if own_class is nn.Linear:
        return NativeLinear
    conv1d: Any = getattr(sys.modules.get("transformers.pytorch_utils"), "Conv1D", None)
    return _native_conv(own_class) if own_class is conv1d else None


@dataclass
class LinearProducts:
    """The layers of one or more models that run on the native product within `attached`.

    Attributes:
        layers: these layers, with the class that each has there.
        total: linear layers of the first model, its output head left out.
        chosen: how many of these are among `layers`.
        gain: torch's time over the native product's in these layers; None if it is not known.
    """

    layers: list[tuple[nn.Module, type[nn.Module]]] = field(default_factory=list)
    total: int = 0
    chosen: int = 0
    gain: float | None = None
    _depth: int = field(default=0, repr=False)

    @contextlib.contextmanager
    def attached(self) -> Iterator[None]:
        """The context in which the layers run on the native product. It may be nested."""
        self._depth += 1
        before: list[tuple[Any, type[nn.Module]]] = []
        try:
            if self._depth == 1:
                for layer, native_class in self.layers:
                    # Another trainer may have attached it, or a parametrization changed its class.
                    if _native_class(layer) is native_class:
                        before.append((layer, type(layer)))
                        object.__setattr__(layer, "__class__", native_class)
            yield
        finally:
            self._depth -= 1
            for layer, own_class in before:
                object.__setattr__(layer, "__class__", own_class)

    def __str__(self) -> str:
        if not self.layers:
            return f"cpu_linear: all {self.total} Linear layers on torch's product, the faster one"
        rate = "" if self.gain is None else f", {self.gain:.2f}x torch's"
        return (
            f"cpu_linear: {self.chosen} of {self.total} Linear layers on fastpref's product{rate} "
            f"on {torch.get_num_threads()} threads"
        )


def choose_layers(
    models: Iterable[nn.Module],
    *,
    compute_dtype: torch.dtype | None = None,
    heads: Iterable[nn.Module] = (),
    speedup: Speedup | None = speedup,
) -> LinearProducts:
    """Choose the layers for which the native product is at least 1.2 times as fast as torch's.

    Layers of one shape are treated alike, so that a policy and its reference have the same bits.

    Args:
        models: the policy, and other models that run with it.
        compute_dtype: autocast's dtype; by default each weight's own.
        heads: modules whose layers are left out: the output heads.
        speedup: torch's time over the native product's by shape and dtype; None: all layers whose
            weight has an element are chosen.
    """
    left_out = {id(part) for head in heads for part in head.modules()}
    products = LinearProducts()
    seconds = {"torch": 0.0, "native": 0.0}  # in units of a multiply-add of the native product
    seen: set[int] = set()
    for number, model in enumerate(models):
        for module in model.modules():
            native_class = _native_class(module)
            if native_class is None or id(module) in left_out or id(module) in seen:
                continue
            seen.add(id(module))
            products.total += number == 0
            weight: Any = module.weight
            dtype = compute_dtype or weight.dtype
            if weight.device.type != "cpu" or weight.dtype not in DTYPES or dtype not in DTYPES:
                continue
            n, k = weight.shape if native_class is NativeLinear else reversed(weight.shape)
            if n * k == 0:
                continue
            if speedup is not None:
                if n * k < LEAST_ELEMENTS:
                    continue
                ratio = speedup((n, k), dtype)
                if ratio < LEAST_SPEEDUP:
                    continue
                seconds["native"] += n * k
                seconds["torch"] += n * k * ratio
            products.layers.append((module, native_class))
            products.chosen += number == 0
    if seconds["native"]:
        products.gain = seconds["torch"] / seconds["native"]
    return products
