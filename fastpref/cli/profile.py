"""`fastpref profile`: memory by component and time by phase, with and without logits."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

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
    LogitsPrecision,
    PairLoss,
    PairLossOptions,
    Pairs,
    TrustRemoteCode,
)
from fastpref.cli.train_options import Precision, PrefixSharing

TITLES = {"fastpref": "fastpref", "eager": "eager logits", "trl": "TRL", "liger": "TRL + Liger"}
COLOURS = {"fastpref": "#1b7f79", "eager": "#c8553d", "trl": "#6b7280", "liger": "#b7791f"}


def command(
    model: Annotated[str, typer.Option(help="Directory or hub name of a causal model.")],
    data: Pairs,
    loss: PairLoss = "dpo",
    loss_option: PairLossOptions = None,
    sides: Annotated[
        str | None,
        typer.Option(
            help="What is measured, joined by commas: fastpref, eager, trl, liger. By default all "
            "that are installed."
        ),
    ] = None,
    beta: Beta = 0.1,
    batch_size: Annotated[int, typer.Option(min=1, help="Pairs per micro-batch.")] = 2,
    grad_accumulation: Annotated[int, typer.Option(min=1, help="Micro-batches a step.")] = 1,
    max_length: Annotated[int, typer.Option(min=2, help="Tokens of prompt and answer.")] = 512,
    steps: Annotated[int, typer.Option(min=1, help="Timed steps of each side.")] = 2,
    lora: Annotated[bool, typer.Option("--lora", help="Train a LoRA adapter only.")] = False,
    lora_r: Annotated[int, typer.Option(min=1, help="Rank of the adapter.")] = 16,
    reference: Annotated[
        str,
        typer.Option(help="auto, precompute, model or adapter; auto: precompute, or the adapter."),
    ] = "auto",
    precision: LogitsPrecision = Precision.exact,
    bf16: Bf16 = None,
    dtype: Annotated[str, typer.Option(help="dtype of the weights.")] = "float32",
    gradient_checkpointing: Annotated[
        bool, typer.Option(help="Recompute activations: less memory, slower.")
    ] = True,
    prefix_sharing: Annotated[
        PrefixSharing, typer.Option(help="Compute the prompt of a pair once instead of twice.")
    ] = PrefixSharing.auto,
    trust_remote_code: TrustRemoteCode = False,
    plot: Annotated[
        Path | None,
        typer.Option(help="A PNG, SVG or PDF of the memory over the step on the longest pairs."),
    ] = None,
    report: Annotated[Path | None, typer.Option(help="An HTML file with everything.")] = None,
    snapshots: Annotated[
        Path | None,
        typer.Option(
            help="On a GPU: a directory for each side's history of allocations in that step, which "
            "pytorch.org/memory_viz shows."
        ),
    ] = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Measure a few training steps with and without logits: memory by component, time by phase.

    Each side trains in a process of its own. The memory is that of a step on the longest pairs.
    """
    from fastpref.cli.losses import choose_loss
    from fastpref.cli.models import load_tokenizer
    from fastpref.cli.train_run import hide_library_bars
    from fastpref.profiling import profile_training
    from fastpref.profiling.sides import unavailable_side

    check_plot(plot)
    check_report(report)
    chosen = choose_loss(loss, beta, loss_option or [])
    if chosen.unpaired:
        raise ValueError(f"--loss {loss}: profile reads losses of pairs, expected one of them")
    loss_settings = {**chosen.settings}
    names = None if sides is None else [name.strip() for name in sides.split(",") if name.strip()]
    hide_library_bars()
    tokenizer = load_tokenizer(model, trust_remote_code)
    measured = [n for n in names or TITLES if unavailable_side(n) is None]
    total = len(measured) * (steps + 2)
    with _progress(total, as_json) as hear:
        profile = profile_training(
            model,
            data,
            sides=names,
            tokenizer=tokenizer,
            loss_type=loss_settings.pop("loss_type"),
            beta=loss_settings.pop("beta"),
            loss_options=loss_settings,
            batch_size=batch_size,
            grad_accumulation=grad_accumulation,
            max_length=max_length,
            steps=steps,
            reference=reference,
            lora={"r": lora_r, "lora_alpha": 32, "target_modules": "all-linear"} if lora else None,
            bf16=bf16,
            dtype=dtype,
            gradient_checkpointing=gradient_checkpointing,
            trust_remote_code=trust_remote_code,
            options={
                "precision": precision.value,
                "prefix_sharing": prefix_sharing.value_of_config,
            },
            snapshots=snapshots,
            hear=hear,
        )
    if plot is not None:
        write_plot(_figure(profile), plot)
    if report is not None:
        _write_report(profile, report)
    if as_json:
        print_json(profile.as_dict())
    else:
        _show(profile)
        say_paths(plot=plot, report=report, snapshots=snapshots)


@contextlib.contextmanager
def _progress(total: int, quiet: bool) -> Iterator[Callable[[str, dict[str, Any]], None]]:
    """Shows progress: a bar in a terminal, lines elsewhere. Yields `hear` of `profile_training`."""
    from rich.console import Console
    from rich.progress import Progress

    from fastpref.progress import count, counting

    console = Console(stderr=True)
    bar = Progress(console=console, transient=True, disable=quiet or not console.is_terminal)
    task = bar.add_task("Profiling", total=total)

    def hear(name: str, message: dict[str, Any]) -> None:
        bar.update(task, description=TITLES[name])
        if "step" in message:
            bar.advance(task)
            count()
        if not quiet and not console.is_terminal and "step" in message:
            step = f"step {message['step']} of {message['of']}, {message['seconds']:.2f} s"
            console.print(f"{TITLES[name]}: {step}", highlight=False)

    with counting("Profiling", "steps", total, disabled=quiet, shared=False), bar:
        yield hear


def _rows(profile: Any) -> tuple[list[str], list[list[Any]], list[list[Any]]]:
    """The header, and the lines of memory in bytes and of time in seconds."""
    from fastpref.profiling.account import PHASES

    sides = [side for side in profile.sides if not side.missing]
    names = list(dict.fromkeys(name for side in sides for name in side.components))
    memory: list[list[Any]] = [
        [name, *(side.components.get(name, 0) for side in sides)]
        for name in names
        if any(side.components.get(name) for side in sides)
    ]
    memory += [
        ["unaccounted", *(side.unaccounted_bytes for side in sides)],
        ["measured peak", *(side.peak_bytes for side in sides)],
        ["tensors alone", *(side.tensor_bytes for side in sides)],
    ]
    if any(side.reserved_bytes is not None for side in sides):
        memory.append(["held by the allocator", *(side.reserved_bytes for side in sides)])
    time: list[list[Any]] = [
        [phase, *(side.phases.get(phase, 0.0) for side in sides)]
        for phase in PHASES
        if any(side.phases.get(phase, 0.0) > 0 for side in sides)
    ]
    time += [
        ["step", *(side.step_seconds for side in sides)],
        ["longest pairs, watched", *(side.longest_step_seconds for side in sides)],
    ]
    return [TITLES[side.name] for side in sides], memory, time


def _show(profile: Any) -> None:
    from rich.table import Table

    console = table_console()
    header, memory, time = _rows(profile)
    longest = profile.batches["longest"][0]
    console.print(
        f"longest batch: {longest['pairs']} pairs of up to {longest['padded_length']:,} tokens, "
        f"{longest['labelled']:,} of them labelled",
        highlight=False,
    )
    for title, unit, lines in (("memory at the peak", 1e6, memory), ("seconds", 1.0, time)):
        table = Table(title if unit == 1.0 else f"{title}, MB", *header, box=None)
        for column in table.columns[1:]:
            column.justify = "right"
        for name, *values in lines:
            digits = ".3f" if unit == 1.0 else ",.0f"
            texts = ["-" if v is None else format(v / unit, digits) for v in values]
            table.add_row(name, *texts)
        console.print(table)
    for sentence in _missing(profile):
        console.print(sentence, highlight=False, markup=False)


def _missing(profile: Any) -> list[str]:
    return [
        f"{TITLES[side.name]} was not measured: {side.missing}"
        for side in profile.sides
        if side.missing
    ]


def draw_memory(axis: Any, profile: Any) -> None:
    """Draw each side's bytes of tensors over the step on the longest pairs."""
    from fastpref.cli.report import tidy

    for side in profile.sides:
        if side.missing:
            continue
        seconds = [time / 1e3 for time, _ in side.timeline]
        gigabytes = [sum(sizes.values()) / 1e9 for _, sizes in side.timeline]
        look = {"color": COLOURS[side.name], "label": TITLES[side.name], "linewidth": 1.4}
        axis.step(seconds, gigabytes, where="post", **look)
    axis.set_ylim(bottom=0)
    axis.set_xlabel("seconds of the step", fontsize=9)
    axis.set_ylabel("GB of tensors", fontsize=9)
    axis.legend(frameon=False, fontsize=9)
    tidy(axis)


def _figure(profile: Any) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    draw_memory(figure.subplots(), profile)
    return figure


def _write_report(profile: Any, path: Path) -> None:
    from fastpref.html_report import HtmlReport, png_bytes

    header, memory, time = _rows(profile)
    settings = profile.settings
    html = HtmlReport("fastpref profile", Path(settings["model"]).name)
    html.facts(
        [
            (name, str(settings[name]))
            for name in ("batch_size", "max_length", "reference", "bf16", "gradient_checkpointing")
        ],
        heading="Settings",
    )
    html.figure(
        png_bytes(_figure(profile)),
        "Tensors during the step on the longest pairs",
        heading="Memory",
    )
    in_mb = [[name, *(None if v is None else v / 1e6 for v in values)] for name, *values in memory]
    html.table(["MB at the peak", *header], in_mb)
    html.table(["seconds", *header], time, heading="Time")
    for sentence in _missing(profile):
        html.text(sentence)
    html.write(path)
