"""The figures of the head on a page, from what head.py wrote."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .markdown import MODES, table, two_digits

Result = dict[str, Any]


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


def _cells(results: Result) -> list[Cell]:
    return [Cell(cell) for cell in results["cells"]]


def _ratios(cells: list[Cell], peer: str) -> str:
    """The least and the greatest time of a peer over that of fastpref."""
    ratios = [cell.ms(peer) / cell.ms("fastpref exact") for cell in cells]
    return f"{min(ratios):.1f}x to {max(ratios):.1f}x"


def _by_shape(cells: list[Cell], columns: Callable[[Cell], list[str]]) -> list[list[str]]:
    """A row per cell; a shape stands in its first row only."""
    seen: set[str] = set()
    rows = []
    for cell in cells:
        shape = "" if cell.shape in seen else cell.shape
        seen.add(cell.shape)
        rows.append([shape, MODES[cell.mode], *columns(cell)])
    return rows


def times_and_memory(results: Result) -> str:
    """Every side's time, and for the largest vocabulary its memory; the largest error of a sum."""
    cells = _cells(results)
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
        [f"error, nats ({worst.shape})", "", *(two_digits(worst.error(n)) for n in names.values())]
    )
    return table(["N, H, V", "head", *names], rows)


def largest_trained(results: Result) -> str:
    """Sentences about the largest head that trains, against plain torch."""
    cell = max((c for c in _cells(results) if c.mode == "trainable"), key=lambda c: c.vocab)
    n, h, v = cell.shape.split(", ")
    ours, plain = "fastpref exact", "eager"
    return (
        f"The DPO loss of a head with N = {n}, H = {h} and V = {v}, in bf16, forward and\n"
        f"backward on two CPU cores, takes {cell.ms(ours):.0f} ms and {cell.mib(ours):.0f} MiB. "
        f"Plain torch takes {cell.ms(plain):.0f} ms and\n{cell.mib(plain):.0f} MiB. The "
        f"log-probability of a 512-token answer is off by {two_digits(cell.error(ours))} nat, "
        f"in plain torch\nby {two_digits(cell.error(plain))} nat.\n"
    )


def fp32_ratios(avx512: Result, avx2: Result) -> str:
    """How much faster than eager torch the head is in fp32, on two processors."""
    here, amd = (_ratios(_cells(results), "eager") for results in (avx512, avx2))
    return (
        f"In fp32 the head takes {here} less time than eager torch on this machine, "
        "whose\nlibrary avoids AVX-512 (benchmarks/results/head_fp32.json), and "
        f"{amd} less on an AMD\nprocessor with AVX2 alone "
        "(head_avx2_fp32.json).\n"
    )


def shares_of_limit(results: Result) -> str:
    """The least FLOPs at the processor's own rate over the time of fastpref, and of eager torch."""
    modes = ("trainable", "frozen", "forward-only")
    shares: dict[tuple[str, str], dict[str, str]] = {}
    for raw in results["cells"]:
        cell = Cell(raw)
        both = [raw["roofline_ms"] / cell.ms(name) for name in ("fastpref exact", "eager")]
        row = shares.setdefault((cell.shape, raw["dtype"]), {})
        row[cell.mode] = " / ".join(f"{share:.0%}" for share in both)
    rows = [[*key, *(row[mode] for mode in modes)] for key, row in shares.items()]
    machine = results["machine"]
    return (
        table(["N, H, V", "dtype", "head trains", "frozen", "forward only"], rows) + "\n"
        f"fastpref / eager; {machine['threads']} threads of {machine['cpu']}, "
        f"{', '.join(machine['cpu_features'])}; memory is kept from call to call.\n"
    )


def against(results: Result, peer: str, title: str) -> str:
    """Times, memory and errors of one peer beside those of fastpref."""

    def columns(c: Cell) -> list[str]:
        both = peer, "fastpref exact"
        return [
            *(f"{c.ms(n):.0f} ms" for n in both),
            *(f"{c.mib(n):.0f} MiB" for n in both),
            *(f"{two_digits(c.error(n))} nat" for n in both),
        ]

    library = title.split()[0]
    titles = [f"{what}, {who}" for what in ("memory", "error") for who in (library, "fastpref")]
    rows = _by_shape(_cells(results), columns)
    return table(["N, H, V", "head", title, "fastpref", *titles], rows)


def against_trl(results: Result, fp32: Result) -> str:
    return (
        against(results, "TRL chunked", "TRL 1.16")
        + "\nTRL's own kernels are made for GPUs; on a CPU it takes a plain torch path, so these\n"
        + "ratios say nothing about a GPU. In float32 (head_fp32.json) the same operation takes\n"
        + f"{_ratios(_cells(fp32), 'TRL chunked')} less time.\n"
    )


def against_cce(results: Result) -> str:
    names = "CCE torch_compile", "torch LCE", "fastpref exact"

    def columns(c: Cell) -> list[str]:
        memory = ", ".join(f"{c.mib(n):.0f}" for n in names)
        error = ", ".join(two_digits(c.error(n)) for n in names)
        return [*(f"{c.ms(n):.0f} ms" for n in names), f"{memory} MiB", f"{error} nat"]

    cells = _cells(results)
    who = "CCE, torch, fastpref"
    titles = ["N, H, V", "head", "CCE", "torch", "fastpref", f"memory: {who}", f"error: {who}"]
    train = [c for c in cells if c.mode == "trainable"]
    memory, ms = (
        ", ".join(f"{getattr(c, what)('fastpref exact', 'recompute'):.0f}" for c in train)
        for what in ("mib", "ms")
    )
    return (
        table(titles, _by_shape(cells, columns))
        + f"\nCCE's compiled path, which keeps 16-bit logits, takes "
        f"{_ratios(cells, 'CCE torch_compile')} of our time here.\n"
        "What fastpref gives on a CPU is the exactness, and with a frozen head or\n"
        f'`strategy="recompute"` ({memory} MiB for the three trainable heads, at {ms} ms)\n'
        "the memory.\n"
    )
