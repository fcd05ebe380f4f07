"""`fastpref train`: the options of the command. train_run.py has the run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fastpref.cli.shared_options import (
    BatchSize,
    Beta,
    Bf16,
    Data,
    LinearProduct,
    LogitsPrecision,
    Loss,
    LossOptions,
    MaxLength,
    TrustRemoteCode,
)
from fastpref.cli.train_options import (
    CpuLinear,
    Precision,
    PrefixSharing,
    Reference,
    TrainOptions,
)
from fastpref.cli.train_run import run


def command(
    model: Annotated[
        str,
        typer.Option(
            help="Directory or hub name of a causal model, or of a LoRA adapter to train on."
        ),
    ],
    data: Data,
    loss: Loss = "dpo",
    loss_option: LossOptions = None,
    output: Annotated[
        Path, typer.Option(help="Where the model, checkpoints, log and plot go.")
    ] = Path("fastpref-output"),
    lora: Annotated[bool, typer.Option("--lora", help="Train a LoRA adapter only.")] = False,
    lora_r: Annotated[
        int | None, typer.Option(min=1, help="Rank of the adapter; by default 16.")
    ] = None,
    lora_alpha: Annotated[
        int | None, typer.Option(min=1, help="Scale of the adapter; by default 32.")
    ] = None,
    lora_targets: Annotated[
        str | None, typer.Option(help="Comma-separated modules; by default all-linear.")
    ] = None,
    eval_data: Annotated[str | None, typer.Option(help="Held-out pairs.")] = None,
    eval_split: Annotated[
        float, typer.Option(min=0.0, max=0.9, help="Hold out this fraction of the data instead.")
    ] = 0.0,
    eval_steps: Annotated[
        int | None,
        typer.Option(min=1, help="Evaluate every so many steps; at the end in any case."),
    ] = None,
    beta: Beta = 0.1,
    lr: Annotated[
        float | None, typer.Option(help="Learning rate; by default 1e-6, with --lora 1e-5.")
    ] = None,
    epochs: Annotated[float, typer.Option(help="Passes over the data.")] = 1.0,
    max_steps: Annotated[int, typer.Option(help="Stop after so many steps; -1: epochs.")] = -1,
    batch_size: BatchSize = 4,
    grad_accumulation: Annotated[int, typer.Option(min=1, help="Batches per optimiser step.")] = 1,
    max_length: MaxLength = 1024,
    precision: LogitsPrecision = Precision.exact,
    bf16: Bf16 = None,
    cpu_linear: LinearProduct = CpuLinear.auto,
    gradient_tolerance: Annotated[
        float | None,
        typer.Option(
            help="Relative error that the head's gradient of the hidden states may have, such as "
            "0.0015, for speed; by default it is exact."
        ),
    ] = None,
    head_gradient_tolerance: Annotated[
        float | None,
        typer.Option(help="The same for the gradient of the head's weight; by default exact."),
    ] = None,
    reference: Annotated[
        Reference,
        typer.Option(
            help="Where reference log-probs come from: a second model, the model with its adapter "
            "off (or as it is now, if --model is one), a pass before training, or columns of the "
            "data. auto: columns where the data has them, else adapter with LoRA, else precompute."
        ),
    ] = Reference.auto,
    reference_store: Annotated[
        Path | None,
        typer.Option(
            help="Directory that keeps reference log-probs for other runs: read, checked and "
            "extended by what it lacks. `fastpref precompute` fills one ahead."
        ),
    ] = None,
    gradient_checkpointing: Annotated[
        bool, typer.Option(help="Recompute activations: less memory, slower.")
    ] = True,
    prefix_sharing: Annotated[
        PrefixSharing,
        typer.Option(
            help="Compute the prompt of a pair once instead of twice; auto: where prompts are long "
            "enough and the model allows it."
        ),
    ] = PrefixSharing.auto,
    packing: Annotated[
        bool, typer.Option("--packing", help="Put the answers of a batch into one row, unpadded.")
    ] = False,
    tokens_per_batch: Annotated[
        int | None,
        typer.Option(
            min=1, help="With --packing: compute a batch of more tokens in several passes."
        ),
    ] = None,
    resume: Annotated[
        str | None,
        typer.Option(
            help="Continue from this checkpoint directory, or from the newest complete one of "
            "--output: 'latest', or 'auto', which starts a new run if there is none."
        ),
    ] = None,
    resume_anyway: Annotated[
        bool,
        typer.Option(
            "--resume-anyway",
            help="Continue also with other data, loss, seed or adapter than the checkpoint's.",
        ),
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Remove what another run has left in --output.")
    ] = False,
    trust_remote_code: TrustRemoteCode = False,
    alarms: Annotated[
        bool,
        typer.Option(
            help="Warn of a run that goes wrong without failing: displacement, margins from "
            "length, weights that do not move."
        ),
    ] = True,
    report: Annotated[
        Path | None,
        typer.Option(help="Write an HTML page about the run here, with its curves and alarms."),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one line of JSON for each event, and no text.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print nothing but errors.")] = False,
    seed: Annotated[int, typer.Option(help="Seed of everything random.")] = 42,
    logging_steps: Annotated[
        int | None,
        typer.Option(
            min=1, help="Steps between two log points; by default at least 50 points, 1 to 10."
        ),
    ] = None,
    save_steps: Annotated[
        int, typer.Option(min=0, help="Steps between two checkpoints; 0 saves at the end only.")
    ] = 500,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
) -> None:
    """Train a model on preferences with DPO, IPO, KTO or another loss."""
    options = dict(locals())
    del options["debug"]  # read by the wrapper around commands
    run(TrainOptions(**options))
