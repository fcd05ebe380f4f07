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
    """The options of `fastpref train`; see its help."""

    model: str
    data: str
    loss: str
    loss_option: list[str] | None
    output: Path
    lora: bool
    lora_r: int | None
    lora_alpha: int | None
    lora_targets: str | None
    eval_data: str | None
    eval_split: float
    eval_steps: int | None
    beta: float
    lr: float | None
    epochs: float
    max_steps: int
    batch_size: int
    grad_accumulation: int
    max_length: int
    precision: Precision
    bf16: bool | None
    cpu_linear: CpuLinear
    gradient_tolerance: float | None
    head_gradient_tolerance: float | None
    reference: Reference
    reference_store: Path | None
    gradient_checkpointing: bool
    prefix_sharing: PrefixSharing
    packing: bool
    tokens_per_batch: int | None
    resume: str | None
    resume_anyway: bool
    overwrite: bool
    trust_remote_code: bool
    alarms: bool
    report: Path | None
    as_json: bool
    quiet: bool
    seed: int
    logging_steps: int | None
    save_steps: int

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
        """The options of a configuration that concern the rows of pairs.

        Raises:
            ValueError: an option that a loss of single answers does not have.
        """
        chosen = {
            "--prefix-sharing": self.prefix_sharing is PrefixSharing.on,
            "--packing": self.packing,
            "--tokens-per-batch": self.tokens_per_batch is not None,
        }
        unused = [name for name, is_set in chosen.items() if is_set]
        if unpaired and unused:
            raise ValueError(
                f"{' and '.join(unused)} would do nothing with --loss {self.loss}, whose rows are "
                "single answers; leave it out"
            )
        if unpaired:
            return {}
        if self.tokens_per_batch is not None and not self.packing:
            raise ValueError("--tokens-per-batch would do nothing; add --packing")
        return {
            "prefix_sharing": self.prefix_sharing.value_of_config,
            "packing": self.packing,
            "tokens_per_batch": self.tokens_per_batch,
        }


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
