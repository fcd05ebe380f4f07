"""What `cpu_linear` gains: the products of a body's Linear layers, and whole optimiser steps.

    python benchmarks/cpu_linear.py

First the three products of each layer of SmolLM2-135M's shapes, torch's and fastpref's in turns.
Then steps of a model of these shapes with random weights in fastpref's trainer, reference and
optimiser included, with the layers on the one product and on the other in turns. Writes a JSON to
benchmarks/results/.
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from lib import results

from fastpref.backends import native
from fastpref.body import LinearProducts

SIDES = ("torch", "native")


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add = parser.add_argument
    add("--hidden", type=int, default=576)
    add("--intermediate", type=int, default=1536)
    add("--heads", type=int, default=9)
    add("--kv-heads", type=int, default=3)
    add("--layers", type=int, default=30)
    add("--vocab", type=int, default=49152)
    add("--pairs", type=int, default=1, help="pairs a step")
    add("--prompt", type=int, default=128, help="tokens of a prompt")
    add("--answer", type=int, default=384, help="tokens of an answer")
    add("--dtype", default="float32", choices=["float32", "bfloat16"], help="of weights and body")
    add("--checkpointing", action="store_true", help="recompute activations")
    add("--repeats", type=int, default=5, help="timed calls of each side")
    add("--output", default="cpu_linear", help="name of the file in results/, or a path")
    return parser.parse_args(argv)


def alternate(sides: dict[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each call, after a call of each that does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(repeats + 1):
        for name, call in sides.items():
            start = time.perf_counter()
            call()
            if turn:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def products(args: argparse.Namespace, shapes: Counter[tuple[int, int]]) -> list[dict[str, Any]]:
    """GFLOP/s of the three products of each shape, for the tokens of a step."""
    tokens, dtype = 2 * args.pairs * (args.prompt + args.answer), getattr(torch, args.dtype)
    rows = []
    for (n, k), layers in shapes.items():
        x, weight, dy = (torch.randn(s).to(dtype) for s in ((tokens, k), (n, k), (tokens, n)))
        operands = {
            "forward": (x, weight),
            "input's gradient": (dy, weight.t()),
            "weight's gradient": (dy.t(), x.t()),
        }
        for name, (a, b) in operands.items():

            def own(a: Any = a, b: Any = b) -> None:
                native.own_product(a, b, torch.empty(a.shape[0], b.shape[0], dtype=dtype))

            sides = {"torch": lambda a=a, b=b: torch.mm(a, b.t()), "native": own}
            seconds = alternate(sides, args.repeats)
            median = {side: statistics.median(seconds[side]) for side in SIDES}
            rows.append(
                {
                    "shape": [n, k],
                    "layers": layers,
                    "product": name,
                    "gflops": {s: round(2e-9 * tokens * n * k / median[s], 1) for s in SIDES},
                    "seconds": {s: round(median[s], 5) for s in SIDES},
                    "speedup": round(median["torch"] / median["native"], 3),
                }
            )
    return rows


def tokenizer() -> Any:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.WordLevel({"<pad>": 0, "</s>": 1, "<unk>": 2}, unk_token="<unk>"))
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="</s>")


class Steps:
    """A trainer, taken one optimiser step at a time on one batch."""

    def __init__(self, args: argparse.Namespace, folder: str):
        from datasets import Dataset
        from transformers import LlamaConfig, LlamaForCausalLM

        from fastpref import PreferenceConfig, PreferenceTrainer

        torch.manual_seed(0)
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=args.vocab,
                hidden_size=args.hidden,
                intermediate_size=args.intermediate,
                num_hidden_layers=args.layers,
                num_attention_heads=args.heads,
                num_key_value_heads=args.kv_heads,
                pad_token_id=0,
                bos_token_id=1,
                eos_token_id=1,
                tie_word_embeddings=True,
            )
        ).to(getattr(torch, args.dtype))
        draw = random.Random(0)
        sizes = {"prompt_ids": args.prompt, "chosen_ids": args.answer, "rejected_ids": args.answer}
        pairs = [
            {name: [draw.randrange(2, args.vocab) for _ in range(n)] for name, n in sizes.items()}
            for _ in range(args.pairs)
        ]
        self.trainer = PreferenceTrainer(
            model=model,
            args=PreferenceConfig(
                output_dir=folder,
                per_device_train_batch_size=args.pairs,
                bf16=False,
                gradient_checkpointing=args.checkpointing,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                use_cpu=True,
                max_steps=1,
                cpu_linear="native",
            ),
            train_dataset=Dataset.from_list(pairs),
            processing_class=tokenizer(),
        )
        self.on_native = self.trainer._products
        self.trainer.create_optimizer()
        self.trainer.current_gradient_accumulation_steps = 1
        self.trainer.model.train()
        self.batch = next(iter(self.trainer.get_train_dataloader()))

    def shapes(self) -> Counter[tuple[int, int]]:
        """The shapes of the policy's layers, and how many it has of each."""
        policy = {id(module) for module in self.trainer.model.modules()}
        layers = (layer for layer, _ in self.on_native.layers if id(layer) in policy)
        return Counter(tuple(layer.weight.shape) for layer in layers)  # type: ignore[misc]

    def step(self, side: str) -> None:
        self.trainer._products = self.on_native if side == "native" else LinearProducts()
        self.trainer.training_step(self.trainer.model, dict(self.batch))
        self.trainer.optimizer.step()
        self.trainer.optimizer.zero_grad()


def main(argv: list[str] | None = None) -> None:
    args = arguments(argv)
    with tempfile.TemporaryDirectory() as folder:
        steps = Steps(args, folder)
        rows = products(args, steps.shapes())
        seconds = alternate({s: lambda s=s: steps.step(s) for s in SIDES}, args.repeats)
    median = {side: statistics.median(seconds[side]) for side in SIDES}
    # Policy and reference run forward; a recomputed forward pass comes on top.
    times = {"forward": 3 if args.checkpointing else 2}
    spent = {
        s: sum(r["layers"] * times.get(r["product"], 1) * r["seconds"][s] for r in rows)
        for s in SIDES
    }
    found = {
        "benchmark": "cpu_linear: the body's Linear layers on torch's product and on fastpref's",
        "machine": results.machine(),
        "options": {k: v for k, v in vars(args).items() if k != "output"},
        "kernel": native.product_kernel(getattr(torch, args.dtype), torch.float32),
        "products": rows,
        "products_speedup": round(spent["torch"] / spent["native"], 3),
        "step_s": {
            s: {"median": round(median[s], 3), "all": [round(t, 3) for t in seconds[s]]}
            for s in SIDES
        },
        "share_of_the_products": {s: round(spent[s] / median[s], 3) for s in SIDES},
        "targets": [
            results.target("step: torch's over native's", 1.3, median["torch"] / median["native"])
        ],
    }
    results.write_json(results.results_path(args.output), found)
    header = ["shape, product", "torch GFLOP/s", "native GFLOP/s", "speed-up"]
    lines = [
        [
            f"{r['shape'][0]}x{r['shape'][1]}, {r['product']}",
            *(f"{r['gflops'][s]:.0f}" for s in SIDES),
            f"{r['speedup']:.2f}x",
        ]
        for r in rows
    ]
    print(results.table(header, lines))
    for side in SIDES:
        share = found["share_of_the_products"][side]
        print(f"step, {side}: {median[side]:.2f} s, of which the body's products {share:.0%}")
    print(results.target_table(found["targets"]))


if __name__ == "__main__":
    main()
