"""The trainers that `fastpref profile` compares, made from one request.

| side     | trainer                                                          |
| fastpref | `PreferenceTrainer` with the options of the request              |
| eager    | the same, but with the model's logits and a loss in plain torch  |
| trl      | TRL's DPOTrainer, its own defaults where the request says none   |
| liger    | the same with use_liger_kernel=True                              |
"""

from __future__ import annotations

import contextlib
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from fastpref.data.batches import loss_inputs, model_inputs
from fastpref.fused.pair_loss import PairInputs, prepare_loss
from fastpref.logps.forward import TokenStats
from fastpref.logps.sequences import sequence_logps
from fastpref.reference.model import as_reference
from fastpref.trainer.config import PreferenceConfig
from fastpref.trainer.preference import PreferenceTrainer

SIDES = ("fastpref", "eager", "trl", "liger")
_PACKAGES = {"trl": ("trl",), "liger": ("trl", "liger_kernel")}
# Options of fastpref's trainer alone.
_OWN = (
    "precision", "head_strategy", "head_memory_budget", "cpu_linear", "prefix_sharing", "packing",
    "tokens_per_batch", "gradient_tolerance", "head_gradient_tolerance",
)  # fmt: skip


def unavailable_side(side: str) -> str | None:
    """Why a side cannot run here; None if it can."""
    missing = [name for name in _PACKAGES.get(side, ()) if find_spec(name) is None]
    return f"{' and '.join(missing)} not installed" if missing else None


def eager_token_logps(logits: Tensor, labels: Tensor) -> Tensor:
    """Log-probs [B, T] of the labels [B, T] from logits [B, T, V], 0 where the label is -100."""
    counted = labels != -100
    logps = torch.log_softmax(logits.float(), -1)
    label_logps = logps.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return label_logps * counted


class EagerTrainer(PreferenceTrainer):
    """`PreferenceTrainer` as it would be with logits: of all positions, in float32."""

    def _eager_logps(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        logits = model(**model_inputs(inputs), use_cache=False).logits
        return eager_token_logps(logits, inputs["labels"])

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        reference = self.reference_logps(inputs)
        arguments: dict[str, Any] = loss_inputs(inputs, reference, self.args.nll_on_prompt)
        labels = arguments.pop("labels")
        for name in ("token_indices", "sequence_ids"):
            arguments.pop(name, None)
        prepared = prepare_loss(
            labels,
            self._loss_options,
            PairInputs(**{k: v for k, v in arguments.items() if k in PairInputs._fields}),
            has_reference=reference is not None,
            nll_labels=arguments.get("nll_labels"),
        )
        stats = TokenStats(self._eager_logps(model, inputs))
        return prepared.loss_from_logps(stats).loss

    def reference_sums(self, reference: Any, batch: dict[str, Any]) -> Tensor:
        model = reference.model
        off = as_reference(model) if reference.adapter else contextlib.nullcontext()
        with torch.no_grad(), off:
            return sequence_logps(self._eager_logps(model, batch), batch["labels"])


def make_trainer(side: str, request: dict[str, Any], rows: list[dict[str, Any]], out: str) -> Any:
    """The trainer of a side.

    Args:
        request: the options of `fastpref.profiling.profile_training`, as JSON has them; the model
            may be a loaded one.
        rows: raw or tokenised pairs, in the order in which they are trained on.
        out: its output directory.
    """
    from datasets import Dataset

    options: dict[str, Any] = {
        **request["loss"],
        "output_dir": out,
        "max_length": request["max_length"],
        "max_steps": request["steps"],
        "per_device_train_batch_size": request["batch_size"],
        "gradient_accumulation_steps": request["grad_accumulation"],
        "gradient_checkpointing": request["gradient_checkpointing"],
        "bf16": request["bf16"],
        "learning_rate": request["learning_rate"],
        "precompute_ref_log_probs": request["reference"] == "precompute",
        "logging_steps": 10**6,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "seed": request["seed"],
        "use_cpu": request["device"] == "cpu",
    }
    if isinstance(request["model"], str):
        options["model_init_kwargs"] = {
            "dtype": request["dtype"],
            "trust_remote_code": request["trust_remote_code"],
        }
    if request["optim"] is not None:
        options["optim"] = request["optim"]
    if side in ("fastpref", "eager"):
        options["handle_signals"] = False
        options["trust_remote_code"] = request["trust_remote_code"]
        options.get("model_init_kwargs", {}).pop("trust_remote_code", None)
        if side == "fastpref":
            options |= {name: request[name] for name in _OWN if request.get(name) is not None}
        else:
            options |= {"prefix_sharing": False, "cpu_linear": "torch"}
        config: Any = PreferenceConfig(**options)
        trainer_class: Any = PreferenceTrainer if side == "fastpref" else EagerTrainer
    else:
        from trl import DPOConfig, DPOTrainer

        if side == "liger":
            options["use_liger_kernel"] = True
        config = DPOConfig(**options)
        trainer_class = DPOTrainer
    trainer = trainer_class(
        model=request["model"],
        args=config,
        train_dataset=Dataset.from_list(rows),
        peft_config=_peft_config(request["lora"]),
    )
    trainer._get_train_sampler = lambda dataset=None: torch.utils.data.SequentialSampler(
        trainer.train_dataset
    )
    return trainer


def _peft_config(lora: dict[str, Any] | None) -> Any:
    if lora is None:
        return None
    from peft import LoraConfig

    return LoraConfig(task_type="CAUSAL_LM", **lora)
