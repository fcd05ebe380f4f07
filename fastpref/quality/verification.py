"""`verify`: whether fastpref computes the right log-probs of a model, and whether a run can start.

data -> a sample of rows, tokenised and collated as in training
     -> token log-probs of fastpref (logp_paths.py) -> checks before the first step (first_step.py)
     -> of the first pairs: sequence log-probs of fastpref, eager torch and TRL against float64
     -> the pairs ranked by how likely they displace the chosen answer (displacement.py)
     -> the model's structure (model_structure.py) -> findings, the worst first

`fastpref verify` is the command. docs/verify.md describes each finding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
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
from fastpref.quality import first_step, logp_paths, model_structure
from fastpref.quality.displacement import Scored
from fastpref.quality.findings import LEVELS, Finding
from fastpref.quality.first_step import Check, PairLogps
from fastpref.quality.verified import PathError, Verification

ROWS, COMPARED = 16, 2
BATCH = 2  # pairs in a batch
_NEGLIGIBLE = 1e-3  # nats a sequence
_LARGE = 0.1  # of a reward


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
    count = min(len(batches), max(1, -(-compared // BATCH)))
    few = ((np.arange(count) + 0.5) * len(batches) / count).astype(int).tolist()
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    options = LossOptions(loss_type=loss_type, beta=beta, **(loss_options or {}))
    run = _Run(model, ref_model, options, examples, batches, few, show_progress)
    out = Verification(dtype, "float64", len(examples), sum(len(groups[i]) for i in few))
    run.check_start(out, max_length, truncation_mode == "keep_start")
    run.compare(out)
    out.findings += model_structure.check_tied_head(model) + model_structure.adapter_initialisation(
        model
    )
    out.findings += model_structure.check_router(model, batches[0])
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
    few: list[int]  # the batches that are computed in every way
    show_progress: bool
    tokens: list[Tensor] = field(default_factory=list)  # of the batches, by fastpref

    def _watched(self, title: str, work: Iterator[Tensor], total: int) -> list[Tensor]:
        """The results of the work on batches, with progress under this title."""
        return list(watched(work, title, "batches", total, 1, not self.show_progress))

    def _logps(self, title: str, reference: Any, few: bool) -> list[Tensor]:
        """The token log-probs of all batches, or of those that are computed in every way."""
        batches = [self.batches[i] for i in self.few] if few else self.batches
        return self._watched(title, map(reference.token_logps, batches), len(batches))

    # ---- before the first step ----

    def check_start(self, out: Verification, max_length: int | None, keep_start: bool) -> None:
        from fastpref.reference import Reference

        scored = Scored(Reference(self.model, False, {}))
        self.tokens = self._logps("Log-probs of fastpref", scored, False)
        out.displacement = scored.ranked([example["row"] for example in self.examples])
        pairs: list[PairLogps] = []
        for batch, logps in zip(self.batches, self.tokens, strict=True):
            size, done = len(batch["input_ids"]) // 2, len(pairs)
            numbers = [example["row"] for example in self.examples[done : done + size]]
            pairs += first_step.pairs_of(batch, logps, numbers, keep_start)
        narrow = next(self.model.parameters()).dtype.itemsize < 4
        findings_of_checks = [
            first_step.check_labels(pairs, self.examples, max_length, keep_start),
            first_step.check_prompts(pairs),
            first_step.check_parting(pairs, 0.25 if narrow else 2e-3),
        ]
        names = (
            "labels are the answers' tokens",
            "both answers follow one prompt",
            "log-probs differ where the answers part, and not before",
        )
        for name, findings in zip(names, findings_of_checks, strict=True):
            message = findings[0].message if findings else f"{len(pairs)} of {len(pairs)} pairs"
            out.checks.append(Check(name, not findings, message))
            out.findings += findings
        self._check_step(out, narrow)
        out.findings += first_step.check_beginnings(pairs)
        one_sided, figures = first_step.check_sides(pairs)
        out.findings += one_sided
        out.figures |= figures

    def _check_step(self, out: Verification, narrow: bool) -> None:
        """Compare the policy in training mode with its reference."""
        from fastpref.reference import Reference, is_peft

        if self.options.reference != "required":
            out.checks.append(Check("margins are 0", None, "the loss has no reference"))
            return
        was_training = self.model.training
        self.model.train()
        try:
            mode = Reference(self.model, False, {}, own_mode=True)
            trained = self._logps("Log-probs in training mode", mode, True)
        finally:
            self.model.train(was_training)
        if all(name in self.batches[0] for name in REFERENCE):
            tokens = list(self.tokens)
            for i, values in zip(self.few, trained, strict=True):
                tokens[i] = values
            sides = [torch.cat([batch[name] for batch in self.batches]) for name in REFERENCE]
            policy = _sums(self.batches, tokens)
            self._check_rewards(out, "columns", self.batches, policy, torch.stack(sides), narrow)
            return
        batches = [self.batches[i] for i in self.few]
        reference_tokens = [self.tokens[i] for i in self.few]
        is_adapter = is_peft(self.model) and self.ref_model is None
        if is_adapter or self.ref_model is not None:
            reference = Reference(self.ref_model or self.model, is_adapter, {})
            reference_tokens = self._logps("Log-probs of the reference", reference, True)
        policy = _sums(batches, trained)
        self._check_rewards(out, "step", batches, policy, _sums(batches, reference_tokens), narrow)

    def _check_rewards(
        self,
        out: Verification,
        source: str,
        batches: list[dict[str, Any]],
        policy: Tensor,
        reference: Tensor,
        narrow: bool,
    ) -> None:
        """Check that rewards are 0 and that the loss is that of equal log-probs.

        Args:
            source: as in `likely_cause`.
            policy, reference: sequence log-probs [2, P].
        """
        from fastpref.trainer.step_zero import likely_cause, noise_of, tolerance

        beta, lengths = self.options.beta, _lengths(batches)
        reference = reference.to(policy)
        ratios = policy - reference
        margins = beta * (ratios[0] - ratios[1])
        limit = tolerance(source, beta, narrow)
        largest = float(torch.cat([beta * ratios.abs().flatten(), margins.abs()]).max())
        loss = self._loss(policy, reference, lengths)
        expected = self._loss(policy, policy, lengths)
        out.figures |= {"largest_reward": largest, "loss": loss, "expected_loss": expected}
        is_zero = largest < limit
        out.checks.append(Check("rewards and margins are 0", is_zero, f"at most {largest:.2g}"))
        text = f"{loss:.6g}, of equal log-probs {expected:.6g}"
        close = abs(loss - expected) <= max(1e-3, 0.5 * limit) * max(1.0, abs(expected))
        out.checks.append(Check(f"the first loss ({self._name()})", close, text))
        out.findings += first_step.check_batch_means(margins, 8)
        if is_zero and close:
            return
        cause = likely_cause(
            source, float((ratios.abs() / lengths.to(ratios)).max()), self._noise(noise_of)
        )
        another = self.ref_model is not None
        if another:
            cause = "the reference is another model than the policy"
        out.findings.append(
            Finding(
                "step_zero",
                "note" if another else "error",
                f"rewards before the first step are up to {largest:.3g}, and the loss is "
                f"{loss:.4g}; of a policy that starts as its reference it is {expected:.4g}",
                f"the likely cause: {cause}",
                values={"largest_reward": largest, "loss": loss, "expected_loss": expected},
            )
        )

    def _noise(self, noise_of: Callable[[Any, None], str | None]) -> str | None:
        was_training = self.model.training
        try:
            return noise_of(self.model.train(), None)
        finally:
            self.model.train(was_training)

    def _name(self) -> str:
        return " + ".join(map(str, self.options.names))

    def _loss(self, policy: Tensor, reference: Tensor, lengths: Tensor) -> float:
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
        exact_model, out.exact = logp_paths.widened(self.model)
        if exact_model is None:
            reason = f"{out.exact}, so that nothing counts as exact"
            out.left_out = dict.fromkeys(("fastpref", "eager", "TRL"), reason)
            return
        try:
            exact = self._exact(exact_model, out.exact)
        except (RuntimeError, TypeError) as error:  # products of experts have no float64
            if out.exact != "float64":
                raise
            exact_model, out.exact = logp_paths.widened(self.model, torch.float32)
            out.left_out["float64"] = f"the model cannot compute in it ({_first_line(error)})"
            if exact_model is None:
                return
            exact = self._exact(exact_model, out.exact)
        del exact_model
        fused = _sums([self.batches[i] for i in self.few], [self.tokens[i] for i in self.few])
        out.errors["fastpref"] = self._error(fused, exact)
        name = f"eager ({out.dtype})"
        eager = self._sequence_logps(f"Log-probs of {name}", logp_paths.plain_logps, self.model)
        out.errors[name] = self._error(eager, exact)
        if (missing := logp_paths.why_no_trl()) is not None:
            out.left_out["TRL"] = missing
        else:
            with logp_paths.with_trl_head(self.model):
                trl = self._sequence_logps("Log-probs of TRL", logp_paths.trl_logps, self.model)
            out.errors["TRL"] = self._error(trl, exact)
        self._judge(out)

    def _exact(self, model: Any, dtype: str) -> Tensor:
        with logp_paths.computing_in(dtype):
            return self._sequence_logps(
                f"Exact log-probs in {dtype}", logp_paths.plain_logps, model
            )

    def _sequence_logps(self, title: str, function: Any, model: Any) -> Tensor:
        """The sequence log-probs [2, P] of the compared pairs."""
        batches = [self.batches[i] for i in self.few]
        parts = self._watched(title, logp_paths.each(function, model, batches), len(batches))
        sides = [part.double().chunk(2) for part in parts]
        return torch.stack([torch.cat(side) for side in zip(*sides, strict=True)])

    def _error(self, values: Tensor, exact: Tensor) -> PathError:
        errors = values - exact
        nats = errors.abs()
        rewards = self.options.beta * (errors[0] - errors[1]).abs()
        figures = (nats.max(), nats.mean(), rewards.max(), rewards.mean())
        return PathError(*(float(figure) for figure in figures))

    def _judge(self, out: Verification) -> None:
        fused, (name, eager) = out.errors["fastpref"], [*out.errors.items()][1]
        if not fused.max_nats <= max(2 * eager.max_nats, _NEGLIGIBLE):
            out.findings.append(
                Finding(
                    "inexact",
                    "error",
                    f"fastpref's log-probs are off by up to {fused.max_nats:.3g} nats an answer, "
                    f"eager torch's in the same dtype by {eager.max_nats:.3g}",
                    "please report it with the model's name; FASTPREF_BACKEND=eager computes "
                    "without fastpref's kernels",
                    values={"fastpref": fused.max_nats, "eager": eager.max_nats},
                )
            )
        elif fused.max_reward > _LARGE:
            out.findings.append(
                Finding(
                    "rounding",
                    "note",
                    f"in {out.dtype} a pair's margin is off by up to {fused.max_reward:.2g} in "
                    f"fastpref and {eager.max_reward:.2g} in {name}: the body's rounding",
                    "margins of this size are noise; fp32 weights are more exact",
                    values={"fastpref": fused.max_reward, "eager": eager.max_reward},
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
    examples = [dict(row) for row in prepared]  # of like lengths in a batch: less padding
    return sorted(examples, key=lambda row: -max(len(row[IDS[1]]), len(row[IDS[2]])))


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


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
