"""`probe_steps`: seconds of a step on this CPU, from real steps of a model with few layers.

config -> two models with a few of its layers and random weights
     -> each trains on micro-batches of the given lengths, as `fastpref profile` has it train
     -> seconds by phase, which are linear in the number of layers
     -> `StepTime` of each micro-batch with all layers

No rate of products, memory or calls is needed. A layer is measured at the model's own shapes, with
the autograd engine, the allocator and the caches as they are in training.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import random
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from fastpref.planning.counts import batch_tokens
from fastpref.planning.model import StepOptions, check_config, silent, with_layers
from fastpref.planning.simulate import Pair
from fastpref.planning.times import StepTime
from fastpref.profiling.account import PHASES
from fastpref.profiling.phases import StepClock
from fastpref.profiling.sides import make_trainer
from fastpref.progress import silenced

_PHASES = (*PHASES, "other")
_OF_LAYERS = ("reference", "body forward", "body backward", "optimiser")
ROUNDS = 3  # of the micro-batches, after one that warms up


def probe_layers(config: Any) -> tuple[int, int] | None:
    """How many layers the two models have; None: two such models would not show what a layer costs.

    They differ by a whole period of the kinds of attention. None if that takes all layers, or if
    experts and dense layers alternate beyond a first dense layer.
    """
    text = config.get_text_config()
    mlp = list(getattr(text, "mlp_layer_types", None) or [])
    dense = getattr(text, "first_k_dense_replace", None) or 0
    step = getattr(text, "decoder_sparse_step", None) or 1
    if len(set(mlp[1:])) > 1 or (not mlp and (dense > 1 or step > 1)):
        return None
    kinds = list(getattr(text, "layer_types", None) or [])
    period = 1
    while kinds[period:] != kinds[: max(len(kinds) - period, 0)]:
        period += 1
    few, more = 1, 1 + period
    return (few, more) if more < text.num_hidden_layers else None


def probe_steps(
    config: Any, batches: Sequence[Sequence[Pair]], options: StepOptions
) -> list[StepTime]:
    """The seconds of an optimiser step on each micro-batch, with torch's present threads.

    Args:
        config: a transformers config of a causal model.
        batches: the tokens of prompt, chosen and rejected answer of each pair of a micro-batch; all
            have as many pairs.
        options: how it is trained, on the CPU.

    Raises:
        ValueError: a config of something else than a causal model, or options that need a GPU.
    """
    check_config(config)
    if options.device != "cpu" or options.method == "qlora":
        raise ValueError(
            f"options: got device {options.device!r} and method {options.method!r}, expected "
            "'cpu' and 'full' or 'lora'"
        )
    layers = config.get_text_config().num_hidden_layers
    sizes = probe_layers(config)
    if sizes is None:
        return [_step_time(step) for step in _measure(config, batches, options)]
    few, more = sizes
    small, large = (_measure(with_layers(config, n), batches, options) for n in sizes)
    factor = (layers - few) / (more - few)
    return [
        _step_time(
            {
                phase: a[phase] + factor * max(b[phase] - a[phase], 0.0)
                if phase in _OF_LAYERS
                else (a[phase] + b[phase]) / 2
                for phase in _PHASES
            }
        )
        for a, b in zip(small, large, strict=True)
    ]


def _step_time(phases: dict[str, float]) -> StepTime:
    return StepTime(
        phases["reference"] + phases["body forward"],
        phases["head"],
        phases["body backward"],
        phases["optimiser"],
        phases["data"] + phases["other"],
    )


def _measure(
    config: Any, batches: Sequence[Sequence[Pair]], options: StepOptions
) -> list[dict[str, float]]:
    """For each micro-batch the seconds of each phase, of real steps: the least of the rounds.

    On a busy machine most steps are slower.
    """
    longest = max(batches, key=lambda batch: batch_tokens(batch, sharing=False))
    order = [longest, *(batch for _ in range(ROUNDS) for batch in batches)]
    rows = _rows([pair for batch in order for pair in batch], config, options)
    from transformers import PrinterCallback

    clock = StepClock()
    with _undisturbed(), tempfile.TemporaryDirectory() as out:
        trainer = make_trainer(options.head, _request(config, options, order), rows, out)
        trainer.remove_callback(PrinterCallback)
        clock.attach(trainer)
        trainer.train()
    steps = clock.steps[1:]
    return [
        {p: min(s.get(p, 0.0) for s in steps[i :: len(batches)]) for p in _PHASES}
        for i in range(len(batches))
    ]


def _request(config: Any, options: StepOptions, order: Sequence[Sequence[Pair]]) -> dict[str, Any]:
    """The options of a trainer, as `make_trainer` reads them."""
    lora = {"r": options.lora_r, "lora_alpha": 32, "target_modules": "all-linear"}
    return {
        "model": _random_model(config, options),
        "loss": {"loss_type": "sigmoid", "beta": 0.1},
        "batch_size": len(order[0]),
        "grad_accumulation": 1,
        "max_length": max(p + max(c, r) for batch in order for p, c, r in batch),
        "steps": len(order),
        "reference": "model" if options.reference == "model" else "data",
        "lora": lora if options.method == "lora" else None,
        "bf16": options.bf16,
        "dtype": None,
        "gradient_checkpointing": options.gradient_checkpointing,
        "optim": None,
        "learning_rate": 1e-6,
        "seed": 0,
        "trust_remote_code": False,
        "device": "cpu",
        "prefix_sharing": options.prefix_sharing,
        "head_strategy": options.head_strategy,
        "head_memory_budget": options.memory_budget,
    }


def _random_model(config: Any, options: StepOptions) -> Any:
    from transformers import AutoModelForCausalLM

    config = copy.deepcopy(config)
    config._name_or_path = ""  # whose tokenizer is not needed
    remote_code = {"trust_remote_code": type(config).__module__.startswith("transformers_modules.")}
    model: Any = AutoModelForCausalLM.from_config(config, dtype=options.dtype, **remote_code)
    return model


def _rows(pairs: Sequence[Pair], config: Any, options: StepOptions) -> list[dict[str, Any]]:
    """Tokenised pairs of these lengths, with any tokens."""
    draw = random.Random(0)
    vocab = config.get_text_config().vocab_size

    def tokens(count: int) -> list[int]:
        return draw.choices(range(vocab), k=count)

    rows: list[dict[str, Any]] = []
    for prompt, chosen, rejected in pairs:
        row: dict[str, Any] = {
            "prompt_ids": tokens(prompt),
            "chosen_ids": tokens(chosen),
            "rejected_ids": tokens(rejected),
        }
        if options.reference == "precompute":
            row |= {"ref_chosen_logps": -1.0 * chosen, "ref_rejected_logps": -1.0 * rejected}
        rows.append(row)
    return rows


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """Neither the random numbers nor the log of the caller see the probe's training."""
    import datasets

    logger = logging.getLogger("fastpref")
    drawn, drawn_by_numpy = random.getstate(), np.random.get_state()
    before, bars = logger.level, not datasets.are_progress_bars_disabled()
    logger.setLevel(logging.CRITICAL)
    datasets.disable_progress_bars()
    try:
        with torch.random.fork_rng(devices=[]), silent(), silenced(True):
            yield
    finally:
        random.setstate(drawn)
        np.random.set_state(drawn_by_numpy)
        logger.setLevel(before)
        if bars:
            datasets.enable_progress_bars()
