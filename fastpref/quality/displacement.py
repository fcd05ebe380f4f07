"""CHES: how much training on a pair lowers the log-prob of its chosen answer as well.

hidden states of a forward pass [2P, T, H], labels [2P, T]
     -> for each answer the sum s of the states that its tokens are predicted from, and their mean m
     -> CHES = <s_chosen, s_rejected> - |s_chosen|^2, and the same of the means for each pair

The score is the centred hidden embedding similarity of Razin et al., "Unintentional Unalignment:
Likelihood Displacement in Direct Preference Optimization" (arXiv:2410.08847), and the second one is
its form that is normalised by length. The paper gives an order of pairs and no threshold: its
filter keeps the 5 % of the pairs with the lowest score of means.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fastpref.data.batches import batch_labels
from fastpref.heads.calling import align_to_tokens, backbone
from fastpref.heads.reading import unwrap


@dataclass(frozen=True)
class PairScore:
    """How likely a pair displaces its chosen answer's likelihood, against other pairs.

    Attributes:
        row: the pair's number in the data.
        ches: the score of sums; higher means likelier.
        ches_by_length: the score of means, which does not grow with the answers' lengths.
    """

    row: int
    ches: float
    ches_by_length: float


def ches(hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The score of sums [P] and that of means [P], float64.

    Args:
        hidden: [2P, T, H], chosen answers first; labels[:, t] is predicted from hidden[:, t].
        labels: [2P, T] int64, -100 where a position does not count.
    """
    counted = (labels != -100).unsqueeze(-1)
    sums = hidden.double().masked_fill(~counted, 0.0).sum(1)  # [2P, H]
    means = sums / counted.sum(1).clamp(min=1)
    scores = []
    for states in (sums, means):
        chosen, rejected = states.chunk(2)
        scores.append((chosen * (rejected - chosen)).sum(-1))
    return scores[0], scores[1]


class Scored:
    """A `Reference` whose forward passes give the scores of their pairs, too.

    Attributes:
        scores: (ches, ches_by_length) of each pair, in the order of the batches.
    """

    def __init__(self, reference: Any) -> None:
        self.reference = reference
        self.scores: list[tuple[float, float]] = []

    def token_logps(self, batch: dict[str, Any]) -> Tensor:
        """`Reference.token_logps`."""
        labels, states = batch_labels(batch), []
        base = backbone(unwrap(self.reference.model))
        hook = base.register_forward_hook(lambda _, inputs, output: states.append(output[0]))
        try:
            logps: Tensor = self.reference.token_logps(batch)
        finally:
            hook.remove()
        scores = ches(align_to_tokens(states[-1], labels), labels)
        self.scores += zip(*(values.tolist() for values in scores), strict=True)
        return logps

    def ranked(self, rows: list[int]) -> list[PairScore]:
        """The pairs with these numbers, the likeliest to displace first."""
        pairs = [PairScore(row, *both) for row, both in zip(rows, self.scores, strict=True)]
        return sorted(pairs, key=lambda pair: -pair.ches)
