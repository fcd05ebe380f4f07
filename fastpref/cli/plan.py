"""`fastpref plan`: what fits a memory, and how fast it is, before any weight is loaded."""

from __future__ import annotations

import enum
import os
from pathlib import Path
from typing import Annotated, Any

import typer

from fastpref.cli import exit_codes
from fastpref.cli.outputs import (
    check_plot,
    check_report,
    print_json,
    say_paths,
    table_console,
    write_plot,
)
from fastpref.cli.shared_options import AsJson, Bf16, Debug, MaxLength, TrustRemoteCode
from fastpref.progress import size_text

SAMPLE = 5_000  # pairs of the data whose tokens are counted


class Method(str, enum.Enum):
    """The weights that train: all, an adapter's, or an adapter's over weights of 4 bits."""

    full = "full"
    lora = "lora"
    qlora = "qlora"


class Where(str, enum.Enum):
    """The kind of device that is planned for."""

    auto = "auto"
    cpu = "cpu"
    gpu = "gpu"


class Head(str, enum.Enum):
    """How the output head is computed."""

    fastpref = "fastpref"
    eager = "eager"


class Dtype(str, enum.Enum):
    """The weights' dtype."""

    float32 = "float32"
    bfloat16 = "bfloat16"


def command(
    model: Annotated[
        str, typer.Option(help="Directory or hub name of a causal model; its config is read.")
    ],
    data: Annotated[
        str | None,
        typer.Option(help="Pairs whose lengths are counted; without: as long as --max-length."),
    ] = None,
    memory: Annotated[
        str | None,
        typer.Option(
            help="Of each device, such as 24GB; by default that of --device or this machine's."
        ),
    ] = None,
    gpus: Annotated[
        int,
        typer.Option(
            min=1,
            help="Devices that share a step's pairs, weights, gradients and optimiser (FSDP).",
        ),
    ] = 1,
    where: Annotated[
        Where,
        typer.Option(
            help="cpu or gpu; auto: that of --device, else gpu if one is here or --gpus is above 1."
        ),
    ] = Where.auto,
    device: Annotated[
        str | None,
        typer.Option(
            help="A common device, such as h100, whose memory and rates are taken. By default this "
            "machine's GPU, if the table of common devices has it."
        ),
    ] = None,
    method: Annotated[
        Method, typer.Option(help="What is asked for: all weights, LoRA or QLoRA.")
    ] = Method.full,
    batch_size: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Pairs of an optimiser step on all devices; by default 8, or the next multiple "
            "of --gpus.",
        ),
    ] = None,
    max_length: MaxLength = 1024,
    bf16: Bf16 = None,
    dtype: Annotated[Dtype, typer.Option(help="The weights' dtype.")] = Dtype.float32,
    head: Annotated[Head, typer.Option(help="With logits: eager.")] = Head.fastpref,
    reference: Annotated[
        str, typer.Option(help="precompute or model; LoRA takes the model without its adapter.")
    ] = "precompute",
    gradient_checkpointing: Annotated[
        bool, typer.Option(help="Recompute activations: less memory, slower.")
    ] = True,
    lora_r: Annotated[int, typer.Option(min=1, help="Rank of an adapter.")] = 16,
    why_oom: Annotated[
        bool,
        typer.Option("--why-oom", help="What to change where --method does not fit, most first."),
    ] = False,
    table: Annotated[bool, typer.Option(help="Plans for common GPUs and CPUs.")] = True,
    probe: Annotated[
        bool,
        typer.Option(help="Measure steps of a few layers on this CPU; without: seconds by rates."),
    ] = True,
    plot: Annotated[
        Path | None,
        typer.Option(help="A PNG, SVG or PDF of each way's memory by component, and the limit."),
    ] = None,
    report: Annotated[Path | None, typer.Option(help="An HTML file with everything.")] = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Plan a training from the model's config and the data's lengths: memory, time, batch.

    No weights are loaded. The exit status is 6 if what was asked for does not fit.
    """
    import torch

    from fastpref.backends.processor import bf16_is_fast
    from fastpref.cli.models import load_config, load_tokenizer, missing_sizes
    from fastpref.cli.train_run import hide_library_bars
    from fastpref.planning import StepOptions, plan_training
    from fastpref.planning.devices import find_device, own_device, own_memory, parse_memory
    from fastpref.planning.times import measured_rates
    from fastpref.profiling.lengths import token_lengths

    check_plot(plot)
    check_report(report)
    if reference not in ("precompute", "model"):
        raise ValueError(f"--reference is {reference!r}; expected precompute or model")
    named = None if device is None else find_device(device)
    kind = where.value
    if named is not None:
        if where not in (Where.auto, Where(named.kind)):
            raise ValueError(f"--where {kind} contradicts --device {device}, a {named.kind}")
        kind = named.kind
    elif where is Where.auto:
        kind = "gpu" if gpus > 1 or torch.cuda.is_available() else "cpu"
    kind = "cuda" if kind == "gpu" else "cpu"
    if gpus > 1 and kind == "cpu":
        raise ValueError(f"--gpus is {gpus}, but a CPU is planned for; expected --gpus 1 or a GPU")
    if method is Method.qlora and kind == "cpu":
        raise ValueError("--method qlora needs a GPU's kernels; expected full or lora on a CPU")
    pairs = -(-8 // gpus) * gpus if batch_size is None else batch_size
    if pairs % gpus:
        raise ValueError(
            f"--batch-size is {pairs}, which --gpus {gpus} cannot share evenly; expected a "
            f"multiple of {gpus}, such as {-(-pairs // gpus) * gpus}"
        )
    if memory is not None:
        available = parse_memory(memory)
    else:
        available = own_memory(kind) if named is None else named.memory
    hide_library_bars()
    config = load_config(model, trust_remote_code)
    lengths = None
    if data is not None:
        tokenizer = load_tokenizer(model, trust_remote_code)
        lengths = token_lengths(data, tokenizer, max_length, SAMPLE)
    half = bf16
    if half is None:
        half = kind == "cuda" or (named is None and bf16_is_fast("cpu"))
    in_bf16 = half or dtype is Dtype.bfloat16
    listed = own_device() if named is None and kind == "cuda" else named
    if listed is not None:
        rates = listed.rates(in_bf16, gpus)
    else:
        rates = measured_rates(in_bf16) if kind == "cpu" else None
    plan = plan_training(
        config,
        memory=available,
        lengths=lengths,
        max_length=max_length,
        batch_size=pairs,
        method=method.value,
        options=StepOptions(
            head=head.value,
            dtype=getattr(torch, dtype.value),
            bf16=half and dtype is Dtype.float32,
            gradient_checkpointing=gradient_checkpointing,
            reference=reference,
            lora_r=lora_r,
        ),
        devices=gpus,
        rates=rates,
        kind=kind,
        table=table,
        why_oom=why_oom,
        probe=probe and rates is not None and rates.measured,
        show_progress=not as_json,
    )
    missing = missing_sizes(model, config)
    sentences = _sentences(plan, lengths, missing, listed)
    if plot is not None:
        write_plot(_figure(plan), plot)
    if report is not None:
        _write_report(plan, model, sentences, report)
    if as_json:
        print_json({**plan.as_dict(), "sizes_by_default": missing})
    else:
        _show(plan, sentences)
        say_paths(plot=plot, report=report)
    if not plan.asked.fits(plan.memory):
        raise typer.Exit(exit_codes.FINDINGS)


_NAMES = {"full": "all weights", "lora": "LoRA", "qlora": "QLoRA"}


def _pairs(count: int) -> str:
    return "1 pair" if count == 1 else f"{count} pairs"


def _seconds(estimate: Any) -> str:
    if estimate.seconds is None:
        return "-"
    total = estimate.seconds.total
    return f"{total:,.0f}" if total >= 100 else f"{total:.3g}"


def _ways(plan: Any) -> tuple[list[str], list[list[str]]]:
    ways = list(plan.ways.items())
    names = dict.fromkeys(
        name for _, way in ways for name, size in way.components.items() if size >= 5e6
    )
    rows = [
        [name, *(f"{way.components.get(name, 0) / 1e9:.2f}" for _, way in ways)] for name in names
    ]
    rows += [
        ["peak, GB", *(f"{way.bytes / 1e9:.2f}" for _, way in ways)],
        ["fits", *("yes" if way.fits(plan.memory) else "no" for _, way in ways)],
        ["pairs x accumulation", *(f"{way.pairs} x {way.accumulation}" for _, way in ways)],
        ["seconds a step", *(_seconds(way) for _, way in ways)],
    ]
    return ["GB of each device", *(_NAMES[name] for name, _ in ways)], rows


def _table(plan: Any) -> tuple[list[str], list[list[str]]]:
    rows = []
    for device, estimate in plan.table:
        if estimate is None:
            rows.append([device.name, "nothing fits", "", "", ""])
            continue
        rows.append(
            [
                device.name,
                _NAMES[estimate.options.method],
                f"{estimate.pairs} x {estimate.accumulation}",
                f"{estimate.bytes / 1e9:.1f}",
                _seconds(estimate),
            ]
        )
    return ["device", "trains", "pairs x accumulation", "GB", "seconds a step"], rows


def _changes(plan: Any) -> tuple[list[str], list[list[str]]]:
    rows = [
        [
            text,
            f"{(plan.asked.bytes - estimate.bytes) / 1e9:.2f}",
            f"{estimate.bytes / 1e9:.2f}",
            "yes" if estimate.fits(plan.memory) else "no",
        ]
        for text, estimate in plan.changes
    ]
    return ["change", "GB saved", "GB then", "fits"], rows


def _sentences(plan: Any, lengths: Any, missing: dict[str, int], listed: Any) -> list[str]:
    from fastpref.planning.estimate import MARGIN, MEMORY_UNCERTAINTY
    from fastpref.planning.plan import length_facts

    weights = plan.weights[0]
    count = f"{weights / 1e6:,.0f} million" if weights >= 1e7 else f"{weights:,}"
    out = [f"{count} weights; {size_text(plan.memory)} a device"]
    if missing:
        sizes = ", ".join(f"{name} {value:,}" for name, value in missing.items())
        out.append(f"config.json lacks sizes, for which its class has defaults: {sizes}")
    if lengths is not None:
        facts = ", ".join(f"{name} {value:,}" for name, value in length_facts(lengths).items())
        out.append(f"tokens of the longer sequence of a pair: {facts}")
    if plan.chosen is None:
        out.append("nothing fits; --why-oom says what to change, and more GPUs share the weights")
    else:
        way = plan.chosen
        out.append(
            f"take: {_NAMES[way.options.method]}, {_pairs(way.pairs)} a micro-batch, "
            f"accumulation {way.accumulation}, max_length {way.max_length}, "
            f"head {way.head_strategy or 'with logits'}"
            + (f", each on {way.devices} devices with sharded weights" if way.devices > 1 else "")
        )
    rates = plan.rates
    if rates is None and listed is None:
        out.append("no seconds: --device names a GPU of the table, such as h100")
    elif rates is None:
        dtype = "bf16" if listed.kind == "gpu" else "fp32"
        out.append(f"no seconds: the rates of {listed.name} are listed in {dtype} alone")
    elif not rates.measured:
        links = " and of its links within one machine" if plan.asked.devices > 1 else ""
        out.append(f"seconds follow from listed rates of {rates.name}{links}, not measured")
    else:
        out.append(
            "seconds follow from steps of a few layers, measured here"
            if plan.probed
            else "seconds follow from rates of this CPU; the real ones were half to twice these"
        )
        if (busy := _load()) is not None:
            out.append(f"this machine is busy ({busy}): alone on it, steps take less")
    out.append(
        f"tensors are predicted within {100 * MEMORY_UNCERTAINTY:.0f} %; "
        f"{100 * MARGIN[plan.asked.options.device]:.0f} % are added before something is said to "
        "fit; rates of other devices are listed, not measured"
    )
    return out


def _load() -> str | None:
    """The load of this machine's processors, if others than this process take part of them."""
    try:
        load = os.getloadavg()[1]  # of five minutes
    except (AttributeError, OSError):  # Windows
        return None
    cores = os.cpu_count() or 1
    return f"a load of {load:.1f} on {cores} processors" if load > 1.5 * cores else None


def _show(plan: Any, sentences: list[str]) -> None:
    from rich.table import Table

    console = table_console()
    for sentence in sentences:
        console.print(sentence, highlight=False, markup=False)
    for header, rows in (_ways(plan), _changes(plan), _table(plan)):
        if not rows:
            continue
        table = Table(*header, box=None)
        for column in table.columns[1:]:
            column.justify = "right"
        for row in rows:
            table.add_row(*row)
        console.print()
        console.print(table)


def _figure(plan: Any) -> Any:
    """A figure of each way's bytes by component, with the memory of a device as a line."""
    from matplotlib.figure import Figure

    from fastpref.cli.report import REJECTED, tidy

    figure = Figure(figsize=(8, 1.4 + 0.5 * len(plan.ways)), layout="constrained")
    axis = figure.subplots()
    names = list(dict.fromkeys(name for way in plan.ways.values() for name in way.components))
    ways = list(plan.ways)[::-1]
    left = [0.0] * len(ways)
    for name in names:
        sizes = [plan.ways[way].components.get(name, 0) / 1e9 for way in ways]
        axis.barh([_NAMES[way] for way in ways], sizes, left=left, height=0.6, label=name)
        left = [a + b for a, b in zip(left, sizes, strict=True)]
    axis.axvline(plan.memory / 1e9, color=REJECTED, linestyle="--", label="memory")
    axis.set_xlabel("GB of each device at the peak", fontsize=9)
    tidy(axis)
    axis.grid(axis="y", visible=False)
    figure.legend(loc="outside lower center", ncols=5, fontsize=8, frameon=False)
    return figure


def _write_report(plan: Any, model: str, sentences: list[str], path: Path) -> None:
    from fastpref.html_report import HtmlReport, png_bytes

    html = HtmlReport("fastpref plan", Path(model).name)
    for sentence in sentences:
        html.text(sentence)
    html.figure(png_bytes(_figure(plan)), "Memory by component, and that of a device")
    parts = (("Ways to train", _ways), ("What to change", _changes), ("Common devices", _table))
    for heading, make in parts:
        header, rows = make(plan)
        if rows:
            html.table(header, rows, heading=heading)
    html.write(path)
