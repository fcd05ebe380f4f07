"""Whether training with gradients from columns of D ends where exact gradients end.

    python benchmarks/columns_training.py --model DIR --data FILE

DPO and IPO, of all weights and of a LoRA adapter, on the same pairs and seed. Each is trained with
exact gradients, with `gradient_tolerance`, and with D rounded to bf16, the error that every
implementation with 16-bit logits has. A run is judged by its training losses, by held-out
pairs, and by the distance of its trained weights from those of the exact run, over the distance
that the exact run moved them. The head's own gradient stays exact, as is the default. Writes a JSON
and a PNG to benchmarks/results/, after each run; cases that the file has whole are not repeated.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import tempfile
from pathlib import Path
from typing import Any

from lib import columns_report, results
from lib.training import Run, is_worker, parser_of, request, write_lines
from train import split

LOSSES = {"dpo": "sigmoid", "ipo": "ipo"}
KINDS = ("exact", "columns", "bf16 D")


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = parser_of(__doc__)
    add = parser.add_argument
    add("--losses", nargs="*", default=list(LOSSES), choices=list(LOSSES))
    add("--trained", nargs="*", default=["all weights", "LoRA"], choices=["all weights", "LoRA"])
    add("--tolerance", type=float, default=1.5e-3)
    add("--steps", type=int, default=60, help="optimiser steps of a run")
    add("--held-out", type=int, default=40, help="pairs judged after training")
    add("--batch", type=int, default=2, help="pairs a step")
    add("--max-length", type=int, default=128, help="tokens of prompt and answer")
    add("--learning-rate", type=float, default=1e-5, help="of all weights; ten times it for LoRA")
    add("--rank", type=int, default=16, help="of LoRA")
    add("--beta", type=float, default=0.1)
    add("--seed", type=int, default=42)
    add("--output", default="columns_training", help="name of the files in results/, or a path")
    args = parser.parse_args(argv)
    args.precision, args.dtype = "exact", "float32"
    args.no_autocast = args.no_checkpointing = True
    return args


def weights_distance(folder: Path, kind: str) -> dict[str, float]:
    """Of the head and of the rest: the distance of a run's weights from the exact run's, over the
    distance that the exact run moved them."""
    from safetensors import safe_open

    apart = {"body": 0.0, "head": 0.0}
    moved = dict(apart)
    names = (kind, "exact", "exact.before")
    files = [safe_open(os.fspath(folder / name), "pt") for name in names]
    for name in files[0].keys():
        here, exact, before = (file.get_tensor(name).double() for file in files)
        part = "head" if "embed_tokens" in name or "lm_head" in name else "body"
        apart[part] += float((here - exact).square().sum())
        moved[part] += float((exact - before).square().sum())
    return {part: (apart[part] / moved[part]) ** 0.5 for part in apart if moved[part]}


def judge(run: dict[str, Any], exact: dict[str, Any]) -> dict[str, Any]:
    """What sets a run apart from the one with exact gradients."""
    losses = [abs(a["loss"] - b["loss"]) for a, b in zip(run["log"], exact["log"], strict=True)]
    after, wanted = run["held_out_after"], exact["held_out_after"]
    margin = wanted["rewards/margins"]
    return {
        "largest difference of a training loss": max(losses),
        "held-out accuracy, exact": wanted["rewards/accuracies"],
        "held-out accuracy": after["rewards/accuracies"],
        "held-out margin, exact": margin,
        "held-out margin": after["rewards/margins"],
        "margin, relative difference": abs(after["rewards/margins"] / margin - 1),
        "weights": run["weights"],
    }


def targets(found: dict[str, dict[str, dict[str, Any]]]) -> list[dict[str, Any]]:
    out = []
    for case, judged in found.items():
        if len(judged) < 2:
            continue
        columns, rounded = judged["columns"], judged["bf16 D"]
        ratio = columns["weights"]["body"] / rounded["weights"]["body"]
        margin = columns["margin, relative difference"]
        out += [
            results.target(f"{case}: the body's distance over that of bf16 D", 2, ratio, most=True),
            results.target(f"{case}: margin, relative difference", 1e-3, margin, most=True),
        ]
    return out


def plot(runs: dict[str, dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, max(len(runs), 1), figsize=(4 * len(runs), 6), squeeze=False)
    for i, (case, kinds) in enumerate(runs.items()):
        for row, key in enumerate(("loss", "rewards/margins")):
            axis = axes[row][i]
            axis.spines[["top", "right"]].set_visible(False)
            for (kind, run), style in zip(kinds.items(), ("-", "--", ":"), strict=False):
                steps = [entry["step"] for entry in run["log"]]
                axis.plot(steps, [e[key] for e in run["log"]], style, label=kind, linewidth=2)
            axis.set_title(f"{case}: {'training loss' if row == 0 else 'reward margin'}")
            axis.set_xlabel("optimiser step")
    axes[0][0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(argv: list[str] | None = None) -> None:
    if is_worker(argv):
        return
    args = arguments(argv)
    train, judged = split(args.data, args.steps * args.batch, args.held_out, args.seed)
    kept = {k: v for k, v in vars(args).items() if k not in ("losses", "trained", "output")}
    settings = kept | {"model": Path(args.model).name, "data": Path(args.data).name}
    path = results.results_path(args.output)
    before = json.loads(path.read_text()) if path.is_file() else {}
    same = before.get("settings") == settings
    runs: dict[str, dict[str, Any]] = before["runs"] if same else {}
    found: dict[str, dict[str, dict[str, Any]]] = before["against exact"] if same else {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        files = {
            "train": write_lines(folder / "train.jsonl", train),
            "held_out": write_lines(folder / "held_out.jsonl", judged),
        }
        for loss, trained in itertools.product(args.losses, args.trained):
            case = f"{loss.upper()}, {trained}"
            if len(runs.get(case, {})) == len(KINDS):
                continue
            lora = trained == "LoRA"
            runs[case], found[case] = {}, {}
            for kind in KINDS:
                ahead = folder / "with_reference"
                first = not ahead.is_dir()
                what = request(
                    args,
                    **files,
                    loss=LOSSES[loss],
                    keep_data=os.fspath(ahead) if first else None,
                    keep_weights=os.fspath(folder / kind),
                    before=False,
                    lora=args.rank if lora else 0,
                    learning_rate=args.learning_rate * (10 if lora else 1),
                    fastpref_options={"gradient_tolerance": args.tolerance}
                    if kind == "columns"
                    else {},
                    rounded_d=kind == "bf16 D",
                )
                run = runs[case][kind] = Run(__file__, f"{case}, {kind}", what).finish()
                if first:
                    files = {file: os.fspath(ahead / file) for file in files}
                if kind != "exact":
                    run["weights"] = weights_distance(folder, kind)
                    found[case][kind] = judge(run, runs[case]["exact"])
                results.write_json(
                    path,
                    {
                        "benchmark": "columns_training: gradients from columns against exact ones",
                        "machine": results.machine(),
                        "settings": settings,
                        "targets": targets(found),
                        "against exact": found,
                        "runs": runs,
                    },
                )
                plot(runs, path.with_suffix(".png"))
    print(results.table(*columns_report.training({"against exact": found})))
    print(results.target_table(targets(found)))


if __name__ == "__main__":
    main()
