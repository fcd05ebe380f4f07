"""The task of rlhf.py: a true reward in closed form, pairs that it labels, and what a policy gets.

    prompts --starting model--> two answers each --Bradley-Terry on the true reward--> pairs
    policy  --held-out prompts--> sampled answers --> true reward, KL to the starting model

The true reward of the demo model's requests, for an answer y and the helpful answer's words w:

    reward = |words of y in w| / |w|  -  0.02 * max(0, words in y - words in the helpful answer - 8)

w leaves out the helpful answer's first and last sentence, which are courtesies. For other data w
are the prompt's words of five letters or more, of which a good answer mentions each, and the
penalty is 0.02 for each word beyond 12. It is a stand-in: it asks nothing of the answer's truth.
"""

from __future__ import annotations

import json
import random
import re
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

SHARPNESS = 6.0  # an answer that is better by 0.5 is preferred with probability 0.95
_PENALTY = 0.02
_SPARE_WORDS = 8  # beyond the helpful answer's length
_TEXT_WORDS = 12
CONSTANTS = {
    "sharpness": SHARPNESS,
    "penalty": _PENALTY,
    "spare_words": _SPARE_WORDS,
    "text_words": _TEXT_WORDS,
}
_ROUNDS = 5  # of sampling, for a prompt whose two answers are the same


@dataclass(frozen=True)
class Task:
    """One prompt, as chat messages, and what its true reward looks for.

    Attributes:
        wanted: the words that an answer should have.
        limit: words beyond this cost `penalty` each.
    """

    prompt: list[dict[str, str]]
    wanted: list[str]
    limit: int
    penalty: float

    def reward(self, answer: str) -> float:
        """The true reward of an answer, at most 1."""
        said = words(answer)
        found = len(set(self.wanted) & set(said)) / max(len(set(self.wanted)), 1)
        return found - self.penalty * max(0, len(said) - self.limit)


def words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def demo_task(row: dict[str, Any]) -> Task:
    """A row of the demo's data."""
    from fastpref.cli.demo import body

    wanted = sorted(set(words(body(row))))
    limit = len(words(row["chosen"][0]["content"])) + _SPARE_WORDS
    return Task(row["prompt"], wanted, limit, _PENALTY)


def text_task(prompt: str | list[dict[str, str]]) -> Task:
    """Any prompt: its longer words are wanted."""
    chat = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    wanted = sorted({word for word in words(chat[-1]["content"]) if len(word) >= 5})
    return Task(chat, wanted, _TEXT_WORDS, _PENALTY)


def demo_tasks(prompts: int, held_out: int) -> tuple[list[Task], list[Task]]:
    from fastpref.cli.demo import read_pairs

    rows = read_pairs("train.jsonl")[:prompts], read_pairs("heldout.jsonl")[:held_out]
    return [demo_task(row) for row in rows[0]], [demo_task(row) for row in rows[1]]


def text_tasks(
    path: str, prompts: int, held_out: int, seed: int, most_words: int | None = None
) -> tuple[list[Task], list[Task]]:
    """Prompts of a file of pairs to train on, and others to judge.

    most_words: of a prompt; None: any number.
    """
    from .training import read_pairs

    seen = {json.dumps(row["prompt"]): row["prompt"] for row in read_pairs(path)}
    tasks = [text_task(prompt) for prompt in seen.values()]
    tasks = [
        task
        for task in tasks
        if task.wanted and (most_words is None or _prompt_words(task) <= most_words)
    ]
    random.Random(seed).shuffle(tasks)
    if len(tasks) < prompts + held_out:
        short = "" if most_words is None else f" of at most {most_words} words"
        raise SystemExit(f"{path} has {len(tasks)} prompts{short}; {prompts + held_out} are needed")
    return tasks[:prompts], tasks[prompts : prompts + held_out]


def _prompt_words(task: Task) -> int:
    return sum(len(message["content"].split()) for message in task.prompt)


def write_tasks(path: Path, tasks: list[Task]) -> str:
    path.write_text("".join(json.dumps(asdict(task)) + "\n" for task in tasks))
    return str(path)


def read_tasks(path: str) -> list[Task]:
    return [Task(**json.loads(line)) for line in Path(path).read_text().splitlines()]


# ---- sampling ----------------------------------------------------------------------------------


class Samples(NamedTuple):
    """Answers of a policy, some for each prompt, one prompt after the other."""

    texts: list[str]
    ids: Tensor  # [rows, T], prompts padded on the left
    mask: Tensor  # [rows, T], the tokens of prompt and answer
    answers: Tensor  # [rows, T], the answers' tokens with the one that ends them


@torch.no_grad()
def sample(
    model: Any, tokenizer: Any, tasks: list[Task], *, tokens: int, copies: int = 1
) -> Samples:
    """Answers at temperature 1 and without truncation of the distribution, whose KL is meant.

    tokens: the most of an answer. copies: answers to each prompt.
    """
    side, tokenizer.padding_side = tokenizer.padding_side, "left"
    given = tokenizer.apply_chat_template(
        [task.prompt for task in tasks],
        add_generation_prompt=True,
        padding=True,
        return_tensors="pt",
        return_dict=True,
    )
    tokenizer.padding_side = side
    model.eval()
    ids = model.generate(
        input_ids=given["input_ids"],
        attention_mask=given["attention_mask"],
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        max_new_tokens=tokens,
        num_return_sequences=copies,
        pad_token_id=tokenizer.pad_token_id,
    )
    start = given["input_ids"].shape[1]
    ends = (ids[:, start:] == tokenizer.eos_token_id).long()
    kept = (ends.cumsum(1) - ends == 0).long()
    prompts = given["attention_mask"].repeat_interleave(copies, 0)
    texts = [
        tokenizer.decode(row[: int(n)], skip_special_tokens=True)
        for row, n in zip(ids[:, start:], kept.sum(1), strict=True)
    ]
    return Samples(
        texts, ids, torch.cat([prompts, kept], 1), torch.cat([torch.zeros_like(prompts), kept], 1)
    )


@torch.no_grad()
def answer_logps(model: Any, samples: Samples, rows: int = 32) -> Tensor:
    """The summed log-probability [rows] of each answer."""
    from fastpref import linear_token_logps
    from fastpref.heads import hidden_states, read_head

    found, head = [], read_head(model)
    for start in range(0, len(samples.ids), rows):
        ids, mask, answers = (t[start : start + rows] for t in samples[1:])
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        hidden = hidden_states(model, input_ids=ids, attention_mask=mask, position_ids=positions)
        labels = ids[:, 1:].masked_fill(answers[:, 1:] == 0, -100)
        logps = linear_token_logps(hidden[:, :-1], head.weight, labels, **head.options())
        found.append(logps.double().sum(1))
    return torch.cat(found)


def judge(
    policy: Any, start: Any, tokenizer: Any, tasks: list[Task], *, tokens: int, copies: int
) -> dict[str, float]:
    """What a policy gets on held-out prompts.

    Returns:
        reward: the mean true reward of sampled answers; reward_se: its standard error.
        kl: the mean over answers of log(policy / start), summed over their tokens; kl_se likewise.
        words: the mean length of an answer. cut: the share of answers that did not end.
    """
    made = sample(policy, tokenizer, tasks, tokens=tokens, copies=copies)
    rewards = torch.tensor(
        [tasks[i // copies].reward(text) for i, text in enumerate(made.texts)], dtype=torch.float64
    )
    kl = torch.zeros(len(rewards), dtype=torch.float64)
    if policy is not start:
        kl = answer_logps(policy, made) - answer_logps(start, made)
    ended = ((made.ids == tokenizer.eos_token_id) & (made.answers == 1)).any(1)
    root = len(rewards) ** 0.5
    return {
        "reward": float(rewards.mean()),
        "reward_se": float(rewards.std() / root),
        "kl": float(kl.mean()),
        "kl_se": float(kl.std() / root),
        "words": sum(len(words(text)) for text in made.texts) / len(made.texts),
        "cut": 1.0 - float(ended.double().mean()),
    }


# ---- pairs -------------------------------------------------------------------------------------


def prefers_first(first: float, second: float, draw: random.Random) -> bool:
    """A Bradley-Terry draw: P(first) = sigmoid(SHARPNESS * (first - second)) of true rewards."""
    probability = torch.sigmoid(torch.tensor(SHARPNESS * (first - second), dtype=torch.float64))
    return draw.random() < float(probability)


def make_pairs(
    model: Any, tokenizer: Any, tasks: list[Task], *, tokens: int, seed: int, batch: int = 128
) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """Two different answers of the model to each prompt, labelled by draws on the true reward.

    Returns:
        The pairs, in the layout of preference data, and with true_chosen and true_rejected. A
        prompt whose answers are all the same has none. Then what was found: `seconds` of sampling,
        the mean true `reward`, and the share of pairs whose label `agrees` with the true reward.
    """
    begun = time.perf_counter()
    torch.manual_seed(seed)
    answers: list[list[str]] = [[] for _ in tasks]
    for _ in range(_ROUNDS):
        open_ = [i for i, found in enumerate(answers) if len(found) < 2]
        for start in range(0, len(open_), batch):
            part = open_[start : start + batch]
            made = sample(model, tokenizer, [tasks[i] for i in part], tokens=tokens, copies=2)
            for k, text in enumerate(made.texts):
                found = answers[part[k // 2]]
                if len(found) < 2 and text not in found:
                    found.append(text)
    seconds = time.perf_counter() - begun
    draw, pairs, agrees = random.Random(seed), [], 0
    for task, found in zip(tasks, answers, strict=True):
        if len(found) < 2:
            continue
        rewards = [task.reward(text) for text in found]
        best = 0 if prefers_first(*rewards, draw) else 1
        agrees += rewards[best] >= rewards[1 - best]
        pair: dict[str, Any] = {"prompt": task.prompt}
        for name, which in (("chosen", best), ("rejected", 1 - best)):
            pair[name] = [{"role": "assistant", "content": found[which]}]
            pair[f"true_{name}"] = rewards[which]
        pairs.append(pair)
    true = [pair[f"true_{name}"] for pair in pairs for name in ("chosen", "rejected")]
    return pairs, {
        "seconds": round(seconds, 2),
        "pairs": len(pairs),
        "reward": sum(true) / max(len(true), 1),
        "agrees": agrees / max(len(pairs), 1),
    }
