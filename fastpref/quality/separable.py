"""Whether single words tell chosen from rejected answers, which a model then learns first.

Naive Bayes over the words that only one of the two answers has, each half of the data scored by
what the other half taught.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

from fastpref.quality.findings import Finding
from fastpref.quality.rows import contents_of

LIMIT = 0.9  # accuracy on unseen pairs from which on the pairs count as trivially separable
LEAST = 100  # pairs below which nothing is said
_WORDS = 400  # of an answer


class Separability:
    """Collects the words of pairs."""

    def __init__(self) -> None:
        self.pairs: list[tuple[frozenset[str], frozenset[str]]] = []

    def add(self, row: Mapping[str, Any]) -> None:
        """Look at a row, which has chosen and rejected."""
        chosen, rejected = (_features(contents_of(row[key])) for key in ("chosen", "rejected"))
        self.pairs.append((chosen - rejected, rejected - chosen))

    def accuracy(self) -> float | None:
        """The share of unseen pairs that words tell apart; None of too few pairs."""
        if len(self.pairs) < LEAST:
            return None
        correct = 0.0
        for half in (0, 1):
            taught = _log_odds(self.pairs[half::2])
            for chosen, rejected in self.pairs[1 - half :: 2]:
                score = sum(taught.get(w, 0.0) for w in chosen)
                score -= sum(taught.get(w, 0.0) for w in rejected)
                correct += 0.5 if score == 0 else float(score > 0)
        return round(correct / len(self.pairs), 4)

    def findings(self, accuracy: float | None) -> list[Finding]:
        """What was found. accuracy: that of `accuracy`."""
        if accuracy is None or accuracy < LIMIT:
            return []
        words: Counter[str] = Counter()
        odds = _log_odds(self.pairs)
        for chosen, rejected in self.pairs:
            words.update(chosen | rejected)
        telling = sorted(words, key=lambda w: -abs(odds.get(w, 0.0)) * words[w])[:5]
        shown = ", ".join(repr(w) for w in telling)
        return [
            Finding(
                "separable",
                "warning",
                f"single words tell chosen from rejected in {100 * accuracy:.0f} % of unseen pairs "
                f"(above all {shown})",
                "see whether the two sides come from different models or formats; a model learns "
                "that difference instead of quality",
                values={"accuracy": accuracy, "words": telling},
            )
        ]


def _features(text: str) -> frozenset[str]:
    words = text.split(maxsplit=_WORDS)[:_WORDS]
    first = {f"starts with {' '.join(words[:2])}"} if words else set()
    return frozenset({word.strip(".,;:!?\"'()").casefold() for word in words} | first)


def _log_odds(pairs: list[tuple[frozenset[str], frozenset[str]]]) -> dict[str, float]:
    chosen: Counter[str] = Counter()
    rejected: Counter[str] = Counter()
    for a, b in pairs:
        chosen.update(a)
        rejected.update(b)
    common = {w for w in chosen.keys() | rejected.keys() if chosen[w] + rejected[w] >= 3}
    return {w: math.log((chosen[w] + 1) / (rejected[w] + 1)) for w in common}
