"""`fastpref check-data`: what is wrong with preference pairs, before they are trained on."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from fastpref.cli import exit_codes
from fastpref.cli.findings import FailOn, add_findings, fails, show_findings
from fastpref.cli.outputs import (
    check_plot,
    check_report,
    print_json,
    say,
    say_paths,
    table_console,
    write_plot,
)
from fastpref.cli.shared_options import Debug, TrustRemoteCode
from fastpref.progress import size_text


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
    plot: Annotated[
        Path | None,
        typer.Option(help="A PNG, SVG or PDF of the lengths and of eager logits; needs --model."),
    ] = None,
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

    check_plot(plot)
    check_report(report)
    if plot is not None and model is None:
        raise ValueError("--plot shows numbers of tokens; pass --model, which has a tokenizer")
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
    if plot is not None:
        if "histogram" not in quality.figures:
            raise ValueError(f"--plot {plot}: no row was tokenised; see --sample and the findings")
        write_plot(_histograms(quality.figures), plot)
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
            say(f"{fixed[1]:,} rows left out of {fixed[0]}")
        say_paths(plot=plot, report=report)
    if fails(quality.findings, fail_on):
        raise typer.Exit(exit_codes.FINDINGS)


def _show(quality: Any) -> None:
    from rich.table import Table

    console = table_console()
    rows = ", ".join(f"{count:,} rows of {name} data" for name, count in quality.rows.items())
    console.print(f"{rows}; {quality.sampled:,} rows tokenised", highlight=False)
    show_findings(console, quality.findings)
    for name, text in _biases(quality.figures):
        console.print(f"{name}: {text}", highlight=False)
    if "histogram" not in quality.figures:
        return
    table = Table("tokens", "median", "90 %", "99 %", "max", box=None)
    for name in ("prompt", "chosen", "rejected", "pair"):
        table.add_row(name, *(f"{v:,}" for v in quality.figures[name].values()))
    console.print(table)
    figures = quality.figures
    console.print(
        f"padding in batches of 8 pairs: {100 * figures['padding']:.0f} % of the tokens; the "
        f"prompt's second copy: {100 * figures['shared_prompt']:.0f} %; an eager head's fp32 "
        f"logits of the longest such batch: {size_text(figures['eager_logits_bytes'])}",
        highlight=False,
    )


def _biases(figures: dict[str, Any]) -> list[tuple[str, str]]:
    """What tells chosen from rejected answers: names and figures, as far as they are known."""
    rows = []
    if "length_bias" in figures:
        wins, r2 = figures["length_bias"]["longer_wins"], figures["length_bias"]["r2"]
        text = f"the chosen one in {100 * wins:.0f} % of the pairs (R^2 {r2:.2f})"
        rows.append(("the longer answer", text))
    if "separability" in figures:
        text = f"tell {100 * figures['separability']:.0f} % of unseen pairs apart"
        rows.append(("single words", text))
    return rows


def html_report(quality: Any, data: str, model: str | None) -> Any:
    """The page of `--report`."""
    from fastpref.html_report import HtmlReport, png_bytes

    page = HtmlReport("fastpref check-data", data)
    add_findings(page, quality.findings)
    rows = [(f"rows of {name} data", count) for name, count in quality.rows.items()]
    figures = quality.figures
    rows += [("rows tokenised", quality.sampled), ("tokenizer", model), *_biases(figures)]
    page.facts(rows, "Data")
    if "histogram" in figures:
        page.facts(
            [
                ("padding in batches of 8 pairs", f"{100 * figures['padding']:.0f} %"),
                ("the prompt's second copy", f"{100 * figures['shared_prompt']:.0f} % of tokens"),
                (
                    "an eager head's fp32 logits of the longest such batch",
                    size_text(figures["eager_logits_bytes"]),
                ),
            ]
        )
        names = ("prompt", "chosen", "rejected", "pair")
        lines = [[name, *figures[name].values()] for name in names]
        page.table(["tokens", "median", "90 %", "99 %", "max"], lines, "Lengths")
        page.figure(png_bytes(_histograms(figures)), "Rows by tokens, batches by eager logits")
    return page


def _histograms(figures: dict[str, Any]) -> Any:
    """A figure of the tokens of prompts and of both answers, and of eager logits by batch."""
    from matplotlib.figure import Figure

    from fastpref.cli.report import CHOSEN, NEUTRAL, REJECTED, tidy

    figure = Figure(figsize=(12, 3), layout="constrained")
    axes = figure.subplots(1, 3)
    histogram, logits = figures["histogram"], figures["eager_logits_histogram"]
    edges = histogram["edges"]
    axes[0].stairs(histogram["prompt"], edges, color=NEUTRAL, fill=True, label="prompt")
    for name, colour in (("chosen", CHOSEN), ("rejected", REJECTED)):
        axes[1].stairs(histogram[name], edges, color=colour, linewidth=1.6, label=name)
    for axis in axes[:2]:
        axis.set_xlabel("tokens", fontsize=9)
        axis.set_ylabel("rows", fontsize=9)
        axis.legend(frameon=False, fontsize=9)
    unit, scale = ("GB", 1e9) if logits["edges"][-1] >= 1e9 else ("MB", 1e6)
    sizes = [edge / scale for edge in logits["edges"]]
    axes[2].stairs(logits["batches"], sizes, color=NEUTRAL, fill=True)
    axes[2].set_xlabel(f"{unit} of an eager head's fp32 logits", fontsize=9)
    axes[2].set_ylabel("batches of 8 pairs", fontsize=9)
    for axis in axes:
        tidy(axis)
    return figure
