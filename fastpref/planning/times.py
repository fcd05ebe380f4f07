"""Seconds of a training step from FLOPs, bytes and a device's rates.

    body      2 FLOPs per weight and token forward; as much again for each of the gradients of
              inputs and of weights, and for recomputed activations; attention beside
    head      the FLOPs of `plan_head`, or of three products of all positions with logits
    passes    what elementwise work reads and writes, in memory that is new each time
    optimiser bytes of weights, gradients and two states, in place
    calls     a fixed time for each operation, which small models consist of
    exchange  with several devices: the weights that a layer gathers for each of its passes, and
              the gradients, as far as the passes' own work does not hide them

A rate is measured here, on this processor, or listed for a device (devices.py) as its peak and the
share of it that training reaches.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass
from typing import Any

import torch

from fastpref.backends.rates import product_rates
from fastpref.planning.counts import batch_tokens, body_flops, trained_share
from fastpref.planning.model import StepOptions
from fastpref.planning.simulate import Pair, step_head

# Numbers of `hidden_size` and of `intermediate_size` that a layer's elementwise work reads or
# writes for a token in a forward pass: norms, rotary embedding, residuals, activation, attention.
# Fitted to SmolLM2-135M on two cores, as are the next two.
_PASSES_HIDDEN, _PASSES_INNER = 38, 10
_PASSES_LOGITS = 20  # float32 numbers for each logit of an eager head
_REACHED = 0.85  # of the measured rate, with the layers' own shapes
_CALLS = 60  # operations of a layer's forward pass


@dataclass(frozen=True)
class Rates:
    """What a device does in a second.

    Attributes:
        name: the device.
        flops: of matrix products of the body.
        head_flops: of those of fastpref's head.
        bytes: that elementwise work reads and writes, into new memory.
        stream: bytes that work in place reads and writes.
        call: seconds of an operation on hardly any data, with its part in autograd.
        link: bytes that a device sends in a second to others of its kind; 0: unknown.
        measured: whether they were measured, and not listed.
    """

    name: str
    flops: float
    head_flops: float
    bytes: float
    stream: float
    call: float
    measured: bool
    link: float = 0.0


@dataclass(frozen=True)
class StepTime:
    """Seconds of a micro-batch's parts."""

    body_forward: float
    head: float
    body_backward: float
    optimiser: float
    other: float = 0.0  # of the host alone: batches, callbacks
    exchange: float = 0.0  # of several devices, beyond what they compute at the same time

    @property
    def total(self) -> float:
        """Seconds of the whole step."""
        return sum(astuple(self))


def _best(call: Callable[[], object], seconds: float = 0.2) -> float:
    call()
    best, end = float("inf"), time.perf_counter() + seconds
    while best == float("inf") or time.perf_counter() < end:
        start = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - start)
    return best


@functools.cache
def measured_rates(bf16: bool = False) -> Rates:
    """This processor's rates, with torch's present number of threads. It takes about a second."""
    dtype = torch.bfloat16 if bf16 else torch.float32
    x, w = torch.randn(512, 768).to(dtype), torch.randn(2048, 768).to(dtype)
    flops = 2.0 * 512 * 768 * 2048 / _best(lambda: torch.mm(x, w.t()))
    products = product_rates()["bfloat16" if bf16 else "float32"]
    used = products[str(products["used"])]
    assert isinstance(used, float)
    # Larger than the caches, so that it is memory's rate.
    a, b, tiny = torch.randn(2**23), torch.empty(2**23), torch.randn(8)
    passed = 2 * 4 * 2**23 / _best(lambda: torch.nn.functional.silu(a))
    moved = 2 * 4 * 2**23 / _best(lambda: b.copy_(a))
    call = 5 * _best(lambda: tiny + tiny, 0.02)
    return Rates("this CPU", _REACHED * flops, _REACHED * used * 1e9, passed, moved, call, True)


def step_seconds(
    config: Any, pairs: Sequence[Pair], options: StepOptions, rates: Rates
) -> StepTime:
    """The seconds of a step of one micro-batch.

    Args:
        config: a transformers config of a causal model.
        pairs: as in `simulate_step`.
        options: as in `simulate_step`.
        rates: of the device.
    """
    text = config.get_text_config()
    layers, hidden, vocab = text.num_hidden_layers, text.hidden_size, text.vocab_size
    inner = getattr(text, "intermediate_size", None) or 4 * hidden
    item = options.item
    sharing = options.prefix_sharing and options.head == "fastpref"
    tokens, labelled = batch_tokens(pairs, sharing)
    moved = tokens * layers * (_PASSES_HIDDEN * hidden + _PASSES_INNER * inner) * item
    forward = body_flops(config, pairs, sharing) / rates.flops + moved / rates.bytes
    forward += _CALLS * layers * rates.call
    trains = options.method == "full"
    backward = forward * (2 if trains else 1) + (forward if options.gradient_checkpointing else 0)
    if options.head == "fastpref":
        plan, _ = step_head(labelled, hidden, vocab, trains, options)
        head = plan.flops / rates.head_flops
    else:
        # Logits, their log_softmax and its gradient, in float32.
        passes = (6 if trains else 4) * tokens * hidden * vocab / rates.flops
        head = passes + _PASSES_LOGITS * 4 * tokens * vocab / rates.bytes
    weights = trained_share(config, options)
    if options.reference != "precompute":
        head_forward = 2.0 * labelled * hidden * vocab / rates.head_flops
        if options.head != "fastpref":
            head_forward = 2.0 * tokens * hidden * vocab / rates.flops
            head_forward += 16 * tokens * vocab / rates.bytes
        reference = forward + head_forward
    else:
        reference = 0.0
    # The norm of the gradients is computed as well.
    optimiser = 9 * 4 * weights / rates.stream
    return StepTime(forward + reference, head, backward, optimiser)
