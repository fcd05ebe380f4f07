"""What gradients from columns of D cost and gain, on the hidden states of a real model.

    python benchmarks/columns.py --model DIR --data FILE

The states are those of completion tokens of the data's chosen answers. Exact gradients and
gradients from columns take turns in one process, forward and backward: with a frozen head, with a
trained one whose gradient is exact, and with both by columns. Freed memory is kept from call to
call, as in a trainer's steps. Times are medians. Errors are relative root mean squares against the
exact gradients. A filter of blocks, which is how cut-cross-entropy leaves out what is small, is
judged by the share of D that it multiplies and by its error. Writes a JSON to benchmarks/results/.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lib import columns_report
from lib.results import machine, results_path, table, target, target_table, write_json
from torch import Tensor

import fastpref
from fastpref.body import keep_cpu_memory

# Name: whether the head trains, whether its gradient takes columns, and the aim.
CASES = {
    "frozen head": (False, False, 1.4),
    "trained head, its gradient exact": (True, False, 1.25),
    "trained head, its gradient by columns": (True, True, 1.7),
}


def real_states(model: str, data: str, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states [tokens, H] of answers, their labels [tokens], and the head's weight [V, H]."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    states, labels, found = [], [], 0
    opened = gzip.open(data, "rt") if data.endswith(".gz") else open(data)
    with opened as lines, torch.no_grad():
        for line in lines:
            pair = json.loads(line)
            render = dict(tokenize=True, return_dict=True)
            prompt = tokenizer.apply_chat_template(
                pair["prompt"], add_generation_prompt=True, **render
            )["input_ids"]
            ids = tokenizer.apply_chat_template(pair["prompt"] + pair["chosen"], **render)
            ids = ids["input_ids"][:640]
            if len(ids) < len(prompt) + 100:
                continue
            hidden = network.model(torch.tensor([ids])).last_hidden_state[0]
            states.append(hidden[len(prompt) - 1 : -1])
            labels.append(torch.tensor(ids[len(prompt) :]))
            found += len(labels[-1])
            if found >= tokens:
                break
    weight = network.get_output_embeddings().weight.detach().clone()
    return torch.cat(states)[:tokens], torch.cat(labels)[:tokens], weight


def distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


def rounded_d(hidden: Tensor, labels: Tensor, weight: Tensor) -> float:
    """The error of u that rounding D to bf16 costs."""
    differences = sizes = 0.0
    for a in range(0, len(labels), 256):
        y = labels[a : a + 256]
        d = -torch.softmax(hidden[a : a + 256] @ weight.t(), 1)
        d[torch.arange(len(y)), y] += 1
        u = d @ weight
        differences += float((d.bfloat16().float() @ weight - u).square().sum())
        sizes += float(u.square().sum())
    return math.sqrt(differences / sizes)


def filtered_d(hidden: Tensor, labels: Tensor, weight: Tensor) -> list[dict[str, Any]]:
    """What a filter of blocks keeps of D, and its error of u, for several thresholds.

    A block of 128 tokens and 128 vocabulary entries is left out where no entry of it reaches the
    threshold. The vocabulary is sorted by mean logit, so that likely tokens share blocks.
    Cut-cross-entropy (Wijmans et al. 2024, section 4.3) does so with 2^-12.
    """
    size = 128
    n = len(labels) // size * size
    logits = hidden[:n] @ weight.t()
    order = logits.mean(0).argsort(descending=True)
    d = -torch.softmax(logits, 1)
    del logits
    d[torch.arange(n), labels[:n]] += 1
    u = d @ weight
    d = torch.nn.functional.pad(d[:, order], (0, -len(order) % size))
    weight = torch.nn.functional.pad(weight[order], (0, 0, 0, -len(order) % size))
    blocks = d.view(n // size, size, -1, size)
    largest = blocks.abs().amax((1, 3))
    found = []
    for power in (8, 10, 12, 14, 16, 18, 20):
        kept = largest >= 2.0**-power
        entries = (blocks * kept[:, None, :, None]).view(n, -1)
        error = distance(entries @ weight, u)
        found.append({"threshold": f"2^-{power}", "kept": float(kept.float().mean())})
        found[-1]["error of u"] = error
    return found


def measure(args: argparse.Namespace) -> dict[str, Any]:
    saved = Path(args.states) if args.states else None
    if saved is not None and saved.is_file():
        hidden, labels, weight = torch.load(saved)
        hidden, labels = hidden[: args.tokens], labels[: args.tokens]
    else:
        hidden, labels, weight = real_states(args.model, args.data, args.tokens)
        if saved is not None:
            torch.save((hidden, labels, weight), saved)
    n = len(labels)
    # The loss of a pair: half of the tokens are more, half less likely to be wanted.
    c = torch.where(torch.arange(n) < n // 2, 1.0, -1.0)

    def call(trains: bool, c: Tensor, **options: Any) -> tuple[float, Tensor, Tensor | None]:
        x, w = hidden.clone().requires_grad_(), weight.detach().requires_grad_(trains)
        start = time.perf_counter()
        logps: Any = fastpref.linear_token_logps(x, w, labels, **options)
        logps.backward(c)
        took = time.perf_counter() - start
        assert x.grad is not None
        return took, x.grad, w.grad

    out: dict[str, Any] = {"bf16 D, error of u": rounded_d(hidden, labels, weight), "cases": {}}
    out["block filter"] = filtered_d(hidden, labels, weight)
    for number, (name, (trains, by_columns, aim)) in enumerate(CASES.items(), 1):
        if number not in args.cases:
            continue
        options = {"gradient_tolerance": args.tolerance}
        if by_columns:
            options["head_gradient_tolerance"] = args.tolerance
        calls: dict[str, Callable[[int], tuple[float, Tensor, Tensor | None]]] = {
            "exact": lambda seed, trains=trains: call(trains, c),
            "columns": lambda seed, trains=trains, options=options: call(
                trains, c, gradient_seed=seed, **options
            ),
        }
        times: dict[str, list[float]] = {key: [] for key in calls}
        errors, head_errors = [], []
        for turn in range(args.repeats + 1):
            found = {key: made(turn) for key, made in calls.items()}
            if turn:
                for key, (took, _, _) in found.items():
                    times[key].append(took)
            errors.append(distance(found["columns"][1], found["exact"][1]))
            exact, columns = found["exact"][2], found["columns"][2]
            if exact is not None and columns is not None:
                head_errors.append(distance(columns, exact))
        report = fastpref.logps.last_gradient_report()
        assert report is not None
        seconds = {key: statistics.median(taken) for key, taken in times.items()}
        out["cases"][name] = {
            "seconds": seconds,
            "all seconds": times,
            "ratio": seconds["exact"] / seconds["columns"],
            "aim": aim,
            "columns": float(report.columns),
            "expected error": float(report.error),
            "error of dX": statistics.mean(errors),
            "error of dW": statistics.mean(head_errors) if head_errors else None,
            "left out": float(report.left_out),
            "bound, mean": float(report.bound_mean),
            "bound, largest": float(report.bound_max),
        }
    return out


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add = parser.add_argument
    add("--model", help="directory of a causal model with its tokenizer")
    add("--data", help="preference pairs, JSON lines; .gz is fine")
    add("--states", help="file for (hidden, labels, weight), which is read if it is there")
    add("--tokens", type=int, default=2048)
    add("--tolerance", type=float, default=1.5e-3)
    add("--repeats", type=int, default=3)
    add("--cases", type=int, nargs="*", default=[1, 2, 3], help="by number; others are kept")
    add("--output", default="columns", help="name of the file in results/, or a path")
    args = parser.parse_args(argv)
    if not (args.model and args.data) and not args.states:
        parser.error("expected --model and --data, or --states")
    hidden = ("output", "model", "data", "states", "cases")
    options = {k: v for k, v in vars(args).items() if k not in hidden}
    with keep_cpu_memory():  # as in a trainer's steps
        measured = measure(args)
    path = results_path(args.output)
    before = json.loads(path.read_text()) if path.is_file() else {}
    if before.get("options") == options:
        measured["cases"] = before["cases"] | measured["cases"]
    cases = measured["cases"]
    targets = [
        target(f"{name}: times as fast as exact", case["aim"], case["ratio"])
        for name, case in cases.items()
    ]
    share = max(case["columns"] for case in cases.values())
    targets.append(target("share of the columns", 0.25, share, most=True))
    results = {"machine": machine(), "options": options, **measured, "targets": targets}
    write_json(path, results)
    print(table(*columns_report.gains(results)))
    print(target_table(targets))
    print(table(*columns_report.block_filter(results)))


if __name__ == "__main__":
    main()
