"""`fastpref check-data`: what is wrong with preference pairs, before they are trained on."""

from __future__ import annotations

import enum
import json
from pathlib import Path
from typing import Annotated, Any

import typer

from fastpref.cli import exit_codes

SHOWN_ROWS = 5


class FailOn(str, enum.Enum):
    """The least level of a finding that makes the exit status 6."""

    error = "error"
    warning = "warning"
    note = "note"
    never = "never"


def command(
    data: Annotated[
        str, typer.Argument(help="Preference pairs: .jsonl, .json, .csv, .parquet or a hub name.")
    ],
    model: Annotated[
        str | None,
        typer.Option(
            help="Directory or hub name of the model whose tokenizer is used; without "
            "one, the tokens are not checked."
        ),
    ] = None,
    eval_data: Annotated[
        str | None, typer.Option(help="Held-out pairs, looked at for rows of the data.")
    ] = None,
    max_length: Annotated[
        int, typer.Option(min=2, help="Tokens of prompt and answer at which training cuts.")
    ] = 1024,
    sample: Annotated[
        int, typer.Option(min=0, help="Rows that are tokenised, evenly spread; 0: all.")
    ] = 5_000,
    fix: Annotated[
        bool,
        typer.Option(
            "--fix",
            help="Write the data without empty, identical, repeated, "
            "contradictory and too long rows to NAME.clean.jsonl beside it.",
        ),
    ] = False,
    fail_on: Annotated[
        FailOn, typer.Option(help="The least level of a finding that makes the exit status 6.")
    ] = FailOn.error,
    as_json: Annotated[
        bool, typer.Option("--json", help="One JSON object with the numbers of all rows.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show a traceback on errors.")] = False,
) -> None:
    """Check preference pairs: repeats, contradictions, ends, templates, truncation, length bias.

    Rows are numbered from 0.
    """
    from fastpref.data import load_preference_data
    from fastpref.quality import check_data, write_fixed
    from fastpref.quality.fix import fixed_path

    path = fixed_path(data)
    if fix and not Path(data).is_file():
        raise ValueError(f"--fix: {data} is no file beside which the clean data could stand")
    pairs = load_preference_data(data)
    quality = check_data(
        pairs,
        None if model is None else _tokenizer(model),
        eval_data=eval_data,
        max_length=max_length,
        sample_rows=sample or None,
        show_progress=not as_json,
    )
    fixed = write_fixed(pairs, quality.findings, path) if fix else None
    if as_json:
        out = quality.as_dict()
        if fixed is not None:
            out["fixed"] = {"path": str(fixed[0]), "dropped": fixed[1]}
        typer.echo(json.dumps(out))
    else:
        _show(quality)
        if fixed is not None:
            typer.echo(f"{fixed[1]:,} rows left out of {fixed[0]}")
    if _fails(quality, fail_on):
        raise typer.Exit(exit_codes.FINDINGS)


def _tokenizer(model: str) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model)


def _fails(quality: Any, fail_on: FailOn) -> bool:
    from fastpref.quality import LEVELS

    worst = quality.worst()
    if worst is None or fail_on is FailOn.never:
        return False
    return LEVELS.index(worst) <= LEVELS.index(fail_on.value)


def _show(quality: Any) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(soft_wrap=True)
    rows = ", ".join(f"{count:,} rows of {name} data" for name, count in quality.rows.items())
    console.print(f"{rows}; {quality.sampled:,} rows tokenised", highlight=False)
    if not quality.findings:
        console.print("nothing found", highlight=False)
    colours = {"error": "red", "warning": "yellow", "note": "cyan"}
    for finding in quality.findings:
        colour, where = colours[finding.level], "" if finding.data == "train" else " (eval)"
        text = f"[{colour}]{finding.level}[/] [bold]{finding.check}[/]{where}: "
        console.print(text, end="", highlight=False)
        console.print(finding.message, markup=False, highlight=False)
        if finding.rows:
            shown = ", ".join(map(str, finding.rows[:SHOWN_ROWS]))
            shown += ", ..." if len(finding.rows) > SHOWN_ROWS else ""
            console.print(f"    rows {shown}", markup=False, highlight=False)
        console.print(f"    {finding.advice}", markup=False, highlight=False)
    if not quality.figures:
        return
    table = Table("tokens", "median", "90 %", "99 %", "max", box=None)
    for name in ("prompt", "chosen", "rejected", "pair"):
        table.add_row(name, *(f"{v:,}" for v in quality.figures[name].values()))
    console.print(table)
    figures = quality.figures
    console.print(
        f"padding in batches of 8 pairs: {100 * figures['padding']:.0f} % of the tokens; the "
        f"prompt's second copy: {100 * figures['shared_prompt']:.0f} %; an eager head's fp32 "
        f"logits of the longest such batch: {figures['eager_logits_bytes'] / 2**30:.2f} GiB",
        highlight=False,
    )
