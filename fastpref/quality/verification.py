"""`verify`: whether fastpref computes the right log-probs of a model, and whether a run can start.

data -> a sample of rows, tokenised and collated as in training
     -> token log-probs of fastpref (paths.py) -> checks before the first step (start.py)
     -> of the first pairs: sequence log-probs of fastpref, eager torch and TRL against float64
     -> the model's structure (structure.py) -> findings, the worst first

`fastpref verify` is the command. docs/verify.md describes each finding.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastpref.data.batches import batch_labels
from fastpref.data.collate import PreferenceCollator
from fastpref.data.columns import IDS, REFERENCE
from fastpref.data.files import load_preference_data
from fastpref.data.tokenise import prepare_dataset
from fastpref.heads.calling import check_head, disable_dropout, install_head_forward
from fastpref.heads.reading import read_head
from fastpref.logps.sequences import sequence_logps
from fastpref.losses.options import LossOptions
from fastpref.losses.preference import preference_loss
from fastpref.progress import watched
from fastpref.quality import paths, start, structure
from fastpref.quality.findings import LEVELS, Finding
from fastpref.quality.start import Check, PairLogps

ROWS, COMPARED = 16, 6
BATCH = 2  # pairs in a batch
_NEGLIGIBLE = 1e-3  # nats a sequence
_LARGE = 0.1  # of a reward


@dataclass
class PathError:
    """How far the sequence log-probs of one way of computing are from the exact ones.

    Attributes:
        max_nats, mean_nats: over the sequences.
        max_reward, mean_reward: beta times the error of a pair's margin.
        seconds: that the way took.
    """

    max_nats: float
    mean_nats: float
    max_reward: float
    mean_reward: float
    seconds: float


@dataclass
class Verification:
    """The result of `verify`.

    Attributes:
        dtype: of the model's weights.
        exact: "float64" or "float32", in which the log-probs that count as exact were computed;
            or why there are none.
        pairs: pairs of the checks; compared: of them, those of the errors.
        errors: by the way of computing.
        left_out: ways that were not taken, and why.
        checks: what has to hold before the first step.
        findings: what was found, the worst first.
        figures: loss and expected loss of the first step, NLL per token of both sides, share of
            pairs that the model ranks as the data.
    """

    dtype: str
    exact: str
    pairs: int = 0
    compared: int = 0
    errors: dict[str, PathError] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    checks: list[Check] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    figures: dict[str, float] = field(default_factory=dict)

    def worst(self) -> str | None:
        """The level of the worst finding; None if there is none."""
        return min((f.level for f in self.findings), key=LEVELS.index, default=None)

    def as_dict(self) -> dict[str, Any]:
        """The attributes, as values for JSON."""
        return {**asdict(self), "findings": [finding.as_dict() for finding in self.findings]}


def verify(
    model: Any,
    data: Any,
    tokenizer: Any = None,
    *,
    ref_model: Any = None,
    peft_config: Any = None,
    loss_type: Any = "sigmoid",
    beta: float = 0.1,
    loss_options: dict[str, Any] | None = None,
    max_length: int | None = 1024,
    truncation_mode: str = "keep_start",
    rows: int = ROWS,
    compared: int = COMPARED,
    data_collator: Any = None,
    show_progress: bool = False,
) -> Verification:
    """Compare log-probs with exact ones, and check what has to hold before the first step.

    Args:
        model: a causal language model or a PeftModel. As in the trainers its dropout is switched
            off, and a PeftModel without a ref_model gets a frozen copy of its adapter.
        data: pairs as `load_preference_data` takes them.
        tokenizer: the model's; not needed for token ids.
        ref_model: the reference; by default the model itself, or the columns of the data.
        peft_config: an adapter to add, as in the trainers.
        loss_type, beta, loss_options: of the loss whose first value is checked.
        max_length, truncation_mode: as in the trainers.
        rows: pairs that are checked, evenly spread over the data.
        compared: of them, the pairs whose log-probs are computed in every way.
        data_collator: replaces `PreferenceCollator`, as in the trainers.
        show_progress: whether progress is shown.

    Raises:
        ValueError: data or a model that could not be trained on (see `PreferenceTrainer`).
    """
    from fastpref.trainer.loading import add_adapter

    model = add_adapter(model, peft_config, ref_model is not None)
    disable_dropout(model)
    install_head_forward(model)
    check_head(model)
    if ref_model is not None:
        install_head_forward(ref_model)
    examples = _sample(data, tokenizer, rows, max_length, truncation_mode, model)
    collator = data_collator or PreferenceCollator(
        _pad_token(tokenizer, model), max_length, truncation_mode
    )
    device = next(model.parameters()).device
    groups = [examples[i : i + BATCH] for i in range(0, len(examples), BATCH)]
    batches = [_to(collator(group), device) for group in groups]
    few = batches[: max(1, -(-min(compared, len(examples)) // BATCH))]
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    options = LossOptions(loss_type=loss_type, beta=beta, **(loss_options or {}))
    run = _Run(model, ref_model, options, examples, batches, few, show_progress)
    out = Verification(dtype, "float64", len(examples), sum(len(b["input_ids"]) for b in few) // 2)
    run.check_start(out, max_length, truncation_mode == "keep_start")
    run.compare(out)
    out.findings += structure.check_tied_head(model) + structure.adapter_initialisation(model)
    out.findings += structure.check_router(model, batches[0])
    out.findings.sort(key=lambda finding: LEVELS.index(finding.level))
    return out


@dataclass
class _Run:
    """The parts of `verify` and their progress."""

    model: Any
    ref_model: Any
    options: LossOptions
    examples: list[dict[str, Any]]
    batches: list[dict[str, Any]]
    few: list[dict[str, Any]]
    show_progress: bool

    def _watched(self, what: str, work: Iterator[Tensor], total: int) -> list[Tensor]:
        """The results of the work on batches, with a line of progress for each part."""
        return list(watched(work, what, "batches", total, 1, not self.show_progress))

    # ---- before the first step ----

    def check_start(self, out: Verification, max_length: int | None, keep_start: bool) -> None:
        from fastpref.reference import Reference, is_peft

        own = is_peft(self.model) and self.ref_model is None
        policy = Reference(self.model, False, {}, own_mode=True)
        reference = Reference(self.ref_model or self.model, own, {})
        total = len(self.batches)
        was_training = self.model.training
        self.model.train()
        try:
            tokens = self._watched(
                "Log-probs in training mode", map(policy.token_logps, self.batches), total
            )
        finally:
            self.model.train(was_training)
        again = self._watched(
            "Log-probs of the reference", map(reference.token_logps, self.batches), total
        )
        pairs: list[PairLogps] = []
        done = 0
        for batch, logps in zip(self.batches, again, strict=True):
            size = len(batch["input_ids"]) // 2
            numbers = [example["row"] for example in self.examples[done : done + size]]
            pairs += start.pairs_of(batch, logps, numbers, keep_start)
            done += size
        narrow = next(self.model.parameters()).dtype.itemsize < 4
        found = [
            start.check_labels(pairs, self.examples, max_length, keep_start),
            start.check_prompts(pairs),
            start.check_parting(pairs, 0.25 if narrow else 2e-3),
        ]
        names = (
            "labels are the answers' tokens",
            "both answers follow one prompt",
            "log-probs differ where the answers part, and not before",
        )
        for name, findings in zip(names, found, strict=True):
            said = findings[0].message if findings else f"{len(pairs)} of {len(pairs)} pairs"
            out.checks.append(Check(name, not findings, said))
            out.findings += findings
        sums = [_sums(self.batches, values) for values in (tokens, again)]
        self._check_rewards(out, sums[0], sums[1], narrow)
        out.findings += start.check_beginnings(pairs)
        one_sided, figures = start.check_sides(pairs)
        out.findings += one_sided
        out.figures |= figures

    def _check_rewards(
        self, out: Verification, policy: Tensor, reference: Tensor, narrow: bool
    ) -> None:
        """Check that rewards are 0 and that the loss is that of equal log-probs."""
        from fastpref.trainer.step_zero import likely_cause, noise_of, tolerance

        beta = self.options.beta
        if self.options.reference != "required":
            out.checks.append(Check("margins are 0", None, "the loss has no reference"))
            return
        source = "step"
        if all(name in self.batches[0] for name in REFERENCE):
            source = "columns"
            sides = [torch.cat([b[name] for b in self.batches]) for name in REFERENCE]
            reference = torch.stack(sides).to(policy)
        ratios = policy - reference  # [2, P]
        margins = beta * (ratios[0] - ratios[1])
        limit = tolerance(source, beta, narrow)
        largest = float(torch.cat([beta * ratios.abs().flatten(), margins.abs()]).max())
        loss, expected = self._loss(policy, reference), self._loss(policy, policy)
        out.figures |= {"largest_reward": largest, "loss": loss, "expected_loss": expected}
        same = largest < limit
        out.checks.append(Check("rewards and margins are 0", same, f"at most {largest:.2g}"))
        text = f"{loss:.6g}, of equal log-probs {expected:.6g}"
        close = abs(loss - expected) <= max(1e-3, 0.5 * limit) * max(1.0, abs(expected))
        out.checks.append(Check(f"the first loss ({self._name()})", close, text))
        out.findings += start.check_batch_means(margins, 8)
        if same and close:
            return
        lengths = _lengths(self.batches)
        per_token = float((ratios.abs() / lengths.to(ratios)).max())
        self.model.train()
        noisy = noise_of(self.model, None)
        self.model.eval()
        cause = likely_cause(source, per_token, noisy)
        another = self.ref_model is not None
        level = "note" if another else "error"
        cause = "the reference is another model than the policy" if another else cause
        out.findings.append(
            Finding(
                "step_zero",
                level,
                f"rewards before the first step are up to {largest:.3g}, and the loss is "
                f"{loss:.4g}; of a policy that starts as its reference it is {expected:.4g}",
                f"the likely cause: {cause}",
                values={"largest_reward": largest, "loss": loss, "expected_loss": expected},
            )
        )

    def _name(self) -> str:
        return " + ".join(map(str, self.options.names))

    def _loss(self, policy: Tensor, reference: Tensor) -> float:
        lengths = _lengths(self.batches)
        out = preference_loss(
            policy[0],
            policy[1],
            reference[0],
            reference[1],
            chosen_lengths=lengths[0],
            rejected_lengths=lengths[1],
            loss_options=self.options,
        )
        return float(out.loss)

    # ---- against exact log-probs ----

    def compare(self, out: Verification) -> None:
        from fastpref.reference import Reference

        exact_model, out.exact = paths.widened(self.model)
        if exact_model is None:
            reason = f"{out.exact}, so that nothing counts as exact"
            out.left_out = dict.fromkeys(("fastpref", "eager", "TRL"), reason)
            return
        with paths.computing_in(out.exact):
            exact, _ = self._timed(
                f"Exact log-probs in {out.exact}", paths.plain_logps, exact_model
            )
        del exact_model
        reference = Reference(self.model, False, {})
        ways: dict[str, Callable[[Any, dict[str, Any]], Tensor]] = {
            "fastpref": lambda model, batch: reference.logps(batch),
            f"eager ({out.dtype})": paths.plain_logps,
        }
        for name, way in ways.items():
            values, seconds = self._timed(f"Log-probs of {name}", way, self.model)
            out.errors[name] = self._error(values, exact, seconds)
        if (reason := paths.why_no_trl()) is not None:
            out.left_out["TRL"] = reason
        else:
            with paths.with_trl_head(self.model):
                values, seconds = self._timed("Log-probs of TRL", paths.trl_logps, self.model)
            out.errors["TRL"] = self._error(values, exact, seconds)
        self._judge(out)

    def _timed(self, what: str, way: Any, model: Any) -> tuple[Tensor, float]:
        """The sequence log-probs [2, P] of the compared pairs, and the seconds that they took."""
        began = time.perf_counter()
        parts = self._watched(what, paths.each(way, model, self.few), len(self.few))
        sides = [part.double().chunk(2) for part in parts]
        values = torch.stack([torch.cat(side) for side in zip(*sides, strict=True)])
        return values, time.perf_counter() - began

    def _error(self, values: Tensor, exact: Tensor, seconds: float) -> PathError:
        errors = values - exact
        nats = errors.abs()
        rewards = self.options.beta * (errors[0] - errors[1]).abs()
        figures = (nats.max(), nats.mean(), rewards.max(), rewards.mean())
        most, mean, largest, usual = (float(figure) for figure in figures)
        return PathError(most, mean, largest, usual, seconds)

    def _judge(self, out: Verification) -> None:
        ours, (name, eager) = out.errors["fastpref"], [*out.errors.items()][1]
        if not ours.max_nats <= max(2 * eager.max_nats, _NEGLIGIBLE):
            out.findings.append(
                Finding(
                    "inexact",
                    "error",
                    f"fastpref's log-probs are off by up to {ours.max_nats:.3g} nats an answer, "
                    f"eager torch's in the same dtype by {eager.max_nats:.3g}",
                    "please report it with the model's name; FASTPREF_BACKEND=eager computes "
                    "without fastpref's kernels",
                    values={"fastpref": ours.max_nats, "eager": eager.max_nats},
                )
            )
        elif ours.max_reward > _LARGE:
            out.findings.append(
                Finding(
                    "rounding",
                    "note",
                    f"in {out.dtype} a pair's margin is off by up to {ours.max_reward:.2g} in "
                    f"fastpref and {eager.max_reward:.2g} in {name}: the body's rounding",
                    "margins of this size are noise; fp32 weights are more exact",
                    values={"fastpref": ours.max_reward, "eager": eager.max_reward},
                )
            )


def _sample(
    data: Any, tokenizer: Any, rows: int, max_length: int | None, mode: str, model: Any
) -> list[dict[str, Any]]:
    """Tokenised rows, evenly spread over the data, the longest first."""
    dataset = load_preference_data(data)
    if not hasattr(dataset, "__len__"):
        raise ValueError("data is a stream; pass a data set or a file")
    if rows < 1:
        raise ValueError(f"rows is {rows}; expected at least 1")
    if not {"row", IDS[0]} & set(dataset.column_names):
        dataset = dataset.add_column("row", list(range(len(dataset))))
    picked = np.unique(np.linspace(0, len(dataset) - 1, min(rows, len(dataset))).astype(int))
    prepared, _ = prepare_dataset(
        dataset.select(picked),
        tokenizer,
        max_length=max_length,
        truncation_mode=mode,
        name="train",
        vocab_size=read_head(model, adapters=True).vocab_size,
    )
    return [dict(row) for row in prepared]


def _pad_token(tokenizer: Any, model: Any) -> int:
    config = model.config
    ids = [getattr(tokenizer, "pad_token_id", None), getattr(tokenizer, "eos_token_id", None)]
    ids += [config.pad_token_id, config.eos_token_id]
    return next((i for i in ids if isinstance(i, int)), 0)


def _to(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}


def _sums(batches: Sequence[dict[str, Any]], tokens: Sequence[Tensor]) -> Tensor:
    """The sequence log-probs [2, P] of all pairs from token log-probs of batches."""
    parts = [
        sequence_logps(values.double(), batch_labels(batch)).chunk(2)
        for batch, values in zip(batches, tokens, strict=True)
    ]
    return torch.stack([torch.cat(side) for side in zip(*parts, strict=True)])


def _lengths(batches: Sequence[dict[str, Any]]) -> Tensor:
    """The tokens [2, P] of the answers of all pairs."""
    parts = [batch["completion_mask"].sum(1).clamp(min=1).chunk(2) for batch in batches]
    return torch.stack([torch.cat(side) for side in zip(*parts, strict=True)])
