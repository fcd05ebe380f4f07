"""`patch_trl`: TRL's trainers compute log-probabilities with `linear_token_logps`.

TRL's DPO, KTO, GRPO, RLOO and SFT trainers give their model a forward pass that returns per-token
log-probabilities (`trl.trainer.utils.add_fused_lm_head`). Each call looks up two names in TRL's
module: `_ChunkedLogProbFunction` computes the log-probabilities, and `_use_triton` says whether
positions without a label are dropped first. Both are replaced, so the patch applies to trainers
made before and after it.

Two more names are replaced for adapters on the output layer; a model without one is not affected.
They are the class of output layers that the trainers refuse, and `add_fused_lm_head`, since TRL
passes on the layer's weight but not the layer.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import sys
import threading
from collections.abc import Callable, Mapping
from types import MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from fastpref.heads.adapters import adapter_options
from fastpref.heads.layer import read_layer
from fastpref.logps.forward import TokenStats
from fastpref.logps.linear import linear_token_logps
from fastpref.logps.options import HeadOptions

_UTILS = "trl.trainer.utils"
_TRAINERS = tuple(f"trl.trainer.{name}_trainer" for name in ("dpo", "kto", "grpo", "rloo", "sft"))
_FUNCTION = _UTILS, "_ChunkedLogProbFunction"
_COMPACT = _UTILS, "_use_triton"
_ADD, _ADAPTED = "add_fused_lm_head", "BaseTunerLayer"
# The arguments that TRL passes, in this order. A TRL with other arguments is refused.
_PARAMETERS = (
    "hidden",
    "weight",
    "bias",
    "targets",
    "temperature",
    "chunk_size",
    "final_logit_softcapping",
    "logit_scale",
    "outputs",
)
# TRL's names of the extra outputs, in TRL's order -> the names in `TokenStats`.
_OUTPUTS = {
    "entropy": "entropy",
    "log_sum_sq_probs": "log_sum_sq_probs",
    "mean_logits": "mean_logit",
    "is_top1": "is_top1",
}
# Devices on which positions without a label are dropped. The number of labels varies, which costs a
# compilation on other accelerators, whose graphs are for one shape.
_COMPACT_DEVICES = ("cpu", "cuda", "xpu", "mps")

Names = dict[tuple[str, str], Any]  # values of (module, attribute)
_originals: Names = {}


class _Running(threading.local):
    """The output layers of the models whose fused forward pass runs in this thread.

    The innermost call is the last. The entry of a layer without an adapter is None.
    """

    def __init__(self) -> None:
        self.layers: list[nn.Module | None] = []


_running = _Running()


class FusedLogProbs:
    """Replaces TRL's autograd function; `apply` has the same arguments and outputs.

    options: of `linear_token_logps`.
    """

    def __init__(self, options: dict[str, Any]):
        self.options = options

    def apply(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        chunk_size: int,
        final_logit_softcapping: float | None = None,
        logit_scale: float = 1.0,
        outputs: tuple[str, ...] = tuple(_OUTPUTS),
    ) -> tuple[Tensor | None, ...]:
        """The log-probs of the targets, and further outputs.

        Args:
            hidden: [N, H]. weight: [V, H]. bias: [V] or None. targets: [N] int64 in [0, V).
            temperature, final_logit_softcapping, logit_scale: the logits' transform.
            chunk_size: without effect. `fastpref.plan_head` chooses the tiles, within patch_trl's
                memory_budget.
            outputs: which further outputs to compute.

        Returns:
            log_probs, entropy, log_sum_sq_probs, mean_logits and is_top1, each [N], or None for
            what `outputs` leaves out. log_probs and entropy are differentiable, as in TRL.
        """
        device_type = hidden.device.type
        adapter: dict[str, Any] = {}
        adapted_layer = _running.layers[-1] if _running.layers else None
        if adapted_layer is not None:
            layer = read_layer(adapted_layer)
            adapter = adapter_options(hidden, layer.weight, layer.bias, layer.adapters)
            weight, bias = layer.weight, adapter.pop("bias")
            # The reference, the model without its adapter, must run the same kernels.
            adapter["fused"] = False
        if not torch.is_autocast_enabled(device_type):  # TRL computes in hidden's dtype
            weight = weight.to(hidden.dtype)
        if bias is not None:
            bias = bias.to(weight.dtype)
        # All targets count. Passing their positions saves a synchronisation of a GPU.
        token_indices = None
        if device_type != "cpu":
            token_indices = torch.arange(targets.shape[0], device=targets.device)
        out = linear_token_logps(
            hidden,
            weight,
            targets,
            bias,
            scale=logit_scale,
            softcap=final_logit_softcapping,
            temperature=temperature,
            extras=tuple(ours for theirs, ours in _OUTPUTS.items() if theirs in outputs),
            token_indices=token_indices,
            **{**self.options, **adapter},
        )
        stats = out if isinstance(out, TokenStats) else TokenStats(out)
        if hasattr(weight, "ds_status") and not torch.compiler.is_compiling():
            _gather_in_backward(stats.logps, weight, bias)
        return stats.logps, *(getattr(stats, ours) for ours in _OUTPUTS.values())


def _gather_in_backward(logps: Tensor, *parameters: Tensor | None) -> None:
    """Gather a head that DeepSpeed ZeRO-3 has partitioned, for the backward pass of logps.

    ZeRO-3 partitions the head after the forward pass. The backward pass may read it
    (strategy="recompute", the entropy's gradient) and returns a gradient of its whole shape.
    """
    node = logps.grad_fn
    while node is not None and node.name() != "LinearTokenLogpsBackward":
        node = node.next_functions[0][0]
    if node is None:
        return
    gathered = contextlib.ExitStack()

    def enter(_: Any) -> None:
        utils = importlib.import_module(_UTILS)
        gathered.enter_context(utils.maybe_gather_lm_head_ctx(*parameters))

    node.register_prehook(enter)
    node.register_hook(lambda *_: gathered.close())


class TRLPatch:
    """The result of `patch_trl`, a context manager that can be used repeatedly.

    Entering applies the patch if it is not active; leaving restores the previous values.
    """

    def __init__(self, previous: Names, replacements: Names, text: str):
        self._previous, self._replacements, self._text = previous, replacements, text

    def __enter__(self) -> TRLPatch:
        current = _current_values(self._replacements)
        if current[_FUNCTION] is not self._replacements[_FUNCTION]:  # undone or replaced since
            self._previous = current
            _assign(self._replacements)
        return self

    def __exit__(self, *_: object) -> None:
        _assign(self._previous)

    def __repr__(self) -> str:
        return self._text


def patch_trl(
    *,
    precision: str = "exact",
    strategy: str = "auto",
    memory_budget: int | None = None,
    backend: str | None = None,
    gradient_tolerance: float | None = None,
    head_gradient_tolerance: float | None = None,
    gradient_seed: int = 0,
) -> TRLPatch:
    """Run TRL's DPO, KTO, GRPO, RLOO and SFT trainers on `linear_token_logps`.

    Call it before `trainer.train()`; for an adapter on the output layer, before the trainer is
    made. `unpatch_trl()` or the end of a `with patch_trl():` block undoes it. A second call
    replaces the options. Losses, metrics and outputs are TRL's up to rounding. The differences:

    - the logits of 16-bit models are fp32;
    - the backward pass computes the logits once less;
    - positions without a label are skipped on CPUs, too;
    - LoRA and DoRA on the output layer are trained, while TRL refuses them.

    Args:
        precision, strategy, memory_budget, backend, gradient_tolerance, head_gradient_tolerance,
            gradient_seed: as in `linear_token_logps`.

    Returns:
        A context manager.

    Raises:
        ImportError: TRL is not installed.
        RuntimeError: this version of TRL has no fused head (before 1.15), or one with other
            arguments.
        ValueError: a bad option.
    """
    options: dict[str, Any] = dict(
        precision=precision,
        strategy=strategy,
        memory_budget=memory_budget,
        backend=backend,
        gradient_tolerance=gradient_tolerance,
        head_gradient_tolerance=head_gradient_tolerance,
        gradient_seed=gradient_seed,
    )
    HeadOptions(**options)
    try:
        trl = importlib.import_module("trl")
        utils = importlib.import_module(_UTILS)
    except ModuleNotFoundError as error:
        if error.name not in ("trl", "trl.trainer", _UTILS):
            raise
        raise ImportError(f"patch_trl: {error}; run: pip install 'trl>=1.16'") from error
    version = f"TRL {getattr(trl, '__version__', '(unknown version)')}"
    if not _originals:
        _check_contract(utils, version)
        _originals.update(_find(utils))
    before, function = _current_values(_originals), FusedLogProbs(options)
    replacements = {place: _replacement(place, function) for place in _originals}
    _assign(replacements)
    shown = ", ".join(f"{name}={value!r}" for name, value in options.items())
    return TRLPatch(before, replacements, f"<fastpref in {version}: {shown}>")


def unpatch_trl() -> None:
    """Restore TRL's implementation; has no effect if `patch_trl` was not called."""
    _assign(_originals)


def _current_values(places: Mapping[tuple[str, str], Any]) -> Names:
    return {place: getattr(sys.modules[place[0]], place[1]) for place in places}


def _assign(values: Mapping[tuple[str, str], Any]) -> None:
    for (module, name), value in values.items():
        setattr(sys.modules[module], name, value)


def _find(utils: ModuleType) -> Names:
    """The names that are replaced, with TRL's values."""
    places = [_FUNCTION, (_UTILS, _ADD)]
    if hasattr(utils, _COMPACT[1]):  # TRL 1.15 drops ignored positions on every device
        places.append(_COMPACT)
    for name in _TRAINERS:
        try:
            module = importlib.import_module(name)
        except ImportError:  # a trainer whose dependencies are missing, which cannot be used
            continue
        if hasattr(module, _ADD):
            places += [
                (name, attribute) for attribute in (_ADD, _ADAPTED) if hasattr(module, attribute)
            ]
    return _current_values(dict.fromkeys(places))


def _replacement(place: tuple[str, str], function: FusedLogProbs) -> Any:
    if place == _FUNCTION:
        return function
    if place == _COMPACT:
        return _compact
    return _add_fused_lm_head if place[1] == _ADD else _RefusedLayer


def _compact(device: torch.device) -> bool:
    return device.type in _COMPACT_DEVICES or _originals[_COMPACT](device)


class _Refused(type):
    """isinstance(layer, _RefusedLayer): whether `read_layer` refuses an adapted layer."""

    def __instancecheck__(cls, layer: Any) -> bool:
        if not _is_adapted(layer):
            return False
        try:
            read_layer(layer)
        except ValueError:
            return True
        return False


class _RefusedLayer(metaclass=_Refused):
    """Replaces PEFT's class of adapted layers in TRL, whose instances TRL refuses."""


def _is_adapted(layer: Any) -> bool:
    from peft.tuners.tuners_utils import BaseTunerLayer

    return isinstance(layer, BaseTunerLayer)


def _add_fused_lm_head(model: Any, *args: Any, **kwargs: Any) -> None:
    """TRL's `add_fused_lm_head`, with a forward pass that makes the output layer known.

    The forward pass puts the layer into `_running`, or None if it has no adapter at that time.
    """
    if isinstance(getattr(model.get_output_embeddings(), "logit_scale", None), Tensor):
        raise ValueError(
            f"the output layer of {type(model).__name__} scales each logit by itself, which TRL's "
            "fused head leaves out; expected fastpref.PreferenceTrainer for this model"
        )
    add: Callable[..., None] = _originals[_UTILS, _ADD]
    add(model, *args, **kwargs)
    arguments = inspect.signature(add).bind(model, *args, **kwargs).arguments
    cast = bool(arguments.get("cast_lm_head_to_fp32"))
    _adapted_head(model, cast)
    inner = model.forward

    @functools.wraps(type(model).forward)  # generate() checks its arguments against the signature
    def forward(self: Any, *args: Any, fused_lm_head: bool = False, **kwargs: Any) -> Any:
        if not fused_lm_head:
            return inner(*args, **kwargs)
        layer = _adapted_head(self, cast)
        patched = isinstance(getattr(sys.modules[_UTILS], _FUNCTION[1]), FusedLogProbs)
        if layer is not None and not patched:
            raise RuntimeError(
                "the model has an adapter on its output layer, which TRL alone would ignore; "
                "expected fastpref.patch_trl() to be active while it trains"
            )
        _running.layers.append(layer)
        try:
            return inner(*args, fused_lm_head=True, **kwargs)
        finally:
            _running.layers.pop()

    model.forward = MethodType(forward, model)


def _adapted_head(model: Any, cast: bool) -> nn.Module | None:
    """The model's output layer if it has an adapter, else None.

    cast: whether TRL casts the layer to float32, which raises ValueError for an adapted one.
    """
    layer = model.get_output_embeddings() if "peft" in sys.modules else None
    if layer is None or not _is_adapted(layer):
        return None
    if cast:
        raise ValueError(
            "cast_lm_head_to_fp32: got True with an adapter on the output layer, which TRL would "
            "leave out when it generates; expected False"
        )
    return layer


def _check_contract(utils: ModuleType, version: str) -> None:
    """Raise RuntimeError unless TRL's fused head has the arguments and outputs known here."""
    if not hasattr(utils, _ADD) or not hasattr(utils, _FUNCTION[1]):
        raise RuntimeError(
            f"patch_trl: {version} has no fused output head (trl.trainer.utils.add_fused_lm_head); "
            "expected TRL 1.15 or newer: pip install 'trl>=1.16'. fastpref.PreferenceTrainer has "
            "the same options and needs no TRL"
        )
    function = getattr(utils, _FUNCTION[1])
    if function is None:  # TRL 1.15 without Triton, whose trainers run only with the patch
        return
    names = tuple(inspect.signature(function.forward).parameters)[1:]
    outputs = getattr(
        importlib.import_module("trl.kernels.chunked_logprob"), "OPTIONAL_OUTPUTS", ()
    )
    for kind, actual, expected in (
        ("arguments", names, _PARAMETERS),
        ("outputs", tuple(outputs), tuple(_OUTPUTS)),
    ):
        if actual != expected:
            raise RuntimeError(
                f"patch_trl: the fused output head of {version} has the {kind} "
                f"{', '.join(actual)}; expected {', '.join(expected)}. A newer fastpref may know it"
            )
