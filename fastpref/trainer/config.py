"""The options of the trainers, in addition to transformers' `TrainingArguments`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers import TrainingArguments

from fastpref.backends.processor import bf16_is_fast, say_once, training_device
from fastpref.body import unavailable_reason
from fastpref.logps.plan import PRECISIONS, check_plan_options, check_tolerance
from fastpref.losses.options import LOSS_OPTIONS, LossOptions
from fastpref.losses.pairs import F_DIVERGENCES, Pairs
from fastpref.losses.unpaired import UNPAIRED_LOSS_TYPES, check_unpaired_options
from fastpref.trainer.checks import auto_or_bool, check_arguments, multiple

C = TypeVar("C", bound="BaseConfig")
LOSS_ALIASES = {"dpo": "sigmoid"}
_CPU_LINEAR = ("auto", "native", "torch")


def _option(default: Any, help: str, choices: Iterable[str] = ()) -> Any:
    metadata = {"help": help} | ({"choices": list(choices)} if choices else {})
    return field(default=default, metadata=metadata)


@dataclass
class BaseConfig(TrainingArguments):
    """The options that both trainers have; see `PreferenceConfig`."""

    _VALID_DICT_FIELDS = [*TrainingArguments._VALID_DICT_FIELDS, "model_init_kwargs"]

    learning_rate: float = _option(1e-6, "Initial learning rate of AdamW.")
    logging_steps: float = _option(10, "Optimiser steps between two log lines.")
    bf16: bool | None = _option(
        None, "Mixed precision in bfloat16; by default where it is fast, unless fp16 is on."
    )  # type: ignore[assignment]
    gradient_checkpointing: bool | None = _option(
        None, "Recompute activations in the backward to save memory; on by default."
    )
    logging_nan_inf_filter: bool = _option(
        False, "Leave NaN losses out of the log; costs a device synchronisation every micro-step."
    )

    # The run
    overwrite_output_dir: bool = _option(
        False, "Remove the checkpoints and the model that another run has left in output_dir."
    )
    resume_anyway: bool = _option(
        False, "Continue from a checkpoint of a run with other data, loss, seed or adapter."
    )
    handle_signals: bool = _option(
        True, "On SIGTERM or Ctrl-C finish the step and save a checkpoint; on SIGUSR1 save one."
    )
    alarms: bool = _option(
        True,
        "Warn of a run that goes wrong without failing: displacement, margins from length, ...",
    )

    # The model
    model_init_kwargs: dict[str, Any] | str | None = _option(
        None, "Arguments of from_pretrained when the model is given by name; dtype is float32 else."
    )
    trust_remote_code: bool = _option(False, "Run code that a model or tokenizer brings along.")
    router_aux_loss_coef: float | None = _option(
        None, "Weight of a mixture of experts' load-balancing loss; the model's own by default."
    )
    disable_dropout: bool = _option(True, "Switch dropout off in the model and the reference.")
    pad_token: str | None = _option(
        None, "Token that pads batches; by default the tokenizer's, or else its EOS token."
    )
    sync_ref_model: bool = _option(
        False, "Move the reference towards the policy during training (TR-DPO)."
    )
    ref_model_mixup_alpha: float = _option(
        0.6, "Share of the policy in the moved reference; the rest is the reference before."
    )
    ref_model_sync_steps: int = _option(512, "Optimiser steps between two such moves.")

    # The data
    dataset_num_proc: int | None = _option(None, "Processes that tokenise the data.")
    max_length: int | None = _option(1024, "Tokens kept of prompt + answer; None keeps all.")
    truncation_mode: str = _option(
        "keep_start",
        "Which end of a sequence longer than max_length stays.",
        choices=("keep_start", "keep_end"),
    )
    pad_to_multiple_of: int | str | None = _option(
        None, "Pad batches to a multiple of this length; 'auto', as TRL's default, does not."
    )
    precompute_ref_log_probs: bool = _option(
        False, "Compute the reference log-probs of all data once, before training."
    )
    reference_store: str | None = _option(
        None, "Directory that keeps them: read, checked, and extended by what it lacks."
    )
    precompute_ref_batch_size: int | None = _option(
        None, "Pairs per batch while doing so; the training or evaluation batch size by default."
    )

    # The rows
    packing: bool = _option(False, "Put the answers of a batch into one row without padding.")
    tokens_per_batch: int | None = _option(
        None, "With packing: compute a batch of more tokens than this in several passes."
    )

    # The loss
    beta: float = _option(0.1, "Strength of the pull towards the reference model.")

    # The output head
    precision: str = _option("exact", "Logits in fp32 (exact) or bf16 (fast).", choices=PRECISIONS)
    head_strategy: str = _option("auto", "auto, stash, recompute or mixed.")
    head_memory_budget: int | None = _option(
        None, "Bytes that the head may use between forward and backward; planned by default."
    )
    backend: str | None = _option(None, "Kernel backend; the fastest that works by default.")
    gradient_tolerance: float | None = _option(
        None, "Relative error that the head's gradient of the hidden states may have, as 1.5e-3."
    )
    head_gradient_tolerance: float | None = _option(
        None, "The same for the gradient of the head's weight; exact by default."
    )

    # The body
    activation_offloading: bool = _option(
        False, "TRL's option, which is refused: activations are recomputed and not moved."
    )
    cpu_linear: str = _option(
        "auto",
        "Whose product the Linear layers take on a CPU; auto: the faster one's.",
        choices=_CPU_LINEAR,
    )
    keep_cpu_memory: bool = _option(
        True, "On a CPU, keep freed memory for the next step instead of returning it to Linux."
    )

    def __post_init__(self) -> None:
        if not torch.accelerator.is_available():
            self.use_cpu = True
        self._choose_bf16()
        check_plan_options("auto", None, self.precision, None)
        most = self.tokens_per_batch
        if most is not None and (not self.packing or most < 1):
            raise ValueError(
                f"tokens_per_batch is {most} with packing={self.packing}; expected at least 1, and "
                "packing=True"
            )
        if self.cpu_linear not in _CPU_LINEAR:
            raise ValueError(
                f"cpu_linear is {self.cpu_linear!r}; expected 'auto', 'native' or 'torch'"
            )
        if self.activation_offloading:
            raise ValueError(
                "activation_offloading: got True, expected False: activations are not moved to the "
                "CPU here; gradient_checkpointing, on by default, recomputes them, and "
                "tokens_per_batch bounds what is left"
            )
        for name in ("gradient_tolerance", "head_gradient_tolerance"):
            check_tolerance(name, getattr(self, name))
        # transformers renamed the option during version 5 and warns about the old name, TRL's.
        renamed = "activation_checkpointing" in {f.name for f in dataclasses.fields(self)}
        for end, default in (("", True), ("_kwargs", None)):
            old, new = f"gradient_checkpointing{end}", f"activation_checkpointing{end}"
            values = [v for v in (getattr(self, new, None), getattr(self, old)) if v is not None]
            setattr(self, new if renamed else old, values[0] if values else default)
        self.pad_to_multiple_of = multiple(self.pad_to_multiple_of)
        if self.use_liger_kernel:
            self.liger_kernel_config = _without_liger_head(self.liger_kernel_config)
        super().__post_init__()

    def _choose_bf16(self) -> None:
        """Set bf16 if it is None: on if the device has bf16 units and fp16 is off."""
        device = training_device(bool(self.use_cpu))
        if self.bf16 is None and self.fp16:
            self.bf16 = False
        if self.bf16 is False or bf16_is_fast(device):
            self.bf16 = self.bf16 is not False
            return
        reason = f"this {'CPU' if device == 'cpu' else 'GPU'} has no bf16 units"
        if self.bf16:
            # The head and the body's Linear layers have products that widen bf16.
            widened = (
                device == "cpu" and self.cpu_linear != "torch" and unavailable_reason() is None
            )
            slower = "slower" if widened else "many times slower"
            say_once(f"bf16 is True, but {reason}: it is {slower} than fp32 here")
            return
        self.bf16 = False
        if self.precision == "fast":
            raise ValueError(
                f"precision is 'fast', which needs 16-bit operands, but {reason}, so that "
                "bf16=None takes fp32; expected bf16=True, or False for a model that is 16-bit "
                "itself"
            )
        say_once(f"{reason}, so that training takes fp32; bf16=True asks for bf16")

    @classmethod
    def validated(cls: type[C], args: Any) -> C:
        """The `args` of a trainer after checks; the defaults for None.

        Raises:
            ValueError: args of another class, an option without a meaning here, several GPUs.
        """
        if args is None:
            return cls(output_dir="fastpref-output")
        if not isinstance(args, cls):
            raise ValueError(
                f"args is a {type(args).__name__}; expected an instance of {cls.__name__}"
            )
        check_arguments(args)
        if args.n_gpu > 1:
            raise ValueError(
                f"{args.n_gpu} GPUs are visible to one process; start the script with `accelerate "
                "launch` or torchrun, or set CUDA_VISIBLE_DEVICES to one of them"
            )
        return args

    def head_options(self) -> dict[str, Any]:
        """The options of the output head, as arguments of `linear_token_logps`."""
        return {
            "strategy": self.head_strategy,
            "memory_budget": self.head_memory_budget,
            "precision": self.precision,
            "backend": self.backend,
            "gradient_tolerance": self.gradient_tolerance,
            "head_gradient_tolerance": self.head_gradient_tolerance,
            "gradient_seed": self.seed + 2**32 * self.process_index,
        }


def _without_liger_head(liger_kernel_config: Any) -> dict[str, Any]:
    """liger_kernel_config without Liger's head, which would replace the fused one."""
    config = dict(liger_kernel_config or {})
    if config.get("fused_linear_cross_entropy"):
        raise ValueError(
            "liger_kernel_config has fused_linear_cross_entropy=True, which replaces the head that "
            "these trainers compute themselves; leave it out"
        )
    return {**config, "fused_linear_cross_entropy": False}


@dataclass
class PreferenceConfig(BaseConfig):
    """Options of `PreferenceTrainer`: transformers' `TrainingArguments` and those below.

    Names and defaults are those of TRL 1.16's DPOConfig where it has them. These defaults differ
    from TrainingArguments: `learning_rate` is 1e-6, `logging_steps` is 10, and activation
    (gradient) checkpointing is on. `bf16` is on unless `fp16` is on or the device has no bf16
    units, which is logged once. `logging_nan_inf_filter` is off, because a loss that is not finite
    stops the run. `use_cpu` is on if the machine has no accelerator.

    Args:
        beta: strength of the pull towards the reference; tau in the IPO paper.
        loss_type: "sigmoid" or "dpo" (DPO), "ipo" or another loss of docs/losses.md; or a list of
            them.
        loss_weights, label_smoothing, ipo_normalization, reference_free, f_divergence_type,
            f_alpha_divergence_coef, discopop_tau, simpo_gamma, alpha, nll_weight, ld_alpha,
            use_weighting: options of the losses; see `fastpref.LossOptions`.
        prefix_sharing: whether a pair's common prompt is computed once: True, False, or "auto",
            where the data's prompts are long enough and the model allows it. The training is the
            same; see docs/prefix-sharing.md.
        packing: whether the answers of a batch are in one row without padding.
        tokens_per_batch: with packing, the most tokens of one pass through the model. The rows of
            a larger training batch are computed in several passes whose gradients are added.
        nll_on_prompt: the NLL counts the prompt's tokens as well, as TRL's ORPO does.
        max_length: maximum number of tokens of prompt + answer; None for no maximum.
        truncation_mode: "keep_start" or "keep_end".
        pad_token: token that pads batches.
        precompute_ref_log_probs: compute the reference log-probs once, before training, for this
            run alone.
        reference_store: the same, but in a directory that later runs read and extend; see
            docs/reference-store.md.
        alarms: whether a run that goes wrong without failing is warned of; see docs/alarms.md.
        sync_ref_model: whether the reference follows the policy (TR-DPO). Every
            ref_model_sync_steps optimiser steps it becomes alpha * policy + (1 - alpha) *
            reference, where alpha is ref_model_mixup_alpha; see
            `fastpref.trainer.reference_sync.ReferenceSync`.
        precision: "exact" (fp32 logits) or "fast"; see `linear_token_logps`.
        head_strategy, head_memory_budget, backend: how the output head is computed; see
            `linear_token_logps`.
        cpu_linear: the matrix product of the body's Linear layers on a CPU. "native" is
            fastpref's, "torch" is torch's, and "auto" is fastpref's for the shapes in which it is
            at least 1.2 times as fast on this machine. See docs/training.md.
        gradient_tolerance, head_gradient_tolerance: relative errors that the head's gradients may
            have; see docs/columns.md. The log then has `head/columns` (the multiplied share of the
            vocabulary), `head/error`, `head/left_out`, `head/bound_mean` and `head/bound_max`.
    """

    # A bool or "auto"; transformers' argument parser takes text for this union alone.
    prefix_sharing: int | str | None = _option(
        "auto", "Compute a pair's common prompt once: auto, true or false."
    )

    # The loss
    loss_type: list[str] | str = field(
        default_factory=lambda: ["sigmoid"],
        metadata={"help": "Preference loss: sigmoid (DPO), ipo, ...; several are added up."},
    )
    loss_weights: list[float] | None = _option(None, "Factors of the losses; 1 by default.")
    label_smoothing: float = _option(0.0, "Probability that a preference label is flipped.")
    ipo_normalization: str = _option(
        "token_mean",
        "IPO on log-ratios per token (token_mean) or per sequence (sum).",
        choices=("token_mean", "sum"),
    )
    reference_free: bool = _option(False, "Train without a reference model.")
    f_divergence_type: str = _option(
        "reverse_kl", "Divergence from the reference.", choices=F_DIVERGENCES
    )
    f_alpha_divergence_coef: float = _option(0.5, "Order of the alpha divergence.")
    discopop_tau: float = _option(0.05, "Temperature of DiscoPOP's mixture.")
    simpo_gamma: float = _option(0.5, "Target margin of the rewards in SimPO and AlphaPO.")
    alpha: float = _option(0.0, "Shape of AlphaPO's reward.")
    nll_weight: float | None = _option(
        None, "Weight of the chosen answers' NLL; 1 with cpo and orpo and else 0 by default."
    )
    nll_on_prompt: bool = _option(False, "Whether that NLL counts the prompt's tokens as well.")
    ld_alpha: float | None = _option(
        None, "Weight of the tokens past the pair's shorter answer (LD-DPO); 1 by default."
    )
    use_weighting: bool = _option(False, "Weigh pairs by the policy's own probability (WPO).")

    def __post_init__(self) -> None:
        losses = self.loss_type if isinstance(self.loss_type, (list, tuple)) else [self.loss_type]
        names = [LOSS_ALIASES.get(name, name) for name in losses]
        self.loss_type = names[0] if len(names) == 1 else names
        self.prefix_sharing = auto_or_bool("prefix_sharing", self.prefix_sharing)
        super().__post_init__()

    def loss_options(self, function: Callable[[Pairs], Tensor] | None = None) -> LossOptions:
        """The options of the loss after checks; function, if any, replaces `loss_type`."""
        options = {name: getattr(self, name) for name in LOSS_OPTIONS}
        if function is not None:
            if self.loss_type != "sigmoid":
                raise ValueError(
                    f"loss_type is {self.loss_type!r} and loss_function is given; expected one of "
                    "the two"
                )
            options["loss_type"] = function
        loss_options = LossOptions(**options)
        if self.nll_on_prompt and not loss_options.needs_nll:
            raise ValueError(
                "nll_on_prompt is True but the loss has no NLL, so it does not support it; set "
                "nll_weight"
            )
        if loss_options.reference != "required":
            if self.precompute_ref_log_probs:
                raise ValueError(
                    "precompute_ref_log_probs is True but the loss needs no reference; set it to "
                    "False"
                )
            if self.reference_store is not None:
                raise ValueError(
                    f"reference_store is {self.reference_store!r} but the loss needs no reference; "
                    "expected None"
                )
        return loss_options


@dataclass
class UnpairedPreferenceConfig(BaseConfig):
    """Options of `UnpairedPreferenceTrainer`, with the names and defaults of TRL 1.16's KTOConfig.

    The options of the model, the data and the head are those of `PreferenceConfig`, and so are the
    defaults of transformers' options.

    Args:
        beta: strength of the pull towards the reference.
        loss_type: "kto" or "apo_zero_unpaired"; see docs/losses.md.
        desirable_weight, undesirable_weight: weights of the two classes of answers.
        packing, tokens_per_batch: as in `PreferenceConfig`. The mismatched answers of KTO's KL term
            have a row of their own; each of both rows has at most tokens_per_batch tokens.
    """

    loss_type: str = _option("kto", "Loss of single answers.", choices=UNPAIRED_LOSS_TYPES)
    desirable_weight: float = _option(1.0, "Factor on the losses of desirable answers.")
    undesirable_weight: float = _option(1.0, "Factor on the losses of undesirable answers.")

    def loss_options(self) -> dict[str, Any]:
        """The options of the loss after checks, as arguments of `linear_kto_loss`."""
        weights = self.desirable_weight, self.undesirable_weight
        check_unpaired_options(self.loss_type, self.beta, *weights)
        return {
            "loss_type": self.loss_type,
            "beta": self.beta,
            "desirable_weight": weights[0],
            "undesirable_weight": weights[1],
        }
