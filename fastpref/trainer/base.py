"""Preference optimisation on `transformers.Trainer`, without logits: what all trainers share."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from accelerate.utils import AutocastKwargs
from torch import Tensor, nn
from transformers import (
    EvalPrediction,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
    set_seed,
)

from fastpref import reference as refs
from fastpref.data.files import load_preference_data
from fastpref.data.tokenise import DataReport
from fastpref.heads.adapters import check_adapters
from fastpref.heads.calling import check_head, disable_dropout, install_head_forward
from fastpref.heads.modes import same_weights_trained
from fastpref.heads.reading import Head, read_head, unwrap
from fastpref.progress import silenced
from fastpref.trainer.checkpointing import CheckpointingTrainer
from fastpref.trainer.checks import check_optimizer, check_sampling, check_trains
from fastpref.trainer.config import BaseConfig
from fastpref.trainer.loading import (
    add_adapter,
    check_models,
    each,
    load_model,
    load_tokenizer,
    router_coefficient,
)
from fastpref.trainer.metrics import MetricWindow, TokenCount, check_grad_norm, check_weights
from fastpref.trainer.model_card import CardTrainer
from fastpref.trainer.predictions import PredictingTrainer
from fastpref.trainer.progress import use_lines
from fastpref.trainer.reference_sync import SyncingTrainer, check_sync_columns, check_sync_options

logger = logging.getLogger("fastpref")


class BaseTrainer(CheckpointingTrainer, PredictingTrainer, SyncingTrainer, CardTrainer):
    """What `PreferenceTrainer` and `UnpairedPreferenceTrainer` share: all but data and loss.

    A trainer derived from it says what its configuration, its rows and its loss are.
    """

    config_class: type[BaseConfig]
    columns: tuple[str, ...]  # of prepared data, which its collator reads
    args: BaseConfig
    loss_is_scaled_for_ga = False  # the loss is a mean per micro-batch
    reads_in_order = False  # the loss needs the training rows in the data's order
    ld_alpha: float | None = None  # of the reference's sums, as in `ld_sequence_logps`

    def __init__(
        self,
        model: str | PreTrainedModel | Any,
        ref_model: str | PreTrainedModel | Any = None,
        args: BaseConfig | None = None,
        data_collator: Callable[[list[dict]], dict[str, Tensor]] | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        compute_metrics: Callable[[EvalPrediction], dict] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        quantization_config: Any = None,
        peft_config: Any = None,
    ) -> None:
        args = self.config_class.of(args)
        if train_dataset is None:
            raise ValueError("train_dataset is None; expected preference data")
        self._head_options = args.head_options()
        self.needs_reference = self.set_loss(args)
        check_sync_options(args, self.needs_reference)
        set_seed(args.seed)  # before an adapter draws its weights
        check_models(model, ref_model, args, quantization_config, peft_config)
        name = model if isinstance(model, str) else None
        model = load_model(model, args, quantization_config)
        if ref_model is not None:
            ref_model = load_model(ref_model, args, quantization_config, trainable=False)
        tokenizer, pad_id = load_tokenizer(model, processing_class, args, name)
        model = add_adapter(model, peft_config, ref_model is not None)
        self._vocab_size = read_head(model, adapters=True).vocab_size
        self.reports: dict[str, DataReport] = {}
        self._tokenizer = tokenizer
        self.args = args
        train_dataset = self._prepare_data(train_dataset, "train")
        check_sampling(args, train_dataset, self.reads_in_order)
        eval_dataset = self._prepare_eval_data(eval_dataset)
        settings: Any = args.accelerator_config
        self._dispatches = bool(settings.dispatch_batches)
        if settings.dispatch_batches is None:  # processes read streams, too, by themselves
            settings.dispatch_batches = False
        if data_collator is None:
            data_collator = self.make_collator(
                pad_id, args.max_length, args.truncation_mode, args.pad_to_multiple_of
            )
        if args.disable_dropout:
            disable_dropout(model)
        check_adapters(read_head(model, adapters=True).adapters, training=True)
        check_optimizer(model, optimizers[0])
        datasets = [train_dataset, *each(eval_dataset)]
        given = [refs.has_reference(dataset, self.reference_columns()) for dataset in datasets]
        check_sync_columns(args, given)
        self.check_data(datasets, any(given) or ref_model is not None)
        wanted = not all(given) and self.needs_reference
        self.precompute = args.precompute_ref_log_probs and wanted
        if self.precompute:  # hours of work ahead of a training that cannot be
            check_trains(model)
        adapter = refs.is_peft(model) and ref_model is None
        if wanted and adapter:
            refs.check_adapter_reference(model)
        elif wanted and not self.precompute and ref_model is None:
            ref_model = refs.frozen_copy(model)
        install_head_forward(model)

        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=tokenizer,
            compute_metrics=compute_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        use_lines(self)
        self.start_checkpoints()
        self.model_accepts_loss_kwargs = False  # transformers before `loss_is_scaled_for_ga`
        if args.gradient_checkpointing:
            # Every block casts its weights anew in backward; a cache would keep 16-bit copies of
            # all of them through the forward pass and save nothing.
            self.accelerator.autocast_handler = AutocastKwargs(cache_enabled=False)
        check_head(self.model)  # here, as the model is on its device by now
        self._router_coef = router_coefficient(model, args.router_aux_loss_coef)
        self.aux_loss_enabled = self._router_coef != 0
        unwrap(model).add_model_tags(self._tag_names)
        self._window = MetricWindow(
            self.accelerator.gather,
            self.accelerator.num_processes,
            self.accelerator.process_index,
            has_aux_loss=self.aux_loss_enabled,
            **self.window_options(),
        )
        self.add_callback(TokenCount(self._window))
        self._evaluates = False
        self._micro_step = (0, 0)
        self.ref_model: Any = None
        if ref_model is not None:
            self.ref_model = self._prepare_reference_model(ref_model)
        self._policy_reference = refs.Reference(
            self.model, adapter, self._head_options, self.ld_alpha
        )
        self.reference = self._policy_reference if adapter and wanted else None
        if args.sync_ref_model:
            self.start_sync(ref_model)
        if self.ref_model is not None:
            self.reference = replace(self._policy_reference, model=self.ref_model, adapter=False)
        if self.precompute:
            self.train_dataset = self._precompute(self.train_dataset, "train")
            if isinstance(self.eval_dataset, Mapping):
                named = self.eval_dataset.items()
                self.eval_dataset = {name: self._precompute(d, name) for name, d in named}
            elif self.eval_dataset is not None:
                self.eval_dataset = self._precompute(self.eval_dataset, "eval")

    # ---- data ----

    def _prepare_data(self, source: Any, name: str) -> Any:
        args = self.args
        quiet = bool(args.disable_tqdm) or args.local_process_index != 0
        with args.main_process_first(desc=f"tokenising {name} data"), silenced(quiet):
            dataset, report = self.prepare_rows(
                load_preference_data(source),
                tokenizer=self._tokenizer,
                max_length=args.max_length,
                truncation_mode=args.truncation_mode,
                num_proc=args.dataset_num_proc,
                name=name,
                vocab_size=self._vocab_size,
            )
        if args.process_index == 0:
            for sentence in report.warnings():
                logger.warning(sentence)
        self.reports[name] = report
        return dataset

    def _prepare_eval_data(self, source: Any) -> Any:
        if isinstance(source, Mapping):
            return {name: self._prepare_data(part, name) for name, part in source.items()}
        return None if source is None else self._prepare_data(source, "eval")

    def _set_signature_columns_if_needed(self) -> None:
        if self._signature_columns is None:
            self._signature_columns: Any = list(self.columns)

    def _precompute(self, dataset: Any, name: str) -> Any:
        """The data with the reference's log-probs; the policy's if there is no other reference."""
        if refs.has_reference(dataset, self.reference_columns()):
            return dataset
        args = self.args
        size = args.train_batch_size if name == "train" else args.eval_batch_size
        reference = self.reference or self._policy_reference
        with self.accelerator.autocast():
            return refs.precompute(
                dataset,
                lambda batch: self.reference_sums(reference, batch),
                self.data_collator,
                self.accelerator,
                batch_size=args.precompute_ref_batch_size or size,
                name=name,
                columns=self.reference_columns(),
                num_workers=args.dataloader_num_workers,
                disable_tqdm=bool(args.disable_tqdm) or not self.is_world_process_zero(),
            )

    # ---- loss ----

    def _prepare_reference_model(self, model: Any) -> Any:
        install_head_forward(model)
        if type(unwrap(model)) is not type(unwrap(self.model)):  # that one has been checked
            check_head(model)
        if self.args.disable_dropout:
            disable_dropout(model)
        model = model.eval().requires_grad_(False)
        return self.accelerator.prepare_model(model, evaluation_mode=True)

    def reference_logps(self, inputs: dict[str, Any]) -> Tensor | None:
        """The reference's log-probs of a batch, one of `reference_columns` after the other."""
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

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The loss of one micro-batch; its metrics are kept on the device until they are logged."""
        if return_outputs:
            raise ValueError("return_outputs=True asks for logits, which this trainer never builds")
        kwargs, head_inputs = self.step_inputs(model, inputs)
        if self.aux_loss_enabled:
            kwargs["output_router_logits"] = True
        out = model(**kwargs, head_fn=self.loss_head, head_inputs=head_inputs)
        if model.training:
            self._window.add(out["sums"], inputs.get("rows"), self._where())
        return out["loss"]

    def _where(self) -> str:
        step = self.state.global_step + 1
        micro = self._micro_step[1] + 1 if self._micro_step[0] == step else 1
        self._micro_step = (step, micro)
        return f"step {step}, micro-batch {micro} of {self.args.gradient_accumulation_steps}"

    # ---- evaluation, logging, checkpoints ----

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Evaluate on the trainer's evaluation data, or on other data of any form it accepts.

        A dict of data sets is evaluated one by one under `eval_{name}_`.
        """
        own: Any = self.eval_dataset
        known = isinstance(eval_dataset, str) and isinstance(own, Mapping) and eval_dataset in own
        chosen = own if eval_dataset is None else eval_dataset
        if isinstance(chosen, Mapping):
            metrics: dict[str, float] = {}
            for name, part in chosen.items():
                part = name if eval_dataset is None else part
                prefix = f"{metric_key_prefix}_{name}"
                metrics.update(self.evaluate(part, ignore_keys, prefix))
            return metrics
        if eval_dataset is not None and not known:
            eval_dataset = self.evaluation_data(eval_dataset, metric_key_prefix)
        self._evaluates = True
        try:
            return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        finally:
            self._evaluates = False

    def evaluation_data(self, source: Any, name: str) -> Any:
        dataset = self._prepare_data(source, name)
        check_sync_columns(self.args, [refs.has_reference(dataset, self.reference_columns())])
        if self.precompute and (self.reference is not None or self.state.global_step == 0):
            dataset = self._precompute(dataset, name)
        return dataset

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the window's metrics to a log line of training; there they leave the device."""
        metrics = {} if self._evaluates else self._window.drain()
        if metrics:
            metrics["num_tokens"] = self._window.total_tokens
        logs.update(metrics)
        if not self.args.fp16:  # there the scaler skips steps without a finite gradient
            check_grad_norm(logs.get("grad_norm"), self.state.global_step)
        super().log(logs, start_time)

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> Any:
        """`transformers.Trainer.train`; see `CheckpointingTrainer.run_training` on resuming.

        Raises:
            ValueError: there is nothing to train, the checkpoint is damaged or another run's, or
                output_dir holds another run or is in use.
            StorageError: output_dir cannot be written, or is full.
            Interrupted, Terminated: Ctrl-C or SIGTERM has ended the run; a checkpoint is saved.
        """
        check_trains(self.model)
        return self.run_training(resume_from_checkpoint, trial, ignore_keys_for_eval)

    def _load_from_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        with same_weights_trained(self.model):  # PEFT loads an adapter as trainable as a whole
            super()._load_from_checkpoint(*args, **kwargs)

    def _load_best_model(self) -> None:
        with same_weights_trained(self.model):
            super()._load_best_model()

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        # Nothing is written over or next to the last good checkpoint unless all is finite.
        self._window.sync()
        check_weights(model, self.state.global_step)
        saved: Any = self.state.stateful_callbacks
        saved.setdefault(TokenCount.KEY, {})["num_tokens"] = self._window.total_tokens
        super()._save_checkpoint(model, trial)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model, unless a trained weight is not finite (`NonFiniteLossError`)."""
        if not _internal_call:  # a checkpoint has been checked already
            check_weights(self.model, self.state.global_step)
        super().save_model(output_dir, _internal_call)

    def add_aux_loss(self, loss: Tensor, aux_loss: Tensor | None) -> Tensor:
        """The loss with that of a mixture of experts' router, where there is one."""
        return loss if aux_loss is None else loss + self._router_coef * aux_loss.to(loss.device)

    # ---- what a trainer says ----

    def set_loss(self, args: Any) -> bool:
        """Check the options of the loss and keep them; whether it needs a reference."""
        raise NotImplementedError

    def prepare_rows(self, dataset: Any, **options: Any) -> tuple[Any, DataReport]:
        """Loaded data, tokenised; options as `prepare_dataset` takes them."""
        raise NotImplementedError

    def make_collator(self, *options: Any) -> Callable[[list[dict]], dict[str, Tensor]]:
        """Of the pad token's id, max_length, truncation_mode and pad_to_multiple_of."""
        raise NotImplementedError

    def check_data(self, datasets: list[Any], has_reference: bool) -> None:
        """Refuse columns, or a reference, that the loss has no use for."""

    def reference_columns(self) -> tuple[str, ...]:
        """The columns that reference log-probs are in."""
        raise NotImplementedError

    def reference_sums(self, reference: refs.Reference, batch: dict[str, Any]) -> Tensor:
        """The reference's log-probs of a batch, by column one after the other."""
        return reference.logps(batch)

    def loss_head(
        self, hidden: Tensor, head: Head, aux_loss: Tensor | None, **inputs: Any
    ) -> dict[str, Tensor]:
        """The `head_fn` of a training step: the loss and the vector of metric sums."""
        raise NotImplementedError

    def window_options(self) -> dict[str, Any]:
        """Arguments of the `MetricWindow`."""
        return {}
