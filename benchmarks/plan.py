"""How close `fastpref plan` comes to what `fastpref profile` measures, over a grid of trainings.

    python benchmarks/plan.py [--first I] [--only N] [--alone] [--memory-only] [--output plan]

With --first the rows before I are taken from the file, so that a busy machine measures in parts.
With --alone the measurements have the processors to themselves (SCHED_FIFO, a right of root).
With --memory-only each training has one round and runs once, and no seconds are compared.

Each configuration is a small model with random weights and random pairs. The worker process of
`fastpref profile` trains it: a step on the longest pairs, which warms up, three rounds of three
batches, and the longest pairs again. The last step's memory is simulated without weights: that of
its tensors, and what is resident in the process. The seconds of the three batches, the best of the
rounds, are predicted by a probe of fewer layers. Each training runs twice, which shows how well its
seconds can be known. Writes a JSON to benchmarks/results/: bytes measured and predicted, of tensors
by component and of the process, and the seconds.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import statistics
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from lib import results

from fastpref.planning.estimate import OUTSIDE, kept_bytes
from fastpref.planning.probe import probe_steps
from fastpref.planning.simulate import StepOptions, highest, simulate_parts
from fastpref.profiling.account import COMPONENTS
from fastpref.profiling.processes import Child
from fastpref.profiling.profile import choose_rows, training_environment

MODELS: dict[str, dict[str, Any]] = {
    "llama, V 32000, H 128": {
        "model_type": "llama", "vocab_size": 32000, "hidden_size": 128, "intermediate_size": 352,
        "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
    },
    "mistral, V 12000, H 192, 12 layers, tied": {
        "model_type": "mistral", "vocab_size": 12000, "hidden_size": 192, "intermediate_size": 512,
        "num_hidden_layers": 12, "num_attention_heads": 4, "num_key_value_heads": 4,
        "tie_word_embeddings": True, "sliding_window": None,
    },
    "gpt2, V 8000, H 192": {
        "model_type": "gpt2", "vocab_size": 8000, "n_embd": 192, "n_layer": 5, "n_head": 6,
        "n_positions": 1024, "bos_token_id": 1,
    },
}  # fmt: skip
# pairs, max_length, checkpointing, method, reference; each with both heads.
SETTINGS = (
    (2, 256, True, "full", "precompute"),
    (2, 256, False, "full", "precompute"),
    (4, 128, True, "full", "model"),
    (1, 512, False, "full", "precompute"),
    (2, 256, True, "lora", "adapter"),
)


def make_model(name: str, folder: Path) -> str:
    """A directory with a model of random weights and a tokenizer of words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    given = dict(MODELS[name])
    config = AutoConfig.for_model(given.pop("model_type"), **given, pad_token_id=0, eos_token_id=1)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    vocabulary = {w: i for i, w in enumerate(["<pad>", "</s>", "<unk>", *WORDS])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.add_special_tokens(["<pad>", "</s>", "<unk>"])
    PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)
    return str(folder)


WORDS = [f"w{i}" for i in range(500)]


def make_pairs(seed: int, count: int = 40) -> list[dict[str, str]]:
    draw = random.Random(seed)

    def text(low: int, high: int) -> str:
        return " ".join(draw.choices(WORDS, k=draw.randint(low, high)))

    keys = {"prompt": (20, 200), "chosen": (20, 300), "rejected": (20, 300)}
    return [{k: text(*sizes) + " " for k, sizes in keys.items()} for _ in range(count)]


TIMED, ROUNDS = 3, 3  # batches that are timed, and how often


@contextlib.contextmanager
def processors(alone: bool) -> Iterator[None]:
    """Whether the threads of this process have the processors to themselves."""

    def schedule(policy: int, priority: int) -> None:
        for thread in os.listdir("/proc/self/task"):
            os.sched_setscheduler(int(thread), policy, os.sched_param(priority))

    if not alone:
        yield
        return
    schedule(os.SCHED_FIFO, 50)
    try:
        yield
    finally:
        schedule(os.SCHED_OTHER, 0)


_WORKER = [sys.executable, "-m", "fastpref.profiling.worker"]


def train(request: dict[str, Any]) -> dict[str, Any]:
    """What the worker of `fastpref profile` finds, in a process of its own."""
    child = Child(_WORKER, request, training_environment(), loud=False)
    try:
        while (message := child.hear()) is not None:
            if "result" in message:
                return message["result"]
            if "failed" in message:
                raise RuntimeError(message["failed"])
        raise RuntimeError(child.ending())
    finally:
        child.stop()


def compare(
    name: str, path: str, setting: tuple[Any, ...], alone: bool, memory_only: bool
) -> list[dict[str, Any]]:
    """Both heads of one configuration."""
    from transformers import AutoConfig

    size, length, checkpointing, method, reference = setting
    rounds = 1 if memory_only else ROUNDS
    lora = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"} if method == "lora" else None
    request: dict[str, Any] = {
        "model": path,
        "loss": {"loss_type": "sigmoid", "beta": 0.1},
        "batch_size": size,
        "grad_accumulation": 1,
        "max_length": length,
        "reference": reference,
        "lora": lora,
        "bf16": False,
        "dtype": "float32",
        "gradient_checkpointing": checkpointing,
        "optim": None,
        "learning_rate": 1e-6,
        "seed": 0,
        "trust_remote_code": False,
        "device": "cpu",
        "prefix_sharing": True,
        "steps": TIMED * rounds + 2,
    }
    rows, batches = choose_rows(path, make_pairs(len(name) + size), request, TIMED)
    first, last = rows[size:-size], rows[-size:]
    rows = [*last, *first * rounds, *last]
    config = AutoConfig.from_pretrained(path)
    longest = [tuple(pair) for pair in batches["longest"][0]["lengths"]]
    timed = [[tuple(pair) for pair in batch["lengths"]] for batch in batches["timed"]]
    out = []
    for side in ("fastpref", "eager"):
        options = StepOptions(
            method=method, head=side, gradient_checkpointing=checkpointing, reference=reference
        )
        account = highest(simulate_parts(config, longest, options))
        resident = OUTSIDE["cpu"] + account.peak_bytes + kept_bytes("cpu", account.components)
        given = {**request, "side": side, "rows": rows}
        with processors(alone):
            found = train(given)
        sizes = {k: found["components"].get(k, 0) for k in (*COMPONENTS, "malloc", "libraries")}
        row = {
            "model": name,
            "head": side,
            "pairs": size,
            "max_length": length,
            "gradient_checkpointing": checkpointing,
            "method": method,
            "reference": reference,
            "measured_bytes": found["tensor_bytes"],
            "predicted_bytes": account.peak_bytes,
            "error": account.peak_bytes / found["tensor_bytes"] - 1,
            "resident_bytes": found["peak_bytes"],
            "predicted_resident_bytes": resident,
            "resident_error": resident / found["peak_bytes"] - 1,
            "measured": {k: v for k, v in sizes.items() if v},
            "predicted": {k: v for k, v in account.components.items() if v},
            "measured_phase": found["peak_phase"],
            "predicted_phase": account.peak_phase,
        }
        if not memory_only:
            with processors(alone):
                predicted = probe_steps(config, timed, options)
            with processors(alone):
                again = train(given)
            phases = [_phases(f["steps"]) for f in (found, again)]
            runs = [sum(step.values()) for step in phases]
            row |= {
                "runs_seconds": runs,
                "step_seconds": statistics.mean(runs),
                "predicted_seconds": statistics.mean(step.total for step in predicted),
                "measured_phases": phases[0],
                "predicted_phases": _phases([asdict(step) for step in predicted]),
            }
        out.append(row)
    return out


def _phases(steps: list[dict[str, float]]) -> dict[str, float]:
    """The mean seconds of each phase: over the batches, of the best of their rounds."""
    names = dict.fromkeys(name for step in steps for name in step)
    return {
        name: statistics.mean(
            min(step.get(name, 0.0) for step in steps[batch::TIMED]) for batch in range(TIMED)
        )
        for name in names
    }


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """How close the predictions are, and how close a second run of the same training is."""
    errors = sorted(abs(row["error"]) for row in rows)
    out = {
        "configurations": len(rows),
        "median_error": statistics.median(errors),
        "largest_error": errors[-1],
    }
    # Files from before the resident memory was predicted have none.
    if resident := sorted(abs(row["resident_error"]) for row in rows if "resident_error" in row):
        out |= {
            "median_error_of_resident": statistics.median(resident),
            "largest_error_of_resident": resident[-1],
            "resident_within_10_percent": sum(error <= 0.1 for error in resident),
        }
    rows = [row for row in rows if "step_seconds" in row]
    if not rows:
        return out
    ratios = [row["predicted_seconds"] / row["step_seconds"] for row in rows]
    of_seconds = sorted(abs(ratio - 1) for ratio in ratios)
    again = sorted(abs(b / a - 1) for a, b in (row["runs_seconds"] for row in rows))
    return out | {
        "median_ratio_of_seconds": statistics.median(ratios),
        "median_error_of_seconds": statistics.median(of_seconds),
        "largest_error_of_seconds": of_seconds[-1],
        "seconds_within_10_percent": sum(error <= 0.1 for error in of_seconds),
        "median_difference_of_runs": statistics.median(again),
        "largest_difference_of_runs": again[-1],
    }


def line(row: dict[str, Any]) -> str:
    """A row in words."""
    text = (
        f"{row['head']}: tensors {row['measured_bytes'] / 1e6:.0f} MB, predicted "
        f"{row['predicted_bytes'] / 1e6:.0f} ({100 * row['error']:+.1f} %); resident "
        f"{row['resident_bytes'] / 1e6:.0f} MB, predicted "
        f"{row['predicted_resident_bytes'] / 1e6:.0f} ({100 * row['resident_error']:+.1f} %)"
    )
    if "step_seconds" not in row:
        return text
    again = row["runs_seconds"][1] / row["runs_seconds"][0]
    return text + (
        f"; {row['step_seconds']:.3f} s, predicted {row['predicted_seconds']:.3f} "
        f"({again:.2f} again)"
    )


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--first", type=int, default=0, help="the first configuration to measure")
    parser.add_argument("--only", type=int, help="so many of the configurations")
    parser.add_argument("--alone", action="store_true", help="have the processors alone")
    parser.add_argument("--memory-only", action="store_true", help="compare no seconds")
    parser.add_argument("--output", default="plan", help="name of the file in results/, or a path")
    args = parser.parse_args(argv)
    if args.memory_only and args.output == "plan":
        parser.error("--memory-only needs an --output of its own: the table has seconds")
    rows: list[dict[str, Any]] = []
    todo = [(name, setting) for name in MODELS for setting in SETTINGS]
    todo = todo[args.first :][: args.only]
    path = results.results_path(args.output)
    if args.first:
        rows = json.loads(path.read_text())["rows"][: 2 * args.first]
    machine = results.machine()
    with tempfile.TemporaryDirectory() as folder:
        paths: dict[str, str] = {}
        for name, setting in todo:
            if name not in paths:
                paths[name] = make_model(name, Path(folder) / str(len(paths)))
            rows += compare(name, paths[name], setting, args.alone, args.memory_only)
            for row in rows[-2:]:
                print(f"{name}, {setting}, {line(row)}", file=sys.stderr, flush=True)
            found = {
                "benchmark": "plan: a step as fastpref plan predicts it and as it is measured",
                "machine": machine,
                **summary(rows),
                "rows": rows,
            }
            results.write_json(path, found)
    print(json.dumps(summary(rows)))


if __name__ == "__main__":
    main()
