"""`fastpref demo`: DPO and IPO on a tiny model that is part of the package, without a network.

The model answers requests at the front desk of a town hall, sometimes helpfully and sometimes not.
scripts/make_demo_model.py made it. In the pairs, the helpful answers are the chosen ones.
"""

from __future__ import annotations

import json
import logging
import re
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from fastpref.cli import report
from fastpref.progress import size_text

ASSETS = Path(__file__).resolve().parent.parent / "assets" / "demo"
TEMPERATURE = 0.7
BETAS = {"dpo": 0.1, "ipo": 0.5}
SHOWN = 4  # requests whose answers are printed


def command(
    output: Annotated[
        Path, typer.Option(help="Where the plot, the figures and the answers go.")
    ] = Path("fastpref-demo"),
    quick: Annotated[
        bool,
        typer.Option(
            "--quick", help="A few steps on a few pairs: shows that it runs, not that it learns."
        ),
    ] = False,
    seed: Annotated[int, typer.Option(help="Seed of training and of sampled answers.")] = 42,
    threads: Annotated[
        int,
        typer.Option(
            min=1,
            help="CPU threads. On a busy machine several of them wait for each other.",
        ),
    ] = 1,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
) -> None:
    """Train a tiny model with DPO and with IPO here and now, and show what changed."""
    from rich.console import Console

    console = Console(highlight=False)
    quiet()
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        run(console, output, quick, seed)
    finally:
        torch.set_num_threads(before)


def run(console: Any, output: Path, quick: bool, seed: int) -> None:
    """The whole demo, with torch's present number of threads."""
    began = time.perf_counter()
    output.mkdir(parents=True, exist_ok=True)
    from transformers import AutoTokenizer

    from fastpref.cli.compare import compare_heads
    from fastpref.cli.models import from_pretrained, load_model

    tokenizer = from_pretrained(AutoTokenizer, str(ASSETS))
    train, heldout = read_pairs("train.jsonl"), read_pairs("heldout.jsonl")
    if quick:
        train, heldout = train[:48], heldout[:8]
    model = load_model(str(ASSETS), torch.float32)
    console.print(
        f"[bold]fastpref demo[/bold]: a Llama of {model.num_parameters() / 1e6:.2f} M parameters "
        f"and {model.config.vocab_size:,} token types, {len(train)} preference pairs to train on, "
        f"{len(heldout)} held out, {torch.get_num_threads()} thread(s)\n"
    )
    answers = {"before": generate(model, tokenizer, heldout, seed)}
    runs, trainer = {}, None
    for loss in BETAS:
        trainer, runs[loss] = train_one(
            loss, tokenizer, train, heldout, output, seed, quick, console
        )
        answers[loss] = generate(trainer.model, tokenizer, heldout, seed)
    head = compare_heads(trainer, batches=1 if quick else 3, repeats=2 if quick else 7)
    helpful = {
        name: sum(body(row) in text for row, text in zip(heldout, texts, strict=True)) / len(texts)
        for name, texts in answers.items()
    }
    seconds = time.perf_counter() - began

    show_answers(console, heldout, answers)
    show_results(console, runs, helpful)
    show_head(console, head)
    plot(runs, helpful, head, output / "demo.png")
    report.write_json(
        output / "demo.json",
        {
            "seconds": seconds,
            "threads": torch.get_num_threads(),
            "runs": runs,
            "helpful_answers": helpful,
            "head": head,
            "answers": [
                {"request": request(row), **{name: texts[i] for name, texts in answers.items()}}
                for i, row in enumerate(heldout)
            ],
        },
    )
    console.print(
        f"{seconds:.0f} s in all. Plot, figures and all answers are in "
        f"[bold]{output}[/bold]: demo.png, demo.json"
    )


def quiet() -> None:
    """Hide the bars and messages of other libraries."""
    from fastpref.cli.train_run import hide_library_bars

    hide_library_bars()
    logging.getLogger("transformers").setLevel(logging.ERROR)


def read_pairs(name: str) -> list[dict[str, Any]]:
    path = ASSETS / name
    if not path.is_file():
        raise ValueError(f"the demo's file {path} is missing; install fastpref again")
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def request(row: dict[str, Any]) -> str:
    return row["prompt"][0]["content"]


def body(row: dict[str, Any]) -> str:
    """The chosen answer without its first and last sentence, which are courtesies."""
    return " ".join(re.split(r"(?<=[.!?]) ", row["chosen"][0]["content"])[1:-1])


@torch.no_grad()
def generate(model: Any, tokenizer: Any, rows: list[dict[str, Any]], seed: int) -> list[str]:
    """One sampled answer to each request."""
    tokenizer.padding_side = "left"
    inputs = tokenizer.apply_chat_template(
        [row["prompt"] for row in rows],
        add_generation_prompt=True,
        padding=True,
        return_tensors="pt",
        return_dict=True,
    ).to(model.device)
    tokenizer.padding_side = "right"
    torch.manual_seed(seed)
    model.eval()
    out = model.generate(
        **inputs, do_sample=True, temperature=TEMPERATURE, top_k=0, max_new_tokens=64
    )
    return tokenizer.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def train_one(loss, tokenizer, train, heldout, output, seed, quick, console) -> tuple[Any, dict]:
    """Train a fresh copy of the model with one loss; returns the trainer and its figures."""
    from fastpref.cli.models import load_model
    from fastpref.cli.progress import ProgressBar
    from fastpref.cli.train_run import make_trainer
    from fastpref.trainer.config import PreferenceConfig

    batch = 12 if quick else 32
    config = PreferenceConfig(
        output_dir=str(output),
        loss_type=loss,
        beta=BETAS[loss],
        learning_rate=1e-3,
        seed=seed,
        num_train_epochs=1 if quick else 3,
        per_device_train_batch_size=batch,
        per_device_eval_batch_size=batch,
        prefix_sharing=False,  # the head is measured on padded batches
        warmup_steps=1 if quick else 5,
        precompute_ref_log_probs=True,
        bf16=False,
        gradient_checkpointing=False,
        logging_steps=1,
        eval_strategy="steps",
        eval_steps=2 if quick else 5,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    bar = ProgressBar(console, f"Training with {loss.upper()}", lines=False, evaluations=False)
    began = time.perf_counter()
    with report.PeakMemory() as memory:
        trainer = make_trainer(
            load_model(str(ASSETS), torch.float32), config, tokenizer, train, heldout, bar=bar
        )
        before = trainer.evaluate()
        try:
            trainer.train()
        finally:
            bar.close()
        after = trainer.evaluate()
    history = trainer.state.log_history
    tokens = max(row.get("num_tokens", 0) for row in history)
    result = {
        "beta": BETAS[loss],
        "steps": trainer.state.global_step,
        "batch_pairs": batch,
        "seconds": time.perf_counter() - began,
        "step_seconds": bar.seconds,
        "tokens_per_second": tokens / bar.seconds if bar.seconds else None,
        "peak_memory_bytes": memory.peak,
        "before": before,
        "after": after,
        "history": history,
    }
    if not console.is_terminal:
        console.print(
            f"Trained with {loss.upper()}: {result['steps']} steps, "
            f"{result['seconds']:.0f} s with evaluations"
        )
    return trainer, result


# ---- output ------------------------------------------------------------------------------------


def show_answers(console: Any, heldout: list[dict], answers: dict[str, list[str]]) -> None:
    """Print the first requests that were answered badly before, with all models' answers."""
    from rich.table import Table
    from rich.text import Text

    bad = [i for i, row in enumerate(heldout) if body(row) not in answers["before"][i]]
    console.print(
        f"\n[bold]Answers to held-out requests[/bold]: {min(SHOWN, len(bad))} of the {len(bad)} "
        "that went wrong before\n(sampled with one seed; green: helpful and correct)"
    )
    for i in bad[:SHOWN]:
        console.print(Text(f"\n  {request(heldout[i])}", style="bold cyan"))
        grid = Table.grid(padding=(0, 1))
        grid.add_column(width=12, justify="right", style="dim")
        grid.add_column(overflow="fold")
        for name, texts in answers.items():
            label = "before" if name == "before" else f"after {name.upper()}"
            good = body(heldout[i]) in texts[i]
            grid.add_row(label, Text(texts[i], "green" if good else "red"))
        console.print(grid)
    console.print()


def show_results(console: Any, runs: dict[str, dict], helpful: dict[str, float]) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(
        title="Held-out pairs and requests",
        title_justify="left",
        title_style="bold",
        box=SIMPLE_HEAD,
    )
    table.add_column("")
    for name in ("before", *(f"after {loss.upper()}" for loss in runs)):
        table.add_column(name, justify="right")
    first = next(iter(runs.values()))["before"]
    table.add_row("helpful and correct answers", *(f"{helpful[n]:.0%}" for n in ("before", *runs)))
    for label, key, spec in (
        ("reward accuracy", "eval_rewards/accuracies", ".1%"),
        ("reward margin", "eval_rewards/margins", "+.3f"),
        ("reward of chosen", "eval_rewards/chosen", "+.3f"),
        ("reward of rejected", "eval_rewards/rejected", "+.3f"),
    ):
        table.add_row(
            label,
            f"{first[key] + 0.0:{spec}}",
            *(f"{run['after'][key]:{spec}}" for run in runs.values()),
        )
    table.add_row(
        "steps, seconds", "", *(f"{run['steps']}, {run['seconds']:.1f}" for run in runs.values())
    )
    table.add_row(
        "tokens per second", "", *(f"{run['tokens_per_second'] or 0:,.0f}" for run in runs.values())
    )
    console.print(table)
    console.print(
        "  [dim]Before training the model is its own reference: margins are zero up to rounding,\n"
        "  and its accuracy says nothing yet.[/dim]\n"
    )


def show_head(console: Any, head: dict[str, Any]) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(
        title=f"The output head on the same steps: {head['positions']:,} positions, "
        f"{head['labelled_tokens']:,} with a label, {head['vocab_size']:,} token types",
        title_justify="left",
        title_style="bold",
        box=SIMPLE_HEAD,
    )
    for name in ("", "extra peak memory", "forward + backward"):
        table.add_column(name, justify="left" if name == "" else "right")
    seconds, extra = head["seconds"], head["extra_memory_bytes"]
    for side, label in (
        ("eager", "eager torch, with logits"),
        ("fastpref", f"fastpref, without ({head['backend']})"),
    ):
        table.add_row(label, size_text(extra[side]), f"{seconds[side] * 1e3:.1f} ms")
    table.add_row(
        "eager / fastpref",
        memory_ratio(extra),
        f"{seconds['eager'] / seconds['fastpref']:.1f}x",
        style="bold",
    )
    console.print(table)
    console.print(
        "  [dim]Eager makes logits at every position, fastpref only where there is a label.\n"
        f"  The two losses differ by {head['loss_difference']:.1e}, the gradients by "
        f"at most {head['largest_gradient_difference']:.1e}.[/dim]\n"
    )


def memory_ratio(extra: dict[str, int | None]) -> str:
    eager, fused = extra["eager"], extra["fastpref"]
    return f"{eager / fused:.1f}x" if eager and fused else "-"


def plot(runs: dict[str, dict], helpful: dict[str, float], head: dict, path: Path) -> None:
    """Write a plot of both training curves, and bars of helpful answers and of the head's costs."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 9), layout="constrained")
    parts: Any = figure.subfigures(len(runs) + 1, 1)
    for part, (loss, run) in zip(parts, runs.items(), strict=False):
        report.draw_training(part.subplots(1, 3), run["history"])
        part.suptitle(
            f"{loss.upper()}, beta {run['beta']:g}",
            x=0.01,
            ha="left",
            fontsize=11,
            fontweight="bold",
        )
    axes = parts[-1].subplots(1, 3)
    parts[-1].suptitle(
        "Before and after; with and without logits",
        x=0.01,
        ha="left",
        fontsize=11,
        fontweight="bold",
    )
    extra, seconds = head["extra_memory_bytes"], head["seconds"]
    sides = ("eager", "fastpref")
    colours = (report.NEUTRAL, report.CHOSEN, report.CHOSEN)
    for axis, title, names, values, template in (
        (
            axes[0],
            "Helpful, correct answers, held out",
            [n.upper() if n in runs else n for n in helpful],
            [100 * v for v in helpful.values()],
            "{:.0f} %",
        ),
        (
            axes[1],
            "Extra memory of the head, MB",
            sides,
            [(extra[s] or 0) / 1e6 for s in sides],
            "{:.3g}",
        ),
        (axes[2], "Time of the head, ms", sides, [seconds[s] * 1e3 for s in sides], "{:.3g}"),
    ):
        bars = axis.bar(names, values, color=colours[: len(names)], width=0.6)
        axis.bar_label(bars, [template.format(value) for value in values], fontsize=9, padding=2)
        axis.set_title(title, loc="left", fontsize=10)
        axis.margins(y=0.15)
        report.tidy(axis)
    report.save_figure(figure, path)
