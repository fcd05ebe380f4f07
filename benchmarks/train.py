"""A real run: a model and preference data, trained with DPO and IPO, and DPO against TRL.

    python benchmarks/train.py --model DIR --data FILE

First fastpref's trainer and TRL's DPOTrainer take turns, a few steps each, on the same pairs, seed
and settings; then fastpref trains alone, and pairs with prompts it never saw are judged before and
after. Writes a JSON and a PNG to benchmarks/results/. README.md beside this file tells how to get a
model; neither it nor the data is part of the repository.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from lib import results
from lib.training import Run, is_worker, parser_of, read_pairs, request, take_turns, write_lines

from fastpref.bench.cases import split_names

LOSSES = ("dpo", "ipo")


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = parser_of(__doc__)
    add = parser.add_argument
    add("--losses", default="dpo,ipo", help="dpo, ipo or both")
    add("--steps", type=int, default=60, help="optimiser steps of each loss")
    add("--held-out", type=int, default=100, help="pairs judged before and after")
    add("--batch", type=int, default=2, help="pairs a step")
    add("--max-length", type=int, default=512, help="tokens of prompt and answer")
    add("--learning-rate", type=float, default=1e-5)
    add("--beta", type=float, default=0.1)
    add("--seed", type=int, default=42)
    add("--precision", default="exact", choices=["exact", "fast"], help="of fastpref's head")
    add("--dtype", default="float32", help="of the weights")
    add("--no-autocast", action="store_true", help="no bf16 autocast")
    add("--no-checkpointing", action="store_true", help="keep activations; recomputed by default")
    add(
        "--reference",
        default="precompute",
        choices=["precompute", "model"],
        help="fastpref's reference against TRL: log-probs computed ahead, whose time is counted,\n"
        "or a second model, as TRL does by default",
    )
    add("--peer-steps", type=int, default=8, help="steps against TRL; 0 leaves it out")
    add("--segment", type=int, default=2, help="steps in a turn")
    add("--output", default="train", help="name of the files in results/, or a path")
    args = parser.parse_args(argv)
    args.losses = split_names(args.losses, LOSSES)
    if not set(args.losses) <= set(LOSSES):
        parser.error(f"--losses: got {','.join(args.losses)}, expected dpo, ipo or both")
    return args


def split(path: str, train: int, held_out: int, seed: int) -> tuple[list[dict], list[dict]]:
    """Pairs to train on and pairs to judge, which share no prompt."""
    pairs = read_pairs(path)
    prompts: dict[str, list[dict]] = {}
    for pair in pairs:
        prompts.setdefault(json.dumps(pair["prompt"]), []).append(pair)
    order = list(prompts)
    random.Random(seed).shuffle(order)
    judged: list[dict] = []
    while order and len(judged) < held_out:
        judged += prompts[order.pop()]
    rest = [pair for prompt in order for pair in prompts[prompt]]
    random.Random(seed).shuffle(rest)
    if len(judged) < held_out or len(rest) < train:
        raise SystemExit(f"{path} has {len(pairs)} pairs; {train + held_out} are needed")
    return rest[:train], judged[:held_out]


def against_trl(args: argparse.Namespace, pairs: list[dict], folder: Path) -> dict[str, Any]:
    """Both trainers on the same pairs, taking turns; the reference's time is spread over steps."""
    data = write_lines(folder / "peer.jsonl", pairs[: args.peer_steps * args.batch])
    common = {"steps": args.peer_steps, "train": data, "segment": args.segment}
    ahead = args.reference == "precompute"
    wanted = {
        "fastpref": request(args, **common, precompute=ahead),
        "trl": request(args, **common, trainer="trl", precompute=False),
    }
    try:
        found = take_turns(__file__, wanted)
    except RuntimeError as error:
        return {"missing": str(error)}
    out: dict[str, Any] = {"steps": args.peer_steps, "segment": args.segment}
    out |= {"reference": args.reference} | found
    ours, theirs = out["fastpref"], out["trl"]
    losses = zip(ours["log"], theirs["log"], strict=True)
    out["largest_loss_gap"] = max(abs(a["loss"] - b["loss"]) for a, b in losses)
    speed = theirs["step_s_with_reference"] / ours["step_s_with_reference"]
    memory = ours["peak_bytes"] / theirs["peak_bytes"]
    out["targets"] = [
        results.target("step time: TRL's over fastpref's, with the reference", 2.0, speed),
        results.target("peak memory: fastpref's over TRL's", 0.5, memory, most=True),
    ]
    return out


def train_alone(
    args: argparse.Namespace, train: list[dict], judged: list[dict], folder: Path
) -> dict[str, Any]:
    """Each loss in turn. The reference's log-probs are computed by the first run and given to the
    others, as columns of the data."""
    files = {
        "train": write_lines(folder / "train.jsonl", train),
        "held_out": write_lines(folder / "held_out.jsonl", judged),
    }
    out: dict[str, Any] = {}
    for i, loss in enumerate(args.losses):
        keep = folder / "with_reference" if i == 0 and len(args.losses) > 1 else None
        what = request(
            args,
            **files,
            loss={"dpo": "sigmoid", "ipo": "ipo"}[loss],
            keep_data=keep and os.fspath(keep),
        )
        result = out[loss] = Run(__file__, loss, what).finish()
        result["median_step_s"] = round(statistics.median(result["step_s"]), 3)
        if keep:
            files = {name: os.fspath(keep / name) for name in files}
    return out


def report(found: dict[str, Any]) -> str:
    lines = []
    for loss, r in found["training"].items():
        before, after = r["held_out_before"], r["held_out_after"]
        lines.append(
            f"{loss}: {len(r['step_s'])} steps, median {r['median_step_s']:.2f} s, peak "
            f"{r['peak_bytes'] / 2**30:.2f} GiB, reference {r['reference_s']:.0f} s; held out: "
            f"accuracy {before['rewards/accuracies']:.3f} to {after['rewards/accuracies']:.3f}, "
            f"margin {before['rewards/margins']:.4f} to {after['rewards/margins']:.4f}, loss "
            f"{before['loss']:.4f} to {after['loss']:.4f}"
        )
    peer = found["against_trl"]
    if peer and "missing" in peer:
        lines.append(f"TRL is missing: {peer['missing']}")
    elif peer:
        header = ["", "s a step", "with reference", "peak GiB"]
        rows = [
            [
                name,
                f"{peer[name]['median_step_s']:.2f}",
                f"{peer[name]['step_s_with_reference']:.2f}",
                f"{peer[name]['peak_bytes'] / 2**30:.2f}",
            ]
            for name in ("fastpref", "trl")
        ]
        lines += [results.table(header, rows), results.target_table(peer["targets"])]
    return "\n".join(lines)


def _smooth(values: list[float], window: int = 8) -> list[float]:
    return [statistics.fmean(values[max(0, i - window + 1) : i + 1]) for i in range(len(values))]


def plot(found: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 3, figsize=(14, 7.5), layout="constrained")
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
    (loss_axis, margin_axis, accuracy_axis), (step_axis, memory_axis, peer_axis) = axes
    panels = (
        (margin_axis, "rewards/margins", "reward margin"),
        (accuracy_axis, "rewards/accuracies", "reward accuracy"),
    )
    for i, (name, r) in enumerate(found["training"].items()):
        steps = [entry["step"] for entry in r["log"]]
        axis = loss_axis if i == 0 else loss_axis.twinx()
        axis.plot(steps, _smooth([e["loss"] for e in r["log"]]), color=f"C{i}")
        axis.set_ylabel(f"{name} loss", color=f"C{i}")
        for axis, key, _ in panels:
            values = _smooth([e[key] for e in r["log"]])
            axis.plot(steps, values, color=f"C{i}", alpha=0.6, label=f"{name}, training")
            ends = [r[f"held_out_{when}"][key] for when in ("before", "after")]
            axis.plot([0, steps[-1]], ends, "o--", color=f"C{i}", label=f"{name}, held out")
        step_axis.plot(steps, r["step_s"], color=f"C{i}", label=name)
    loss_axis.set_title("training loss, mean of 8 steps")
    for axis, _, title in panels:
        axis.set_title(title)
        axis.legend(fontsize=8)
    step_axis.set_title("seconds a step, training alone")
    step_axis.set_ylim(bottom=0)
    step_axis.legend(fontsize=8)
    peer = found["against_trl"]
    if peer and "missing" not in peer:
        names = ["fastpref", "trl"]
        bars = memory_axis.bar(
            names, [peer[n]["peak_bytes"] / 2**30 for n in names], color=["C0", "C7"]
        )
        memory_axis.bar_label(bars, fmt="%.2f")
        step = [peer[n]["median_step_s"] for n in names]
        ahead = [peer[n]["step_s_with_reference"] - s for n, s in zip(names, step, strict=True)]
        peer_axis.bar(names, step, color=["C0", "C7"], label="step")
        bars = peer_axis.bar(names, ahead, bottom=step, color="C1", label="reference, ahead")
        peer_axis.bar_label(bars, [f"{s + a:.2f}" for s, a in zip(step, ahead, strict=True)])
        peer_axis.legend(fontsize=8)
    memory_axis.set_title("peak resident memory, GiB")
    peer_axis.set_title("seconds a step, taking turns")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(argv: list[str] | None = None) -> None:
    if is_worker(argv):
        return
    args = arguments(argv)
    begun = time.perf_counter()
    train, judged = split(args.data, args.steps * args.batch, args.held_out, args.seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        against = against_trl(args, train, folder) if args.peer_steps else None
        alone = train_alone(args, train, judged, folder)
    config = json.loads((Path(args.model) / "config.json").read_text())
    keys = ("model_type", "hidden_size", "num_hidden_layers", "vocab_size", "tie_word_embeddings")
    skipped = ("model", "data", "output")
    found = {
        "benchmark": "train: DPO and IPO on a real model and data, DPO against TRL's trainer",
        "machine": results.machine(),
        "model": {"name": Path(args.model).name, **{k: config.get(k) for k in keys}},
        "settings": {k: v for k, v in vars(args).items() if k not in skipped}
        | {
            "held_out_before": "policy and reference are the same then: margins are 0 up to the "
            "backbone's rounding, as its batches are not those of the precomputation, so the "
            "accuracy before training means nothing",
            "step_s": "wall time of one optimiser step, without pauses; medians against TRL leave "
            "out the first step; step_s_with_reference adds the precomputation's share of a step",
            "peak_bytes": "peak resident memory of the whole process, libraries included",
        },
        "wall_s": round(time.perf_counter() - begun, 1),
        "against_trl": against,
        "training": alone,
    }
    path = results.results_path(args.output)
    results.write_json(path, found)
    plot(found, path.with_suffix(".png"))
    print(report(found))
    print(f"{found['wall_s']:.0f} s in all; wrote {path.stem}.json and {path.stem}.png")


if __name__ == "__main__":
    main()
