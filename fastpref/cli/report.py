"""Reports of a run: peak memory, summary table, log file and plot."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from fastpref.profiling.resident import life_peak, reset_peak, status_bytes
from fastpref.storage import whole_file

CHOSEN, REJECTED, NEUTRAL = "#1b7f79", "#c8553d", "#6b7280"


class PeakMemory:
    """The peak memory inside a `with` block, in bytes.

    On a GPU it is the memory that torch allocated there. On a CPU it is the resident memory of this
    process, whose high-water mark Linux can reset.

    Attributes:
        base: the memory at the start of the block; None if it cannot be measured.
        peak: the peak since then; None if it cannot be measured.
        exact: False if the mark cannot be reset; peak is then that of the process's whole life.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self.base: int | None = None
        self.peak: int | None = None
        self.exact = True

    def __enter__(self) -> PeakMemory:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            self.base = torch.cuda.memory_allocated(self.device)
        else:
            self.exact = reset_peak()
            self.base = status_bytes("VmRSS")
        return self

    def __exit__(self, *_: Any) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            self.peak = torch.cuda.max_memory_allocated(self.device)
        else:
            self.peak = life_peak()

    @property
    def extra(self) -> int | None:
        """The peak minus the memory at the start, in bytes; None if it is not known."""
        if self.base is None or self.peak is None or not self.exact:
            return None
        return max(0, self.peak - self.base)


def summary_table(title: str, rows: Iterable[tuple[str, str]]) -> Any:
    """A rich table of two columns, name and value."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(
        title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD, show_header=False
    )
    table.add_column(style="dim")
    table.add_column()
    for name, value in rows:
        table.add_row(name, value)
    return table


def jsonable(value: Any) -> Any:
    """A value for JSON: NaN and infinities become None, tensors numbers."""
    if isinstance(value, torch.Tensor):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {str(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [jsonable(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)


def write_json(path: Path, value: Any) -> None:
    text = json.dumps(jsonable(value), indent=2, ensure_ascii=False) + "\n"
    with whole_file(path) as beside:
        beside.write_text(text, "utf-8")


def series(history: Sequence[Mapping[str, Any]], key: str) -> tuple[list[int], list[float]]:
    """Steps and values of one metric in a trainer's `log_history`."""
    points = [(row["step"], row[key]) for row in history if key in row and "step" in row]
    return [step for step, _ in points], [value for _, value in points]


# The panels of a training plot: title, metric, whether to draw a line at 0, bounds of the axis.
_PANELS = (
    ("Loss", "loss", False, None),
    ("Reward margin", "rewards/margins", True, None),
    ("Reward accuracy", "rewards/accuracies", False, (-0.03, 1.03)),
)


def draw_training(axes: Sequence[Any], history: Sequence[Mapping[str, Any]]) -> None:
    """Draw loss, margin and accuracy of a `log_history` on three matplotlib axes."""
    for axis, (title, key, zero, bounds) in zip(axes, _PANELS, strict=True):
        for name, colour, style in (
            (key, CHOSEN, {"linewidth": 1.6}),
            (f"eval_{key}", REJECTED, {"marker": "o", "markersize": 4, "linewidth": 1.2}),
        ):
            steps, values = series(history, name)
            if steps:
                label = "held out" if name.startswith("eval_") else "training"
                axis.plot(steps, values, color=colour, label=label, **style)
        if not axis.get_lines():  # single answers have no accuracy
            axis.set_visible(False)
            continue
        if zero:
            axis.axhline(0, color=NEUTRAL, linewidth=0.8, linestyle=":")
        if bounds:
            axis.set_ylim(*bounds)
        axis.set_title(title, loc="left", fontsize=10)
        axis.set_xlabel("optimiser step", fontsize=9)
        axis.xaxis.get_major_locator().set_params(integer=True)
        tidy(axis)
    if axes[0].get_legend_handles_labels()[0]:
        axes[0].legend(frameon=False, fontsize=9)


def tidy(axis: Any) -> None:
    """Apply the common style of the plots."""
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(labelsize=8)
    axis.grid(axis="y", color="#e5e7eb", linewidth=0.8)
    axis.set_axisbelow(True)


def training_figure(history: Sequence[Mapping[str, Any]], title: str) -> Any:
    """A figure of loss, reward margin and reward accuracy over the steps of a `log_history`."""
    from matplotlib.figure import Figure  # pyplot would need a display and has global state

    figure = Figure(figsize=(11, 3.2), layout="constrained")
    draw_training(figure.subplots(1, 3), history)
    figure.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold")
    return figure


def plot_training(history: Sequence[Mapping[str, Any]], path: Path, title: str) -> None:
    """Write `training_figure` to a PNG file."""
    save_figure(training_figure(history, title), path)


def save_figure(figure: Any, path: Path, dpi: int = 120) -> None:
    """Write a matplotlib figure to a PNG, SVG or PDF file, by its name."""
    with whole_file(path) as beside:
        figure.savefig(beside, format=path.suffix[1:].lower(), dpi=dpi)
