"""`fastpref verify`: whether log-probs are right and a run can start, on a model of one's own."""

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
    say_paths,
    table_console,
    write_plot,
)
from fastpref.cli.shared_options import (
    AsJson,
    Beta,
    Bf16,
    Debug,
    MaxLength,
    PairLoss,
    PairLossOptions,
    Pairs,
    TrustRemoteCode,
)


def command(
    model: Annotated[
        str, typer.Option(help="Directory or hub name of a causal model or of a LoRA adapter.")
    ],
    data: Pairs,
    ref_model: Annotated[
        str | None, typer.Option(help="The reference; by default the model, or the data's columns.")
    ] = None,
    loss: PairLoss = "dpo",
    loss_option: PairLossOptions = None,
    beta: Beta = 0.1,
    max_length: MaxLength = 1024,
    rows: Annotated[
        int, typer.Option(min=1, help="Pairs that are checked, evenly spread over the data.")
    ] = 16,
    compared: Annotated[
        int,
        typer.Option(min=1, help="Of these, the pairs that every way of computing is compared on."),
    ] = 2,
    bf16: Bf16 = None,
    fail_on: Annotated[
        FailOn, typer.Option(help="The least level of a finding that makes the exit status 6.")
    ] = FailOn.error,
    plot: Annotated[
        Path | None, typer.Option(help="A PNG, SVG or PDF of the errors of log-probs.")
    ] = None,
    report: Annotated[
        Path | None, typer.Option(help="Write an HTML page with checks and errors here.")
    ] = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Check a model and pairs before training: log-probs against float64, and the first step.

    Log-probs of fastpref, of eager torch and of TRL are compared with those of the same weights in
    float64. Rows are numbered from 0.
    """
    import torch

    from fastpref.backends.processor import bf16_is_fast, training_device
    from fastpref.cli.losses import choose_loss
    from fastpref.cli.models import load_model, load_tokenizer
    from fastpref.cli.train_run import hide_library_bars
    from fastpref.data import load_preference_data
    from fastpref.losses.options import LOSS_OPTIONS
    from fastpref.quality import verify

    check_plot(plot)
    check_report(report)
    chosen = choose_loss(loss, beta, loss_option or [])
    if chosen.unpaired:
        raise ValueError(f"--loss {loss} is of single answers; verify reads pairs")
    if "nll_on_prompt" in chosen.settings:
        raise ValueError(
            "--loss-option nll_on_prompt would do nothing: verify computes log-probs of answers "
            "alone; leave it out"
        )
    device = training_device()
    narrow = bf16_is_fast(device) if bf16 is None else bf16
    dtype = torch.bfloat16 if narrow else torch.float32
    hide_library_bars()
    pairs = load_preference_data(data)  # a wrong name is known before the model is loaded
    tokenizer = load_tokenizer(model, trust_remote_code)
    options = {k: v for k, v in chosen.settings.items() if k in LOSS_OPTIONS}
    models = [
        None if name is None else load_model(name, dtype, trust_remote_code, argument).to(device)
        for argument, name in (("--model", model), ("--ref-model", ref_model))
    ]
    result = verify(
        models[0],
        pairs,
        tokenizer,
        ref_model=models[1],
        loss_type=options.pop("loss_type"),
        beta=options.pop("beta"),
        loss_options=options,
        max_length=max_length,
        rows=rows,
        compared=compared,
        show_progress=not as_json,
    )
    if plot is not None:
        if not result.errors:
            raise ValueError(f"--plot {plot}: nothing was compared ({result.exact})")
        write_plot(_errors_figure(result), plot)
    if report is not None:
        html_report(result, model, data).write(report)
    if as_json:
        print_json(result.as_dict())
    else:
        _show(result)
        say_paths(plot=plot, report=report)
    if fails(result.findings, fail_on):
        raise typer.Exit(exit_codes.FINDINGS)


def _exact(result: Any) -> str:
    return (
        f"{result.compared} pairs in {result.dtype}, against {result.exact}"
        if result.errors
        else f"not compared: {result.exact}"
    )


def _error_rows(result: Any) -> list[list[str]]:
    rows = []
    for name, error in result.errors.items():
        figures = (error.max_nats, error.mean_nats, error.max_reward, error.mean_reward)
        rows.append([name, *(f"{figure:.2g}" for figure in figures)])
    return rows


ERROR_COLUMNS = ("log-probs of", "max nats", "mean nats", "max reward", "mean reward")
_MARKS = {True: ("ok", "green"), False: ("fails", "red"), None: ("-", "dim")}


SHOWN = 5  # pairs of the ranking by CHES


def _show(result: Any) -> None:
    from rich.table import Table

    console = table_console()
    table = Table(*ERROR_COLUMNS, box=None, title="Error of an answer's log-prob and of a margin")
    table.title_justify, table.title_style = "left", "bold"
    for row in _error_rows(result):
        table.add_row(*row)
    console.print(table)
    console.print(f"({_exact(result)})\n", highlight=False)
    for name, reason in result.left_out.items():
        console.print(f"{name}: {reason}", markup=False, highlight=False)
    console.print(f"[bold]Before the first step[/bold] ({result.pairs} pairs)", highlight=False)
    for check in result.checks:
        mark, colour = _MARKS[check.passed]
        console.print(f"[{colour}]{mark:5}[/] {check.name}: ", end="", highlight=False)
        console.print(check.found, markup=False, highlight=False)
    figures = result.figures
    console.print(
        f"NLL a token: {figures['nll_chosen']:.3f} chosen, {figures['nll_rejected']:.3f} rejected; "
        f"ranked as the data: {100 * figures['ranking_accuracy']:.0f} % of the pairs",
        highlight=False,
    )
    first = ", ".join(f"{pair.row} ({pair.ches:.3g})" for pair in result.displacement[:SHOWN])
    console.print(f"highest CHES, likelihood displacement: rows {first}\n", highlight=False)
    show_findings(console, result.findings)


def html_report(result: Any, model: str, data: str) -> Any:
    """The page of `--report`."""
    from fastpref.html_report import HtmlReport, png_bytes

    page = HtmlReport("fastpref verify", f"{model}, {data}")
    add_findings(page, result.findings)
    about = (
        f"Of an answer's log-prob in nats, and of a pair's margin as a reward: {_exact(result)}."
    )
    page.table(ERROR_COLUMNS, _error_rows(result), "Errors", about)
    if result.left_out:
        page.facts(result.left_out.items())
    if result.errors:
        page.figure(png_bytes(_errors_figure(result)), "Largest error by way of computing")
    rows = [[check.name, _MARKS[check.passed][0], check.found] for check in result.checks]
    page.table(("check", "", "found"), rows, "Before the first step")
    page.facts(result.figures.items(), heading="Figures")
    scores = [
        [str(pair.row), f"{pair.ches:.4g}", f"{pair.ches_by_length:.4g}"]
        for pair in result.displacement
    ]
    about = "Training on the first pairs is the likeliest to lower the chosen answer's likelihood."
    page.table(("row", "CHES", "by length"), scores, "Likelihood displacement", about)
    return page


def _errors_figure(result: Any) -> Any:
    from matplotlib.figure import Figure

    from fastpref.cli.report import CHOSEN, NEUTRAL, tidy

    figure = Figure(figsize=(7, 0.6 + 0.45 * len(result.errors)), layout="constrained")
    axis = figure.subplots()
    names = list(result.errors)[::-1]
    values = [max(result.errors[name].max_nats, 1e-9) for name in names]
    colours = [CHOSEN if name == "fastpref" else NEUTRAL for name in names]
    axis.barh(names, values, color=colours, height=0.6)
    axis.set_xscale("log")
    axis.set_xlabel("nats an answer", fontsize=9)
    tidy(axis)
    axis.grid(axis="y", visible=False)
    return figure
