"""DPO in a plain PyTorch loop, with an ordinary Hugging Face model and without its logits.

python examples/plain_pytorch.py                       # the tiny model that fastpref ships
python examples/plain_pytorch.py --model NAME_OR_DIR --data pairs.jsonl --steps 100
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import fastpref
from fastpref.heads import hidden_states, read_head

DEMO = Path(fastpref.__file__).parent / "assets" / "demo"


def make_batch(tokenizer: Any, rows: list[dict], device: Any) -> dict[str, Tensor]:
    """Sequences [chosen; rejected] of pairs of chats; labels[t] is predicted from hidden[t]."""

    def ids(messages: list[dict], **options: Any) -> list[int]:
        text = tokenizer.apply_chat_template(messages, tokenize=False, **options)
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    sequences = [ids(row["prompt"] + row[side]) for side in ("chosen", "rejected") for row in rows]
    starts = [len(ids(row["prompt"], add_generation_prompt=True)) for row in rows] * 2
    longest = max(map(len, sequences))
    shape = len(sequences), longest
    input_ids, mask = torch.zeros(shape, dtype=torch.int64), torch.zeros(shape, dtype=torch.int64)
    labels = torch.full(shape, -100)
    for i, (sequence, start) in enumerate(zip(sequences, starts, strict=True)):
        input_ids[i, : len(sequence)] = torch.tensor(sequence)
        mask[i, : len(sequence)] = 1
        labels[i, start - 1 : len(sequence) - 1] = torch.tensor(sequence[start:])
    batch = {"input_ids": input_ids, "attention_mask": mask, "labels": labels}
    return {name: t.to(device) for name, t in batch.items()}


def run_backbone(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """The last hidden states [2P, T, H]."""
    return hidden_states(
        model, input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]
    )


@torch.no_grad()
def reference_logps(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """[2P], computed once, before training: then no second model has to stay in memory."""
    head = read_head(model)
    tokens = fastpref.linear_token_logps(
        run_backbone(model, batch), head.weight, batch["labels"], **head.options()
    )
    return fastpref.sequence_logps(tokens, batch["labels"])


def load(argv: list[str] | None, text: str) -> tuple[Any, list[dict[str, Tensor]], int]:
    """The model, batches of four pairs, and the number of steps."""
    parser = argparse.ArgumentParser(description=text)
    parser.add_argument("--model", default=str(DEMO))
    parser.add_argument("--data", default=str(DEMO / "train.jsonl"))
    parser.add_argument("--steps", type=int, default=20)
    options = parser.parse_args(argv)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).to(device)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    rows = [json.loads(line) for line in Path(options.data).read_text().splitlines()]
    starts = range(0, min(len(rows), 4 * options.steps), 4)
    batches = [make_batch(tokenizer, rows[i : i + 4], device) for i in starts]
    return model, batches, options.steps


def main(argv: list[str] | None = None) -> list[float]:
    model, batches, steps = load(argv, __doc__.splitlines()[0])
    references = [reference_logps(model, batch) for batch in batches]
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4)
    losses = []
    for step in range(steps):
        batch, reference = batches[step % len(batches)], references[step % len(batches)]
        head = read_head(model)
        out = fastpref.linear_dpo_loss(
            run_backbone(model, batch),
            head.weight,
            batch["labels"],
            reference,
            beta=0.1,
            **head.options(),
        )
        out.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        margin = (out.chosen_rewards - out.rejected_rewards).mean()
        losses.append(out.loss.item())
        print(f"step {step + 1}: loss {losses[-1]:.4f}, reward margin {margin:+.4f}")
    return losses


if __name__ == "__main__":
    main()
