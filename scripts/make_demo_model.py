"""Make what `fastpref demo` needs: a tiny causal model, its tokenizer and preference pairs.

    python scripts/make_demo_model.py            # writes fastpref/assets/demo, minutes on two cores

All text comes from the templates of demo_text.py next to this file: the front desk of a town hall
answers short requests. The model is pretrained on a mixture in which half of the answers are
courteous, complete and correct and the other half are curt, rude or wrong, so that it knows both.
The pairs then say which of the two is wanted. A request that is in a pair is never in the
pretraining text, and the held-out pairs use requests that the training pairs do not have.
"""

import argparse
import json
import random
import time
from pathlib import Path

import torch
from demo_text import ask, kinds, polite
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

ASSETS = Path(__file__).resolve().parent.parent / "fastpref" / "assets" / "demo"
TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL = ["<|pad|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>"]


def unique_requests(rng, count, taken):
    """Requests that differ from each other and from those in `taken`, which they are added to."""
    requests = []
    while len(requests) < count:
        request = ask(rng)
        if request.prompt not in taken:
            taken.add(request.prompt)
            requests.append(request)
    return requests


def pair(rng, request):
    """One preference pair: the helpful answer against one of the three unwanted kinds."""
    unwanted = rng.choices(kinds, weights=[4, 4, 2])[0]
    return {
        "prompt": [{"role": "user", "content": request.prompt}],
        "chosen": [{"role": "assistant", "content": polite(rng, request.answer)}],
        "rejected": [{"role": "assistant", "content": unwanted(rng, request)}],
    }


def pretraining_texts(rng, count, taken):
    """Chats, half of them with a helpful answer, none with a request of the preference pairs."""
    texts = []
    while len(texts) < count:
        request = ask(rng)
        if request.prompt in taken:
            continue
        if rng.random() < 0.5:
            answer = polite(rng, request.answer)
        else:
            answer = rng.choices(kinds, weights=[5, 4, 1])[0](rng, request)
        texts.append(f"<|user|>{request.prompt}<|end|><|assistant|>{answer}<|end|>")
    return texts


def make_tokenizer(texts, vocab_size):
    """A byte-level BPE that keeps numbers of up to three digits whole."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(
                Regex(r"\d{1,3}| ?\p{L}+| ?[^\s\p{L}\d]+|\s+"), behavior="isolated"
            ),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=SPECIAL,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|pad|>",
        eos_token="<|end|>",
        additional_special_tokens=SPECIAL[2:],
        chat_template=TEMPLATE,
        model_max_length=512,
    )


def make_model(tokenizer, vocab_size):
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocab_size,
            hidden_size=128,
            intermediate_size=320,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
        )
    )


def batches(ids, rng, size, pad):
    """Endless padded batches; each pool of them is sorted by length so that little is padding."""
    while True:
        order = rng.sample(range(len(ids)), len(ids))
        for start in range(0, len(order) - 32 * size + 1, 32 * size):
            pool = sorted(order[start : start + 32 * size], key=lambda i: len(ids[i]))
            chunks = [pool[i : i + size] for i in range(0, len(pool), size)]
            rng.shuffle(chunks)
            for chunk in chunks:
                longest = max(len(ids[i]) for i in chunk)
                yield torch.tensor([ids[i] + [pad] * (longest - len(ids[i])) for i in chunk])


def pretrain(model, ids, rng, steps, batch_size, learning_rate):
    pad = model.config.pad_token_id
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.01
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, learning_rate, total_steps=steps, pct_start=0.05, final_div_factor=100
    )
    began = time.perf_counter()
    source = batches(ids, rng, batch_size, pad)
    for step in range(1, steps + 1):
        batch = next(source)
        logits = model(input_ids=batch, attention_mask=(batch != pad).long()).logits
        loss = torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten(), ignore_index=pad
        )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 50 == 0 or step == steps:
            print(
                f"step {step}/{steps}  loss {loss.item():.3f}  {time.perf_counter() - began:.0f} s",
                flush=True,
            )


def compact_json(path):
    """Rewrite a JSON file without indentation: a third of the size for a tokenizer."""
    path.write_text(json.dumps(json.loads(path.read_text()), separators=(",", ":")))


def write_pairs(path, pairs):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in pairs))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, default=ASSETS)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--learning-rate", type=float, default=4e-3)
    parser.add_argument("--texts", type=int, default=48000)
    parser.add_argument("--vocab-size", type=int, default=3072, help="at most")
    parser.add_argument("--train-pairs", type=int, default=320)
    parser.add_argument("--heldout-pairs", type=int, default=96)
    args = parser.parse_args()

    rng = random.Random(args.seed)
    torch.manual_seed(args.seed)
    torch.use_deterministic_algorithms(True)
    args.output.mkdir(parents=True, exist_ok=True)

    taken = set()
    train = [pair(rng, r) for r in unique_requests(rng, args.train_pairs, taken)]
    heldout = [pair(rng, r) for r in unique_requests(rng, args.heldout_pairs, taken)]
    write_pairs(args.output / "train.jsonl", train)
    write_pairs(args.output / "heldout.jsonl", heldout)
    texts = pretraining_texts(rng, args.texts, taken)

    tokenizer = make_tokenizer(texts, args.vocab_size)
    ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
    print(
        f"{len(texts)} texts, {sum(map(len, ids)) / len(ids):.1f} tokens each on average, "
        f"{len(tokenizer)} token types"
    )
    model = make_model(tokenizer, -(-len(tokenizer) // 64) * 64)
    print(f"{model.num_parameters():,} parameters")
    pretrain(model, ids, rng, args.steps, args.batch_size, args.learning_rate)

    model.to(torch.bfloat16).save_pretrained(args.output)
    tokenizer.save_pretrained(args.output)
    compact_json(args.output / "tokenizer.json")
    (args.output / "model.safetensors").chmod(0o644)
    total = sum(f.stat().st_size for f in args.output.iterdir())
    print(f"{args.output}: {total / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
