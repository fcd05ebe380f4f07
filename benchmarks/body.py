"""How much of their ideal gain prefix sharing and packing reach in a model's body.

    python benchmarks/body.py --model DIR

Forward and backward of the body alone, without head, loss and optimiser, on random tokens: padded
rows as TRL has them take turns with rows of segments in one process. Ideal is as many times faster
as there are fewer tokens: with a prompt of P tokens and answers of C, prefix sharing has P + 2C
instead of 2 (P + C). Attention also reads longer rows of keys, so that less is reached. Times are
medians. Writes a JSON to benchmarks/results/.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from lib.results import machine, results_path, table, target, target_table, write_json

from fastpref.attention import SegmentAttention
from fastpref.body import keep_cpu_memory
from fastpref.data import PreferenceCollator
from fastpref.data.batches import model_inputs
from fastpref.data.segments import SegmentCollator
from fastpref.heads.reading import unwrap

AIM = 0.9  # of the ideal


def example(draw: random.Random, vocab: int, prompt: int, chosen: int, rejected: int) -> dict:
    sizes = {"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected}
    return {key: [draw.randrange(vocab) for _ in range(size)] for key, size in sizes.items()}


def cases(vocab: int, pairs: int) -> dict[str, tuple[list[dict], SegmentCollator]]:
    """Name: the pairs, and what makes rows of segments of them."""
    draw = random.Random(0)

    def ragged() -> list[int]:
        return [min(max(round(draw.lognormvariate(4.8, 0.6)), 16), 500) for _ in range(2)]

    even = [example(draw, vocab, 512, 128, 128) for _ in range(pairs)]
    uneven = [example(draw, vocab, 32, *ragged()) for _ in range(2 * pairs)]
    return {
        "prefix sharing, P = 512, C = 128": (even, SegmentCollator(0)),
        "packing, ragged answers": (uneven, SegmentCollator(0, sharing=False, packing=True)),
        "both, P = 512, C = 128": (even, SegmentCollator(0, packing=True)),
    }


def step_of(model: Any, batch: dict[str, Any], attention: SegmentAttention) -> Callable[[], None]:
    body, inputs = unwrap(model).base_model, model_inputs(batch)

    def step() -> None:
        with attention.rows_of(batch):
            hidden = body(**inputs, use_cache=False).last_hidden_state
            hidden.backward(torch.ones_like(hidden))
        model.zero_grad(set_to_none=True)

    return step


def measure(model: Any, pairs: list[dict], collator: SegmentCollator, repeats: int) -> dict:
    attention = SegmentAttention(model, checked=True)
    batches = {"padded": PreferenceCollator(0)(pairs), "segments": collator(pairs)}
    tokens = {name: batch["input_ids"].numel() for name, batch in batches.items()}
    steps = {name: step_of(model, batch, attention) for name, batch in batches.items()}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(repeats + 1):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            if turn:  # the first warms up
                seconds[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(found) for name, found in seconds.items()}
    gain, ideal = (found["padded"] / found["segments"] for found in (medians, tokens))
    return {
        "tokens": tokens,
        "seconds": medians,
        "all seconds": seconds,
        "ratio": gain,
        "ideal": ideal,
        "of ideal": gain / ideal,
    }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add = parser.add_argument
    add("--model", required=True, help="directory of a causal model")
    add("--pairs", type=int, default=2, help="of a step; twice as many where they are ragged")
    add("--repeats", type=int, default=5)
    add("--output", default="body", help="name of the file in results/, or a path")
    args = parser.parse_args(argv)
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).train()
    found: dict[str, Any] = {}
    with keep_cpu_memory():
        for name, (pairs, collator) in cases(model.config.vocab_size, args.pairs).items():
            found[name] = measure(model, pairs, collator, args.repeats)
    targets = [
        target(f"{name}, of the ideal", AIM, case["of ideal"]) for name, case in found.items()
    ]
    options = {"pairs": args.pairs, "repeats": args.repeats, "parameters": model.num_parameters()}
    result = {"machine": machine(), "options": options, "cases": found, "targets": targets}
    write_json(results_path(args.output), result)
    header = ["", "padded s", "segments s", "ratio", "ideal"]
    rows = [
        [name, *(f"{s:.2f}" for s in case["seconds"].values()), f"{case['ratio']:.2f}x"]
        + [f"{case['ideal']:.2f}x"]
        for name, case in found.items()
    ]
    print(table(header, rows))
    print(target_table(targets))


if __name__ == "__main__":
    main()
