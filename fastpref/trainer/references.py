"""The reference of a trainer: which one it is, and its log-probabilities of batches and data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fastpref import reference as refs
from fastpref.attention import SegmentAttention
from fastpref.heads.calling import check_head, disable_dropout, install_head_forward
from fastpref.heads.reading import unwrap
from fastpref.trainer.checks import check_positions, check_trains
from fastpref.trainer.division import convert_weights, engine_dtype, trained_form
from fastpref.trainer.metrics import MetricWindow
from fastpref.trainer.reference_sync import SyncingTrainer, check_sync_columns
from fastpref.trainer.step_zero import StepZeroProbe
from fastpref.trainer.stored_references import StoringTrainer


class ReferencingTrainer(StoringTrainer, SyncingTrainer):
    """The part of a trainer that has a reference."""

    ld_alpha: float | None = None  # for the reference's sums, as in `ld_sequence_logps`
    needs_reference: bool  # whether the loss needs a reference
    precompute: bool  # whether reference log-probs are computed before training
    _head_options: dict[str, Any]
    _window: MetricWindow

    def choose_reference(self, model: Any, ref_model: Any, datasets: list[Any]) -> Any:
        """Decide where the reference's log-probs come from, before transformers' constructor.

        Args:
            model: the policy.
            ref_model: the user's reference model or None.
            datasets: the prepared training and evaluation data.

        Returns:
            The second model: ref_model or a frozen copy of the policy; None if none is needed.
        """
        check_positions(model, datasets, self.args.max_length)
        in_data = [refs.has_reference(dataset, self.reference_columns()) for dataset in datasets]
        self._probes = self.needs_reference and ref_model is None
        check_sync_columns(self.args, in_data)
        self.check_data(datasets, any(in_data) or ref_model is not None)
        self._runs_reference = not all(in_data) and self.needs_reference
        ahead = self.args.precompute_ref_log_probs or self.args.reference_store is not None
        self.precompute = ahead and self._runs_reference
        if self.args.reference_store is not None and self.needs_reference and all(in_data):
            raise ValueError(
                f"reference_store is {self.args.reference_store!r} but the data has columns of "
                "reference log-probs, so that the store would not be used; expected one of the two"
            )
        if self.precompute:  # `train` checks this again, after hours of computing log-probs
            check_trains(model)
        self._is_own_reference = refs.is_peft(model) and ref_model is None
        if self._runs_reference and self._is_own_reference:
            refs.check_adapter_reference(model)
        elif self._runs_reference and not self.precompute and ref_model is None:
            return refs.frozen_copy(model)
        return ref_model

    def set_up_reference(self, ref_model: Any) -> None:
        """Prepare the reference that `choose_reference` returned, and precompute its log-probs."""
        if self.precompute and self.args.reference_store is not None:
            model = self.model if ref_model is None else ref_model
            self.open_store(model, ref_model is None and self._is_own_reference)
        self.ref_model: Any = None
        if ref_model is not None:
            self.ref_model = self._prepare_reference_model(ref_model)
        attention, ref_attention = self.choose_rows()
        self._policy_reference = refs.Reference(
            self.model,
            self._is_own_reference,
            self._head_options,
            self.ld_alpha,
            attention=attention,
        )
        self.reference: refs.Reference | None = None
        if self.ref_model is not None:
            self.reference = replace(
                self._policy_reference,
                model=self.ref_model,
                adapter=False,
                attention=ref_attention,
            )
        elif self._is_own_reference and self._runs_reference:
            self.reference = self._policy_reference
        if self.args.sync_ref_model:
            self.start_sync(ref_model)
        self._add_probe()
        self._shard_reference()
        if self.precompute:
            self._check_whole_weights()
            self.train_dataset = self._precompute(self.train_dataset, "train")
            if isinstance(self.eval_dataset, Mapping):
                named = self.eval_dataset.items()
                self.eval_dataset = {name: self._precompute(d, name) for name, d in named}
            elif self.eval_dataset is not None:
                self.eval_dataset = self._precompute(self.eval_dataset, "eval")
        self._is_set_up = True

    def _add_probe(self) -> None:
        """Have the first step checked, if the policy starts as its reference."""
        if not (self._probes and self.args.alarms):
            return
        in_data = refs.has_reference(self.train_dataset, self.reference_columns())
        source = "columns" if in_data else "ahead" if self.precompute else "step"
        args: Any = self.args
        model: Any = self.model
        half = bool(args.bf16 or args.fp16) or next(model.parameters()).dtype.itemsize < 4
        noise = args.neftune_noise_alpha
        self.add_callback(StepZeroProbe(self._window, source, args.beta, half, noise))

    def _prepare_reference_model(self, model: Any) -> Any:
        install_head_forward(model)
        if type(unwrap(model)) is not type(unwrap(self.model)):  # the policy's class is checked
            check_head(model)
        if self.args.disable_dropout:
            disable_dropout(model)
        if (dtype := engine_dtype(self.accelerator)) is not None:  # as the policy will have it
            convert_weights(model, dtype)
        model = model.eval().requires_grad_(False)
        return self.accelerator.prepare_model(model, evaluation_mode=True)

    def _shard_reference(self) -> None:
        """Shard `ref_model` as FSDP2 shards the policy; accelerate leaves models to evaluate whole.

        Its weights are freed after each forward pass, the head too: no backward pass would do it.
        """
        if self.ref_model is None or not getattr(self.accelerator, "is_fsdp2", False):
            return
        from accelerate.utils import fsdp2_prepare_model

        self.ref_model = fsdp2_prepare_model(self.accelerator, self.ref_model).eval()
        self.ref_model.set_reshard_after_forward(True)

    def _check_whole_weights(self) -> None:
        """Raise ValueError where a process has no weights yet, and would compute with them."""
        plugin: Any = getattr(self.accelerator.state, "fsdp_plugin", None)
        if self.is_fsdp_enabled and plugin.cpu_ram_efficient_loading:
            raise ValueError(
                "precompute_ref_log_probs and reference_store need the weights on every process, "
                "and fsdp_cpu_ram_efficient_loading leaves them on the first one; set it to false, "
                "or compute them with fastpref precompute"
            )

    def with_reference(self, dataset: Any, name: str) -> Any:
        """Evaluation data with the reference's log-probs, if they are computed ahead.

        The policy is its own reference only before the first step.
        """
        check_positions(self.model, [dataset], self.args.max_length)
        check_sync_columns(self.args, [refs.has_reference(dataset, self.reference_columns())])
        can_compute = self.reference is not None or self.state.global_step == 0
        if self.precompute and (can_compute or self.reference_store is not None):
            return self._precompute(dataset, name, can_compute)
        return dataset

    def _precompute(self, dataset: Any, name: str, can_compute: bool = True) -> Any:
        """The data with the log-probs of the reference, or of the policy if there is no other.

        can_compute: whether that reference is still there; if not, a store may have the log-probs.
        """
        if refs.has_reference(dataset, self.reference_columns()):
            return dataset
        args = self.args
        size = args.train_batch_size if name == "train" else args.eval_batch_size
        size = args.precompute_ref_batch_size or size
        source = self.reference or self._policy_reference

        def logps(batch: dict[str, Any]) -> Tensor:
            self.end_before_batch()
            return self.reference_sums(reference, batch)

        what = f"the reference's log-probs of {name} data"
        fate = "which are not kept: the same command starts again"
        if self.reference_store is not None:
            fate = f"which {self.reference_store.path} keeps: the same command goes on"
        with (
            self.ending_computation(what, fate),
            self.accelerator.autocast(),
            trained_form(source.model, self.accelerator) as model,
        ):
            reference = source.of(model)
            if self.reference_store is not None:
                return self.with_stored(dataset, name, reference if can_compute else None, size)
            return refs.precompute(
                dataset,
                logps,
                self.data_collator,
                self.accelerator,
                batch_size=size,
                name=name,
                columns=self.reference_columns(),
                num_workers=args.dataloader_num_workers,
                disable_tqdm=bool(args.disable_tqdm) or not self.is_world_process_zero(),
            )

    def reference_logps(self, inputs: dict[str, Any]) -> Tensor | None:
        """The reference's log-probs of a batch, [C * P] for C `reference_columns`, or None."""
        names = self.reference_columns()
        if names[0] in inputs:
            return torch.cat([inputs[name] for name in names])
        if self.reference is None and not self.needs_reference:
            return None
        if self.reference is None:
            raise ValueError(
                "this data has no reference log-probs and no reference model is kept; pass it as "
                "eval_dataset when the trainer is made, or pass ref_model"
            )
        with self.accelerator.autocast():
            return self.reference_sums(self.reference, inputs)

    # ---- defined by a subclass ----

    def choose_rows(self) -> tuple[SegmentAttention | None, SegmentAttention | None]:
        """Choose the rows of batches; the attention of the policy and of `ref_model` for them."""
        return None, None

    def check_data(self, datasets: list[Any], has_reference: bool) -> None:
        """Raise ValueError for columns, or a reference, that the loss does not support."""

    def reference_sums(self, reference: refs.Reference, batch: dict[str, Any]) -> Tensor:
        """The reference's log-probs of a batch, [C * P], one column after the other."""
        return torch.cat([reference.logps(part) for part in self.reference_parts(batch)])
