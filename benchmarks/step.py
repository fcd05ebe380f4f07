"""What each feature of the trainer gains in a training step, on a real model.

    python benchmarks/step.py --model DIR --data FILE

Pairs of three kinds of length: those of the data (short prompts, long answers), and pairs cut from
the same texts with the lengths of HH-RLHF (dialogues, short answers) and of TL;DR (long posts,
one-sentence summaries). On each kind fastpref's trainer takes turns with TRL's DPOTrainer on the
same pairs, seed and settings, and then with itself without one of its features at a time. Two runs
are alive at a time, each in a process of its own. Writes a JSON to benchmarks/results/.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from lib import results
from lib.training import is_worker, parser_of, read_pairs, request, take_turns, write_lines

# Medians and spreads of the logarithm of the tokens, and the limits, of a prompt and of an answer.
LENGTHS = {
    "data": None,
    "HH-RLHF": ((130, 0.8, 16, 800), (50, 0.8, 8, 300)),
    "TL;DR": ((330, 0.35, 120, 520), (33, 0.35, 10, 70)),
}
ON = {"prefix_sharing": "auto", "packing": True}
OFF: dict[str, dict[str, Any]] = {
    "no prefix sharing": {"prefix_sharing": False},
    "no packing": {"packing": False},
    "neither": {"prefix_sharing": False, "packing": False},
    "reference model in the step": {"precompute_ref_log_probs": False},
    "freed memory returned": {"keep_cpu_memory": False},
}


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = parser_of(__doc__)
    add = parser.add_argument
    add("--lengths", default=",".join(LENGTHS), help="kinds of length")
    add("--off", default=",".join(OFF), help="features that are left out in turn; may be empty")
    add("--steps", type=int, default=4, help="optimiser steps of a run; the first does not count")
    add("--batch", type=int, default=4, help="pairs a step")
    add("--max-length", type=int, default=1024, help="tokens of prompt and answer")
    add("--learning-rate", type=float, default=1e-6)
    add("--beta", type=float, default=0.1)
    add("--seed", type=int, default=42)
    add("--precision", default="exact", choices=["exact", "fast"], help="of fastpref's head")
    add("--dtype", default="float32", help="of the weights")
    add("--autocast", dest="no_autocast", action="store_false", help="bf16 autocast")
    add("--no-checkpointing", action="store_true", help="keep activations; recomputed by default")
    add("--output", default="step", help="name of the file in results/, or a path")
    args = parser.parse_args(argv)
    args.lengths = [name for name in args.lengths.split(",") if name]
    args.off = [name for name in args.off.split(",") if name]
    for name, known in (("lengths", LENGTHS), ("off", OFF)):
        if unknown := set(getattr(args, name)) - set(known):
            parser.error(f"--{name}: got {', '.join(unknown)}, expected {', '.join(known)}")
    return args


def text_of(turns: Any) -> str:
    return turns if isinstance(turns, str) else " ".join(turn["content"] for turn in turns)


def cut_pairs(pairs: list[dict], kind: str, count: int, tokenizer: Any, seed: int) -> list[dict]:
    """So many pairs with lengths of a kind. Their texts are consecutive pieces of the data's."""
    draw = random.Random(seed)
    if (lengths := LENGTHS[kind]) is None:
        return draw.sample(pairs, count)
    order = draw.sample(range(len(pairs)), len(pairs))
    ids: list[int] = []
    for i in order:
        ids += tokenizer(text_of(pairs[i]["chosen"]), add_special_tokens=False)["input_ids"]

    def piece(which: int) -> str:
        median, spread, low, high = lengths[which]
        tokens = round(median * draw.lognormvariate(0, spread))
        tokens = min(max(tokens, low), high)
        if len(ids) < tokens:
            raise SystemExit("the data's texts are too short for so many pairs")
        taken, ids[:tokens] = ids[:tokens], []
        return str(tokenizer.decode(taken))

    names = {"prompt": 0, "chosen": 1, "rejected": 1}
    return [{name: piece(which) for name, which in names.items()} for _ in range(count)]


def turns_of(args: argparse.Namespace, data: str, other: str | None) -> dict[str, Any]:
    """fastpref with all features, in turns with TRL (None) or without a feature."""
    common = {"steps": args.steps, "train": data, "segment": 1}
    wanted = {"fastpref": request(args, **common, fastpref_options=ON)}
    if other is None:
        wanted["TRL"] = request(args, **common, trainer="trl", precompute=False)
    else:
        wanted[other] = request(args, **common, fastpref_options=ON | OFF[other])
    try:
        found = take_turns(__file__, wanted)
    except RuntimeError as error:
        return {"missing": str(error)}
    ours, theirs = (found[name] for name in wanted)
    for name in wanted:
        found[name]["pairs_per_s"] = round(args.batch / found[name]["step_s_with_reference"], 3)
        found[name]["above_bytes"] = found[name]["peak_bytes"] - found[name]["floor_bytes"]
    losses = zip(ours["log"], theirs["log"], strict=True)
    return {
        "runs": found,
        "largest_loss_gap": max(abs(a["loss"] - b["loss"]) for a, b in losses),
        "speedup": round(theirs["step_s_with_reference"] / ours["step_s_with_reference"], 3),
        "memory": round(ours["above_bytes"] / max(theirs["above_bytes"], 1), 3),
    }


def targets(found: dict[str, Any]) -> list[dict[str, Any]]:
    out = []
    for kind, speed in (("TL;DR", 2.0), ("data", 1.4)):
        peer = found.get(kind, {}).get("TRL", {})
        if "runs" not in peer:
            continue
        what = f"{kind}: pairs/s, fastpref's over TRL's"
        out.append(results.target(what, speed, peer["speedup"]))
        if kind == "TL;DR":
            what = f"{kind}: peak memory above model and optimiser, fastpref's over TRL's"
            out.append(results.target(what, 0.5, peer["memory"], most=True))
    return out


def report(found: dict[str, Any]) -> str:
    lines = []
    for kind, by in found["lengths"].items():
        rows = []
        for other, cell in by.items():
            if "missing" in cell:
                lines.append(f"{kind}, {other}: {cell['missing']}")
                continue
            for name, run in cell["runs"].items():
                rows.append(
                    [
                        name if name != "fastpref" else f"fastpref, beside {other}",
                        f"{run['median_step_s']:.2f}",
                        f"{run['pairs_per_s']:.3f}",
                        f"{run['above_bytes'] / 2**30:.2f}",
                        f"{cell['speedup']:.2f}x" if name == "fastpref" else "",
                    ]
                )
        header = [kind, "s a step", "pairs/s", "GiB above", "speed-up"]
        lines.append(results.table(header, rows))
    return "\n\n".join([*lines, results.target_table(found["targets"])])


def main(argv: list[str] | None = None) -> None:
    if is_worker(argv):
        return
    args = arguments(argv)
    from transformers import AutoTokenizer

    begun = time.perf_counter()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    pairs = read_pairs(args.data)
    skipped = ("model", "data", "output")
    by_kind: dict[str, Any] = {kind: {} for kind in args.lengths}
    found = {
        "benchmark": "step: what each feature of the trainer gains in a step, and TRL's DPOTrainer",
        "machine": results.machine(),
        "model": Path(args.model).name,
        "settings": {k: v for k, v in vars(args).items() if k not in skipped}
        | {
            "pairs_per_s": "pairs of a step over its median time and its share of the reference's "
            "log-probs computed ahead",
            "above_bytes": "peak resident memory less what a process with the libraries has, and "
            "less the policy's weights and Adam's two states",
        },
        "lengths": by_kind,
    }
    path = results.results_path(args.output)
    with tempfile.TemporaryDirectory() as folder:
        for number, kind in enumerate(args.lengths):
            count = args.steps * args.batch
            cut = cut_pairs(pairs, kind, count, tokenizer, args.seed)
            data = write_lines(Path(folder) / f"{number}.jsonl", cut)
            for other in (None, *args.off):
                print(f"{kind}: {other or 'TRL'}", file=sys.stderr)
                by_kind[kind][other or "TRL"] = turns_of(args, data, other)
                found["wall_s"] = round(time.perf_counter() - begun, 1)
                found["targets"] = targets(by_kind)
                results.write_json(path, found)
    print(report(found))
    print(f"{found['wall_s']:.0f} s in all; wrote {path.name}")


if __name__ == "__main__":
    main()
