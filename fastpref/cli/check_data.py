"""`fastpref check-data`: what is wrong with preference pairs, before they are trained on."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from fastpref.cli import exit_codes
from fastpref.cli.findings import FailOn, add_findings, fails, show_findings
from fastpref.cli.outputs import check_report, print_json, table_console
from fastpref.cli.shared_options import Debug, TrustRemoteCode


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
    report: Annotated[
        Path | None, typer.Option(help="Write an HTML page with findings and lengths here.")
    ] = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="One JSON object with the numbers of all rows.")
    ] = False,
    debug: Debug = False,
) -> None:
    """Check preference pairs: repeats, contradictions, ends, templates, truncation, length bias.

    Rows are numbered from 0.
    """
    from fastpref.cli.models import load_tokenizer
    from fastpref.data import load_preference_data
    from fastpref.quality import check_data, write_fixed
    from fastpref.quality.fix import fixed_path

    check_report(report)
    path = fixed_path(data)
    if fix and not Path(data).is_file():
        raise ValueError(f"--fix: {data} is no file beside which the clean data could stand")
    if fix and path.exists():
        raise ValueError(f"--fix: {path} exists already; move it away")
    pairs = load_preference_data(data)
    quality = check_data(
        pairs,
        None if model is None else load_tokenizer(model, trust_remote_code),
        eval_data=eval_data,
        max_length=max_length,
        sample_rows=sample or None,
        show_progress=not as_json,
    )
    fixed = write_fixed(pairs, quality.findings, path) if fix else None
    if report is not None:
        html_report(quality, data, model).write(report)
    if as_json:
        out = quality.as_dict()
        if fixed is not None:
            out["fixed"] = {"path": str(fixed[0]), "dropped": fixed[1]}
        print_json(out)
    else:
        _show(quality)
        if fixed is not None:
            typer.echo(f"{fixed[1]:,} rows left out of {fixed[0]}")
        if report is not None:
            typer.echo(f"Report: {report}")
    if fails(quality.findings, fail_on):
        raise typer.Exit(exit_codes.FINDINGS)


def _show(quality: Any) -> None:
    from rich.table import Table

    console = table_console()
    rows = ", ".join(f"{count:,} rows of {name} data" for name, count in quality.rows.items())
    console.print(f"{rows}; {quality.sampled:,} rows tokenised", highlight=False)
    show_findings(console, quality.findings)
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


def html_report(quality: Any, data: str, model: str | None) -> Any:
    """The page of `--report`."""
    from fastpref.html_report import HtmlReport, png_bytes

    page = HtmlReport("fastpref check-data", data)
    add_findings(page, quality.findings)
    rows = [(f"rows of {name} data", count) for name, count in quality.rows.items()]
    page.facts([*rows, ("rows tokenised", quality.sampled), ("tokenizer", model)], "Data")
    figures = quality.figures
    if figures:
        page.facts(
            [
                ("padding in batches of 8 pairs", f"{100 * figures['padding']:.0f} %"),
                ("the prompt's second copy", f"{100 * figures['shared_prompt']:.0f} % of tokens"),
                (
                    "an eager head's fp32 logits of the longest such batch",
                    f"{figures['eager_logits_bytes'] / 2**30:.2f} GiB",
                ),
            ]
        )
        names = ("prompt", "chosen", "rejected", "pair")
        lines = [[name, *figures[name].values()] for name in names]
        page.table(["tokens", "median", "90 %", "99 %", "max"], lines, "Lengths")
        page.figure(png_bytes(_histograms(figures["histogram"])), "Rows by number of tokens")
    return page


def _histograms(histogram: dict[str, list[int]]) -> Any:
    """A figure of the token counts of prompts and of both answers."""
    from matplotlib.figure import Figure

    from fastpref.cli.report import CHOSEN, NEUTRAL, REJECTED, tidy

    figure = Figure(figsize=(9, 3), layout="constrained")
    axes = figure.subplots(1, 2)
    edges = histogram["edges"]
    axes[0].stairs(histogram["prompt"], edges, color=NEUTRAL, fill=True, label="prompt")
    for name, colour in (("chosen", CHOSEN), ("rejected", REJECTED)):
        axes[1].stairs(histogram[name], edges, color=colour, linewidth=1.6, label=name)
    for axis in axes:
        axis.set_xlabel("tokens", fontsize=9)
        axis.set_ylabel("rows", fontsize=9)
        axis.legend(frameon=False, fontsize=9)
        tidy(axis)
    return figure
