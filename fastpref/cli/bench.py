"""`fastpref bench`: what the loss of a head costs on this machine, and what has changed."""

from __future__ import annotations

import contextlib
import enum
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from fastpref.cli import exit_codes
from fastpref.cli.outputs import (
    check_place,
    check_plot,
    check_report,
    print_json,
    say,
    say_paths,
    table_console,
    write_plot,
)
from fastpref.cli.shared_options import AsJson, Debug, TrustRemoteCode

THRESHOLD = 0.05
LOG_WIDTH = 160  # characters, in which the widest table stays whole


class Scale(str, enum.Enum):
    """What is scaled."""

    tokens = "tokens"
    vocab = "vocab"
    threads = "threads"


def command(
    heads: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[HEAD]...",
            help="Heads to measure: N,H,V (labelled tokens, hidden size, vocabulary), "
            "N,H,V,SOFTCAP, or the name or folder of a model, whose config gives H, V and the "
            "dtype. By default 512,512,32000.",
        ),
    ] = None,
    tokens: Annotated[
        int | None, typer.Option(min=2, help="N of all heads; by default 1024 for models.")
    ] = None,
    trained: Annotated[bool, typer.Option("--trained", help="Measure a head that trains.")] = False,
    frozen: Annotated[bool, typer.Option("--frozen", help="Measure a frozen head.")] = False,
    forward: Annotated[
        bool, typer.Option("--forward", help="Measure a pass without gradients.")
    ] = False,
    dtype: Annotated[
        str | None,
        typer.Option(
            help="bf16, fp32 or both; by default a model's own, and otherwise what the machine is "
            "fast at."
        ),
    ] = None,
    backend: Annotated[
        str | None, typer.Option(help="fastpref's backends, joined by commas.")
    ] = None,
    strategy: Annotated[
        str | None, typer.Option(help="Of a head that trains: stash, recompute or both.")
    ] = None,
    precision: Annotated[str, typer.Option(help="exact, fast or both.")] = "exact,fast",
    gradient_tolerance: Annotated[
        float | None,
        typer.Option(help="Also measure approximate gradients with this relative error."),
    ] = None,
    peers: Annotated[
        str,
        typer.Option(
            help="Other libraries: all that are installed, none, or names joined by commas, such "
            "as trl,liger."
        ),
    ] = "all",
    scale: Annotated[
        Scale | None,
        typer.Option(
            help="Measure each head at 1/4, 1/2, 1 and 2 times the size, or with 1, 2, 4, ... "
            "threads."
        ),
    ] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Calls of each side.")] = 5,
    seconds: Annotated[
        float, typer.Option(help="Seconds that one side may spend on its calls.")
    ] = 1.5,
    budget: Annotated[
        float, typer.Option(help="Seconds for everything; what does not fit is left out.")
    ] = 120.0,
    memory: Annotated[bool, typer.Option(help="Measure the memory, in a second process.")] = True,
    device: Annotated[
        str | None, typer.Option(help="cpu or cuda; by default a GPU where there is one.")
    ] = None,
    compare: Annotated[
        Path | None,
        typer.Option(metavar="OLD.json", help="An earlier result; a regression is status 6."),
    ] = None,
    threshold: Annotated[
        float, typer.Option(help="The fraction by which a time may grow before it is a regression.")
    ] = THRESHOLD,
    save: Annotated[
        Path | None, typer.Option(help="Write the result here, for a later --compare.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="A PNG, SVG or PDF of the result.")] = None,
    report: Annotated[Path | None, typer.Option(help="An HTML file with everything.")] = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Measure the DPO loss of a head, forward and backward: time, memory, error against float64.

    fastpref, eager torch and other libraries take turns on the same random data.
    """
    from fastpref.bench.bench import STRATEGIES, bench_options
    from fastpref.bench.cases import DTYPES, split_names, tasks
    from fastpref.bench.compare import check_threshold, compare_results
    from fastpref.bench.run import run_tasks
    from fastpref.logps.plan import PRECISIONS

    check_plot(plot)
    check_report(report)
    _check_save(save)
    check_threshold(threshold)
    if compare is None and threshold != THRESHOLD:
        raise ValueError("--threshold is for --compare, which is not given")
    if strategy is not None and (frozen or forward) and not trained:
        raise ValueError("--strategy is of a head that trains; --trained is not given")
    modes = {"trainable": trained, "frozen": frozen, "forward-only": forward}
    options = bench_options(
        heads or None,
        tokens=tokens,
        modes=[name for name, is_chosen in modes.items() if is_chosen] or None,
        dtypes=None if dtype is None else split_names(dtype, list(DTYPES)),
        precision=split_names(precision, PRECISIONS),
        backends=None if backend is None else split_names(backend),
        strategies=None if strategy is None else split_names(strategy, list(STRATEGIES)),
        gradient_tolerance=gradient_tolerance,
        peers=None if peers == "all" else [] if peers == "none" else split_names(peers),
        scale=None if scale is None else scale.value,
        device=device,
        repeats=repeats,
        seconds=seconds,
        budget=budget,
        memory=memory,
        trust_remote_code=trust_remote_code,
    )
    old = None if compare is None else _old_result(compare, options)
    if not as_json:
        _announce(options)
    with _progress(len(tasks(options)), as_json) as (hear, doing):
        result = run_tasks(options, hear=hear, doing=doing)
    if (why := result.why_nothing()) is not None:
        raise RuntimeError(f"nothing was measured: {why}")
    record = result.as_dict()
    changes = [] if old is None else compare_results(old, record, threshold)
    if save is not None:
        _save(save, record)
    scaled = None if scale is None else scale.value
    if plot is not None:
        _write_plot(result, scaled, plot)
    if report is not None:
        _write_report(result, scaled, changes, report)
    if as_json:
        more = {} if old is None else {"changes": [vars(change) for change in changes]}
        print_json(record | more)
    else:
        _show(result, scaled, changes)
        say_paths(saved=save, plot=plot, report=report)
    if result.wrong() or any(change.regression for change in changes):
        raise typer.Exit(exit_codes.FINDINGS)


def _check_save(path: Path | None) -> None:
    """Raise, before anything is measured, if --save could not be written."""
    from fastpref.bench.compare import load_result

    if path is None:
        return
    path = check_place("--save", path)
    if path.is_file() and path.stat().st_size:
        try:
            load_result(path)
        except ValueError:
            raise ValueError(f"--save {path} is no earlier result, so it stays") from None


def _save(path: Path, record: dict[str, Any]) -> None:
    from fastpref.bench.results import write_json
    from fastpref.cli.report import jsonable
    from fastpref.storage import disk_errors

    with disk_errors(f"--save {path} could not be written"):
        write_json(path.expanduser(), jsonable(record))


def _old_result(path: Path, options: Any) -> dict[str, Any]:
    """The earlier result, if its times can be compared with what will be measured."""
    import torch

    from fastpref.bench.bench import side_names
    from fastpref.bench.compare import check_machines, key_of, load_result, sides_of
    from fastpref.bench.problem import parse_shape
    from fastpref.bench.results import machine

    old = load_result(path)
    present = machine()
    if options.device == "cuda":
        present["gpu"] = torch.cuda.get_device_name()
    check_machines(old["machine"], present, f"--compare {path}")
    keys = {
        key_of(vars(parse_shape(case.shape)), dtype, mode, case.threads)
        for case in options.cases
        for dtype in case.dtypes
        for mode in options.modes
    }
    old_sides, sides = sides_of(old), set(side_names(options))
    if not keys & old_sides.keys():
        raise ValueError(f"--compare {path} has none of the cases that would be measured")
    if not any(old_sides[key] & sides for key in keys & old_sides.keys()):
        raise ValueError(f"--compare {path} has none of fastpref's ways that would be measured")
    return old


def _announce(options: Any) -> None:
    """Say what will be done, before it starts."""
    from fastpref.bench.bench import side_names

    for case in options.cases:
        about = f" ({case.model})" if case.model else ""
        threads = f", {case.threads} threads" if case.threads else ""
        modes = ", ".join(options.modes)
        say(f"head {case.shape}{about}, {', '.join(case.dtypes)}{threads}: {modes}")
    say(f"sides: {', '.join(side_names(options))}")
    for name, reason in options.missing_peers.items():
        say(f"{name} is left out: {reason}")
    limit = f", at most {options.budget:.0f} s" if options.budget is not None else ""
    say(f"{options.repeats} calls of each, by turns{limit}")


@contextlib.contextmanager
def _progress(total: int, quiet: bool) -> Iterator[tuple[Callable[..., None], Callable[..., None]]]:
    """Shows progress: a bar in a terminal, lines elsewhere.

    Yields the functions `hear` and `doing` of `run_tasks`.
    """
    from rich.console import Console
    from rich.progress import Progress

    from fastpref.progress import count, counting

    console = Console(stderr=True)
    bar = Progress(console=console, transient=True, disable=quiet or not console.is_terminal)
    bar_task = bar.add_task("Starting", total=total)
    lines = not quiet and not console.is_terminal
    printed: set[tuple[str, str]] = set()

    def doing(message: dict[str, Any]) -> None:
        task, side = message["doing"], message.get("entry", "")
        bar.update(bar_task, description=f"{task}: {side}" if side else task)
        if lines and side and (task, side) not in printed:
            console.print(f"{task}: {side}", highlight=False, markup=False)
        printed.add((task, side))

    def hear(message: dict[str, Any]) -> None:
        if "result" in message or "dropped" in message:
            bar.advance(bar_task)
            count()
        if "dropped" in message and not quiet:
            text = f"{message['dropped']}: left out, no time left"
            console.print(text, highlight=False, markup=False)
        result = message.get("result", {})
        if result.get("kind") == "roofline" and "failed" not in result and not quiet:
            product, copy = result["product"], result["copy"]
            console.print(
                f"{result['dtype']}: a bare product reaches {1e3 * product['tflop_per_s']:,.1f} "
                f"GFLOP/s, a copy {copy['gb_per_s']:,.1f} GB/s",
                highlight=False,
            )

    with counting("Benchmark", "tasks", total, disabled=quiet, shared=False), bar:
        yield hear, doing


def _parts(result: Any, scale: str | None, changes: list[Any]) -> Iterator[tuple[str, Any, Any]]:
    """The title, the table and the notes of each part of the output."""
    from fastpref.bench import tables

    if result.rates:
        yield "the machine", tables.rates_table(result.rates), []
    for cell in result.cells:
        yield tables.title_of(cell), tables.cell_table(cell), tables.notes_of(cell)
    if scale is not None and result.cells:
        yield f"scaling over {scale}", tables.scaling_table(result.cells, scale), []
    if changes:
        worse = [change for change in changes if change.regression]
        last = f"{len(worse)} of {len(changes)} are regressions" if worse else "no regression"
        yield "against the earlier result", tables.changes_table(changes), [last]


def _left_out(result: Any) -> list[str]:
    """Sentences on what was not measured."""
    out = [f"{name} was not measured: {reason}" for name, reason in result.missing_peers.items()]
    out += [f"{r['id']}: {r['failed']}" for r in result.results if "failed" in r]
    out += [f"stopped: {reason}" for reason in result.stops]
    return out + ([f"no time left for: {', '.join(result.dropped)}"] if result.dropped else [])


def _show(result: Any, scale: str | None, changes: list[Any]) -> None:
    from rich.table import Table
    from rich.text import Text

    console = table_console(LOG_WIDTH)
    for title, (header, lines), notes in _parts(result, scale, changes):
        console.print(f"\n{title}", style="bold", highlight=False, markup=False)
        table = Table(*header, box=None)
        texts = 2 if header[0] == "case" else 1
        for i, column in enumerate(table.columns):
            column.no_wrap = console.width >= LOG_WIDTH
            column.justify = "left" if i < texts else "right"
        for line in lines:
            table.add_row(*map(Text, line))
        console.print(table)
        for sentence in notes:
            console.print(sentence, highlight=False, markup=False)
    console.print()
    for sentence in _left_out(result):
        console.print(sentence, highlight=False, markup=False)
    console.print(f"{result.wall_s:.0f} s in all", highlight=False)


def _figures(result: Any, scale: str | None) -> list[tuple[Any, str]]:
    from fastpref.bench.plots import figure_of, scaling_figure

    bars = figure_of(result.cells), "Speed over eager, fraction of the roofline, and memory"
    if scale is None:
        return [bars]
    return [(scaling_figure(result.cells, scale), f"Time over {scale}"), bars]


def _write_plot(result: Any, scale: str | None, path: Path) -> None:
    figure = next((figure for figure, _ in _figures(result, scale) if figure), None)
    if figure is None:
        raise ValueError(f"--plot {path}: nothing was measured that can be drawn")
    write_plot(figure, path, dpi=110)


def _write_report(result: Any, scale: str | None, changes: list[Any], path: Path) -> None:
    from fastpref.html_report import HtmlReport, png_bytes

    page = HtmlReport("fastpref bench", ", ".join(result.settings["shapes"]))
    machine = result.machine
    names = ("date", "cpu", "gpu", "threads", "memory_gib", "python", "backend", "commit")
    facts = [(name, str(machine[name])) for name in names if machine.get(name) is not None]
    facts += [(name, version) for name, version in machine.get("packages", {}).items()]
    page.facts(facts, heading="Machine")
    for title, (header, lines), notes in _parts(result, scale, changes):
        page.table(header, lines, heading=title)
        for sentence in notes:
            page.text(sentence)
    for figure, caption in _figures(result, scale):
        if figure is not None:
            page.figure(png_bytes(figure), caption)
    for sentence in _left_out(result):
        page.text(sentence)
    for name in ("time", "memory", "errors", "roofline"):
        page.text(f"{name}: {result.settings[name]}")
    page.write(path)
