"""Loss and metrics of an evaluation, computed from values of each row.

An evaluation step stores a few values of each row, and no mean. At the end the rows of all
processes are gathered, each once, and loss and metrics are computed as of one batch of all rows. So
they do not depend on the batch size, the number of processes or the padding. This includes losses
that compare the pairs of a batch (AOT) and means over tokens (NLL).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate.utils import gather_object
from torch import Tensor

from fastpref.fused.pair_loss import PreparedLoss
from fastpref.heads.router import ROUTED, balance
from fastpref.logps.forward import TokenStats
from fastpref.logps.sequences import sequence_logps
from fastpref.losses.options import LossOptions
from fastpref.losses.preference import evaluate, make_pairs
from fastpref.losses.unpaired import kto_loss
from fastpref.trainer.metrics import SIDES, NonFiniteLossError, answer_sums

Rows = dict[str, Tensor]  # values by name, [P] or [P, n] for P rows


class Scored(NamedTuple):
    """All rows of an evaluation as one batch.

    Attributes:
        sums: the loss, and the sums from which metrics are computed.
        rewards: [P, 2] of chosen and rejected answers, or [P] of single answers.
        labels: int64 [P]; 0, the column of the preferred answer, for pairs; for single answers 1 if
            desirable, else 0.
    """

    sums: dict[str, float]
    rewards: Tensor
    labels: Tensor


_SHIFT = 1 << 40  # larger than any position in a data set


def pair_rows(prepared: PreparedLoss, stats: TokenStats, router: Tensor | None) -> Rows:
    """The values of each pair of a batch from which loss and metrics are computed.

    Args:
        prepared: the loss.
        stats: of the tokens, shaped like the loss's labels.
        router: [2P, n] of `router_rows`, or None.
    """
    values, policy_weight = prepared.per_pair(stats)
    values |= {"weight": prepared.inputs.pair_weight, "policy_weight": policy_weight}
    counted = prepared.is_labelled

    def sides(t: Tensor) -> tuple[Tensor, ...]:
        """The sums over the labelled tokens of each chosen and of each rejected answer."""
        if prepared.labels.dim() == 2:
            return (t * counted).sum(1).chunk(2)
        return sequence_logps(t.float(), prepared.labels, **prepared.sequence_layout).chunk(2)

    assert stats.entropy is not None and stats.mean_logit is not None and stats.is_top1 is not None
    chosen, rejected = sides(torch.ones_like(prepared.labels))
    entropy, logits = sides(stats.entropy), sides(stats.mean_logit)
    values |= {
        "tokens/chosen": chosen,
        "tokens/rejected": rejected,
        "entropy": entropy[0] + entropy[1],
        "logits/chosen": logits[0],
        "logits/rejected": logits[1],
        "top1/chosen": sides(stats.is_top1)[0],
    }
    if router is not None:
        halves = router.chunk(2)
        values[ROUTED] = halves[0] + halves[1]
    return {name: value for name, value in values.items() if value is not None}


_LOSS_INPUTS = (
    "chosen_logps",
    "rejected_logps",
    "ref_chosen_logps",
    "ref_rejected_logps",
    "chosen_lengths",
    "rejected_lengths",
    "margin",
    "soft_labels",
    "chosen_nll",
    "nll_lengths",
)


def score_pairs(rows: Rows, options: LossOptions, router_coef: float = 0.0) -> Scored:
    """The sums `metrics.SUMS` over all pairs, as of one batch, and the rewards of each pair."""
    pairs = make_pairs(options, **{name: rows.get(name) for name in _LOSS_INPUTS})  # type: ignore[arg-type]
    out = evaluate(pairs, rows.get("weight"), rows.get("policy_weight"))
    loss, tokens = out.loss, rows["tokens/chosen"] + rows["tokens/rejected"]
    if not tokens.any():  # a batch without a labelled token has a zero loss, as in training
        loss = loss * 0.0
    sums = {
        "pairs": torch.tensor(len(tokens)),
        "rewards/chosen": out.chosen_rewards.sum(),
        "rewards/rejected": out.rejected_rewards.sum(),
        "rewards/accuracies": (out.chosen_rewards > out.rejected_rewards).sum(),
        "logps/chosen": rows["chosen_logps"].sum(),
        "logps/rejected": rows["rejected_logps"].sum(),
    }
    if "chosen_nll" in rows:
        sums["nll_loss"] = rows["chosen_nll"].sum() / rows["nll_lengths"].sum().clamp(min=1)
    for name in ("tokens", "logits"):
        sums.update({f"{name}/{side}": rows[f"{name}/{side}"].sum() for side in SIDES})
    sums.update({name: rows[name].sum() for name in ("entropy", "top1/chosen")})
    rewards = torch.stack([out.chosen_rewards, out.rejected_rewards], 1)
    labels = torch.zeros(len(tokens), dtype=torch.int64)
    return Scored(_with_router(sums, loss, rows, router_coef), rewards, labels)


def answer_rows(
    labels: Tensor,
    stats: TokenStats,
    sequence_ids: Tensor | None,
    ref_logps: Tensor,
    desirable: Tensor,
    kl_ratios: Tensor | None,
    answer_weight: Tensor | None,
    router: Tensor | None,
) -> Rows:
    """The values of each answer of a batch from which loss and metrics are computed.

    Args:
        labels, stats: [B, T], or [N] with sequence_ids [N] in [0, B).
        router: [B, n].
        ref_logps, desirable, kl_ratios, answer_weight: [B].
    """
    assert stats.entropy is not None and stats.mean_logit is not None
    sums = answer_sums(labels, sequence_ids, len(desirable))
    values = {
        "logps": sums(stats.logps),
        "ref_logps": ref_logps,
        "desirable": desirable,
        "kl_ratios": kl_ratios,
        "weight": answer_weight,
        "tokens": sums(torch.ones_like(labels)),
        "entropy": sums(stats.entropy),
        "logits": sums(stats.mean_logit),
        ROUTED: router,
    }
    return {name: value for name, value in values.items() if value is not None}


def score_answers(rows: Rows, options: dict[str, Any], router_coef: float = 0.0) -> Scored:
    """As `score_pairs`, for single answers and `metrics.UNPAIRED_SUMS`.

    KTO's KL term is estimated once, from all rows.
    """
    desirable = rows["desirable"].bool()
    kl = rows["kl_ratios"].mean().clamp(min=0) if "kl_ratios" in rows else None
    out = kto_loss(
        rows["logps"], rows["ref_logps"], desirable, kl, weight=rows.get("weight"), **options
    )
    loss = out.loss if rows["tokens"].any() else out.loss * 0.0
    sums = {"kl": out.kl, "entropy": rows["entropy"].sum()}
    per_answer = {"answers": torch.ones_like(out.rewards), "rewards": out.rewards}
    per_answer |= {name: rows[name] for name in ("logps", "tokens", "logits")}
    for side, mask in zip(SIDES, (desirable, ~desirable), strict=True):
        sums.update({f"{name}/{side}": (t * mask).sum() for name, t in per_answer.items()})
    return Scored(_with_router(sums, loss, rows, router_coef), out.rewards, desirable.long())


def _with_router(sums: Rows, loss: Tensor, rows: Rows, coef: float) -> dict[str, float]:
    if ROUTED in rows:
        sums["aux_loss"] = balance(rows[ROUTED].sum(0))
        loss = loss + coef * sums["aux_loss"]
    empty = {"aux_loss": 0.0, "nll_loss": 0.0}
    return empty | {name: float(value) for name, value in (sums | {"loss": loss}).items()}


@dataclass
class RowTable:
    """The values of an evaluation's rows, which stay on the device until the end.

    Args:
        device: where loss and metrics are computed.
        process: the index of this process.
        processes: the number of processes.
    """

    device: torch.device
    process: int = 0
    processes: int = 1
    shapes: dict[str, torch.Size] = field(default_factory=dict)
    parts: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    count: int = 0

    def add(self, values: Rows, positions: Tensor | None, rows: Tensor | None) -> None:
        """Store the values of a batch's rows.

        Args:
            values: by name [P] or [P, n], the same names in every batch.
            positions: [P] the rows' positions in the data set. A loader may repeat rows so that all
                processes have equally many; repeated rows have equal positions. None means that no
                row is repeated.
            rows: [P] the rows' numbers in the input, for an error.
        """
        self.shapes = {name: value.shape[1:] for name, value in values.items()}
        flat = torch.cat([v.reshape(len(v), -1).float() for v in values.values()], 1)
        if positions is None:
            counter = torch.arange(self.count, self.count + len(flat), device=flat.device)
            positions = _SHIFT + counter * self.processes + self.process
        self.count += len(flat)
        positions = positions.to(flat.device)
        numbers = torch.full_like(positions, -1) if rows is None else rows.to(positions)
        self.parts.append((torch.stack([positions, numbers], 1), flat))

    def clear(self) -> None:
        self.parts = []

    def collect(self) -> tuple[Rows, list[int]]:
        """The rows of all processes, each once and in the data set's order.

        This is the only place where values leave the device.

        Returns:
            The values by name, in the device's widest floating-point dtype; and the rows' numbers
            in the input, -1 if not known.
        """
        local = []
        if self.parts:
            ids, flat = (torch.cat(tensors).cpu() for tensors in zip(*self.parts, strict=True))
            local = [(self.shapes, ids, flat)]
        gathered = gather_object(local)
        if not gathered:
            return {}, []
        shapes = gathered[0][0]
        ids, flat = (torch.cat([part[i] for part in gathered]) for i in (1, 2))
        order = ids[:, 0].argsort(stable=True)
        positions = ids[order, 0]
        is_first = torch.ones(len(order), dtype=torch.bool)
        is_first[1:] = positions[1:] != positions[:-1]
        order = order[is_first]
        widest = torch.float32 if self.device.type == "mps" else torch.float64
        widths = [shape.numel() for shape in shapes.values()]
        columns = flat[order].to(self.device, widest).split(widths, 1)
        rows = {
            name: column.reshape(len(order), *shape)
            for (name, shape), column in zip(shapes.items(), columns, strict=True)
        }
        return rows, ids[order, 1].tolist()


def figures(
    table: RowTable,
    score: Callable[[Rows], Scored],
    metrics_of: Callable[[dict[str, float]], dict[str, float]],
    where: str,
) -> tuple[dict[str, float], np.ndarray | None, np.ndarray | None]:
    """Loss and metrics, rewards and labels of an evaluation; the same on every process.

    Args:
        table: the rows.
        score: maps all rows to their `Scored`.
        metrics_of: maps the sums to metrics.
        where: the step, for an error.

    Returns:
        Loss and metrics by name; the rewards of the rows, float32, and their labels, both in the
        data set's order. Without rows an empty dict, None and None.

    Raises:
        NonFiniteLossError: the loss is not finite. It names the rows with values that are not.
    """
    rows, numbers = table.collect()
    if not rows:
        return {}, None, None
    sums, rewards, labels = score(rows)
    if not torch.tensor(sums["loss"]).isfinite():
        bad = ~torch.stack([v.reshape(len(v), -1).isfinite().all(1) for v in rows.values()]).all(0)
        bad_rows = [numbers[i] for i in bad.nonzero().flatten().tolist() if numbers[i] >= 0]
        names = f", data rows {bad_rows[:20]}" if bad_rows else ""
        raise NonFiniteLossError(f"the loss is {sums['loss']} at {where}{names}")
    metrics = {"loss": sums["loss"], **metrics_of(sums)}
    return metrics, rewards.float().cpu().numpy(), labels.cpu().numpy()
