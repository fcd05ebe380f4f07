"""`plan_training`: what fits a memory, and how fast it is, before any weight is loaded.

config, lengths of the data's pairs
     -> the longest pairs of a micro-batch, simulated: bytes by component (simulate.py)
     -> for each way to train (full, LoRA, QLoRA) the largest micro-batch that fits
     -> seconds of a step on the data's pairs, by a device's rates (times.py)
     -> the plan; and the changes that would make another configuration fit, the largest gain first
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import torch

from fastpref.planning.counts import count_weights
from fastpref.planning.devices import DEVICES, Device
from fastpref.planning.model import METHODS, StepOptions, check_config
from fastpref.planning.simulate import (
    Pair,
    Parts,
    extrapolated,
    highest,
    simulate_parts,
    step_head,
)
from fastpref.planning.times import Rates, StepTime, step_seconds
from fastpref.profiling.lengths import Lengths

# Of the predicted tensors. benchmarks/results/plan.json has a grid of real steps, which are closer.
MEMORY_UNCERTAINTY = 0.10
# Of all but the libraries, before something is said to fit. On a CPU it is more, since what malloc
# keeps is an estimate.
MARGIN = {"cpu": 0.20, "cuda": 0.10}
# What is resident beside tensors: the interpreter and its libraries, or a GPU's context.
OUTSIDE = {"cpu": 650 * 2**20, "cuda": 900 * 2**20}
# What the allocator holds beyond live tensors: shares of the weights, and of the bytes that come
# and go in a step. A CPU's were chosen after a profile of SmolLM2-135M alone.
KEPT = {"cpu": (1.0, 0.5), "cuda": (0.0, 0.10)}
_PASSING = ("gradients", "activations", "head", "reference", "other")
_SIZES = (1, 2, 4, 8, 16, 32)


@dataclass
class Estimate:
    """The memory and the time of one configuration.

    Attributes:
        options: how it is trained.
        pairs: of a micro-batch.
        accumulation: micro-batches of a step.
        max_length: tokens of prompt and answer.
        devices: over which weights, gradients and optimiser are sharded.
        components: bytes of each device at the peak: tensors by component, "allocator" (what it
            holds beyond them) and "libraries".
        seconds: of an optimiser step, by part; None without rates.
    """

    options: StepOptions
    pairs: int
    accumulation: int
    max_length: int
    devices: int
    components: dict[str, int]
    peak_phase: str
    seconds: StepTime | None = None

    @property
    def bytes(self) -> int:
        """Of each device at the peak."""
        return sum(self.components.values())

    def fits(self, memory: int) -> bool:
        """Whether it fits with the uncertainty of the prediction."""
        outside = self.components.get("libraries", 0)
        margin = 1 + MARGIN[self.options.device]
        return outside + margin * (self.bytes - outside) <= memory

    def as_dict(self) -> dict[str, Any]:
        """The attributes, as values for JSON."""
        options = {**asdict(self.options), "dtype": str(self.options.dtype)[6:]}
        seconds = None
        if self.seconds is not None:
            seconds = {**asdict(self.seconds), "total": self.seconds.total}
        return {
            "options": options,
            "pairs": self.pairs,
            "accumulation": self.accumulation,
            "max_length": self.max_length,
            "devices": self.devices,
            "components": self.components,
            "bytes": self.bytes,
            "peak_phase": self.peak_phase,
            "seconds": seconds,
        }


@dataclass
class TrainingPlan:
    """The result of `plan_training`.

    Attributes:
        memory: bytes of each device.
        chosen: the configuration to take; None if nothing fits.
        asked: the configuration that was asked for, whether it fits or not.
        ways: for full, lora and qlora the largest that fits, or the smallest there is.
        changes: (what to change, the estimate then), by bytes saved, for `asked`.
        table: for common devices the way, pairs and seconds; None where nothing fits.
        weights: of the model: all, and those that train with the chosen way.
    """

    memory: int
    chosen: Estimate | None
    asked: Estimate
    ways: dict[str, Estimate]
    changes: list[tuple[str, Estimate]] = field(default_factory=list)
    table: list[tuple[Device, Estimate | None]] = field(default_factory=list)
    weights: tuple[int, int] = (0, 0)

    def as_dict(self) -> dict[str, Any]:
        """The attributes, as values for JSON."""
        return {
            "memory": self.memory,
            "memory_uncertainty": MEMORY_UNCERTAINTY,
            "weights": {"all": self.weights[0], "trained": self.weights[1]},
            "chosen": None if self.chosen is None else self.chosen.as_dict(),
            "asked": {**self.asked.as_dict(), "fits": self.asked.fits(self.memory)},
            "ways": {name: way.as_dict() for name, way in self.ways.items()},
            "changes": [{"change": text, **e.as_dict()} for text, e in self.changes],
            "table": [
                {"device": d.name, "plan": None if e is None else e.as_dict()}
                for d, e in self.table
            ],
        }


def default_lengths(max_length: int) -> Lengths:
    """The lengths of pairs where no data is given: the longest there can be, a quarter prompt."""
    prompt = np.full(64, max_length // 4)
    answer = np.full(64, max_length - max_length // 4)
    return Lengths(prompt, answer, answer, np.arange(64))


class Planner:
    """Estimates of one model on one data set; simulations are kept."""

    def __init__(self, config: Any, lengths: Lengths, kind: str) -> None:
        self.config, self.lengths, self.kind = config, lengths, kind
        self._parts: dict[Any, Parts] = {}

    def _pairs(self, lengths: Lengths, size: int, longest: bool) -> list[Pair]:
        order = np.argsort(lengths.longest, kind="stable")
        if longest:
            index = order[::-1][:size]
        else:
            index = order[np.linspace(0, len(order) - 1, size).astype(int)]
        rows = np.stack([lengths.prompt, lengths.chosen, lengths.rejected], 1)[index]
        found = [(int(p), int(c), int(r)) for p, c, r in rows]
        while len(found) < size:  # data of fewer pairs than a batch
            found.append(found[-1])
        return found

    def _cut(self, max_length: int) -> Lengths:
        prompt = np.minimum(self.lengths.prompt, max_length - 1)
        chosen, rejected = (
            np.minimum(values, max_length - prompt)
            for values in (self.lengths.chosen, self.lengths.rejected)
        )
        return Lengths(prompt, chosen, rejected, self.lengths.row)

    def parts(self, options: StepOptions, size: int, max_length: int) -> Parts:
        """The parts of the step on a micro-batch of the longest pairs.

        Bytes are linear in the number of pairs, so that two sizes give the others.
        """
        if size > 2:
            one, two = (self.parts(options, n, max_length) for n in (1, 2))
            return extrapolated(one, two, size - 1)
        pairs = self._pairs(self._cut(max_length), size, longest=True)
        key: Any = options, size, max_length
        if options.head == "fastpref":  # many budgets give one plan of the head
            text = self.config.get_text_config()
            labelled, trains = sum(c + r for _, c, r in pairs), options.method == "full"
            head = step_head(labelled, text.hidden_size, text.vocab_size, trains, options)
            key = replace(options, memory_budget=None), head, size, max_length
        if key not in self._parts:
            self._parts[key] = simulate_parts(self.config, pairs, options)
        return self._parts[key]

    def estimate(
        self,
        options: StepOptions,
        size: int,
        accumulation: int,
        max_length: int,
        devices: int = 1,
        rates: Rates | None = None,
    ) -> Estimate:
        """Memory and time of a configuration."""
        account = highest(self.parts(options, size, max_length))
        components = {name: value for name, value in account.components.items() if value}
        if devices > 1:  # FSDP: each device keeps its part, and gathers a layer at a time
            layer = components.get("weights", 0) // max(self._layers, 1)
            for name in ("weights", "optimiser", "gradients", "reference"):
                if name in components:
                    components[name] //= devices
            components["gathered"] = 2 * layer
        passing = sum(components.get(name, 0) for name in _PASSING)
        of_weights, of_passing = KEPT[self.kind]
        kept = of_weights * components.get("weights", 0) + of_passing * passing
        components["allocator"] = int(kept)
        components["libraries"] = OUTSIDE[self.kind]
        seconds = None
        if rates is not None:
            pairs = self._pairs(self._cut(max_length), max(size, 8), longest=False)
            # The time of a pair of the data, times those of a step.
            whole = step_seconds(self.config, pairs, options, rates)
            share = size * accumulation / len(pairs)
            seconds = StepTime(
                whole.body_forward * share,
                whole.head * share,
                whole.body_backward * share,
                whole.optimiser,
            )
        return Estimate(
            options, size, accumulation, max_length, devices, components,
            account.peak_phase, seconds,
        )  # fmt: skip

    @property
    def _layers(self) -> int:
        return self.config.get_text_config().num_hidden_layers

    def largest(
        self,
        options: StepOptions,
        per_step: int,
        max_length: int,
        memory: int,
        devices: int,
        rates: Rates | None,
    ) -> Estimate:
        """The largest micro-batch that fits, of those that divide a step; else one pair."""
        found = None
        for size in (n for n in _SIZES if n <= per_step and per_step % n == 0):
            tried = self.estimate(options, size, per_step // size, max_length, devices, rates)
            if found is not None and not tried.fits(memory):
                break
            found = tried
        assert found is not None
        return found


def plan_training(
    config: Any,
    *,
    memory: int,
    lengths: Lengths | None = None,
    max_length: int = 1024,
    batch_size: int = 8,
    method: str = "full",
    options: StepOptions | None = None,
    devices: int = 1,
    rates: Rates | None = None,
    kind: str = "cpu",
    table: bool = True,
    why_oom: bool = True,
) -> TrainingPlan:
    """Plan the training of a model from its config and the lengths of its data.

    Args:
        config: a transformers config of a causal model; no weights are loaded.
        memory: bytes of each device.
        lengths: of the data's pairs; None: all pairs are as long as max_length.
        max_length: tokens of prompt and answer.
        batch_size: pairs of an optimiser step.
        method: "full", "lora" or "qlora": the way that is asked for.
        options: its further options; its method is replaced.
        devices: GPUs that the weights are sharded over.
        rates: of a device, for the seconds.
        kind: "cpu" or "cuda".
        table: whether common devices are planned for, too.
        why_oom: whether changes are estimated where the way that is asked for does not fit.

    Returns:
        A `TrainingPlan`.

    Raises:
        ValueError: a size that is not positive, an unknown method, or a config whose model cannot
            be simulated.
    """
    check_config(config)
    for name, value in (("memory", memory), ("batch_size", batch_size), ("devices", devices)):
        if value < 1:
            raise ValueError(f"{name}: got {value}, expected at least 1")
    if method not in METHODS:
        raise ValueError(f"method: got {method!r}, expected {', '.join(METHODS)}")
    if lengths is None:
        lengths = default_lengths(max_length)
    base = replace(options or StepOptions(), method=method)
    base = replace(base, device=kind, memory_budget=max(memory // 16, 1))
    planner = Planner(config, lengths, kind)
    asked = planner.largest(_of(base, method), batch_size, max_length, memory, devices, rates)
    ways = {method: asked}
    for other in ("full", "lora", *(["qlora"] if kind == "cuda" else [])):
        if other not in ways:
            ways[other] = planner.largest(
                _of(base, other), batch_size, max_length, memory, devices, rates
            )
    fitting = [way for way in ways.values() if way.fits(memory)]
    chosen = fitting[0] if fitting else None
    plan = TrainingPlan(memory, chosen, asked, ways)
    plan.weights = count_weights(config, (chosen or asked).options)[:2]
    if why_oom and not asked.fits(memory):
        plan.changes = _changes(planner, asked, ways, devices, rates)
    if table:
        plan.table = [
            (device, _for_device(planner, device, base, batch_size, max_length))
            for device in DEVICES
        ]
    return plan


def _of(options: StepOptions, method: str) -> StepOptions:
    if method == "full":
        reference = "precompute" if options.reference == "adapter" else options.reference
        return replace(options, method=method, reference=reference)
    return replace(options, method=method, reference="adapter")


def _for_device(
    planner: Planner, device: Device, base: StepOptions, batch_size: int, max_length: int
) -> Estimate | None:
    """The first way that fits a device, the most thorough first."""
    own = Planner(planner.config, planner.lengths, "cuda" if device.kind == "gpu" else "cpu")
    own._parts = planner._parts
    half = device.kind == "gpu"
    for method in ("full", "lora", "qlora"):
        if method == "qlora" and device.kind == "cpu":
            continue
        options = replace(base, bf16=half, device=own.kind, memory_budget=device.memory // 16)
        options = _of(options, method)
        if method != "full" and half:
            options = replace(options, dtype=torch.bfloat16, bf16=False)
        found = own.largest(options, batch_size, max_length, device.memory, 1, device.rates())
        if found.fits(device.memory):
            return found
    return None


def _changes(
    planner: Planner,
    asked: Estimate,
    ways: dict[str, Estimate],
    devices: int,
    rates: Rates | None,
) -> list[tuple[str, Estimate]]:
    """What to change, one thing at a time, by the bytes that it saves."""
    options = asked.options
    tried: list[tuple[str, StepOptions, int, int, int]] = []
    size, length = asked.pairs, asked.max_length

    def add(text: str, **changes: Any) -> None:
        other = replace(options, **changes.pop("options", {}))
        tried.append(
            (
                text,
                other,
                changes.get("size", size),
                changes.get("length", length),
                changes.get("devices", devices),
            )
        )

    if size > 1:
        add(f"1 pair a micro-batch instead of {size}, with accumulation", size=1)
    if not options.gradient_checkpointing:
        add("gradient checkpointing", options={"gradient_checkpointing": True})
    if options.head == "eager":
        add("fastpref's head instead of logits", options={"head": "fastpref"})
    if options.reference == "model":
        add("--reference precompute instead of a second model", options={"reference": "precompute"})
    if options.head == "fastpref" and options.method == "full":
        add("head_strategy recompute", options={"head_strategy": "recompute"})
    if length > 256:
        add(f"max_length {length // 2} instead of {length}", length=length // 2)
    if options.method == "full":
        lora = {"method": "lora", "reference": "adapter"}
        add("LoRA instead of all weights", options=lora)
        if options.dtype == torch.float32:
            add("LoRA over weights in bf16", options={**lora, "dtype": torch.bfloat16})
    elif options.dtype == torch.float32:
        add("weights in bf16", options={"dtype": torch.bfloat16})
    if options.method != "qlora" and planner.kind == "cuda":
        qlora = {"method": "qlora", "reference": "adapter", "dtype": torch.bfloat16}
        add("QLoRA: weights of 4 bits under an adapter", options=qlora)
    if planner.kind == "cuda":
        add(f"{2 * devices} GPUs that share the weights", devices=2 * devices)
    per_step = asked.pairs * asked.accumulation
    found = [
        (text, planner.estimate(other, n, per_step // n, cut, count, rates))
        for text, other, n, cut, count in tried
    ]
    found = [(text, estimate) for text, estimate in found if estimate.bytes < asked.bytes]
    return sorted(found, key=lambda change: change[1].bytes)


def length_facts(lengths: Lengths) -> dict[str, int]:
    """Percentiles of the tokens of the data's longer sequences."""
    values: Sequence[float] = np.percentile(lengths.longest, [50, 90, 99, 100])
    return {name: int(v) for name, v in zip(("p50", "p90", "p99", "max"), values, strict=True)}
