"""`fastpref precompute`: the reference's log-probabilities of a data set, written to a store."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from fastpref.cli.losses import LOSS_HELP
from fastpref.cli.shared_options import (
    BatchSize,
    Bf16,
    Data,
    LinearProduct,
    LogitsPrecision,
    MaxLength,
    TrustRemoteCode,
)
from fastpref.cli.train_options import CpuLinear, Precision, TrainOptions


def command(
    model: Annotated[
        str, typer.Option(help="Directory or hub name of the reference: a model or a LoRA adapter.")
    ],
    data: Data,
    reference_store: Annotated[
        Path, typer.Option(help="Directory of the store; it is made, or extended.")
    ],
    eval_data: Annotated[str | None, typer.Option(help="Held-out data.")] = None,
    loss: Annotated[
        str,
        typer.Option(
            help="The loss to be trained. All losses of pairs read the same log-probs; kto also "
            "needs those of mismatched answers, which depend on --batch-size. " + LOSS_HELP
        ),
    ] = "dpo",
    lora: Annotated[
        bool,
        typer.Option(
            "--lora", help="The training will be with --lora, which loads the model in bf16 there."
        ),
    ] = False,
    batch_size: BatchSize = 4,
    max_length: MaxLength = 1024,
    precision: LogitsPrecision = Precision.exact,
    bf16: Bf16 = None,
    cpu_linear: LinearProduct = CpuLinear.auto,
    trust_remote_code: TrustRemoteCode = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print nothing but errors.")] = False,
    seed: Annotated[
        int, typer.Option(help="That of the training, which shuffles single answers with it.")
    ] = 42,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
) -> None:
    """Compute the reference log-probs that `fastpref train --reference-store` reads.

    A run that was ended goes on where it was. Options that change the log-probs must be those of
    the training: --max-length, --precision, --bf16 or --fp32, --lora.
    """
    options = dict(locals())
    del options["debug"]  # read by the wrapper around commands
    run(TrainOptions(**options, output=reference_store, alarms=False))


def run(options: TrainOptions) -> None:
    """Make the trainer, which fills the store, and say what it holds."""
    from rich.markup import escape

    from fastpref.cli import report
    from fastpref.cli.progress import ProgressBar, RunConsole
    from fastpref.cli.train_run import (
        hide_library_bars,
        hide_library_warnings,
        load_trainer,
        make_config,
        make_plan,
        notes_on,
    )
    from fastpref.progress import lines_to, size_text

    first = os.environ.get("RANK", "0") == "0"
    console = RunConsole(highlight=False, quiet=options.quiet or not first)
    if not console.is_terminal or console.quiet:
        hide_library_bars()
    if options.quiet or not first:
        hide_library_warnings()
    plan = make_plan(options)
    if plan.loss.reference != "required":
        raise ValueError(f"--loss {options.loss} has no reference, so that nothing is computed")
    config = make_config(options, plan, not console.is_terminal or console.quiet)
    log = None if console.is_terminal or console.quiet else console.file
    with notes_on(console), lines_to(log), report.PeakMemory(plan.device):
        trainer: Any = load_trainer(options, plan, config, ProgressBar(console))
    store = trainer.reference_store
    size = sum(path.stat().st_size for path in (store.path / "parts").glob("*.parquet"))
    sets = {"training": plan.train_set, "held-out": plan.eval_set}
    rows = ", ".join(f"{len(data)} {name}" for name, data in sets.items() if data is not None)
    console.print(
        f"Reference log-probs of {rows} rows are in [bold]{escape(str(store.path))}[/bold] "
        f"({store.sequences} sequences, {size_text(size)})"
    )
