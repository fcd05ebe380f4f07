"""Puts the figures of benchmarks/results/ into README.md and docs/, where these lines ask for them:

    <!-- benchmarks/tables.py NAME -->
    <!-- end -->

    python benchmarks/tables.py            # after a benchmark has written new results
    python benchmarks/tables.py --check    # fail if a page has other figures

No figure of a page is written by hand.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lib import columns_report, plan_report, profile_report, reliability, rlhf_report

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
_BLOCK = re.compile(
    r"(<!-- benchmarks/tables\.py (\w+) -->\n).*?(<!-- end -->)", re.DOTALL | re.MULTILINE
)
MODES = {"trainable": "trains", "frozen": "frozen"}


def _results(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / f"{name}.json").read_text())


class Cell:
    """One shape and mode of benchmarks/head.py."""

    def __init__(self, cell: dict[str, Any]):
        self.shape = ", ".join(str(cell["shape"][k]) for k in "NHV")
        self.vocab, self.mode = cell["shape"]["V"], cell["mode"]
        self._rows = {row["variant"]: row for row in cell["variants"]}

    def _row(self, name: str, strategy: str = "stash") -> dict[str, Any]:
        if name.startswith("fastpref") and self.mode == "trainable":
            name = f"{name}, {strategy}"
        return self._rows[name]

    def ms(self, name: str, strategy: str = "stash") -> float:
        return self._row(name, strategy)["time"]["median_ms"]

    def mib(self, name: str, strategy: str = "stash") -> float:
        return self._row(name, strategy)["memory"]["extra"] / 2**20

    def error(self, name: str) -> float:
        return self._row(name)["errors"]["sum_max"]


def _cells(name: str) -> list[Cell]:
    return [Cell(cell) for cell in _results(name)["cells"]]


def _short(x: float) -> str:
    """Two digits, or five decimals; without an exponent."""
    return f"{x:.5f}" if x < 1e-3 else f"{x:.2g}"


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines).replace("|  |", "| |")


def _by_shape(cells: list[Cell], columns: Callable[[Cell], list[str]]) -> list[list[str]]:
    """A row per cell; a shape stands in its first row only."""
    seen: set[str] = set()
    rows = []
    for cell in cells:
        shape = "" if cell.shape in seen else cell.shape
        seen.add(cell.shape)
        rows.append([shape, MODES[cell.mode], *columns(cell)])
    return rows


def head() -> str:
    cells = _cells("head")
    names = {
        "eager": "eager",
        "fastpref exact": "fastpref exact",
        "fastpref fast": "fastpref fast",
        "torch.compile": "torch.compile",
        "TRL 1.16": "TRL chunked",
        "Liger": "Liger DPO",
        "CCE": "CCE torch_compile",
    }
    rows = _by_shape(cells, lambda c: [f"{c.ms(name):.0f} ms" for name in names.values()])
    largest = [c for c in cells if c.vocab == max(c.vocab for c in cells)]
    for c in largest:
        line = [f"extra memory, {c.shape}" if c is largest[0] else "", MODES[c.mode]]
        for title, name in names.items():
            text = f"{c.mib(name):.0f} MiB"
            if title.startswith("fastpref") and c.mode == "trainable":
                text = f"{c.mib(name):.0f}, or {c.mib(name, 'recompute'):.0f} recomputing"
            line.append(text)
        rows.append(line)
    worst = max(cells, key=lambda c: c.error("eager"))
    rows.append(
        [f"error, nats ({worst.shape})", "", *(_short(worst.error(n)) for n in names.values())]
    )
    return _table(["N, H, V", "head", *names], rows)


def first() -> str:
    """The sentence of the README's first screen: the largest head, trained."""
    cell = max((c for c in _cells("head") if c.mode == "trainable"), key=lambda c: c.vocab)
    n, h, v = cell.shape.split(", ")
    ours, plain = "fastpref exact", "eager"
    return (
        f"The DPO loss of a head with N = {n}, H = {h} and V = {v}, in bf16, forward and\n"
        f"backward on two CPU cores, takes {cell.ms(ours):.0f} ms and {cell.mib(ours):.0f} MiB. "
        f"Plain torch takes {cell.ms(plain):.0f} ms and\n{cell.mib(plain):.0f} MiB. The "
        f"log-probability of a 512-token answer is off by {_short(cell.error(ours))} nat, in plain "
        f"torch\nby {_short(cell.error(plain))} nat.\n"
    )


def _span(ratios: list[float]) -> str:
    return f"{min(ratios):.1f}x to {max(ratios):.1f}x"


def fp32() -> str:
    def ratio(name: str) -> str:
        return _span([c.ms("eager") / c.ms("fastpref exact") for c in _cells(name)])

    return (
        f"In fp32 the head takes {ratio('head_fp32')} less time than eager torch on this machine, "
        "whose\nlibrary avoids AVX-512 (benchmarks/results/head_fp32.json), and "
        f"{ratio('head_avx2_fp32')} less on an AMD\nprocessor with AVX2 alone "
        "(head_avx2_fp32.json).\n"
    )


def _against(name: str, title: str) -> str:
    def columns(c: Cell) -> list[str]:
        both = name, "fastpref exact"
        return [
            *(f"{c.ms(n):.0f} ms" for n in both),
            *(f"{c.mib(n):.0f} MiB" for n in both),
            *(f"{_short(c.error(n))} nat" for n in both),
        ]

    short = title.split()[0]
    titles = [f"{what}, {who}" for what in ("memory", "error") for who in (short, "fastpref")]
    rows = _by_shape(_cells("head"), columns)
    return _table(["N, H, V", "head", title, "fastpref", *titles], rows)


def trl() -> str:
    ratio = _span([c.ms("TRL chunked") / c.ms("fastpref exact") for c in _cells("head_fp32")])
    return (
        _against("TRL chunked", "TRL 1.16")
        + "\nTRL's own kernels are made for GPUs; on a CPU it takes a plain torch path, so these\n"
        + "ratios say nothing about a GPU. In float32 (head_fp32.json) the same operation takes\n"
        + f"{ratio} less time.\n"
    )


def trl_step() -> str:
    if not (RESULTS / "trl_step.json").exists():
        return "`python benchmarks/trl_step.py` measures it.\n"
    results = _results("trl_step")
    options, rows = results["options"], []
    for mode, found in results["modes"].items():
        both = "TRL", "fastpref"
        time, memory = found["time"], found["memory"]
        errors = found["largest_error_of_a_sequence_nat"]
        rows.append(
            [
                MODES[mode],
                *(f"{time[side]['median_ms']:.0f} ms" for side in both),
                *(f"{memory[side]['peak_beyond'] / 2**20:.0f} MiB" for side in both),
                *(f"{_short(errors[side])} nat" for side in both),
            ]
        )
    tokens = next(iter(results["modes"].values()))["tokens"]
    titles = [f"{what}{who}" for what in ("", "memory, ", "error, ") for who in ("TRL", "patched")]
    return (
        f"{options['pairs']} pairs, {tokens['labelled']} labelled of {tokens['positions']} "
        f"positions, vocabulary {options['vocab']},\nhidden size {options['hidden']}, "
        f"{options['layers']} layers, {options['dtype']}:\n\n" + _table(["head", *titles], rows)
    )


def liger() -> str:
    return _against("Liger DPO", "Liger 0.8.5")


def cce() -> str:
    names = "CCE torch_compile", "torch LCE", "fastpref exact"

    def columns(c: Cell) -> list[str]:
        memory = ", ".join(f"{c.mib(n):.0f}" for n in names)
        error = ", ".join(_short(c.error(n)) for n in names)
        return [*(f"{c.ms(n):.0f} ms" for n in names), f"{memory} MiB", f"{error} nat"]

    cells = _cells("head")
    who = "CCE, torch, fastpref"
    titles = ["N, H, V", "head", "CCE", "torch", "fastpref", f"memory: {who}", f"error: {who}"]
    train = [c for c in cells if c.mode == "trainable"]
    memory, ms = (
        ", ".join(f"{getattr(c, what)('fastpref exact', 'recompute'):.0f}" for c in train)
        for what in ("mib", "ms")
    )
    ratios = _span([c.ms("CCE torch_compile") / c.ms("fastpref exact") for c in cells])
    return (
        _table(titles, _by_shape(cells, columns))
        + f"\nCCE's compiled path, which keeps 16-bit logits, takes {ratios} of our time here.\n"
        "What fastpref gives on a CPU is the exactness, and with a frozen head or\n"
        f'`strategy="recompute"` ({memory} MiB for the three trainable heads, at {ms} ms)\n'
        "the memory.\n"
    )


def train() -> str:
    results = _results("train")
    ours, peer = (results["against_trl"][k] for k in ("fastpref", "trl"))
    reached = {k: v["held_out_after"]["rewards/accuracies"] for k, v in results["training"].items()}
    return (
        f"{ours['median_step_s']:.1f} s, or {ours['step_s_with_reference']:.1f} s with the "
        "reference's log-probs that are computed ahead, against\n"
        f"{peer['median_step_s']:.1f} s; peak resident memory {ours['peak_bytes'] / 2**30:.1f} GiB "
        f"against {peer['peak_bytes'] / 2**30:.1f} GiB. {results['settings']['steps']} steps move "
        f"the reward\naccuracy on {results['settings']['held_out']} held-out pairs to "
        f"{reached['dpo']:.2f} (DPO) and {reached['ipo']:.2f} (IPO).\n"
    )


def host_time() -> str:
    us = {name: found["median"] for name, found in _results("host_time")["us"].items()}
    parts = "forward", "backward", "log-probs without gradients"
    forward, backward, logps = (us[f"without kernels, {part}"] for part in parts)
    ours, eager, trl = (
        us[f"step, {name}"] for name in ("fastpref exact, stash", "eager", "TRL chunked")
    )
    return (
        "On one core of the machine of benchmarks/results/host_time.json\n"
        f"a call without its kernels takes {forward:.0f} us forward and {backward:.0f} us "
        f"backward, `linear_token_logps` without\ngradients {logps:.0f} us. A whole step on a few "
        f"tokens, where arithmetic is next to nothing, takes {ours:.0f} us;\neager torch's "
        f"{eager:.0f} us, TRL's chunked function {trl:.0f} us.\n"
    )


def cpu_linear() -> str:
    rows = []
    for name in ("cpu_linear", "cpu_linear_bf16"):
        found = _results(name)
        step = {side: found["step_s"][side]["median"] for side in ("torch", "native")}
        rows.append(
            [
                found["options"]["dtype"],
                str(found["options"]["layers"]),
                f"{step['torch']:.2f} s",
                f"{step['native']:.2f} s",
                f"{step['torch'] / step['native']:.2f}x",
                f"{found['products_speedup']:.2f}x",
            ]
        )
    header = ["dtype", "blocks", "torch's", "fastpref's", "step", "the layers' products alone"]
    machine = found["machine"]
    where = f"{machine['cpu']}, {machine['threads']} threads, {', '.join(machine['cpu_features'])}"
    return _table(header, rows) + f"\n{where}, torch {machine['packages']['torch']}.\n"


def columns() -> str:
    results = _results("columns")
    return _table(*columns_report.gains(results)) + "\n" + columns_report.about_gains(results)


def columns_large_vocabulary() -> str:
    results = _results("columns_large_vocabulary")
    return _table(*columns_report.gains(results)) + "\n" + columns_report.about_gains(results)


def block_filter() -> str:
    return _table(*columns_report.block_filter(_results("columns")))


def columns_training() -> str:
    results = _results("columns_training")
    return _table(*columns_report.training(results)) + "\n" + columns_report.about_training(results)


def rlhf() -> str:
    found = _results("rlhf")
    options, machine = found["settings"], found["machine"]
    seeds = len(found["start"])
    truth = [r["accuracy"]["held_out_pairs"]["truth"] for r in found["runs"] if "accuracy" in r]
    start = sum(point["reward"] for point in found["start"]) / seeds
    pairs = [part["pairs"]["pairs"] for part in found["pairs"]]
    sampling = sum(part["pairs"]["seconds"] for part in found["pairs"]) / seeds
    return (
        _table(*rlhf_report.cost_rows(found)) + "\n"
        f"{found['model']}, {pairs[0]} pairs, {options['epochs']} epochs, {options['batch']} pairs "
        f"or prompts a step, {options['generations']} answers a prompt in RLOO,\n"
        f"{'one seed' if seeds == 1 else f'{seeds} seeds'}; threads: {machine['threads']} of "
        f"{machine['cpu']}. The starting model gets {start:.2f}; the reward model\nfinds the truly "
        f"better held-out answer in {sum(truth) / len(truth):.0%} of pairs. Sampling them took "
        f"{sampling:.0f} s, for each method alike.\n"
    )


def step() -> str:
    results = _results("step")
    rows, seen = [], set()
    for name in ("step", "step_features", "step_off", "step_dialogues"):
        lengths = _results(name)["lengths"]
        for kind, other in ((kind, other) for kind, cells in lengths.items() for other in cells):
            cell = lengths[kind][other]
            if "runs" not in cell or (kind, other) in seen:  # what an earlier file has, too
                continue
            seen.add((kind, other))
            ours, theirs = cell["runs"]["fastpref"], cell["runs"][other]
            rows.append(
                [
                    kind,
                    other,
                    f"{theirs['pairs_per_s']:.3f}",
                    f"{ours['pairs_per_s']:.3f}",
                    f"{cell['speedup']:.2f}x",
                    f"{theirs['above_bytes'] / 2**30:.2f} GiB",
                    f"{ours['above_bytes'] / 2**30:.2f} GiB",
                ]
            )
    header = ["lengths", "against", "its pairs/s", "ours", "faster", "its memory", "ours"]
    machine, settings = results["machine"], results["settings"]
    return (
        _table(header, rows) + "\n"
        f"{machine['cpu']}, {machine['threads']} threads, {', '.join(machine['cpu_features'])}; "
        f"{settings['batch']} pairs a step, {settings['dtype']}, medians of "
        f"{settings['steps'] - 1} steps,\nTRL {machine['packages']['trl']}. Memory is what stands "
        "above the libraries, the policy's weights and Adam's states.\n"
    )


def faults() -> str:
    results = _results("reliability")
    rows = reliability.table(results)
    return _table(["what", "tests/faults/", "found"], rows) + "\n" + reliability.machine(results)


def plan() -> str:
    return plan_report.grid(_results("plan"))


def profile() -> str | None:
    if not (RESULTS / "profile.json").exists():
        return None
    return profile_report.tables(_results("profile"))


BLOCKS = {
    f.__name__: f
    for f in (
        first,
        head,
        fp32,
        trl,
        trl_step,
        liger,
        cce,
        train,
        step,
        cpu_linear,
        host_time,
        columns,
        block_filter,
        columns_large_vocabulary,
        columns_training,
        rlhf,
        faults,
        plan,
        profile,
    )  # fmt: skip
}


def fill(text: str) -> str:
    """A page with its blocks' figures from the results. KeyError for an unknown block.

    A block whose results are not there, which is None, keeps what it has.
    """

    def filled(found: re.Match[str]) -> str:
        figures = BLOCKS[found[2]]()
        return found[0] if figures is None else found[1] + figures + found[3]

    return _BLOCK.sub(filled, text)


def pages() -> list[Path]:
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def main() -> None:
    stale = []
    for page in pages():
        text = page.read_text()
        if fill(text) == text:
            continue
        stale.append(page.name)
        if "--check" not in sys.argv:
            page.write_text(fill(text))
    if "--check" in sys.argv and stale:
        raise SystemExit(f"other figures than in benchmarks/results: {', '.join(stale)}")
    print(f"written: {', '.join(stale)}" if stale else "all figures are those of the results")


if __name__ == "__main__":
    main()
