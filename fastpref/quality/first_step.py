"""What has to hold before the first step: margins of 0, the loss, labels, and pairs of one prompt.

The checks read a batch of the collator and the token log-probs of its sequences. The cause of
margins that are not 0 is that of the alarm of the first step (fastpref/trainer/step_zero.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastpref.data.batches import batch_labels
from fastpref.data.collate import truncate
from fastpref.quality.findings import Finding, of_rows

FIRST = 3  # tokens of an answer that a broken template makes unlikely
OUTLIER = 4.0  # nats a token by which they are then above the others
LEAST = 16  # pairs below which nothing is said about shares
ONE_SIDED, UNRANKED = 0.95, 0.25  # shares of pairs
_GAP = 0.5  # nats a token


@dataclass(frozen=True)
class Check:
    """Something that has to hold.

    Attributes:
        name: what is checked.
        passed: whether it holds; None if it does not apply.
        found: what was found, for people.
    """

    name: str
    passed: bool | None
    found: str


@dataclass
class PairLogps:
    """A pair's labelled tokens and their log-probs.

    Attributes:
        row: its number in the data.
        labels, logps: of the chosen and of the rejected answer, [n] each.
        aligned: whether each label is the token after its position.
        same_prompt: whether the tokens before both answers are the same.
        prompts_agree: the same, but if the start of sequences is cut, of the tokens that both have.
    """

    row: int
    labels: tuple[np.ndarray, np.ndarray]
    logps: tuple[np.ndarray, np.ndarray]
    aligned: bool
    same_prompt: bool
    prompts_agree: bool

    def per_token(self) -> tuple[float, float]:
        """The mean log-prob of a token of both answers, in nats."""
        means = [float(v.mean()) if len(v) else 0.0 for v in self.logps]
        return means[0], means[1]

    def parting(self) -> int:
        """How many tokens the answers have in common at their start."""
        a, b = self.labels
        n = min(len(a), len(b))
        differs = np.flatnonzero(a[:n] != b[:n])
        return int(differs[0]) if len(differs) else n


def pairs_of(
    batch: Mapping[str, Any], logps: Tensor, rows: Sequence[int], keep_start: bool = True
) -> list[PairLogps]:
    """The pairs of a batch [chosen; rejected] with token log-probs [2P, T].

    keep_start: whether a sequence that is too long loses its end.
    """
    labels = batch_labels(batch).cpu().numpy()
    ids, values = batch["input_ids"].cpu().numpy(), logps.double().cpu().numpy()
    out, pairs = [], len(rows)
    for i, row in enumerate(rows):
        both = (i, i + pairs)
        counted = [np.flatnonzero(labels[j] != -100) for j in both]
        starts = [int(c[0]) + 1 if len(c) else 0 for c in counted]
        a, b = (ids[j][:start] for j, start in zip(both, starts, strict=True))
        n = max(len(a), len(b)) if keep_start else min(len(a), len(b))
        width = ids.shape[1] - 1  # the last position has no token after it
        ends = [(j, c[c < width]) for j, c in zip(both, counted, strict=True)]
        have_starts = all(starts)  # an answer without a label has no start
        out.append(
            PairLogps(
                int(row),
                (labels[i][counted[0]], labels[i + pairs][counted[1]]),
                (values[i][counted[0]], values[i + pairs][counted[1]]),
                all(np.array_equal(labels[j][c], ids[j][1:][c]) for j, c in ends),
                have_starts and np.array_equal(a, b),
                not have_starts
                or np.array_equal(a[len(a) - min(n, len(a)) :], b[len(b) - min(n, len(b)) :]),
            )
        )
    return out


def check_labels(
    pairs: Sequence[PairLogps],
    examples: Sequence[Mapping[str, Any]],
    max_length: int | None,
    keep_start: bool,
) -> list[Finding]:
    """Findings of labels that are not the answers' tokens.

    examples: the tokenised rows.
    """
    wrong = []
    wrong += [pair.row for pair in pairs if not pair.aligned]
    for pair, example in zip(pairs, examples, strict=True):
        for side, labels in zip(("chosen_ids", "rejected_ids"), pair.labels, strict=True):
            prompt = list(example["prompt_ids"])
            ids, start = truncate(prompt + list(example[side]), len(prompt), max_length, keep_start)
            if labels.tolist() != ids[max(start, 1) :]:
                wrong.append(pair.row)
    return of_rows(
        "labels",
        "error",
        wrong,
        len(pairs),
        "have labels that are not the tokens of their answers, or at other positions",
        "see the collator: labels[t] is the token after position t, and completion_mask is 1 for "
        "the answer's tokens alone",
    )


def check_prompts(pairs: Sequence[PairLogps]) -> list[Finding]:
    """Findings of pairs whose answers follow different tokens."""
    return of_rows(
        "prompts_differ",
        "error",
        [pair.row for pair in pairs if not pair.prompts_agree],
        len(pairs),
        "have different tokens before the two answers",
        "see the collator and the labels: a pair compares two answers to one prompt",
    )


def check_parting(pairs: Sequence[PairLogps], tolerance: float) -> list[Finding]:
    """Findings of log-probs that differ before the answers part, or do not where they part."""
    early, late = [], []
    for pair in pairs:
        n, (a, b) = pair.parting(), pair.logps
        if n and pair.same_prompt and np.abs(a[:n] - b[:n]).max() > tolerance:
            early.append(pair.row)
        if n < min(len(a), len(b)) and a[n] == b[n]:
            late.append(pair.row)
    out = of_rows(
        "differs_early",
        "error",
        early,
        len(pairs),
        f"have log-probs that differ by more than {tolerance:g} nats where both answers are the "
        "same so far",
        "the model's results depend on padding or on the other rows: see its attention mask and "
        "positions",
    )
    return out + of_rows(
        "same_where_parting",
        "error",
        late,
        len(pairs),
        "have the same log-prob for the first token that differs",
        "the labels are probably shifted against the logits",
    )


def check_beginnings(pairs: Sequence[PairLogps]) -> list[Finding]:
    """A finding if the first tokens of the answers are far less likely than the rest."""
    first, later = [], []
    for pair in pairs:
        for values in pair.logps:
            if len(values) > 2 * FIRST:
                first.append(-values[:FIRST].mean())
                later.append(-values[FIRST:].mean())
    if len(first) < LEAST or np.median(np.subtract(first, later)) < OUTLIER:
        return []
    return [
        Finding(
            "first_tokens",
            "warning",
            f"the first {FIRST} tokens of an answer cost {np.median(first):.1f} nats each, the "
            f"others {np.median(later):.1f}",
            "see whether prompt and answer are joined as the model knows them: chat template, "
            "generation prompt, space before the answer",
            values={"first": float(np.median(first)), "rest": float(np.median(later))},
        )
    ]


def check_sides(pairs: Sequence[PairLogps]) -> tuple[list[Finding], dict[str, float]]:
    """Findings about the reference's log-probs per token of both sides, and their figures."""
    means = np.array([pair.per_token() for pair in pairs])
    ranked = float((means[:, 0] > means[:, 1]).mean())
    gap = float((means[:, 0] - means[:, 1]).mean())
    figures = {
        "nll_chosen": -float(means[:, 0].mean()),
        "nll_rejected": -float(means[:, 1].mean()),
        "ranking_accuracy": ranked,
    }
    out = []
    if len(pairs) >= LEAST and max(ranked, 1 - ranked) >= ONE_SIDED and abs(gap) >= _GAP:
        side = "chosen" if gap > 0 else "rejected"
        out.append(
            Finding(
                "off_policy",
                "warning",
                f"the {side} answer is the more likely one in {100 * max(ranked, 1 - ranked):.0f} "
                f"% of the pairs, by {abs(gap):.2f} nats a token",
                "the sides probably come from different models or formats, which is learnt first; "
                "pairs of one model's samples teach more",
                values={"gap": gap, "ranked": ranked},
            )
        )
    elif len(pairs) >= LEAST and ranked <= UNRANKED:
        out.append(
            Finding(
                "ranking",
                "warning",
                f"the model prefers the chosen answer, by log-prob per token, in only "
                f"{100 * ranked:.0f} % of the pairs",
                "the reward accuracy is relative to the reference and seldom turns such pairs "
                "round (arXiv:2405.19534): train on chosen answers first (SFT), and judge samples",
                values={"ranked": ranked},
            )
        )
    return out, figures


def check_batch_means(margins: Tensor, batch_size: int) -> list[Finding]:
    """A finding if the mean margin over batches has another sign than that over rows.

    margins: [P] of the policy against its reference.
    """
    rows = float(margins.mean())
    batches = float(torch.stack([part.mean() for part in margins.split(batch_size)]).mean())
    if rows * batches >= 0:
        return []
    return [
        Finding(
            "batch_means",
            "note",
            f"the mean margin is {rows:+.3g} over the {len(margins)} rows, and {batches:+.3g} as a "
            f"mean over batches of {batch_size}",
            "fastpref evaluates over rows; of other trainers' figures compare those of one batch "
            "size alone",
            values={"rows": rows, "batches": batches},
        )
    ]
