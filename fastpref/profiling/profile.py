"""`profile_training`: a few real steps of each side, each in a process of its own.

data -> lengths of all pairs -> the pairs of a profile: short ones to warm up, evenly spread ones
     that are timed, the longest ones for the memory
     -> for each side a process (worker.py) -> its phases and its account
     -> `Profile`
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fastpref.backends.huge_pages import TORCH_SETTING
from fastpref.backends.processor import bf16_is_fast, training_device
from fastpref.profiling.account import PHASES
from fastpref.profiling.lengths import Lengths, token_lengths
from fastpref.profiling.processes import Child
from fastpref.storage import check_writable

_SIDES = ("fastpref", "eager", "trl", "liger")
MOST_STEPS = 10_000  # whose rows all go to the process of a side
_WORKER = [sys.executable, "-m", "fastpref.profiling.worker"]
ROWS = 20_000  # of the data whose tokens are counted


@dataclass
class SideProfile:
    """The time and the memory of one side.

    Attributes:
        name: "fastpref", "eager", "trl" or "liger".
        missing: why it was not measured; None if it was.
        step_seconds: median of the timed steps.
        phases: the median step's seconds of each of `PHASES`.
        longest_step_seconds: seconds of the step on the longest pairs, while it is watched.
        peak_bytes: the most memory in that step: resident in the process on a CPU, allocated on a
            GPU. None where the system does not tell.
        tensor_bytes: the most bytes of tensors.
        peak_phase: the phase in which the tensors' peak was.
        components: bytes at the peak, by name.
        unaccounted_bytes: peak_bytes less the components.
        reserved_bytes: the most that torch's allocator held of a GPU's memory, with what was free
            in it; None on a CPU.
        timeline: (milliseconds, bytes of each component) during that step.
    """

    name: str
    missing: str | None = None
    step_seconds: float | None = None
    phases: dict[str, float] = field(default_factory=dict)
    setup_seconds: float | None = None
    longest_step_seconds: float | None = None
    peak_bytes: int | None = None
    tensor_bytes: int | None = None
    peak_phase: str | None = None
    components: dict[str, int] = field(default_factory=dict)
    unaccounted_bytes: int | None = None
    reserved_bytes: int | None = None
    timeline: list[tuple[float, dict[str, int]]] = field(default_factory=list)


@dataclass
class Profile:
    """The result of `profile_training`: its settings, its batches and its sides.

    Attributes:
        settings: the options of the training.
        batches: tokens of the timed batches and of the longest one.
        sides: a `SideProfile` each.
    """

    settings: dict[str, Any]
    batches: dict[str, Any]
    sides: list[SideProfile]

    def side(self, name: str) -> SideProfile:
        """The side of that name. Raises KeyError."""
        for side in self.sides:
            if side.name == name:
                return side
        raise KeyError(name)

    def as_dict(self) -> dict[str, Any]:
        """The attributes, as values for JSON."""
        return asdict(self)


def profile_training(
    model: str,
    data: Any,
    *,
    tokenizer: Any = None,
    sides: Sequence[str] | None = None,
    loss_type: str | list[str] = "sigmoid",
    beta: float = 0.1,
    loss_options: Mapping[str, Any] | None = None,
    batch_size: int = 2,
    grad_accumulation: int = 1,
    max_length: int = 512,
    steps: int = 2,
    reference: str = "auto",
    lora: Mapping[str, Any] | None = None,
    bf16: bool | None = None,
    dtype: str = "float32",
    gradient_checkpointing: bool = True,
    optim: str | None = None,
    seed: int = 42,
    trust_remote_code: bool = False,
    options: Mapping[str, Any] | None = None,
    snapshots: str | Path | None = None,
    hear: Callable[[str, dict[str, Any]], None] | None = None,
) -> Profile:
    """Measure memory by component and time by phase of a few training steps.

    Args:
        model: directory or hub name of a causal model.
        data: pairs, as `load_preference_data` reads them.
        tokenizer: what counts the tokens; by default that of the model.
        sides: of "fastpref", "eager", "trl" and "liger"; None: all whose packages are installed.
        loss_type, beta, loss_options: as in `PreferenceConfig`.
        batch_size, grad_accumulation: pairs of a micro-batch, and micro-batches of a step.
        max_length: tokens of prompt and answer at which they are cut.
        steps: timed steps of each side, after one that warms up.
        reference: "precompute", "model", "adapter", or "auto": precompute, with LoRA adapter. A
            precomputation is not part of a step.
        lora: arguments of `peft.LoraConfig`; None trains all weights.
        bf16: as in `PreferenceConfig`.
        dtype: the weights' dtype.
        gradient_checkpointing, optim, seed: as in `TrainingArguments`.
        trust_remote_code: whether code that the model brings along runs.
        options: further options of fastpref's own trainer, such as precision or prefix_sharing.
        snapshots: a directory for the history of each side's allocations on a GPU, in the step on
            the longest pairs: SIDE.pickle, which https://pytorch.org/memory_viz shows.
        hear: called with a side's name and its messages: {"stage": ...}, {"step": ..., "of": ...}.

    Returns:
        A `Profile`.

    Raises:
        ValueError: bad data, an unknown option, or a model that no side can load.
        RuntimeError: no side could be measured for another reason.
    """
    from fastpref.profiling.sides import unavailable_side

    names = list(dict.fromkeys(_SIDES if sides is None else sides))
    if not names:
        raise ValueError(f"sides: got none, expected some of {', '.join(_SIDES)}")
    if unknown := set(names) - set(_SIDES):
        raise ValueError(
            f"sides: got {', '.join(sorted(unknown))}, expected some of {', '.join(_SIDES)}"
        )
    reasons = [f"{name}: {why}" for name in names if (why := unavailable_side(name)) is not None]
    if len(reasons) == len(names):
        raise ValueError(f"sides: none of them can run here: {'; '.join(reasons)}")
    sizes = {"steps": steps, "batch_size": batch_size, "grad_accumulation": grad_accumulation}
    for name, value in sizes.items():
        if value < 1:
            raise ValueError(f"{name}: got {value}, expected at least 1")
    if steps > MOST_STEPS:
        raise ValueError(f"steps: got {steps}, expected at most {MOST_STEPS}")
    for name, given, expected in (
        ("dtype", dtype, ("float32", "bfloat16", "float16")),
        ("reference", reference, ("auto", "precompute", "model", "adapter")),
    ):
        if given not in expected:
            raise ValueError(f"{name}: got {given!r}, expected one of {', '.join(expected)}")
    if reference == "auto":
        reference = "precompute" if lora is None else "adapter"
    if (reference == "adapter") != (lora is not None):
        raise ValueError(
            f"reference: got {reference!r} {'without' if lora is None else 'with'} an adapter, "
            f"expected {'precompute or model' if lora is None else 'adapter'}"
        )
    device = training_device()
    folder = None if snapshots is None else Path(snapshots).expanduser().absolute()
    if folder is not None:
        if device != "cuda":
            raise ValueError(
                f"snapshots: got a directory, but training is on a {device}, of which torch keeps "
                "no history; expected None"
            )
        check_writable(folder)
    settings: dict[str, Any] = {
        **(options or {}),
        "model": str(model),
        "loss": {"loss_type": loss_type, "beta": beta, **(loss_options or {})},
        "batch_size": batch_size,
        "grad_accumulation": grad_accumulation,
        "max_length": max_length,
        "reference": reference,
        "lora": None if lora is None else dict(lora),
        "bf16": bf16_is_fast(device) if bf16 is None else bf16,
        "dtype": dtype,
        "gradient_checkpointing": gradient_checkpointing,
        "optim": optim,
        "learning_rate": 1e-6,
        "seed": seed,
        "trust_remote_code": trust_remote_code,
        "device": device,
    }
    rows, batches = choose_rows(model, data, settings, steps, tokenizer)
    measured = [_measure(name, settings, rows, steps + 2, hear, folder) for name in names]
    profiles = [side for side, _ in measured]
    if all(side.missing for side in profiles):
        of_input = all(of_input for _, of_input in measured)
        text = "; ".join(f"{side.name}: {side.missing}" for side in profiles)
        raise (ValueError if of_input else RuntimeError)(f"nothing could be measured: {text}")
    return Profile(settings, batches, profiles)


def choose_rows(
    model: str, data: Any, settings: dict[str, Any], steps: int, tokenizer: Any = None
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The raw pairs in the order of training, and the tokens of their batches."""
    from transformers import AutoTokenizer

    from fastpref.data.files import load_preference_data

    dataset = load_preference_data(data)
    if tokenizer is None:
        tokenizer = AutoTokenizer.from_pretrained(
            model, trust_remote_code=settings["trust_remote_code"]
        )
    lengths = token_lengths(dataset, tokenizer, settings["max_length"], ROWS)
    per_step = settings["batch_size"] * settings["grad_accumulation"]
    order = np.argsort(lengths.longest, kind="stable")
    if len(order) < per_step:
        raise ValueError(
            f"the data has {len(order)} usable pairs; expected at least the {per_step} of a step "
            "(batch_size times grad_accumulation)"
        )
    spread = np.linspace(0, len(order) - 1, steps * per_step).astype(int)
    # Every timed step has short pairs and long ones.
    timed = order[spread].reshape(per_step, steps).T.reshape(-1)
    longest = order[::-1][:per_step]
    picked = np.concatenate([order[:per_step], timed, longest])
    names = [name for name in dataset.column_names if not name.startswith("ref_")]
    chosen = dataset.select_columns(names).select(lengths.row[picked])
    batches = {
        "timed": _batch_facts(lengths.picked(timed), settings["batch_size"]),
        "longest": _batch_facts(lengths.picked(longest), settings["batch_size"]),
        "pairs": len(order),
    }
    return [dict(row) for row in chosen], batches


def _batch_facts(lengths: Lengths, size: int) -> list[dict[str, Any]]:
    """For each micro-batch: pairs, the padded length, tokens without padding, labelled tokens, and
    the lengths of each pair's prompt and answers."""
    out = []
    for start in range(0, len(lengths.row), size):
        part = lengths.picked(slice(start, start + size))
        out.append(
            {
                "pairs": len(part.row),
                "padded_length": int(part.longest.max()),
                "tokens": int((2 * part.prompt + part.labelled).sum()),
                "shared_tokens": int((part.prompt + part.labelled).sum()),
                "labelled": int(part.labelled.sum()),
                "lengths": np.stack(part[:3], 1).tolist(),
            }
        )
    return out


def training_environment() -> dict[str, str]:
    """The variables of a process in which a training is measured: quiet, and the huge pages of
    `fastpref train`."""
    return {
        "TQDM_DISABLE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "KINETO_LOG_LEVEL": "5",
        TORCH_SETTING: os.environ.get(TORCH_SETTING, "1"),
    }


def _measure(
    name: str,
    settings: dict[str, Any],
    rows: list[dict[str, Any]],
    steps: int,
    hear: Callable[[str, dict[str, Any]], None] | None,
    snapshots: Path | None,
) -> tuple[SideProfile, bool]:
    """The side, and whether it is missing because of the input."""
    from fastpref.profiling.sides import unavailable_side

    reason = unavailable_side(name)
    if reason is not None:
        return SideProfile(name, missing=reason), True
    # Columns that no trainer reads may hold dates or bytes, which JSON has as texts.
    rows = json.loads(json.dumps(rows, default=str))
    request = {**settings, "side": name, "rows": rows, "steps": steps}
    if snapshots is not None:
        file = snapshots / f"{name}.pickle"
        file.unlink(missing_ok=True)
        request["snapshot"] = str(file)
    root = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    with tempfile.TemporaryDirectory() as folder:  # here: the worker may be killed
        request["folder"] = folder
        # A module in the user's directory, such as random.py, does not replace a library's.
        environment = {**training_environment(), "PYTHONSAFEPATH": "1", "PYTHONPATH": path}
        child = Child(_WORKER, request, environment, loud=False)
        try:
            while (message := child.hear()) is not None:
                if "failed" in message:
                    return SideProfile(name, missing=message["failed"]), message["input"]
                if "result" in message:
                    return _side(name, message["result"]), False
                if hear is not None:
                    hear(name, message)
            return SideProfile(name, missing=child.ending()), False
        finally:
            child.stop()


def _side(name: str, result: dict[str, Any]) -> SideProfile:
    steps = result.pop("steps")
    totals = [sum(step.values()) for step in steps]
    phases = {p: statistics.median(step.get(p, 0.0) for step in steps) for p in PHASES}
    result["timeline"] = [(time, sizes) for time, sizes in result["timeline"]]
    return SideProfile(name, step_seconds=statistics.median(totals), phases=phases, **result)
