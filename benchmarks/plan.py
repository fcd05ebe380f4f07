"""How close `fastpref plan` comes to what `fastpref profile` measures, over a grid of trainings.

    python benchmarks/plan.py [--first I] [--only N] [--output plan]

With --first the rows before I are taken from the file, so that a busy machine measures in parts.

Each configuration is a small model with random weights and random pairs, trained for three steps;
the last of them, on the longest pairs, is simulated without weights as well. Writes a JSON to
benchmarks/results/: bytes of tensors measured and predicted, by component, and the seconds.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from lib import results

from fastpref.planning.simulate import StepOptions, simulate_step
from fastpref.planning.times import measured_rates, step_seconds
from fastpref.profiling.account import COMPONENTS
from fastpref.profiling.profile import choose_rows
from fastpref.profiling.worker import profile_side

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


def compare(name: str, path: str, setting: tuple[Any, ...], rates: Any) -> list[dict[str, Any]]:
    """Both heads of one configuration, trained in this process: one step is timed."""
    from transformers import AutoConfig

    size, length, checkpointing, method, reference = setting
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
        "steps": 3,
    }
    rows, batches = choose_rows(path, make_pairs(len(name) + size), request, 1)
    config = AutoConfig.from_pretrained(path)
    longest = [tuple(pair) for pair in batches["longest"][0]["lengths"]]
    timed = [tuple(pair) for pair in batches["timed"][0]["lengths"]]
    out = []
    for side in ("fastpref", "eager"):
        gc.collect()
        found = profile_side({**request, "side": side, "rows": rows}, lambda message: None)
        options = StepOptions(
            method=method, head=side, gradient_checkpointing=checkpointing, reference=reference
        )
        account = simulate_step(config, longest, options)
        sizes = {k: found["components"][k] for k in COMPONENTS}
        out.append(
            {
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
                "measured": {k: v for k, v in sizes.items() if v},
                "predicted": {k: v for k, v in account.components.items() if v},
                "measured_phase": found["peak_phase"],
                "predicted_phase": account.peak_phase,
                "step_seconds": sum(found["steps"][0].values()),
                "predicted_seconds": step_seconds(config, timed, options, rates).total,
            }
        )
    return out


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--first", type=int, default=0, help="the first configuration to measure")
    parser.add_argument("--only", type=int, help="so many of the configurations")
    parser.add_argument("--output", default="plan", help="name of the file in results/, or a path")
    args = parser.parse_args(argv)
    rows: list[dict[str, Any]] = []
    todo = [(name, setting) for name in MODELS for setting in SETTINGS]
    todo = todo[args.first :][: args.only]
    path = results.results_path(args.output)
    if args.first:
        rows = json.loads(path.read_text())["rows"][: 2 * args.first]
    rates = measured_rates()
    with tempfile.TemporaryDirectory() as folder:
        paths: dict[str, str] = {}
        for name, setting in todo:
            if name not in paths:
                paths[name] = make_model(name, Path(folder) / str(len(paths)))
            rows += compare(name, paths[name], setting, rates)
            for row in rows[-2:]:
                print(
                    f"{name}, {setting}, {row['head']}: {row['measured_bytes'] / 1e6:.0f} MB, "
                    f"predicted {row['predicted_bytes'] / 1e6:.0f} ({100 * row['error']:+.1f} %); "
                    f"{row['step_seconds']:.2f} s, predicted {row['predicted_seconds']:.2f}",
                    file=sys.stderr,
                    flush=True,
                )
    errors = sorted(abs(row["error"]) for row in rows)
    found = {
        "benchmark": "plan: memory of a step as fastpref plan predicts it and as it is measured",
        "machine": results.machine(),
        "configurations": len(rows),
        "median_error": statistics.median(errors),
        "largest_error": errors[-1],
        "median_ratio_of_seconds": statistics.median(
            row["predicted_seconds"] / row["step_seconds"] for row in rows
        ),
        "rows": rows,
    }
    results.write_json(path, found)
    shown = ("configurations", "median_error", "largest_error", "median_ratio_of_seconds")
    print(json.dumps({k: found[k] for k in shown}))


if __name__ == "__main__":
    main()
