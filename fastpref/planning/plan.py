"""`plan_training`: what fits a memory, and how fast it is, before any weight is loaded.

config, lengths of the data's pairs
     -> for each method (full, LoRA, QLoRA) the largest micro-batch that fits (estimate.py)
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
from fastpref.planning.estimate import MEMORY_UNCERTAINTY, Estimate, Planner, default_lengths
from fastpref.planning.model import METHODS, StepOptions, check_config
from fastpref.planning.times import Rates, StepTime
from fastpref.profiling.lengths import Lengths
from fastpref.progress import advancing

MOST_TOKENS = 2**22  # of a sequence: the simulation has rows of that many ids


@dataclass
class TrainingPlan:
    """The result of `plan_training`.

    Attributes:
        memory: bytes of each device.
        chosen: the configuration to take; None if nothing fits.
        asked: the configuration that was asked for, whether it fits or not.
        ways: for each method ("full", "lora", "qlora") the configuration with the largest
            micro-batch that fits, or with the fewest bytes if none fits.
        changes: (what to change in `asked`, the estimate after it), the most bytes saved first.
        table: for common devices the method, pairs and seconds; None where nothing fits.
        weights: numbers of the model's weights: all, and those that train in the chosen
            configuration.
        probed: whether the seconds of `ways` follow from measured steps, not from rates alone.
        rates: of the device that is planned for; None: unknown.
    """

    memory: int
    chosen: Estimate | None
    asked: Estimate
    ways: dict[str, Estimate]
    changes: list[tuple[str, Estimate]] = field(default_factory=list)
    table: list[tuple[Device, Estimate | None]] = field(default_factory=list)
    weights: tuple[int, int] = (0, 0)
    probed: bool = False
    rates: Rates | None = None

    def as_dict(self) -> dict[str, Any]:
        """The attributes, as values for JSON."""
        return {
            "memory": self.memory,
            "memory_uncertainty": MEMORY_UNCERTAINTY,
            "probed": self.probed,
            "rates": None if self.rates is None else asdict(self.rates),
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
    probe: bool = False,
    show_progress: bool = False,
) -> TrainingPlan:
    """Plan the training of a model from its config and the lengths of its data.

    Args:
        config: a transformers config of a causal model; no weights are loaded.
        memory: bytes of each device.
        lengths: of the data's pairs; None: all pairs are as long as max_length.
        max_length: tokens of prompt and answer.
        batch_size: pairs of an optimiser step, on all devices together.
        method: "full", "lora" or "qlora": the method that is asked for.
        options: its further options; its method is replaced.
        devices: GPUs that the pairs of a step and the weights are divided among.
        rates: of a device, for the seconds; with several devices they need a `link`.
        kind: "cpu" or "cuda".
        table: whether common devices are planned for, too.
        why_oom: whether changes are estimated if the method that is asked for does not fit.
        probe: whether steps of a model with fewer layers and random weights are measured on this
            CPU, which makes the seconds more exact; rates are of this CPU then. A model whose steps
            would take more than a minute, or half the memory, is left to the rates.
        show_progress: whether progress is shown.

    Returns:
        A `TrainingPlan`.

    Raises:
        ValueError: a size that is not positive, pairs that the devices cannot share, an unknown
            method, a probe without rates of this CPU, or a config whose model cannot be simulated.
    """
    check_config(config)
    for name, value in (("memory", memory), ("batch_size", batch_size), ("devices", devices)):
        if value < 1:
            raise ValueError(f"{name}: got {value}, expected at least 1")
    if batch_size % devices:
        more = -(-batch_size // devices) * devices
        raise ValueError(
            f"batch_size: got {batch_size}, which {devices} devices cannot share evenly; expected "
            f"a multiple of {devices}, such as {more}"
        )
    if probe and not (kind == "cpu" and rates is not None and rates.measured):
        raise ValueError("probe: got True, expected kind 'cpu' and measured rates")
    if method not in METHODS:
        raise ValueError(f"method: got {method!r}, expected {', '.join(METHODS)}")
    if lengths is None:
        lengths = default_lengths(max_length)
    if (tokens := min(int(lengths.longest.max()), max_length)) > MOST_TOKENS:
        raise ValueError(
            f"max_length: got sequences of {tokens:,} tokens; a plan is made for at most "
            f"{MOST_TOKENS:,}"
        )
    base = replace(options or StepOptions(), method=method)
    base = replace(base, device=kind, memory_budget=max(memory // 16, 1))
    planner = Planner(config, lengths, kind)
    others = ("full", "lora", *(["qlora"] if kind == "cuda" else []))
    names = list(dict.fromkeys((method, *others)))
    parts = len(names) * (1 + probe) + (len(DEVICES) if table else 0)
    with advancing("Planning", "parts", parts, not show_progress) as advance:
        ways = {}
        for name in names:
            ways[name] = planner.largest(
                _of(base, name), batch_size // devices, max_length, memory, devices, rates
            )
            advance(1)
        corrections: dict[str, StepTime | None] = {}
        if probe and rates is not None:
            for name, way in ways.items():
                sizes = way.pairs, max_length
                corrections[name] = planner.correction(way.options, *sizes, rates, memory)
                ways[name] = planner.estimate(
                    way.options, way.pairs, way.accumulation, max_length, devices, rates,
                    corrections[name],
                )  # fmt: skip
                advance(1)
        asked = ways[method]
        fitting = [way for way in ways.values() if way.fits(memory)]
        chosen = fitting[0] if fitting else None
        plan = TrainingPlan(memory, chosen, asked, ways, rates=rates)
        plan.probed = all(corrections.values()) if corrections else False
        plan.weights = count_weights(config, (chosen or asked).options)[:2]
        if why_oom and not asked.fits(memory):
            plan.changes = _changes(planner, asked, devices, rates, corrections.get(method))
        for device in DEVICES if table else ():
            found = _for_device(planner, device, base, batch_size, max_length)
            plan.table.append((device, found))
            advance(1)
    return plan


def _of(options: StepOptions, method: str) -> StepOptions:
    if method == "full":
        reference = "precompute" if options.reference == "adapter" else options.reference
        return replace(options, method=method, reference=reference)
    if options.bf16:  # `fastpref train` loads weights that do not train in bf16 then
        options = replace(options, dtype=torch.bfloat16, bf16=False)
    return replace(options, method=method, reference="adapter")


def _for_device(
    planner: Planner, device: Device, base: StepOptions, batch_size: int, max_length: int
) -> Estimate | None:
    """The first method that fits a device, the one that trains the most weights first."""
    device_planner = Planner(
        planner.config, planner.lengths, "cuda" if device.kind == "gpu" else "cpu"
    )
    device_planner._parts = planner._parts
    half = device.kind == "gpu"
    for method in ("full", "lora", "qlora"):
        if method == "qlora" and device.kind == "cpu":
            continue
        options = replace(
            base, bf16=half, device=device_planner.kind, memory_budget=device.memory // 16
        )
        options = _of(options, method)
        estimate = device_planner.largest(
            options, batch_size, max_length, device.memory, 1, device.rates(options.item == 2)
        )
        if estimate.fits(device.memory):
            return estimate
    return None


def _changes(
    planner: Planner,
    asked: Estimate,
    devices: int,
    rates: Rates | None,
    correction: StepTime | None,
) -> list[tuple[str, Estimate]]:
    """Single changes with the estimates after them, the most bytes saved first."""
    options = asked.options
    candidates: list[tuple[str, StepOptions, int, int, int]] = []
    size, length = asked.pairs, asked.max_length
    per_step = asked.pairs * asked.accumulation * devices

    def add(text: str, **changes: Any) -> None:
        other = replace(options, **changes.pop("options", {}))
        candidates.append(
            (
                text,
                other,
                changes.get("size", size),
                changes.get("length", length),
                changes.get("devices", devices),
            )
        )

    if devices > 1 and per_step > devices and not options.sync_each_batch:
        text = "1 pair a micro-batch, gradients exchanged after each (sync_each_batch)"
        add(text, size=1, options={"sync_each_batch": True})
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
        if not options.bf16:
            add("LoRA instead of all weights", options=lora)
        if options.dtype == torch.float32:
            narrow = {**lora, "dtype": torch.bfloat16, "bf16": False}
            add("LoRA over weights in bf16", options=narrow)
    elif options.dtype == torch.float32:
        add("weights in bf16", options={"dtype": torch.bfloat16})
    if options.method != "qlora" and planner.kind == "cuda":
        qlora = {
            "method": "qlora", "reference": "adapter", "dtype": torch.bfloat16, "bf16": False
        }  # fmt: skip
        add("QLoRA: weights of 4 bits under an adapter", options=qlora)
    if planner.kind == "cuda":
        twice = size if asked.accumulation % 2 == 0 else max(size // 2, 1)
        text = f"{2 * devices} GPUs that share the weights"
        if per_step % (2 * devices):
            text += f", {2 * devices} pairs or more a step"
        add(text, devices=2 * devices, size=twice)
    estimates = []
    for text, other, n, cut, count in candidates:
        accumulation = max(per_step // (n * count), 1)
        # Links of fewer devices, or rates of another dtype, say nothing about this one.
        same = count == devices and other.dtype == options.dtype
        known = rates if same else None
        found = planner.estimate(other, n, accumulation, cut, count, known, correction)
        estimates.append((text, found))
    estimates = [(text, estimate) for text, estimate in estimates if estimate.bytes < asked.bytes]
    return sorted(estimates, key=lambda change: change[1].bytes)


def length_facts(lengths: Lengths) -> dict[str, int]:
    """Percentiles of the tokens of the data's longer sequences."""
    values: Sequence[float] = np.percentile(lengths.longest, [50, 90, 99, 100])
    return {name: int(v) for name, v in zip(("p50", "p90", "p99", "max"), values, strict=True)}
