"""`PreferenceTrainer`: preference optimisation on `transformers.Trainer`, without logits."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from accelerate.utils import AutocastKwargs
from torch import Tensor, nn
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    set_seed,
)

from . import reference as refs
from .batches import loss_inputs
from .config import PreferenceConfig
from .data import DataReport, PreferenceCollator, load_preference_data, prepare_dataset
from .data_files import IDS, NUMBERS, PER_PAIR, REFERENCE
from .fused import linear_preference_loss
from .heads import (
    Head,
    align_to_tokens,
    check_head,
    disable_dropout,
    install_head_forward,
    model_inputs,
    read_head,
    unwrap,
)
from .loading import add_adapter, each, load_model, load_tokenizer, router_coefficient
from .losses import LossOptions, Pairs
from .metrics import (
    EXTRAS,
    MetricWindow,
    TokenCount,
    check_grad_norm,
    check_weights,
    micro_step_sums,
)

logger = logging.getLogger("fastpref")


class PreferenceTrainer(Trainer):
    """Train a causal language model on preference pairs (DPO, IPO, ...).

    A drop-in for TRL 1.16's DPOTrainer: the same data, tokenisation, loss, metric names and
    gradient-accumulation semantics (the mean over micro-batches). The output head goes through
    `linear_preference_loss`, so no logits exist. Metrics are summed on the device and read once per
    log line.

    The reference is the first of: the data's columns ref_chosen_logps and ref_rejected_logps;
    `ref_model`; for a model that a `peft_config` is applied to, the model with its adapter off; for
    a PeftModel, a frozen copy of its adapter; with `precompute_ref_log_probs`, the model as it is
    now, asked once; a frozen copy of the model.

    Args:
        model: a name or directory (loaded in float32 unless `model_init_kwargs` says otherwise), a
            PreTrainedModel or a PeftModel.
        ref_model: the reference; a model, a name or None.
        args: a `PreferenceConfig`.
        data_collator: replaces `PreferenceCollator`; must return input_ids, attention_mask and
            completion_mask as that does.
        train_dataset: anything that `load_preference_data` reads.
        eval_dataset: likewise, or a dict of them by name.
        processing_class: the tokenizer; by default the model's.
        callbacks, optimizers: as in `transformers.Trainer`.
        peft_config: adapter to add, such as `peft.LoraConfig`.
        loss_function: a loss of your own in place of `args.loss_type`; see docs/losses.md.

    Raises:
        ValueError: bad data (see `prepare_dataset`), an unknown loss or option, a model without an
            output head, a tokenizer without a pad token.
        NonFiniteLossError: while training, if the loss, a gradient or a weight is not finite. The
            message names the step and, where known, the rows. Nothing is saved after that.
    """

    args: PreferenceConfig
    loss_is_scaled_for_ga = False  # the loss is a mean per micro-batch

    def __init__(
        self,
        model: str | PreTrainedModel | Any,
        ref_model: str | PreTrainedModel | Any = None,
        args: PreferenceConfig | None = None,
        data_collator: Callable[[list[dict]], dict[str, Tensor]] | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        peft_config: Any = None,
        loss_function: Callable[[Pairs], Tensor] | None = None,
    ) -> None:
        args = PreferenceConfig.of(args)
        if train_dataset is None:
            raise ValueError("train_dataset is None; expected preference data")
        self._head_options = args.head_options()
        self._loss_options: LossOptions = args.loss_options(loss_function)
        set_seed(args.seed)  # before an adapter draws its weights
        if model is ref_model and not isinstance(model, str):
            raise ValueError("ref_model is model itself; leave it out to have a copy made")
        if args.model_init_kwargs is not None and not isinstance(model, str):
            raise ValueError("model_init_kwargs is given but the model is already loaded")
        model = load_model(model, args)
        ref_model = None if ref_model is None else load_model(ref_model, args)
        tokenizer, pad_id = load_tokenizer(model, processing_class, args)
        model = add_adapter(model, peft_config, ref_model is not None)
        self._vocab_size = read_head(model).weight.shape[0]
        self.reports: dict[str, DataReport] = {}
        self._tokenizer = tokenizer
        self.args = args
        train_dataset = self._prepare_data(train_dataset, "train")
        eval_dataset = self._prepare_eval_data(eval_dataset)
        if not hasattr(train_dataset, "__len__"):  # processes read streams by themselves
            settings: Any = args.accelerator_config
            settings.dispatch_batches = False
        if data_collator is None:
            data_collator = PreferenceCollator(
                pad_id, args.max_length, args.truncation_mode, args.pad_to_multiple_of
            )
        if args.disable_dropout:
            disable_dropout(model)
        datasets = [train_dataset, *each(eval_dataset)]
        for column, name in PER_PAIR.items():
            if any(column in (dataset.column_names or ()) for dataset in datasets):
                self._loss_options.check_takes(name, column)
        given = [refs.has_reference(dataset) for dataset in datasets]
        if any(given) or ref_model is not None:
            if args.reference_free:
                raise ValueError("reference_free is True but a reference is given")
            self._loss_options.check_reference(True)
        wanted = not all(given) and self._loss_options.reference == "required"
        self.precompute = args.precompute_ref_log_probs and wanted
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
            callbacks=callbacks,
            optimizers=optimizers,
        )
        self.model_accepts_loss_kwargs = False  # transformers before `loss_is_scaled_for_ga`
        if args.gradient_checkpointing:
            # Every block casts its weights anew in backward; a cache would keep 16-bit copies of
            # all of them through the forward pass and save nothing.
            self.accelerator.autocast_handler = AutocastKwargs(cache_enabled=False)
        check_head(self.model)  # here, as the model is on its device by now
        self._router_coef = router_coefficient(model, args.router_aux_loss_coef)
        self._windows = {mode: self._new_window() for mode in ("train", "eval")}
        self.add_callback(TokenCount(self._windows["train"]))
        self._eval_prefix: str | None = None
        self._micro_step = (0, 0)
        self.ref_model: Any = None
        if ref_model is not None:
            self.ref_model = self._prepare_reference_model(ref_model)
        silence = not args.disable_dropout
        self._policy_reference = refs.Reference(
            self.model, adapter, self._head_options, silence, args.ld_alpha
        )
        self.reference = self._policy_reference if adapter and wanted else None
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
        with args.main_process_first(desc=f"tokenising {name} data"):
            dataset, report = prepare_dataset(
                load_preference_data(source),
                self._tokenizer,
                max_length=args.max_length,
                truncation_mode=args.truncation_mode,
                num_proc=args.dataset_num_proc,
                name=name,
                vocab_size=self._vocab_size,
            )
        if args.process_index == 0 and report.rows is not None:
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
            self._signature_columns: Any = [*IDS, *NUMBERS, "row"]

    def _precompute(self, dataset: Any, name: str) -> Any:
        """The data with the reference's log-probs; the policy's if there is no other reference."""
        if refs.has_reference(dataset):
            return dataset
        args = self.args
        size = args.train_batch_size if name == "train" else args.eval_batch_size
        reference = self.reference or self._policy_reference
        was_training = reference.model.training
        reference.model.eval()
        try:
            with self.accelerator.autocast():
                return refs.precompute(
                    dataset,
                    reference.logps,
                    self.data_collator,
                    self.accelerator,
                    batch_size=args.precompute_ref_batch_size or size,
                    name=name,
                    num_workers=args.dataloader_num_workers,
                    disable_tqdm=bool(args.disable_tqdm) or not self.is_world_process_zero(),
                )
        finally:
            reference.model.train(was_training)

    # ---- loss ----

    def _prepare_reference_model(self, model: Any) -> Any:
        install_head_forward(model)
        if type(unwrap(model)) is not type(unwrap(self.model)):  # that one has been checked
            check_head(model)
        if self.args.disable_dropout:
            disable_dropout(model)
        model = model.eval().requires_grad_(False)
        return self.accelerator.prepare_model(model, evaluation_mode=True)

    def _reference_logps(self, inputs: dict[str, Any]) -> Tensor | None:
        """The reference's log-prob of each sequence [2P], or None without a reference."""
        if REFERENCE[0] in inputs:
            return torch.cat([inputs[key] for key in REFERENCE])
        if self.reference is None and self._loss_options.reference != "required":
            return None
        if self.reference is None:
            raise ValueError(
                "this data has no reference log-probs and no reference model is kept; pass it as "
                "eval_dataset when the trainer is made, or pass ref_model"
            )
        with self.accelerator.autocast():
            return self.reference.logps(inputs)

    def _loss_head(
        self,
        hidden: Tensor,
        head: Head,
        aux_loss: Tensor | None,
        *,
        attention_mask: Tensor,
        labels: Tensor,
        **inputs: Tensor | None,
    ) -> dict[str, Tensor]:
        """The `head_fn` of a training step: the loss and the vector of metric sums."""
        out = linear_preference_loss(
            align_to_tokens(hidden, labels),
            head.weight,
            labels,
            **inputs,  # type: ignore[arg-type]
            **head.options(),
            **self._head_options,
            loss_options=self._loss_options,
            extras=EXTRAS,
        )
        loss = out.loss
        if aux_loss is not None:
            loss = loss + self._router_coef * aux_loss.to(loss.device)
        return {"loss": loss, "sums": micro_step_sums(out, loss, aux_loss, labels, attention_mask)}

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
        head_inputs = {
            "attention_mask": inputs["attention_mask"],
            **loss_inputs(inputs, self._reference_logps(inputs), self.args.nll_on_prompt),
        }
        kwargs = model_inputs(inputs)
        if self._router_coef:
            kwargs["output_router_logits"] = True
        out = model(**kwargs, head_fn=self._loss_head, head_inputs=head_inputs)
        window = self._windows["train" if model.training else "eval"]
        window.add(out["sums"], inputs.get("rows"), self._where(model.training))
        return out["loss"]

    def _where(self, training: bool) -> str:
        if not training:
            return f"evaluation after step {self.state.global_step}"
        step = self.state.global_step + 1
        micro = self._micro_step[1] + 1 if self._micro_step[0] == step else 1
        self._micro_step = (step, micro)
        return f"step {step}, micro-batch {micro} of {self.args.gradient_accumulation_steps}"

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor, None, None]:
        """The evaluation loss of one batch; there are no logits to return."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            return self.compute_loss(model, inputs).detach(), None, None

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
            eval_dataset = self._prepare_data(eval_dataset, metric_key_prefix)
            if self.precompute and (self.reference is not None or self.state.global_step == 0):
                eval_dataset = self._precompute(eval_dataset, metric_key_prefix)
        self._windows["eval"].clear()
        self._eval_prefix = metric_key_prefix
        try:
            return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        finally:
            self._eval_prefix = None

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the window's metrics to a log line; the only place where they leave the device."""
        prefix = "" if self._eval_prefix is None else f"{self._eval_prefix}_"
        metrics = self._windows["eval" if prefix else "train"].drain()
        if metrics:
            metrics["num_tokens"] = self._windows["train"].total_tokens
        logs.update({prefix + key: value for key, value in metrics.items()})
        if not self.args.fp16:  # there the scaler skips steps without a finite gradient
            check_grad_norm(logs.get("grad_norm"), self.state.global_step)
        super().log(logs, start_time)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        # Nothing is written over or next to the last good checkpoint unless all is finite.
        self._windows["train"].sync()
        check_weights(model, self.state.global_step)
        saved: Any = self.state.stateful_callbacks
        saved[TokenCount.KEY] = {"num_tokens": self._windows["train"].total_tokens}
        super()._save_checkpoint(model, trial)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model, unless a trained weight is not finite (`NonFiniteLossError`)."""
        if not _internal_call:  # a checkpoint has been checked already
            check_weights(self.model, self.state.global_step)
        super().save_model(output_dir, _internal_call)

    def _new_window(self) -> MetricWindow:
        return MetricWindow(
            self.accelerator.gather,
            self.accelerator.num_processes,
            self.accelerator.process_index,
            has_aux_loss=self._router_coef != 0,
            has_nll=self._loss_options.needs_nll,
        )
