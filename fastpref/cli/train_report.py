"""The summary of a finished run of `fastpref train`, for terminals and as an HTML page."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from fastpref.cli import report
from fastpref.cli.train_options import TrainOptions
from fastpref.html_report import HtmlReport, png_bytes
from fastpref.progress import size_text


def summarise(trainer: Any, memory: report.PeakMemory, bar: Any) -> dict[str, Any]:
    """The figures of a finished run; None for what was not measured."""
    history = trainer.state.log_history
    metrics: dict[str, Any] = {}
    for row in history:
        metrics.update(row)
    tokens = metrics.get("num_tokens", 0) - bar.resumed_tokens
    vocabulary = trainer.accelerator.unwrap_model(trainer.model).get_output_embeddings().weight
    facts = {
        "steps": trainer.state.global_step,
        "seconds": bar.seconds,
        "tokens_per_second": tokens / bar.seconds if bar.seconds and tokens > 0 else None,
        "peak_memory_bytes": memory.peak,
        "peak_memory_kind": "device" if memory.device.type == "cuda" else "resident",
        "batch_positions": trainer.data_collator.positions,
        "batch_labelled_tokens": trainer.data_collator.labelled,
        "logits_bytes": trainer.data_collator.positions * vocabulary.shape[0] * 4,
    }
    for prefix in ("", "eval_"):
        for key in ("loss", "rewards/accuracies", "rewards/margins"):
            facts[prefix + key] = metrics.get(prefix + key)
    return facts


def summary_rows(facts: dict[str, Any]) -> list[tuple[str, str]]:
    """The rows of the summary table: name and text."""

    def both_sets(key: str, spec: str) -> str:
        values = [(facts[key], "training"), (facts[f"eval_{key}"], "held out")]
        return ", ".join(f"{value:{spec}} {name}" for value, name in values if value is not None)

    rate, seconds = facts["tokens_per_second"], facts["seconds"]
    rows = [
        ("steps", f"{facts['steps']}" + (f" in {seconds:.1f} s" if seconds else "")),
        ("loss", both_sets("loss", ".4f")),
        ("reward accuracy", both_sets("rewards/accuracies", ".3f")),
        ("reward margin", both_sets("rewards/margins", "+.4f")),
        ("tokens per second", "not measured" if rate is None else f"{rate:,.0f}"),
        (
            "peak memory",
            f"{size_text(facts['peak_memory_bytes'])} ({facts['peak_memory_kind']})",
        ),
        (
            "logits not made",
            f"{size_text(facts['logits_bytes'])} for one fp32 copy of those "
            f"of the largest batch ({facts['batch_positions']:,} positions)",
        ),
    ]
    return [(name, text) for name, text in rows if text]


def html_report(
    title: str,
    headline: str,
    facts: dict[str, Any],
    alarms: list[tuple[str, str]],
    history: Sequence[Mapping[str, Any]],
) -> HtmlReport:
    """The page of `--report`.

    Args:
        title: of the curves.
        headline: the first line of the run, with rich's markup.
        alarms: the name and the message of each warning.
        history: the trainer's `log_history`.
    """
    page = HtmlReport("fastpref train", re.sub(r"\[/?[a-z]+\]", "", headline))
    # A sentence of an alarm says itself what to do.
    page.findings([("warning", name, text, "") for name, text in alarms], "Alarms", "No alarm.")
    page.facts(summary_rows(facts), heading="Summary")
    figure = report.training_figure(history, title)
    page.figure(png_bytes(figure), "Loss, reward margin and reward accuracy", heading="Curves")
    evaluations = [row for row in history if "eval_loss" in row]
    if evaluations:
        keys = ("loss", "rewards/accuracies", "rewards/margins", "logps/chosen", "logps/rejected")
        shown = [key for key in keys if f"eval_{key}" in evaluations[0]]
        rows = [[row["step"], *(row.get(f"eval_{key}") for key in shown)] for row in evaluations]
        page.table(["step", *shown], rows, "Held-out pairs")
    return page


def write_results(
    options: TrainOptions,
    trainer: Any,
    console: Any,
    title: str,
    headline: str,
    facts: dict[str, Any],
    alarms: list[tuple[str, str]],
) -> None:
    """Write the log, the plot and the report, and print the summary.

    title, headline, facts, alarms: as for `html_report`.
    """
    from rich.markup import escape

    from fastpref.storage import disk_errors

    output, history = options.output, trainer.state.log_history
    config = {k: v for k, v in trainer.args.to_dict().items() if k != "hub_token"}
    named = [{"name": name, "message": message} for name, message in alarms]
    log = {"summary": facts, "alarms": named, "history": history, "options": config}
    with disk_errors(f"the model is saved in {output}, but its log and plot could not be"):
        report.write_json(output / "training_log.json", log)
        report.plot_training(history, output / "training.png", title)
    console.print(report.summary_table("Summary", summary_rows(facts)))
    console.print(
        f"Model, training_log.json and training.png are in [bold]{escape(str(output))}[/bold]"
    )
    if options.report is not None:
        page = html_report(title, headline, facts, alarms, history)
        console.print(f"Report: [bold]{escape(str(page.write(options.report)))}[/bold]")
