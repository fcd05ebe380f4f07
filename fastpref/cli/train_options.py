"""The options of `fastpref train` as one object, and their checks."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any


class Precision(str, Enum):
    exact = "exact"
    fast = "fast"


class CpuLinear(str, Enum):
    auto = "auto"
    native = "native"
    torch = "torch"


class Reference(str, Enum):
    auto = "auto"
    model = "model"
    adapter = "adapter"
    precompute = "precompute"
    columns = "columns"


class PrefixSharing(str, Enum):
    auto = "auto"
    on = "on"
    off = "off"

    @property
    def value_of_config(self) -> str | bool:
        return "auto" if self is PrefixSharing.auto else self is PrefixSharing.on


@dataclass(frozen=True)
class TrainOptions:
    """The options of `fastpref train`, with its defaults; see its help."""

    model: str
    data: str
    loss: str = "dpo"
    loss_option: list[str] | None = None
    output: Path = Path("fastpref-output")
    lora: bool = False
    lora_r: int | None = None
    lora_alpha: int | None = None
    lora_targets: str | None = None
    eval_data: str | None = None
    eval_split: float = 0.0
    eval_steps: int | None = None
    beta: float = 0.1
    lr: float | None = None
    epochs: float = 1.0
    max_steps: int = -1
    batch_size: int = 4
    grad_accumulation: int = 1
    max_length: int = 1024
    precision: Precision = Precision.exact
    bf16: bool | None = None
    cpu_linear: CpuLinear = CpuLinear.auto
    gradient_tolerance: float | None = None
    head_gradient_tolerance: float | None = None
    reference: Reference = Reference.auto
    reference_store: Path | None = None
    gradient_checkpointing: bool = True
    prefix_sharing: PrefixSharing = PrefixSharing.auto
    packing: bool = False
    tokens_per_batch: int | None = None
    resume: str | None = None
    resume_anyway: bool = False
    overwrite: bool = False
    trust_remote_code: bool = False
    alarms: bool = True
    report: Path | None = None
    as_json: bool = False
    quiet: bool = False
    seed: int = 42
    logging_steps: int | None = None
    save_steps: int = 500

    def __post_init__(self) -> None:
        # A shell leaves the ~ of --output=~/run as it is.
        for name in ("output", "reference_store", "report"):
            if (path := getattr(self, name)) is not None:
                object.__setattr__(self, name, path.expanduser())

    @property
    def adapter(self) -> dict[str, Any]:
        """The options that shape a new adapter."""
        return {
            "--lora-r": self.lora_r,
            "--lora-alpha": self.lora_alpha,
            "--lora-targets": self.lora_targets,
        }

    def rows(self, unpaired: bool) -> dict[str, Any]:
        """The options of a configuration that concern the rows of batches.

        Raises:
            ValueError: an option without effect.
        """
        if unpaired and self.prefix_sharing is PrefixSharing.on:
            raise ValueError(
                f"--prefix-sharing would do nothing with --loss {self.loss}, whose rows are single "
                "answers; leave it out"
            )
        if self.tokens_per_batch is not None and not self.packing:
            raise ValueError("--tokens-per-batch would do nothing; add --packing")
        settings: dict[str, Any] = {
            "packing": self.packing,
            "tokens_per_batch": self.tokens_per_batch,
        }
        if not unpaired:
            settings["prefix_sharing"] = self.prefix_sharing.value_of_config
        return settings


def check_options(options: TrainOptions, unused: list[str]) -> None:
    """Raise ValueError for options that are out of range or would have no effect.

    unused: the options of a new adapter that were passed without --lora.
    """
    max_steps = options.max_steps
    if max_steps < 1 and max_steps != -1:
        raise ValueError(f"--max-steps is {max_steps}; expected at least 1, or -1 for all epochs")
    if not 0 < options.epochs < math.inf:
        raise ValueError(f"--epochs is {options.epochs:g}; expected a finite number above 0")
    if not 0 <= (options.lr or 0.0) < math.inf:
        raise ValueError(f"--lr is {options.lr:g}; expected a finite number of at least 0")
    if not 0 <= options.seed < 2**32:
        raise ValueError(f"--seed is {options.seed}; expected 0 to {2**32 - 1}")
    if unused:
        raise ValueError(f"{' and '.join(unused)} would do nothing; add --lora")
    if options.resume is None and options.resume_anyway:
        raise ValueError("--resume-anyway would do nothing; add --resume")
    if options.resume not in (None, "auto") and options.overwrite:
        raise ValueError("--resume and --overwrite exclude each other; give one of them")
    if options.reference_store is not None and options.reference not in (
        Reference.auto,
        Reference.precompute,
    ):
        raise ValueError(
            f"--reference {options.reference.value} would not use --reference-store; give one of "
            "the two"
        )
    if options.eval_steps and options.eval_data is None and not options.eval_split:
        raise ValueError("--eval-steps needs held-out pairs; add --eval-data or --eval-split")
