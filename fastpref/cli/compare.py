"""`compare_heads`: the output head with and without logits, measured by `fastpref demo`."""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch

from fastpref.backends.host_memory import release_memory
from fastpref.cli import report


def eager_loss(hidden, weight, labels, ref_logps, loss_type, beta) -> torch.Tensor:
    """DPO and IPO in plain torch: logits of all positions, then log_softmax."""
    logps = (hidden @ weight.T).log_softmax(-1)
    counted = labels != -100
    label_logps = logps.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    ratios = (label_logps * counted).sum(1) - ref_logps
    if loss_type == "ipo":
        chosen, rejected = (ratios / counted.sum(1)).chunk(2)
        return (chosen - rejected - 1 / (2 * beta)).square().mean()
    chosen, rejected = ratios.chunk(2)
    return -torch.nn.functional.logsigmoid(beta * (chosen - rejected)).mean()


def compare_heads(trainer: Any, batches: int, repeats: int) -> dict[str, Any]:
    """Time and extra peak memory of the head's forward and backward pass, on the CPU.

    Both sides get the hidden states and reference log-probs of the run's batches. Times are medians
    of alternating calls after a warm-up. Memory is that of the largest batch.

    Args:
        trainer: a trainer with precomputed reference log-probs.
        batches: number of batches.
        repeats: number of timed calls for each batch.
    """
    import fastpref

    weight = trainer.model.get_output_embeddings().weight.detach().cpu().requires_grad_()
    cases = []
    for batch, _ in zip(trainer.get_train_dataloader(), range(batches), strict=False):
        with torch.no_grad():
            hidden = (
                trainer.model.get_decoder()(
                    input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]
                )
                .last_hidden_state.float()
                .cpu()
            )
        ref_logps = torch.cat([batch["ref_chosen_logps"], batch["ref_rejected_logps"]]).cpu()
        cases.append((hidden, batch["labels"].cpu(), ref_logps, batch["token_indices"].cpu()))
    options = {"loss_type": trainer.args.loss_type, "beta": trainer.args.beta}

    def fused(hidden, labels, ref_logps, indices):
        return fastpref.linear_preference_loss(
            hidden, weight, labels, ref_logps, token_indices=indices, **options
        ).loss

    def eager(hidden, labels, ref_logps, indices):
        return eager_loss(hidden, weight, labels, ref_logps, **options)

    sides = {"fastpref": fused, "eager": eager}

    def step(side, case):
        hidden = case[0].detach().requires_grad_()
        loss = sides[side](hidden, *case[1:])
        loss.backward()
        weight.grad = None
        return loss.item(), hidden.grad

    extra: dict[str, int | None] = {}
    for side in sides:  # fastpref first, so that it cannot reuse memory that eager has freed
        measured: list[int | None] = []
        for case in cases:
            release_memory()
            with report.PeakMemory() as memory:
                step(side, case)
            measured.append(memory.extra)
        peaks = [peak for peak in measured if peak is not None]
        extra[side] = max(peaks) if len(peaks) == len(measured) else None
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    for _ in range(repeats):
        for case in cases:
            for side in sides:
                began = time.perf_counter()
                step(side, case)
                seconds[side].append(time.perf_counter() - began)
    (loss, grad), (eager_value, eager_grad) = (step(side, cases[0]) for side in sides)
    hidden, labels = cases[0][:2]
    return {
        "loss_type": trainer.args.loss_type,
        "positions": labels.numel(),
        "labelled_tokens": int((labels != -100).sum()),
        "hidden_size": hidden.shape[-1],
        "vocab_size": weight.shape[0],
        "backend": fastpref.backends.active("cpu", torch.float32),
        "seconds": {side: statistics.median(times) for side, times in seconds.items()},
        "extra_memory_bytes": extra,
        "loss_difference": abs(loss - eager_value),
        "largest_gradient_difference": (grad - eager_grad).abs().max().item(),
    }
