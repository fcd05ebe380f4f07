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
from pathlib import Path
from typing import Any

from lib import (
    columns_report,
    head_report,
    plan_report,
    profile_report,
    reliability,
    rlhf_report,
)
from lib.markdown import MODES, table, two_digits

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
_BLOCK = re.compile(
    r"(<!-- benchmarks/tables\.py (\w+) -->\n).*?(<!-- end -->)", re.DOTALL | re.MULTILINE
)


def _results(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / f"{name}.json").read_text())


def head() -> str:
    return head_report.times_and_memory(_results("head"))


def first() -> str:
    """The sentences of the README's first screen."""
    return head_report.largest_trained(_results("head"))


def fp32() -> str:
    return head_report.fp32_ratios(_results("head_fp32"), _results("head_avx2_fp32"))


def head_limit() -> str:
    return head_report.shares_of_limit(_results("head_kept_memory"))


def trl() -> str:
    return head_report.against_trl(_results("head"), _results("head_fp32"))


def liger() -> str:
    return head_report.against(_results("head"), "Liger DPO", "Liger 0.8.5")


def cce() -> str:
    return head_report.against_cce(_results("head"))


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
                *(f"{two_digits(errors[side])} nat" for side in both),
            ]
        )
    tokens = next(iter(results["modes"].values()))["tokens"]
    titles = [f"{what}{who}" for what in ("", "memory, ", "error, ") for who in ("TRL", "patched")]
    return (
        f"{options['pairs']} pairs, {tokens['labelled']} labelled of {tokens['positions']} "
        f"positions, vocabulary {options['vocab']},\nhidden size {options['hidden']}, "
        f"{options['layers']} layers, {options['dtype']}:\n\n" + table(["head", *titles], rows)
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
    for name in ("cpu_linear", "cpu_linear_avx512", "cpu_linear_bf16"):
        found = _results(name)
        machine = found["machine"]
        step = {side: found["step_s"][side]["median"] for side in ("torch", "native")}
        rows.append(
            [
                f"{machine['cpu']}, {', '.join(machine['cpu_features'])}",
                found["options"]["dtype"],
                str(found["options"]["layers"]),
                f"{step['torch']:.2f} s",
                f"{step['native']:.2f} s",
                f"{step['torch'] / step['native']:.2f}x",
                f"{found['products_speedup']:.2f}x",
            ]
        )
    products = "the layers' products alone"
    header = ["processor", "dtype", "blocks", "torch's", "fastpref's", "step", products]
    versions = f"{machine['threads']} threads, torch {machine['packages']['torch']}"
    return table(header, rows) + f"\n{versions}.\n"


def _gains(name: str) -> str:
    results = _results(name)
    return table(*columns_report.gains(results)) + "\n" + columns_report.about_gains(results)


def columns() -> str:
    return _gains("columns")


def columns_avx512() -> str:
    return _gains("columns_avx512")


def columns_large_vocabulary() -> str:
    return _gains("columns_large_vocabulary")


def block_filter() -> str:
    return table(*columns_report.block_filter(_results("columns")))


def columns_training() -> str:
    results = _results("columns_training")
    return table(*columns_report.training(results)) + "\n" + columns_report.about_training(results)


def rlhf() -> str:
    return _against_rlhf("rlhf")


def rlhf_smollm2() -> str:
    return _against_rlhf("rlhf_smollm2")


def _against_rlhf(name: str) -> str:
    found = _results(name)
    options, machine = found["settings"], found["machine"]
    seeds = len(found["start"])
    truth = [r["accuracy"]["held_out_pairs"]["truth"] for r in found["runs"] if "accuracy" in r]
    start = sum(point["reward"] for point in found["start"]) / seeds
    pairs = [part["pairs"]["pairs"] for part in found["pairs"]]
    sampling = sum(part["pairs"]["seconds"] for part in found["pairs"]) / seeds
    return (
        table(*rlhf_report.cost_rows(found)) + "\n"
        f"{found['model']}, {pairs[0]} pairs, {options['epochs']} "
        f"{'epoch' if options['epochs'] == 1 else 'epochs'}, {options['batch']} pairs "
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
        table(header, rows) + "\n"
        f"{machine['cpu']}, {machine['threads']} threads, {', '.join(machine['cpu_features'])}; "
        f"{settings['batch']} pairs a step, {settings['dtype']}, medians of "
        f"{settings['steps'] - 1} steps,\nTRL {machine['packages']['trl']}. Memory is what stands "
        "above the libraries, the policy's weights and Adam's states.\n"
    )


def faults() -> str:
    results = _results("reliability")
    rows = reliability.table(results)
    return table(["what", "tests/faults/", "found"], rows) + "\n" + reliability.machine(results)


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
        head_limit,
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
        columns_avx512,
        columns_large_vocabulary,
        columns_training,
        rlhf,
        rlhf_smollm2,
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
