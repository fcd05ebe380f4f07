"""The trainers' metrics: summed on the device, and read once per log line."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from fastpref.fused.pair_loss import PreferenceOutput
from fastpref.logps.columns import GradientReport
from fastpref.logps.sequences import sequence_logps
from fastpref.losses.unpaired import UnpairedLoss
from fastpref.trainer.moments import MOMENTS, pair_moments

# The elements of a micro-step's vector. They are sums and counts, not means, so that they can be
# added over processes with different numbers of rows.
SUMS = (
    "loss",
    "aux_loss",
    "nll_loss",
    "pairs",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/accuracies",
    "logps/chosen",
    "logps/rejected",
    "tokens/chosen",
    "tokens/rejected",
    "entropy",
    "logits/chosen",
    "logits/rejected",
    "top1/chosen",
    "num_tokens",
    *MOMENTS,
)
EXTRAS = ("entropy", "mean_logit", "is_top1")
PER_PAIR = tuple(key for key in SUMS if key.startswith(("rewards/", "logps/")))
MEANS = ("aux_loss", "nll_loss", "kl")  # elements that are averaged over processes, not added
# For single answers.
SIDES = ("chosen", "rejected")
PER_ANSWER = tuple(f"{key}/{side}" for key in ("rewards", "logps") for side in SIDES)
UNPAIRED_SUMS = (
    "loss",
    "aux_loss",
    "kl",
    "answers/chosen",
    "answers/rejected",
    *PER_ANSWER,
    "tokens/chosen",
    "tokens/rejected",
    "entropy",
    "logits/chosen",
    "logits/rejected",
    "num_tokens",
)
UNPAIRED_EXTRAS = ("entropy", "mean_logit")


class NonFiniteLossError(ValueError):
    """The loss, a gradient or a weight became NaN or infinite."""


@torch.no_grad()
def micro_step_sums(
    out: PreferenceOutput,
    loss: Tensor,
    aux_loss: Tensor | None,
    labels: Tensor,
    num_tokens: Tensor,
    sequence_ids: Tensor | None = None,
    per_token: bool = False,
) -> Tensor:
    """The vector of one micro-step, float32 [len(SUMS)], without a synchronisation.

    Args:
        labels: [2P, T], or [N] with sequence_ids [N] in [0, 2P).
        num_tokens: the batch's number of tokens, [].
        per_token: as in `pair_moments`.
    """
    assert out.stats is not None
    pairs = len(out.chosen_rewards)

    def sides(values: Tensor) -> tuple[Tensor, Tensor]:
        """The sums over the tokens of chosen and of rejected answers."""
        if sequence_ids is None:
            chosen, rejected = values.sum(1).chunk(2)
            return chosen.sum(), rejected.sum()
        is_chosen = sequence_ids < pairs
        return (values * is_chosen).sum(), (values * ~is_chosen).sum()

    entropy, mean_logit, is_top1 = out.stats.entropy, out.stats.mean_logit, out.stats.is_top1
    assert entropy is not None and mean_logit is not None and is_top1 is not None
    tokens = sides(labels != -100)
    logits = sides(mean_logit)  # the statistics are 0 where there is no label
    values = {
        "loss": loss,
        "aux_loss": loss.new_zeros(()) if aux_loss is None else aux_loss,
        "nll_loss": loss.new_zeros(()) if out.nll_loss is None else out.nll_loss,
        "pairs": loss.new_full((), pairs),
        "rewards/chosen": out.chosen_rewards.sum(),
        "rewards/rejected": out.rejected_rewards.sum(),
        "rewards/accuracies": (out.chosen_rewards > out.rejected_rewards).sum(),
        "logps/chosen": out.chosen_logps.sum(),
        "logps/rejected": out.rejected_logps.sum(),
        "tokens/chosen": tokens[0],
        "tokens/rejected": tokens[1],
        "entropy": entropy.sum(),
        "logits/chosen": logits[0],
        "logits/rejected": logits[1],
        "top1/chosen": sides(is_top1)[0],
        "num_tokens": num_tokens,
        **pair_moments(out, labels, sequence_ids, per_token),
    }
    return torch.stack([values[key].float() for key in SUMS])


def answer_sums(
    labels: Tensor, sequence_ids: Tensor | None, answers: int
) -> Callable[[Tensor], Tensor]:
    """A function that sums values of the labelled tokens over each answer, float32 [answers].

    Args:
        labels: [answers, T], or [N] with sequence_ids [N]; the values have the same shape.
    """
    layout: dict[str, Any] = {}
    if sequence_ids is not None:
        layout = {"sequence_ids": sequence_ids, "num_sequences": answers}
    return lambda values: sequence_logps(values.float(), labels, **layout)


@torch.no_grad()
def unpaired_sums(
    out: UnpairedLoss,
    loss: Tensor,
    aux_loss: Tensor | None,
    desirable: Tensor,
    labels: Tensor,
    num_tokens: Tensor,
    sequence_ids: Tensor | None = None,
) -> Tensor:
    """The vector of one micro-step of single answers, float32 [len(UNPAIRED_SUMS)].

    Args:
        labels: [B, T], or [N] with sequence_ids [N] in [0, B).
        num_tokens: the batch's number of tokens, [].
    """
    assert out.stats is not None and out.logps is not None
    sums = answer_sums(labels, sequence_ids, len(desirable))
    entropy, mean_logit = out.stats.entropy, out.stats.mean_logit
    assert entropy is not None and mean_logit is not None
    values = {
        "loss": loss,
        "aux_loss": loss.new_zeros(()) if aux_loss is None else aux_loss,
        "kl": out.kl,
        "entropy": entropy.sum(),
        "num_tokens": num_tokens,
    }
    per_answer = {
        "answers": torch.ones_like(out.logps),
        "rewards": out.rewards,
        "logps": out.logps,
        "tokens": sums(torch.ones_like(labels)),
        "logits": sums(mean_logit),
    }
    for side, mask in zip(SIDES, (desirable, ~desirable), strict=True):
        values.update({f"{key}/{side}": (t * mask).sum() for key, t in per_answer.items()})
    return torch.stack([values[key].float() for key in UNPAIRED_SUMS])


def _mean(sums: dict[str, float], key: str, *counts: str) -> float:
    count = sum(sums[c] for c in counts)
    return sums[key] / count if count > 0 else 0.0


def unpaired_metrics(
    sums: dict[str, float], has_aux_loss: bool, has_nll: bool = False
) -> dict[str, float]:
    """TRL's metrics of one micro-step of single answers.

    A class of answers that does not occur has no metrics.
    """
    metrics = {"aux_loss": sums["aux_loss"]} if has_aux_loss else {}
    metrics["kl"] = sums["kl"]
    metrics["entropy"] = _mean(sums, "entropy", "tokens/chosen", "tokens/rejected")
    for side in SIDES:
        if sums[f"tokens/{side}"] > 0:
            metrics[f"logits/{side}"] = _mean(sums, f"logits/{side}", f"tokens/{side}")
        for key in ("rewards", "logps") if sums[f"answers/{side}"] > 0 else ():
            metrics[f"{key}/{side}"] = _mean(sums, f"{key}/{side}", f"answers/{side}")
    if all(f"rewards/{side}" in metrics for side in SIDES):
        metrics["rewards/margins"] = metrics["rewards/chosen"] - metrics["rewards/rejected"]
    return metrics


def micro_step_metrics(
    sums: dict[str, float], has_aux_loss: bool, has_nll: bool = False
) -> dict[str, float]:
    """TRL's metrics of one micro-step of pairs, from its sums over all processes."""

    def mean(key: str, *counts: str) -> float:
        return _mean(sums, key, *counts)

    shown = {"aux_loss": has_aux_loss, "nll_loss": has_nll}
    metrics = {key: sums[key] for key, is_shown in shown.items() if is_shown}
    metrics["entropy"] = mean("entropy", "tokens/chosen", "tokens/rejected")
    metrics["logits/chosen"] = mean("logits/chosen", "tokens/chosen")
    metrics["logits/rejected"] = mean("logits/rejected", "tokens/rejected")
    metrics["mean_token_accuracy"] = mean("top1/chosen", "tokens/chosen")
    metrics.update({key: mean(key, "pairs") for key in PER_PAIR})
    metrics["rewards/margins"] = metrics["rewards/chosen"] - metrics["rewards/rejected"]
    return metrics


def column_metrics(
    reports: list[GradientReport], device: torch.device, gather: Callable[[Tensor], Tensor]
) -> dict[str, float]:
    """What the head's gradients left out: means over micro-steps and processes, by token.

    `head/bound_max` alone is the largest. A process without a report counts for no token; without
    any report there are no metrics.
    """
    names = GradientReport._fields[1:]
    rows = torch.zeros((1, len(names) + 1), device=device)
    if reports:
        values = torch.stack([torch.stack([t.float() for t in r[1:]]).to(device) for r in reports])
        weights = torch.tensor([float(r.tokens) for r in reports], device=device)
        rows[0, :-2] = (values[:, :-1] * weights[:, None]).sum(0)
        rows[0, -2], rows[0, -1] = values[:, -1].max(), weights.sum()
    everywhere = gather(rows).cpu()
    if not everywhere[:, -1].any():
        return {}
    means = everywhere[:, :-2].sum(0) / everywhere[:, -1].sum()
    gathered = [*means.tolist(), float(everywhere[:, -2].max())]
    return {f"head/{name}": value for name, value in zip(names, gathered, strict=True)}


def check_grad_norm(norm: float | None, step: int) -> None:
    """Raise NonFiniteLossError if the gradient's norm is not finite."""
    if norm is not None and not torch.tensor(norm).isfinite():
        raise NonFiniteLossError(f"the gradient's norm is {norm} at step {step}")


def check_weights(model: Any, step: int) -> None:
    """Raise NonFiniteLossError if a trainable weight is not finite."""
    weights = [p.detach() for p in model.parameters() if p.requires_grad]
    if weights and not bool(torch.nn.utils.get_total_norm(weights).isfinite()):
        raise NonFiniteLossError(f"a weight is not finite after step {step}")


@dataclass
class _Step:
    """A micro-step whose sums are on the device."""

    sums: Tensor
    rows: Tensor | None
    where: str


@dataclass
class MetricWindow:
    """The micro-steps since the last log line.

    Args:
        gather: concatenates the tensors of all processes on dim 0, as `Accelerator.gather` does.
        world_size: number of processes.
        rank: the index of this process.
        has_aux_loss, has_nll: whether to report `aux_loss` and `nll_loss`.
        names: the elements of a micro-step's vector.
        metrics_of: maps a micro-step's sums, has_aux_loss and has_nll to its metrics.
        total_tokens: the number of tokens of the run.
        observer: gets the sums of each micro-step, over all processes, when they are read.
        pending: micro-steps whose sums are on the device.
        metrics: the metrics of the other micro-steps.
    """

    gather: Callable[[Tensor], Tensor]
    world_size: int = 1
    rank: int = 0
    has_aux_loss: bool = False
    has_nll: bool = False
    names: tuple[str, ...] = SUMS
    metrics_of: Callable[[dict[str, float], bool, bool], dict[str, float]] = micro_step_metrics
    total_tokens: int = 0
    observer: Callable[[dict[str, float]], None] | None = None
    pending: list[_Step] = field(default_factory=list)
    metrics: list[dict[str, float]] = field(default_factory=list)
    missing: float = 0.0  # the fraction of the last micro-step that is still to be added

    def add(self, sums: Tensor, rows: Tensor | None, where: str, share: float = 1.0) -> None:
        """Store a micro-step. In one process on a CPU its loss is checked at once.

        Args:
            sums: the vector [len(names)].
            rows: the numbers of its rows in the data, for an error.
            where: the step, for an error.
            share: the fraction of the micro-batch's pairs that these are. Further calls add the
                rest; a loss is then the sum of its parts, and there are no other means.
        """
        step = _Step(sums, rows, where)
        if self.missing > 0:
            before = self.pending.pop()
            step.sums = before.sums + sums
            if rows is not None and before.rows is not None:
                step.rows = torch.cat([before.rows, rows])
        self.missing = (self.missing or 1.0) - share
        if self.missing < 1e-9:
            self.missing = 0.0
        if sums.device.type == "cpu" and self.world_size == 1:
            self._check(step.sums[None], [step], self.rank)
        self.pending.append(step)

    def sync(self) -> None:
        """Compute the metrics of the pending micro-steps, with one collective and one copy.

        Raises:
            NonFiniteLossError: on every process, if a loss of any process is not finite.
        """
        if not self.pending:
            return
        steps, self.pending = self.pending, []
        local = torch.stack([step.sums for step in steps])
        parts = self.gather(local).view(self.world_size, len(steps), -1).cpu().double()
        for rank, part in enumerate(parts):
            self._check(part, steps, rank)
        total = parts.sum(0)
        for i in (i for i, name in enumerate(self.names) if name in MEANS):
            total[:, i] /= self.world_size
        for row in total.tolist():
            sums = dict(zip(self.names, row, strict=True))
            self.metrics.append(self.metrics_from(sums))
            self.total_tokens += int(sums["num_tokens"])
            if self.observer is not None:
                self.observer(sums)

    def metrics_from(self, sums: dict[str, float]) -> dict[str, float]:
        """The metrics of a batch from its sums over all processes."""
        return self.metrics_of(sums, self.has_aux_loss, self.has_nll)

    def _check(self, values: Tensor, steps: list[_Step], rank: int) -> None:
        losses = values[:, self.names.index("loss")]
        if bool(losses.isfinite().all()):
            return
        index = int((~losses.isfinite()).nonzero()[0])
        step = steps[index]
        process = f", process {rank}" if self.world_size > 1 else ""
        rows = ""
        if rank == self.rank and step.rows is not None:  # rows of other processes are not known
            rows = f", data rows {step.rows.tolist()}"
        value = losses[index].item()
        raise NonFiniteLossError(f"the loss is {value} at {step.where}{process}{rows}")

    def drain(self) -> dict[str, float]:
        """The mean of each metric over the micro-steps that have it; empties the window."""
        self.sync()
        steps, self.metrics = self.metrics, []
        values_of: dict[str, list[float]] = {}
        for key, value in (item for step in steps for item in step.items()):
            values_of.setdefault(key, []).append(value)
        return {key: sum(values) / len(values) for key, values in values_of.items()}


class TokenCount(TrainerCallback):
    """Restores the number of tokens from the checkpoint that a run resumes from."""

    KEY = "fastpref"  # in the checkpoint's trainer_state.json, under stateful_callbacks

    def __init__(self, window: MetricWindow) -> None:
        self.window = window

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        saved = (state.stateful_callbacks or {}).get(self.KEY, {})
        self.window.total_tokens = saved.get("num_tokens", self.window.total_tokens)
