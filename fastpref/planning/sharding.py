"""What several devices hold and wait for that share a model by FSDP2.

bytes of a part of the step on one device -> those of each of several: shards, what is gathered
seconds of a step on one device -> those with the exchange of weights and gradients
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from fastpref.planning.counts import count_weights, trained_share
from fastpref.planning.model import StepOptions
from fastpref.planning.simulate import QUANTISED_BYTES
from fastpref.planning.times import StepTime


def sharded_bytes(
    config: Any, components: dict[str, int], options: StepOptions, devices: int
) -> dict[str, int]:
    """The bytes of each device with FSDP2, from those of a part of the step on one."""
    found = dict(components)
    weights, item = components["weights"], options.item
    quantised = _quantised(config, options)
    found["weights"] = quantised + (weights - quantised) // devices
    for name in ("optimiser", "reference"):
        found[name] = found.get(name, 0) // devices
    layers, _, kept = _gathered(config, weights, options)
    gathered = 2 * layers / max(config.get_text_config().num_hidden_layers, 1) + kept
    if options.accumulates and not options.sync_each_batch:
        # Whole until the last micro-batch exchanges them, in the dtype of products.
        found["gradients"] = found.get("gradients", 0) * item // options.dtype.itemsize
    else:
        found["gradients"] = found.get("gradients", 0) // devices
        # Whole gradients of two layers and of the head are on their way.
        gathered *= 2 if options.method == "full" else 1
    found["gathered"] = int(gathered)
    return found


def _quantised(config: Any, options: StepOptions) -> int:
    """The bytes of 4-bit weights, which accelerate does not shard."""
    if options.method != "qlora":
        return 0
    return int(count_weights(config, StepOptions())[2] * QUANTISED_BYTES)


def _gathered(config: Any, weights: int, options: StepOptions) -> tuple[float, float, float]:
    """The bytes of weights that devices gather: of layers, in each pass, and once.

    A layer and an input embedding of its own are gathered in each pass. The output head stays
    from the forward pass to the end of the backward pass.
    """
    text = config.get_text_config()
    head = float(text.vocab_size * text.hidden_size * options.item)
    whole = (weights - _quantised(config, options)) * options.item / options.dtype.itemsize
    tables = 1 if getattr(text, "tie_word_embeddings", False) else 2
    return max(whole - tables * head, 0.0), max(whole - head, 0.0), head


def shared_seconds(
    config: Any,
    seconds: StepTime,
    options: StepOptions,
    weights: int,
    accumulation: int,
    devices: int,
    link: float,
) -> StepTime:
    """The seconds of a step on several devices, from those on one and the weights' bytes."""
    _, passing, head = _gathered(config, weights, options)
    # A second model has a head of its own.
    forward = passing + head
    if options.reference != "precompute":
        forward += passing + (head if options.reference == "model" else 0)
    reduced = options.item * trained_share(config, options)
    batch = replace(
        seconds,
        body_forward=seconds.body_forward / accumulation,
        body_backward=seconds.body_backward / accumulation,
    )
    sent = (devices - 1) / devices / link  # seconds for a byte of what all hold together
    once = exchange_seconds(batch, forward * sent, (passing + reduced) * sent)
    others = once
    if not options.sync_each_batch:
        others = exchange_seconds(batch, forward * sent, passing * sent)
    waits = once + (accumulation - 1) * others
    # Each device has its own part of the optimiser's work.
    return replace(seconds, optimiser=seconds.optimiser / devices, exchange=waits)


def exchange_seconds(step: StepTime, forward: float, backward: float) -> float:
    """The seconds that devices with sharded weights (FSDP) wait for each other in a micro-batch.

    A pass hides what takes no longer than itself, because the next layer is on its way while one
    computes.

    Args:
        step: the micro-batch's seconds on one device.
        forward: seconds for the weights that the forward pass gathers.
        backward: seconds for those that the backward pass gathers, and for the gradients that it
            reduces.
    """
    return max(0.0, forward - step.body_forward) + max(0.0, backward - step.body_backward)
