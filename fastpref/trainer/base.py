"""`BaseTrainer`: the part of the trainers that does not depend on the kind of data or loss."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

from accelerate.utils import AutocastKwargs
from torch import Tensor, nn
from transformers import (
    EvalPrediction,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
    set_seed,
)

from fastpref.data.files import load_preference_data
from fastpref.data.tokenise import DataReport
from fastpref.heads.adapters import check_adapters
from fastpref.heads.calling import check_head, disable_dropout, install_head_forward
from fastpref.heads.modes import same_weights_trained
from fastpref.heads.reading import Head, read_head, unwrap
from fastpref.logps.columns import GradientReport, last_gradient_report
from fastpref.progress import silenced
from fastpref.trainer.alarms import Alarms
from fastpref.trainer.body import BodyTrainer
from fastpref.trainer.checkpointing import CheckpointingTrainer
from fastpref.trainer.checks import (
    check_optimizer,
    check_parallelism,
    check_sampling,
    check_trains,
    warn_about_tolerances,
)
from fastpref.trainer.config import BaseConfig
from fastpref.trainer.loading import as_list, load_parts, router_coefficient
from fastpref.trainer.metrics import (
    MetricWindow,
    TokenCount,
    check_grad_norm,
    check_weights,
    column_metrics,
)
from fastpref.trainer.model_card import CardTrainer
from fastpref.trainer.moved import MovedWeights
from fastpref.trainer.predictions import PredictingTrainer
from fastpref.trainer.progress import use_lines
from fastpref.trainer.reference_sync import check_sync_options
from fastpref.trainer.references import ReferencingTrainer

logger = logging.getLogger("fastpref")


class BaseTrainer(
    BodyTrainer, CheckpointingTrainer, PredictingTrainer, ReferencingTrainer, CardTrainer
):
    """Base class of `PreferenceTrainer` and `UnpairedPreferenceTrainer`.

    A subclass defines its configuration, its data and its loss.
    """

    config_class: type[BaseConfig]
    padded_collator_class: type  # the collator of separate rows
    columns: tuple[str, ...]  # the columns of prepared data that the collator reads
    args: BaseConfig
    loss_is_scaled_for_ga = False  # the loss is a mean per micro-batch
    _share = 1.0  # the fraction of the micro-batch's pairs that `compute_loss` gets
    reads_in_order = False  # whether the loss needs the training rows in the data's order

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
        args = self.config_class.validated(args)
        if train_dataset is None:
            raise ValueError("train_dataset is None; expected preference data")
        self.args = args
        self._head_options = args.head_options()
        self.needs_reference = self.set_loss(args)
        check_sync_options(args, self.needs_reference)
        set_seed(args.seed)  # determines the initial weights of an adapter
        model, ref_model, tokenizer, pad_token_id = load_parts(
            model, ref_model, processing_class, args, quantization_config, peft_config
        )
        self._tokenizer = tokenizer
        self._vocab_size = read_head(model, adapters=True).vocab_size
        self.reports: dict[str, DataReport] = {}
        train_dataset = self._prepare_data(train_dataset, "train")
        check_sampling(args, train_dataset, self.reads_in_order)
        eval_dataset = self._prepare_eval_data(eval_dataset)
        self._choose_dispatch()
        if data_collator is None:
            data_collator = self.make_collator(
                pad_token_id, args.max_length, args.truncation_mode, args.pad_to_multiple_of
            )
        self._prepare_model(model, optimizers[0])
        datasets = [train_dataset, *as_list(eval_dataset)]
        ref_model = self.choose_reference(model, ref_model, datasets)
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
        self._set_up_training(ref_model)
        self._set_up_metrics()
        self.set_up_body(ref_model)
        self.set_up_reference(ref_model)

    # ---- steps of the constructor ----

    def _choose_dispatch(self) -> None:
        """Let each process read the data, streams too, unless dispatch_batches is set."""
        settings: Any = self.args.accelerator_config
        self._dispatches = bool(settings.dispatch_batches)
        if settings.dispatch_batches is None:  # accelerate would dispatch streams
            settings.dispatch_batches = False

    def _prepare_model(self, model: Any, optimizer: Any) -> None:
        if self.args.disable_dropout:
            disable_dropout(model)
        check_adapters(read_head(model, adapters=True).adapters, training=True)
        check_optimizer(model, optimizer)

    def _set_up_training(self, ref_model: Any) -> None:
        # accelerate launch may ask for it in the environment.
        check_parallelism((), getattr(self.accelerator, "parallelism_config", None))
        use_lines(self)
        reference = self.model if ref_model is None and not self._is_own_reference else ref_model
        self.start_checkpoints(reference if self._runs_reference else None)
        self.model_accepts_loss_kwargs = False  # transformers before `loss_is_scaled_for_ga`
        if self.args.gradient_checkpointing:
            # The backward pass casts each block's weights again. A cache would hold 16-bit copies
            # of all weights during the forward pass and save nothing.
            self.accelerator.autocast_handler = AutocastKwargs(cache_enabled=False)
        check_head(self.model)  # the model is on its device now
        unwrap(self.model).add_model_tags(self._tag_names)

    def _set_up_metrics(self) -> None:
        self._router_coef = router_coefficient(self.model, self.args.router_aux_loss_coef)
        self.aux_loss_enabled = self._router_coef != 0
        self._window = MetricWindow(
            self.accelerator.gather,
            self.accelerator.num_processes,
            self.accelerator.process_index,
            has_aux_loss=self.aux_loss_enabled,
            **self.window_options(),
        )
        self.add_callback(TokenCount(self._window))
        if self.args.alarms:
            alarms = Alarms(self.args, self.needs_reference, self._probes)
            self._window.observer = alarms.observe
            self.add_callback(alarms)
            self.add_callback(MovedWeights())
        self._micro_step = (0, 0)
        self._column_reports: list[GradientReport] = []
        tolerances = self.args.gradient_tolerance, self.args.head_gradient_tolerance
        self._has_columns = any(t is not None for t in tolerances)

    # ---- data ----

    def _prepare_data(self, source: Any, name: str) -> Any:
        """Load and tokenise data, log warnings about its rows, and keep the report."""
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

    def make_collator(self, *options: Any) -> Callable[[list[dict]], dict[str, Tensor]]:
        """The collator; options: the arguments of `PreferenceCollator` in order."""
        return self.padded_collator_class(*options)

    def evaluation_data(self, source: Any, name: str) -> Any:
        return self.with_reference(self._prepare_data(source, name), name)

    def _set_signature_columns_if_needed(self) -> None:
        if self._signature_columns is None:
            self._signature_columns: Any = list(self.columns)

    # ---- loss ----

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The loss of one micro-batch; its metrics stay on the device until they are logged."""
        if return_outputs:
            raise ValueError("return_outputs=True asks for logits, which this trainer never builds")
        kwargs, head_inputs = self.step_inputs(model, inputs)
        if self.aux_loss_enabled:
            kwargs["output_router_logits"] = True
        before = last_gradient_report()
        out = model(**kwargs, head_fn=self.loss_head, head_inputs=head_inputs)
        report = last_gradient_report()
        if report is not None and report is not before:
            self._column_reports.append(report)
        if model.training:
            self._window.add(out["sums"], inputs.get("rows"), self._where(), self._share)
        return out["loss"]

    def _where(self) -> str:
        """The present step and micro-batch, for an error."""
        step = self.state.global_step + 1
        begins = self._window.missing == 0
        micro = self._micro_step[1] + begins if self._micro_step[0] == step else 1
        self._micro_step = (step, micro)
        return f"step {step}, micro-batch {micro} of {self.args.gradient_accumulation_steps}"

    # ---- logging, checkpoints ----

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the metrics since the last log line, which leave the device here."""
        metrics = {} if self._evaluates else self._window.drain()
        if metrics:
            metrics["num_tokens"] = self._window.total_tokens
            if self._has_columns:
                reports, self._column_reports = self._column_reports, []
                metrics |= column_metrics(reports, self.args.device, self.accelerator.gather)
        logs.update(metrics)
        if not self.args.fp16:  # with fp16 the scaler skips steps without a finite gradient
            check_grad_norm(logs.get("grad_norm"), self.state.global_step)
        super().log(logs, start_time)

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> Any:
        """`transformers.Trainer.train`; `CheckpointingTrainer.run_training` says how it resumes.

        Raises:
            ValueError: no weight is trainable, the checkpoint is damaged or of another run, or
                output_dir holds another run's files or is in use.
            StorageError: output_dir cannot be written, or is full.
            Interrupted, Terminated: Ctrl-C or SIGTERM has ended the run, after a checkpoint.
        """
        check_trains(self.model)
        warn_about_tolerances(unwrap(self.model), self.args)
        with self.kept_memory():
            return self.run_training(resume_from_checkpoint, trial, ignore_keys_for_eval)

    def _load_from_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        with same_weights_trained(self.model):  # PEFT makes all weights of an adapter trainable
            super()._load_from_checkpoint(*args, **kwargs)

    def _load_best_model(self) -> None:
        with same_weights_trained(self.model):
            super()._load_best_model()

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        # Before anything is written, so that the last checkpoint is one of finite weights.
        self._window.sync()
        check_weights(model, self.state.global_step)
        saved: Any = self.state.stateful_callbacks
        saved.setdefault(TokenCount.KEY, {})["num_tokens"] = self._window.total_tokens
        super()._save_checkpoint(model, trial)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model; `NonFiniteLossError` if a trainable weight is not finite."""
        if not _internal_call:  # `_save_checkpoint` has checked the weights of a checkpoint
            check_weights(self.model, self.state.global_step)
        super().save_model(output_dir, _internal_call)

    def add_aux_loss(self, loss: Tensor, aux_loss: Tensor | None) -> Tensor:
        """The loss plus the weighted load-balancing loss of a mixture of experts, if any."""
        return loss if aux_loss is None else loss + self._router_coef * aux_loss.to(loss.device)

    # ---- defined by a subclass ----

    def set_loss(self, args: Any) -> bool:
        """Check and store the options of the loss; returns whether it needs a reference."""
        raise NotImplementedError

    def prepare_rows(self, dataset: Any, **options: Any) -> tuple[Any, DataReport]:
        """Tokenise loaded data; arguments and results as in `prepare_dataset`."""
        raise NotImplementedError

    def loss_head(
        self, hidden: Tensor, head: Head, aux_loss: Tensor | None, **inputs: Any
    ) -> dict[str, Tensor]:
        """The `head_fn` of a training step; returns "loss" [] and "sums", the metrics' vector."""
        raise NotImplementedError

    def window_options(self) -> dict[str, Any]:
        """Further arguments of the `MetricWindow`."""
        return {}
