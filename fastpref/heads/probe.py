"""Observing what a model's forward does between its backbone and its logits.

A configuration key can be there without being used, and a forward can scale, cap, mask or cut the
logits with no key that says so. So the forward is run once with two stand-ins: a backbone that
returns known hidden states and an output layer that returns known logits. The input of the layer
and the output of the forward then show the head's whole transform. No weight is read, so the
weights may be large, sharded or on the meta device. The docstring of `fastpref.heads` compares this
check with `check_head`.
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
    """One run of a model's forward with stand-ins.

    Attributes:
        hidden: the backbone's hidden states, [1, 3, H].
        received: the argument of the output layer, [1, 3, H].
        values: the result of the output layer, [1, 1, V].
        logits: the logits that the forward returned, [1, 1, vocabulary].
    """

    hidden: Tensor
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
    """Raise ValueError unless forward computes softcap * tanh(scale * layer(h) / softcap).

    Args:
        forward: the model's original forward.
        backbone: the submodule whose first output is h.
        module: the result of get_output_embeddings().
        layer: the parameters of module.
        scale, softcap: the expected transform.
        vocab_size: the expected number of logits of each token.
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
    # The layer received ratio * h, so its values stand for ratio * (h W^T).
    values, logits = tail.values[..., :vocab_size] / ratio, tail.logits.double()
    if _close(logits, _transform(values, scale, softcap)):
        return
    fitted = _fit(values, logits)
    expected = f"scale {scale:g} and softcap {softcap}, which is what its config tells"
    if not _close(logits, _transform(values, *fitted)):
        raise ValueError(
            f"the logits of {name} are not those of a linear output layer with {expected}, nor "
            f"with any other scale and softcap: its forward changes them further; {_OTHERWISE}"
        )
    fit = f"'scale': {fitted[0]:.7g}, 'softcap': {fitted[1] and float(f'{fitted[1]:.7g}')}"
    raise ValueError(
        f"the logits of {name} are not those of a linear output layer with {expected}; its forward "
        f"was seen to use transform={{{fit}}}: give that to install_head_forward if it is meant"
    )


_OTHERWISE = (
    "expected a linear layer on the backbone's last hidden states. Give linear_token_logps what "
    "the model's last layer is called with, or give token_logps the model's logits"
)


class _Unusual(Exception):
    """A forward that is not a backbone followed by a head; the message completes "MODEL ..."."""


class _Outputs(dict):
    """A backbone's outputs: last_hidden_state, and None for any other field that is read."""

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
    """Replace module.forward within the context."""
    before = module.__dict__.get("forward")  # of this instance; None where the class has it
    module.forward = function  # type: ignore[method-assign]
    try:
        yield
    finally:
        del module.forward
        if before is not None:
            module.forward = before  # type: ignore[method-assign]


def accepted(forward: Callable[..., Any], inputs: dict[str, Any]) -> dict[str, Any]:
    """Those of the inputs that a function accepts as keywords."""
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
    """Run forward with stand-ins. Raises _Unusual for a forward that they do not fit."""
    rows, width = layer.weight.shape
    device = "cpu" if layer.weight.is_meta else layer.weight.device
    ids = torch.tensor([[token % rows for token in _TOKENS]], device=device)
    options = {"use_cache": False, "return_dict": True}
    arguments = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **options}
    inputs = accepted(type(model).forward, arguments)
    # Multiples of 1/8, which every floating-point dtype represents exactly.
    hidden = (torch.arange(len(_TOKENS) * width) * 37 % 251 - 125).view(1, -1, width) / 8
    hidden = hidden.to(device, layer.weight.dtype)
    values = _spread(rows)
    received: list[Tensor] = []
    backbone_calls: list[bool] = []

    def logits_of(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        received.append(x)
        return values.float().clone()

    def hidden_of(*args: Any, **kwargs: Any) -> _Outputs:
        backbone_calls.append(True)
        return _Outputs(hidden)

    with evaluating(model):  # without dropout, in case the real backbone runs
        with _forward_of(module, logits_of), _forward_of(backbone, hidden_of):
            out = forward(**inputs)
        if not backbone_calls:  # forward calls parts of the backbone: run the real one instead
            hidden = backbone(**accepted(type(backbone).forward, arguments))[0]
            received.clear()
            with _forward_of(module, logits_of):
                out = forward(**inputs)
    logits = out.logits if hasattr(out, "logits") else out[0]
    if len(received) != 1:
        raise _Unusual(
            f"calls the layer that get_output_embeddings() returns {len(received)} times, not once"
        )
    if not isinstance(logits, Tensor) or logits.dim() != 3 or logits.shape[:2] != (1, 1):
        raise _Unusual("makes its logits from more than the output of that layer")
    if received[0].shape != hidden.shape:
        raise _Unusual(
            f"calls its output layer with shape {tuple(received[0].shape)} where the backbone "
            f"returns {tuple(hidden.shape)}"
        )
    return Tail(hidden, received[0], values, logits.to("cpu") if not logits.is_meta else logits)


def _spread(n: int) -> Tensor:
    """[1, 1, n] numbers of both signs; any 64 neighbours have magnitudes from 0.01 to 1000."""
    k = torch.arange(n)
    magnitude = 10.0 ** (-2 + 5 * (k * 23 % 64).double() / 63)
    return torch.where(k % 2 == 0, magnitude, -magnitude).view(1, 1, n)


def _ratio(tail: Tail, name: str, has_bias: bool) -> float:
    """The factor between the backbone's hidden states and the argument of the output layer.

    Raises:
        ValueError: there is no such factor, or the layer has a bias, to which it does not apply.
    """
    hidden, received = tail.hidden.double(), tail.received.double().to(tail.hidden.device)
    ratio = float((received * hidden).sum() / (hidden * hidden).sum())
    error = (received - ratio * hidden).abs().max()
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


def _fit(raw: Tensor, logits: Tensor) -> tuple[float, float | None]:
    """The only scale and softcap that can map raw to logits; whether they do is not checked."""
    raw, logits = raw.flatten(), logits.flatten()
    # With a softcap the smallest logit is in tanh's linear range, and the largest one is capped.
    low, high = raw.abs().argmin(), raw.abs().argmax()
    scale = float(logits[low] / raw[low])
    cap = float(logits[high].abs())
    return (scale, None) if cap > 0.5 * abs(scale * float(raw[high])) else (scale, cap)


def _close(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a.cpu(), b.cpu(), rtol=1e-4, atol=1e-6)


@torch.no_grad()
def _check_linear(layer: Layer) -> None:
    """Raise ValueError unless the layer computes row_scale * (x @ weight.T) + bias.

    A subclass of nn.Linear may do more: normalise the weight, quantise the input.
    """
    module, weight = layer.module, layer.weight
    if getattr(type(module), "forward", None) is nn.Linear.forward or weight.is_meta:
        return
    if weight is not getattr(module, "weight", None):  # PEFT's, with trained rows in place
        return
    x = torch.linspace(-1, 1, 2 * weight.shape[1]).view(2, -1).to(weight)
    expected = nn.functional.linear(x, weight).float()
    if layer.row_scale is not None:
        expected = expected * layer.row_scale
    if layer.bias is not None:
        expected = expected + layer.bias
    out = module(x)
    limit = 1e-4 if weight.dtype in (torch.float32, torch.float64) else 5e-2
    same = isinstance(out, Tensor) and out.shape == expected.shape
    if not same or not (out.float() - expected).abs().max() <= limit * expected.abs().max() + 1e-6:
        raise ValueError(
            f"the output head is a {type(module).__name__}, which does not compute "
            f"x @ weight.T + bias; {_OTHERWISE}"
        )
