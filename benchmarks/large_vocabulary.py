"""States of a real model with a head of 151,936 tokens, for columns.py.

    python benchmarks/large_vocabulary.py --model DIR --data FILE --states states.pt
    python benchmarks/columns.py --states states.pt --output columns_large_vocabulary

No small model with such a vocabulary is at hand, so its head is trained here. A byte-pair
vocabulary of that size is made from text files. The model reads the data's answers with its own
tokenizer; where a token of the new vocabulary begins, the model's hidden state is taken and the new
token is the label. The head starts from the model's own rows for the first piece of each token, and
is trained by cross-entropy on some answers. The states that are written are those of other answers.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from lib.training import parser_of, read_pairs
from torch import Tensor

import fastpref
from fastpref.body import keep_cpu_memory


def text_files(folders: list[str], megabytes: int) -> Iterator[str]:
    """Texts of some folders, in order, up to a size."""
    left = megabytes * 2**20
    for folder in folders:
        for path in sorted(Path(folder).rglob("*")):
            if path.suffix not in (".md", ".rst", ".txt", ".py") or not path.is_file():
                continue
            text = path.read_text(errors="ignore")[: min(left, 200_000)]
            left -= len(text)
            yield text
            if left <= 0:
                return


def vocabulary(texts: Iterator[str], size: int):
    """A byte-level byte-pair tokenizer of so many tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=size, min_frequency=1, initial_alphabet=alphabet)
    )
    if tokenizer.get_vocab_size() < size:
        raise SystemExit(
            f"the texts give {tokenizer.get_vocab_size()} tokens, not {size}: more text"
        )
    return tokenizer


@torch.no_grad()
def states_of(network, own, new, texts: list[str], tokens: int) -> tuple[Tensor, Tensor]:
    """Hidden states [n, H] before the new tokens that begin where a token of the model ends, and
    their ids [n]."""
    hidden, labels = [], []
    for text in texts:
        read = own(text, return_offsets_mapping=True, truncation=True, max_length=tokens)
        before = {end: i for i, (_, end) in enumerate(read["offset_mapping"])}
        states = network.model(torch.tensor([read["input_ids"]])).last_hidden_state[0]
        encoded = new.encode(text)
        for token, (start, _) in zip(encoded.ids, encoded.offsets, strict=True):
            if start in before and start:
                hidden.append(states[before[start]])
                labels.append(token)
    return torch.stack(hidden), torch.tensor(labels)


def first_rows(weight: Tensor, own, new) -> Tensor:
    """The model's rows for the first piece of each new token; a token of several pieces is less
    likely than its first one, which a part along the states' mean will have to learn."""
    texts = new.decode_batch([[i] for i in range(new.get_vocab_size())])
    firsts = [(ids or [0])[0] for ids in own(texts, add_special_tokens=False)["input_ids"]]
    return weight[torch.tensor(firsts)].clone()


def train_head(weight: Tensor, hidden: Tensor, labels: Tensor, args: argparse.Namespace) -> None:
    """Steps of Adam on the cross-entropy, over shuffled states, in place."""
    weight.requires_grad_()
    optimizer = torch.optim.Adam([weight], lr=args.learning_rate)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(args.seed))
    batches = order.split(args.batch)
    for step, rows in enumerate(batches):
        for group in optimizer.param_groups:
            group["lr"] = args.learning_rate * (1 - step / len(batches))
        start = time.perf_counter()
        loss = -fastpref.linear_token_logps(hidden[rows], weight, labels[rows]).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 5 == 0:
            took = time.perf_counter() - start
            print(f"step {step}/{len(batches)}: {loss.item():.3f} nats, {took:.1f} s", flush=True)
    weight.requires_grad_(False)


def main(argv: list[str] | None = None) -> None:
    parser = parser_of(__doc__)
    add = parser.add_argument
    add("--states", required=True, help="file to write")
    add("--texts", nargs="+", required=True, help="folders whose text files make the vocabulary")
    add("--megabytes", type=int, default=40, help="of text for the vocabulary")
    add("--vocabulary", type=int, default=151936)
    add("--answers", type=int, default=300, help="that the head is trained on")
    add("--tokens", type=int, default=256, help="that are read of an answer")
    add("--batch", type=int, default=1024)
    add("--learning-rate", type=float, default=1e-3)
    add("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    own = AutoTokenizer.from_pretrained(args.model)
    network = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    answers = [pair["chosen"][-1]["content"] for pair in read_pairs(args.data)]
    random.Random(args.seed).shuffle(answers)
    trained, others = answers[: args.answers], answers[args.answers :]

    def all_texts() -> Iterator[str]:
        yield from answers
        yield from text_files(args.texts, args.megabytes)

    new = vocabulary(all_texts(), args.vocabulary)
    print(f"{new.get_vocab_size()} tokens", flush=True)
    hidden, labels = states_of(network, own, new, trained, args.tokens)
    weight = first_rows(network.get_output_embeddings().weight.detach(), own, new)
    print(f"{len(labels)} states to train on", flush=True)
    with keep_cpu_memory():
        train_head(weight, hidden, labels, args)
    hidden, labels = states_of(network, own, new, others[:40], args.tokens)
    hidden, labels = hidden[:2048], labels[:2048]
    logps = fastpref.linear_token_logps(hidden, weight, labels)
    uniform = math.log(len(weight))
    print(json.dumps({"held-out nats": -float(logps.mean()), "uniform": uniform}))
    torch.save((hidden, labels, weight), args.states)


if __name__ == "__main__":
    main()
