"""Asking a model's own forward what it does between its backbone and its logits.

A configuration key can be there without being used, and a forward can scale, cap, mask or cut the
logits with no key that says so. So the forward is run once with two stand-ins: a backbone that
returns known hidden states and an output layer that returns known logits. What reaches the layer
and what comes out at the end then shows the head's whole transform, exactly and at no cost: no
weight is touched, so it does not matter where the weights are or how large they are.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastpref.heads.layer import Layer
from fastpref.heads.modes import evaluating

_TOKENS = (5, 6, 7)


@dataclass(frozen=True)
class Tail:
    """What a forward does after its backbone, as observed.

    Attributes:
        given: the backbone's hidden states [1, 3, H].
        received: what the output layer was called with.
        logits: the model's logits [1, 1, vocabulary] for the layer's output `values` [1, 1, V].
    """

    given: Tensor
    received: Tensor
    values: Tensor
    logits: Tensor


def verify(
    model: nn.Module,
    forward: Callable[..., Any],
    backbone: nn.Module,
    module: nn.Module,
    layer: Layer,
    *,
    scale: float,
    softcap: float | None,
    vocab_size: int,
) -> None:
    """Raise ValueError unless forward computes softcap * tanh(scale * (layer(h)) / softcap).

    Args:
        forward: the model's own.
        backbone: the submodule whose first output is h.
        module: what get_output_embeddings() returns; `layer` is what it holds.
        scale, softcap: the transform that is expected.
        vocab_size: how many logits of each token are expected.
    """
    name = type(model).__name__
    _check_linear(layer)
    try:
        tail = _observe(model, forward, backbone, module, layer)
    except _Unusual as error:
        raise ValueError(f"{name} {error}; {_OTHERWISE}") from None
    except Exception as error:
        raise ValueError(
            f"the part of {name} after its backbone could not be run by itself: "
            f"{type(error).__name__}: {error}; {_OTHERWISE}"
        ) from error
    if tail.logits.is_meta or tail.received.is_meta:
        return
    ratio = _ratio(tail, name, layer.bias is not None)
    if tail.logits.shape[-1] != vocab_size:
        raise ValueError(
            f"{name} returns {tail.logits.shape[-1]} logits for each token and its output layer "
            f"has {tail.values.shape[-1]} rows, of which its config tells to keep {vocab_size}; "
            f"{_OTHERWISE}"
        )
    # The layer saw ratio * h, so its values stand for ratio * (h W^T).
    values, found = tail.values[..., :vocab_size] / ratio, tail.logits.double()
    wanted = _transform(values, scale, softcap)
    if _close(found, wanted):
        return
    guess = _guess(values, found)
    told = f"scale {scale:g} and softcap {softcap}, which is what its config tells"
    if not _close(found, _transform(values, *guess)):
        raise ValueError(
            f"the logits of {name} are not those of a linear output layer with {told}, nor with "
            f"any other scale and softcap: its forward changes them further; {_OTHERWISE}"
        )
    seen = f"'scale': {guess[0]:.7g}, 'softcap': {guess[1] and float(f'{guess[1]:.7g}')}"
    raise ValueError(
        f"the logits of {name} are not those of a linear output layer with {told}; its forward was "
        f"seen to use transform={{{seen}}}: give that to install_head_forward if it is meant"
    )


_OTHERWISE = (
    "expected a linear layer on the backbone's last hidden states. Give linear_token_logps what "
    "the model's last layer is called with, or give token_logps the model's logits"
)


class _Unusual(Exception):
    """The forward is not the backbone and then its head; the message says in what way."""


class _Outputs(dict):
    """A backbone's outputs with every field that a forward may ask for, all but one None."""

    def __init__(self, hidden: Tensor) -> None:
        super().__init__(last_hidden_state=hidden)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self.get(name)

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, str):
            return self.get(key)
        return tuple(self.values())[key]


@contextlib.contextmanager
def _forward_of(module: nn.Module, function: Callable[..., Any]) -> Iterator[None]:
    own = module.__dict__.get("forward")
    module.forward = function  # type: ignore[method-assign]
    try:
        yield
    finally:
        del module.forward
        if own is not None:
            module.forward = own  # type: ignore[method-assign]


def accepted(forward: Callable[..., Any], inputs: dict[str, Any]) -> dict[str, Any]:
    """What of the inputs the function takes by name."""
    parameters = inspect.signature(forward).parameters.values()
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return inputs
    return {k: v for k, v in inputs.items() if k in {p.name for p in parameters}}


@torch.no_grad()
def _observe(
    model: nn.Module,
    forward: Callable[..., Any],
    backbone: nn.Module,
    module: nn.Module,
    layer: Layer,
) -> Tail:
    rows, width = layer.weight.shape
    device = "cpu" if layer.weight.is_meta else layer.weight.device
    ids = torch.tensor([[token % rows for token in _TOKENS]], device=device)
    options = {"use_cache": False, "return_dict": True}
    wanted = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **options}
    inputs = accepted(type(model).forward, wanted)
    # Eighths, which every dtype holds exactly.
    hidden = (torch.arange(len(_TOKENS) * width) * 37 % 251 - 125).view(1, -1, width) / 8
    hidden = hidden.to(device, layer.weight.dtype)
    values = _spread(rows)
    calls: list[Tensor] = []
    asked: list[bool] = []

    def logits_of(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        calls.append(x)
        return values.float().clone()

    def hidden_of(*args: Any, **kwargs: Any) -> _Outputs:
        asked.append(True)
        return _Outputs(hidden)

    with evaluating(model):  # where the stand-in is not asked, dropout would run
        with _forward_of(module, logits_of), _forward_of(backbone, hidden_of):
            out = forward(**inputs)
        if not asked:  # its forward reaches into the backbone; then both have to be run
            hidden = backbone(**accepted(type(backbone).forward, wanted))[0]
            calls.clear()
            with _forward_of(module, logits_of):
                out = forward(**inputs)
    logits = out.logits if hasattr(out, "logits") else out[0]
    if len(calls) != 1:
        raise _Unusual(
            f"calls the layer that get_output_embeddings() returns {len(calls)} times, not once"
        )
    if not isinstance(logits, Tensor) or logits.dim() != 3 or logits.shape[:2] != (1, 1):
        raise _Unusual("makes its logits from more than the output of that layer")
    if calls[0].shape != hidden.shape:
        raise _Unusual(
            f"calls its output layer with shape {tuple(calls[0].shape)} where the backbone returns "
            f"{tuple(hidden.shape)}"
        )
    return Tail(hidden, calls[0], values, logits.to("cpu") if not logits.is_meta else logits)


def _spread(n: int) -> Tensor:
    """[1, 1, n] numbers from 0.01 to 1000 of both signs; any 64 neighbours span them."""
    k = torch.arange(n)
    size = 10.0 ** (-2 + 5 * (k * 23 % 64).double() / 63)
    return torch.where(k % 2 == 0, size, -size).view(1, 1, n)


def _ratio(tail: Tail, name: str, has_bias: bool) -> float:
    """What the hidden states are multiplied with on their way to the output layer."""
    given, received = tail.given.double(), tail.received.double().to(tail.given.device)
    ratio = float((received * given).sum() / (given * given).sum())
    error = (received - ratio * given).abs().max()
    limit = 1e-5 if tail.received.dtype in (torch.float32, torch.float64) else 1e-2
    if not ratio or not error <= limit * received.abs().max():
        raise ValueError(
            f"{name} changes its backbone's hidden states before they reach its output layer (a "
            f"further layer or norm, as BERT has); {_OTHERWISE}"
        )
    if abs(ratio - 1) <= limit:
        return 1.0
    if has_bias:
        raise ValueError(
            f"{name} scales its hidden states by {ratio:g} before an output layer with a bias; "
            f"{_OTHERWISE}"
        )
    return ratio


def _transform(raw: Tensor, scale: float, softcap: float | None) -> Tensor:
    scaled = raw * scale
    return scaled if softcap is None else softcap * torch.tanh(scaled / softcap)


def _guess(raw: Tensor, found: Tensor) -> tuple[float, float | None]:
    """The scale and the softcap that take raw to found, if any do."""
    raw, found = raw.flatten(), found.flatten()
    low, high = raw.abs().argmin(), raw.abs().argmax()
    scale = float(found[low] / raw[low])
    cap = float(found[high].abs())
    return (scale, None) if cap > 0.5 * abs(scale * float(raw[high])) else (scale, cap)


def _close(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a.cpu(), b.cpu(), rtol=1e-4, atol=1e-6)


@torch.no_grad()
def _check_linear(layer: Layer) -> None:
    """A class of its own may do more than F.linear: normalise the weight, quantise the input."""
    module, weight = layer.module, layer.weight
    if getattr(type(module), "forward", None) is nn.Linear.forward or weight.is_meta:
        return
    if weight is not getattr(module, "weight", None):  # with trained rows, which PEFT puts in
        return
    x = torch.linspace(-1, 1, 2 * weight.shape[1]).view(2, -1).to(weight)
    expected = nn.functional.linear(x, weight).float()
    if layer.row_scale is not None:
        expected = expected * layer.row_scale
    if layer.bias is not None:
        expected = expected + layer.bias
    got = module(x)
    limit = 1e-4 if weight.dtype in (torch.float32, torch.float64) else 5e-2
    same = isinstance(got, Tensor) and got.shape == expected.shape
    if not same or not (got.float() - expected).abs().max() <= limit * expected.abs().max() + 1e-6:
        raise ValueError(
            f"the output head is a {type(module).__name__}, which does not compute "
            f"x @ weight.T + bias; {_OTHERWISE}"
        )
