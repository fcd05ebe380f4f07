"""Losses of your own: any function of log-probabilities, on the same fused head.

    python examples/custom_loss.py [--model NAME_OR_DIR --data pairs.jsonl --steps 100]

Every step's loss is a sum: one of the log-probs of whole answers, one of their tokens' entropies.
"""

from __future__ import annotations

import torch
from plain_pytorch import load, reference_logps, run_backbone
from torch import Tensor

import fastpref
from fastpref.heads import read_head


def squared_hinge(pairs) -> Tensor:
    """The loss [P] of each pair; pairs.chosen and pairs.rejected are log-ratios to the reference.

    Pass it as loss_type: weights, rewards and the mean come with it.
    """
    return torch.relu(1 - pairs.beta * (pairs.chosen - pairs.rejected)) ** 2


def entropy_bonus(stats: fastpref.TokenStats, labels: Tensor) -> Tensor:
    """Minus the mean entropy of the distributions that the answers' tokens were drawn from."""
    return -stats.entropy.sum() / (labels != -100).sum().clamp(min=1)


def main(argv: list[str] | None = None) -> list[float]:
    model, batches, steps = load(argv, __doc__.splitlines()[0])
    references = [reference_logps(model, batch) for batch in batches]
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4)
    losses = []
    for step in range(steps):
        batch, reference = batches[step % len(batches)], references[step % len(batches)]
        head = read_head(model)
        out = fastpref.linear_preference_loss(
            run_backbone(model, batch),
            head.weight,
            batch["labels"],
            reference,
            loss_type=squared_hinge,
            beta=0.1,
            extras=("entropy",),
            **head.options(),
        )
        loss = out.loss + 0.01 * entropy_bonus(out.stats, batch["labels"])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(out.loss.item())
        print(f"step {step + 1}: loss {losses[-1]:.4f}")
    return losses


if __name__ == "__main__":
    main()
