"""The memory and the seconds of one configuration, and the largest micro-batch that fits.

options, pairs of the data -> the longest pairs, simulated -> bytes by component (simulate.py)
                           -> evenly spread pairs -> seconds by the device's rates (times.py),
                              multiplied by the correction that a probe measured (probe.py)
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from fastpref.planning.model import StepOptions, with_layers
from fastpref.planning.probe import ROUNDS, probe_layers, probe_steps
from fastpref.planning.sharding import sharded_bytes, shared_seconds
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

# Fraction of the predicted bytes of tensors. The real steps of benchmarks/results/plan.json are
# closer.
MEMORY_UNCERTAINTY = 0.10
# Fraction of the predicted bytes that must stay free for a plan to fit. It is larger on a CPU,
# where the bytes that malloc keeps are an estimate.
MARGIN = {"cpu": 0.20, "cuda": 0.10}
# Resident bytes besides tensors: the interpreter and its libraries, or a GPU's context.
OUTSIDE = {"cpu": 590 * 2**20, "cuda": 900 * 2**20}
# What the allocator holds beyond live tensors: bytes of any step, and a share of those that come
# and go in it. A CPU's were chosen after the trainings of benchmarks/plan.py and two profiles of
# SmolLM2-135M with torch's setting of huge pages, as `fastpref train` has it. Without that setting
# malloc's heap has holes of several times its size.
KEPT_ALWAYS = {"cpu": 60 * 10**6, "cuda": 0}
KEPT = {"cpu": 0.5, "cuda": 0.1}
_PASSING = ("gradients", "activations", "head", "reference", "other")
_LARGEST = 32  # the most pairs of a micro-batch that are tried
# Predicted seconds of a probe's steps. Micro-batches are added up to the first limit. A probe that
# would take more than the second is not run.
_PROBE_SECONDS, _MOST_SECONDS = 8.0, 60.0


@dataclass
class Estimate:
    """The memory and the time of one configuration.

    Attributes:
        options: how it is trained.
        pairs: of a micro-batch.
        accumulation: micro-batches of a step, on each device.
        max_length: tokens of prompt and answer.
        devices: that share the pairs of a step, and over which weights, gradients and optimiser
            are sharded.
        components: bytes of each device at the peak: tensors by component, "allocator" (what it
            holds beyond them) and "libraries".
        seconds: of an optimiser step, by part, with the exchange of several devices; None without
            rates, or without the rate of the devices' links.
        head_strategy: how fastpref computes the head of the longest micro-batch; None: with logits.
    """

    options: StepOptions
    pairs: int
    accumulation: int
    max_length: int
    devices: int
    components: dict[str, int]
    peak_phase: str
    seconds: StepTime | None = None
    head_strategy: str | None = None

    @property
    def bytes(self) -> int:
        """Bytes of each device at the peak."""
        return sum(self.components.values())

    def fits(self, memory: int) -> bool:
        """Whether it fits with the uncertainty of the prediction."""
        return (1 + MARGIN[self.options.device]) * self.bytes <= memory

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
            "head_strategy": self.head_strategy,
            "seconds": seconds,
        }


def _labelled(pairs: list[Pair]) -> int:
    return sum(chosen + rejected for _, chosen, rejected in pairs)


def kept_bytes(kind: str, components: dict[str, int]) -> int:
    """The bytes that the allocator of "cpu" or "cuda" holds beyond live tensors at a peak."""
    passing = sum(components.get(name, 0) for name in _PASSING)
    return KEPT_ALWAYS[kind] + int(KEPT[kind] * passing)


def default_lengths(max_length: int) -> Lengths:
    """The lengths without data: max_length tokens in each sequence, a quarter of them prompt."""
    prompt = np.full(64, max_length // 4)
    answer = np.full(64, max_length - max_length // 4)
    return Lengths(prompt, answer, answer, np.arange(64))


class Planner:
    """Estimates of one model on one data set. The results of simulations are cached."""

    def __init__(self, config: Any, lengths: Lengths, kind: str) -> None:
        self.config, self.lengths, self.kind = config, lengths, kind
        self._parts: dict[Any, Parts] = {}
        self._corrections: dict[Any, StepTime | None] = {}

    def _pairs(self, lengths: Lengths, size: int, longest: bool) -> list[Pair]:
        order = np.argsort(lengths.longest, kind="stable")
        if longest:
            index = order[::-1][:size]
        else:
            index = order[np.linspace(0, len(order) - 1, size).astype(int)]
        rows = np.stack([lengths.prompt, lengths.chosen, lengths.rejected], 1)[index]
        pairs = [(int(p), int(c), int(r)) for p, c, r in rows]
        while len(pairs) < size:  # data of fewer pairs than a batch
            pairs.append(pairs[-1])
        return pairs

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
            parts = extrapolated(one, two, size - 1)
            surplus = self._stash_surplus(options, size, max_length)
            for components in parts.values() if surplus else ():
                components["head"] = max(components.get("head", 0) - surplus, 0)
            return parts
        pairs = self._pairs(self._cut(max_length), size, longest=True)
        options = replace(options, sync_each_batch=False)  # without effect on one device's tensors
        key: Any = options, size, max_length
        if options.head == "fastpref":  # many budgets give one plan of the head
            head = self._head(options, pairs)
            key = replace(options, memory_budget=None), head, size, max_length
        if key not in self._parts:
            self._parts[key] = simulate_parts(self.config, pairs, options)
        return self._parts[key]

    def _stash_surplus(self, options: StepOptions, size: int, max_length: int) -> int:
        """The bytes of logits that fewer pairs would keep, and so many pairs recompute instead."""
        if options.head != "fastpref":
            return 0
        cut = self._cut(max_length)
        few, many = (self._pairs(cut, n, longest=True) for n in (2, size))
        kept_by_few, kept = (self._head(options, pairs)[0].stash_tokens for pairs in (few, many))
        if kept_by_few < _labelled(few):
            return 0
        vocab: int = self.config.get_text_config().vocab_size
        return max(_labelled(many) - kept, 0) * vocab * options.item

    def _head(self, options: StepOptions, pairs: list[Pair]) -> Any:
        text = self.config.get_text_config()
        trains = options.method == "full"
        return step_head(_labelled(pairs), text.hidden_size, text.vocab_size, trains, options)

    def estimate(
        self,
        options: StepOptions,
        size: int,
        accumulation: int,
        max_length: int,
        devices: int = 1,
        rates: Rates | None = None,
        correction: StepTime | None = None,
    ) -> Estimate:
        """Memory and time of a configuration.

        correction: for each part of a step the factor on its seconds by rates; for the part
            "other" the seconds themselves.
        """
        options = replace(options, accumulates=accumulation > 1)
        parts = self._parts_with_gradients(options, size, max_length)
        weights = max(part.get("weights", 0) for part in parts.values())
        if devices > 1:
            parts = {k: sharded_bytes(self.config, c, options, devices) for k, c in parts.items()}
        account = highest(parts)
        components = {name: value for name, value in account.components.items() if value}
        components["allocator"] = kept_bytes(self.kind, components)
        components["libraries"] = OUTSIDE[self.kind]
        seconds = None
        if rates is not None and (devices == 1 or rates.link):
            seconds = self._seconds(options, size, accumulation, max_length, rates, correction)
            if devices > 1:
                seconds = shared_seconds(
                    self.config, seconds, options, weights, accumulation, devices, rates.link
                )
        strategy = None
        if options.head == "fastpref":
            pairs = self._pairs(self._cut(max_length), size, longest=True)
            strategy = self._head(options, pairs)[0].strategy
        return Estimate(
            options, size, accumulation, max_length, devices, components,
            account.peak_phase, seconds, strategy,
        )  # fmt: skip

    def _parts_with_gradients(self, options: StepOptions, size: int, max_length: int) -> Parts:
        """`parts`; an adapter's earlier gradients are added instead of simulated."""
        if not options.accumulates or options.method == "full":
            return self.parts(options, size, max_length)
        parts = self.parts(replace(options, accumulates=False), size, max_length)
        whole = max(components.get("gradients", 0) for components in parts.values())
        return {part: {**components, "gradients": whole} for part, components in parts.items()}

    def _seconds(
        self,
        options: StepOptions,
        size: int,
        accumulation: int,
        max_length: int,
        rates: Rates,
        correction: StepTime | None,
    ) -> StepTime:
        batches = self._micro_batches(size, max_length)
        steps = [step_seconds(self.config, batch, options, rates) for batch in batches]
        by = correction or StepTime(1.0, 1.0, 1.0, 1.0)

        def mean(name: str) -> float:
            return sum(getattr(step, name) for step in steps) / len(steps)

        return StepTime(
            accumulation * mean("body_forward") * by.body_forward,
            accumulation * mean("head") * by.head,
            accumulation * mean("body_backward") * by.body_backward,
            mean("optimiser") * by.optimiser,
            accumulation * by.other,
        )

    def _micro_batches(self, size: int, max_length: int) -> list[list[Pair]]:
        """Micro-batches of evenly spread pairs, those of middle length first."""
        pairs = self._pairs(self._cut(max_length), max(size, 8), longest=False)
        order = sorted(range(len(pairs)), key=lambda i: abs(i - len(pairs) // 2))
        pairs = [pairs[i] for i in order]
        return [pairs[i : i + size] for i in range(0, len(pairs) - size + 1, size)]

    def correction(
        self, options: StepOptions, size: int, max_length: int, rates: Rates, memory: int
    ) -> StepTime | None:
        """The correction of the rates, from a probe on this CPU; None if a probe is too large.

        memory: bytes, half of which the probe may take.
        """
        options = replace(options, accumulates=False, sync_each_batch=False)
        key = options, size, max_length
        if key not in self._corrections:
            self._corrections[key] = self._probed(options, size, max_length, rates, memory)
        return self._corrections[key]

    def _probed(
        self, options: StepOptions, size: int, max_length: int, rates: Rates, memory: int
    ) -> StepTime | None:
        batches = self._micro_batches(size, max_length)  # the first is the only one of a slow model
        layers = probe_layers(self.config) or (self._layers,)
        short = [with_layers(self.config, n) for n in layers]

        def cost(batch: list[Pair]) -> float:
            return (1 + ROUNDS) * sum(
                step_seconds(config, batch, options, rates).total for config in short
            )

        if cost(batches[0]) > _MOST_SECONDS:
            return None
        account = highest(simulate_parts(short[-1], batches[0], options))
        if 2 * account.peak_bytes > memory:
            return None
        while len(batches) > 1 and sum(map(cost, batches)) > _PROBE_SECONDS:
            batches.pop()
        measured = probe_steps(self.config, batches, options)
        predicted = [step_seconds(self.config, batch, options, rates) for batch in batches]

        def ratio(name: str) -> float:
            return sum(getattr(s, name) for s in measured) / sum(
                getattr(s, name) for s in predicted
            )

        return StepTime(
            ratio("body_forward"),
            ratio("head"),
            ratio("body_backward"),
            ratio("optimiser"),
            sum(s.other for s in measured) / len(measured),
        )

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
        """The largest micro-batch that fits and divides a step, or the one with the fewest bytes.

        Accumulated gradients take memory of their own, so that a larger micro-batch may need less.

        per_step: pairs of a step on each device.
        """
        sizes = [n for n in range(1, min(per_step, _LARGEST) + 1) if per_step % n == 0]
        estimates = [
            self.estimate(options, n, per_step // n, max_length, devices, rates) for n in sizes
        ]
        fitting = [estimate for estimate in estimates if estimate.fits(memory)]
        return fitting[-1] if fitting else min(estimates, key=lambda e: e.bytes)
