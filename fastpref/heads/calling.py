"""Calling a transformers model without computing its logits.

`install_head_forward` adds a keyword to the forward of a causal language model: `head_fn`, a
function that receives the final hidden states and the head instead of the logits being computed.
The loss thus runs inside the model's forward, and wrappers around the model (DDP, PEFT, autocast,
compile) see an ordinary call. In mixed precision accelerate converts a model's outputs to fp32;
hidden states that stay inside are not converted. Without `head_fn` the model behaves as before.
docs/heads.md lists the model families that work and those that are refused.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from fastpref.heads.layer import read_layer
from fastpref.heads.modes import evaluating
from fastpref.heads.probe import accepted, verify
from fastpref.heads.reading import Head, read_head, unwrap
from fastpref.heads.router import load_balancing_loss
from fastpref.heads.sharded import gather_head, is_sharded, needs_hooks, within_layer


def backbone(model: Any) -> nn.Module:
    """The submodule whose first output the head reads."""
    for base in (getattr(model, "base_model", None), getattr(model, "model", None)):
        if isinstance(base, nn.Module) and base is not model:
            return base
    raise ValueError(
        f"model {type(model).__name__} has no backbone apart from its output head; expected one at "
        "model.base_model or model.model that returns the last hidden states"
    )


HeadFunction = Callable[..., Any]  # (hidden [B, T, H], Head, aux_loss or None, **head_inputs)
RouterFunction = Callable[[Any, Any, Tensor | None], Tensor]  # (model, outputs, attention_mask)

# Arguments of a causal model's forward that concern its logits, with the values accepted there.
_OF_LOGITS: dict[str, tuple[Any, ...]] = {
    "labels": (None,),
    "shift_labels": (None,),
    "num_items_in_batch": (None,),
    "logits_to_keep": (None, 0),
    "return_dict": (None, True, False),
}


def install_head_forward(model: Any, *, transform: Mapping[str, Any] | None = None) -> None:
    """Let `model(..., head_fn=f, head_inputs={...})` return `f(hidden, head, aux_loss, **inputs)`.

    The arguments of f:

    - hidden: the last hidden states [B, T, H], on the head's device;
    - head: a `Head`;
    - aux_loss: with output_router_logits=True, the load-balancing loss [] of a mixture of experts;
      else None. With the further keyword `router_fn=g` it is g(model, outputs, attention_mask).

    Installation checks the head that `read_head` returns against the model's forward, with
    stand-ins for backbone and output layer. Install before the model is wrapped for distributed
    training. A second installation has no effect. `uninstall_head_forward` undoes it.

    Args:
        model: a causal language model, wrapped or not.
        transform: {"scale": float, "softcap": float or None}, if the config does not say it. It is
            checked against the model's forward.

    Raises:
        ValueError: no output head, or one that `read_head` refuses; no backbone; a forward that
            applies something else to the hidden states than a linear layer, this scale and this
            softcap.
    """
    outer, model = model, unwrap(model)
    installed = "_forward_without_head_fn" in model.__dict__
    if installed and transform is None:
        return
    before = model.__dict__.get("_head_transform")
    if transform is not None:
        model._head_transform = _checked_transform(transform)
    try:
        head = read_head(model, adapters=True)
        original = model._forward_without_head_fn if installed else model.forward
        module, base = model.get_output_embeddings(), backbone(model)
        verify(
            model, original, base, module, read_layer(module),
            scale=head.scale, softcap=head.softcap, vocab_size=head.vocab_size,
        )  # fmt: skip
    except ValueError:
        if transform is not None:
            model._head_transform = before
        raise
    if installed:
        return

    @functools.wraps(type(model).forward)
    def forward(
        self: Any,
        *args: Any,
        head_fn: HeadFunction | None = None,
        head_inputs: Mapping[str, Any] | None = None,
        router_fn: RouterFunction = load_balancing_loss,
        **kwargs: Any,
    ) -> Any:
        if head_fn is None:
            return self._forward_without_head_fn(*args, **kwargs)
        kwargs = _backbone_inputs(self, args, kwargs)
        outputs = backbone(self)(**kwargs)
        aux_loss = None
        if kwargs.get("output_router_logits"):
            aux_loss = router_fn(self, outputs, kwargs.get("attention_mask"))
        layer = self.get_output_embeddings()
        gather_head(layer)
        head_call = head_fn, aux_loss, head_inputs or {}
        if needs_hooks(layer):
            return within_layer(
                layer, lambda hidden: _call_head(self, hidden, *head_call), outputs[0]
            )
        # Without a new function, for which torch.compile would trace each call anew.
        return _call_head(self, outputs[0], *head_call)

    # generate() checks its arguments against the signature. __wrapped__ is deleted because
    # accelerate, to remove its wrapper, follows that attribute down to the innermost function.
    del forward.__wrapped__  # type: ignore[attr-defined]
    forward.__signature__ = inspect.signature(type(model).forward)  # type: ignore[attr-defined]
    model._forward_without_head_fn = original
    # Read here, because torch.compile cannot trace inspect.signature.
    model._head_arguments = _names(type(model).forward)[0], _names(type(base).forward)
    model._forward_with_head_fn = MethodType(forward, model)
    _replace_forward(outer, original, model._forward_with_head_fn)


def _call_head(
    model: Any,
    hidden: Tensor,
    head_fn: HeadFunction,
    aux_loss: Any,
    inputs: Mapping[str, Any],
) -> Any:
    head = read_head(model, adapters=True)
    return head_fn(_at_head(hidden, head.weight), head, aux_loss, **inputs)


def _replace_forward(outer: Any, old: Any, new: Any) -> None:
    """Replace the forward of the model, and of wrappers that hold it as their own forward.

    PEFT's adaption prompts are such a wrapper.
    """
    unwrap(outer).forward = new
    for module in outer.modules():
        if module.__dict__.get("forward") == old:
            module.forward = new


def uninstall_head_forward(model: Any) -> None:
    """Undo `install_head_forward`; has no effect on a model without it.

    Raises:
        ValueError: the model's forward has been replaced since, as `accelerate.prepare` does.
    """
    outer, model = model, unwrap(model)
    if "_forward_without_head_fn" not in model.__dict__:
        return
    if model.forward != model._forward_with_head_fn:
        raise ValueError(
            f"model {type(model).__name__} has had its forward replaced after install_head_forward;"
            " expected that to be undone first (for accelerate: unwrap_model(model, "
            "keep_fp32_wrapper=False))"
        )
    original = model._forward_without_head_fn
    _replace_forward(outer, model.forward, original)
    del model._forward_without_head_fn, model._forward_with_head_fn, model._head_arguments
    model.__dict__.pop("_head_transform", None)
    if getattr(original, "__func__", None) is type(model).forward:  # the class provides it
        del model.forward


def _names(function: Any) -> tuple[tuple[str, ...], bool]:
    """The names of a method's parameters without self, and whether it has **kwargs."""
    parameters = list(inspect.signature(function).parameters.values())[1:]
    has_kwargs = any(p.kind is p.VAR_KEYWORD for p in parameters)
    return tuple(p.name for p in parameters), has_kwargs


def _backbone_inputs(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a causal model's forward as keyword arguments of its backbone.

    Raises:
        ValueError: an argument that concerns logits, such as labels.
    """
    names, (base_names, has_kwargs) = model._head_arguments
    inputs = dict(zip(names, args, strict=False), **kwargs)
    for key, allowed in _OF_LOGITS.items():
        value = inputs.pop(key, None)
        if not any(value is a for a in allowed):
            raise ValueError(
                f"{key}: got a {type(value).__name__} together with head_fn, expected none: there "
                "are no logits; give head_fn what it needs in head_inputs"
            )
    _rename_cache(inputs, base_names)
    inputs["use_cache"] = False
    # None is dropped, because PEFT passes it for every argument that its caller omitted.
    return {
        key: value
        for key, value in inputs.items()
        if key in base_names or (has_kwargs if key == "use_cache" else value is not None)
    }


# The argument that holds the keys and values of earlier tokens: its name since transformers 5.24,
# the name before that, and the name in older state-space models.
_CACHE = ("cache", "past_key_values", "cache_params")


def _rename_cache(inputs: dict[str, Any], names: tuple[str, ...]) -> None:
    """Pass the cache under the backbone's name for it; `names` are the backbone's parameters."""
    present = [name for name in _CACHE if inputs.get(name) is not None]
    if len(present) > 1:
        raise ValueError(f"{' and '.join(present)} are given; expected one cache")
    backbone_name = next((name for name in _CACHE if name in names), None)
    if present and backbone_name is not None:
        inputs[backbone_name] = inputs.pop(present[0])
    for name in _CACHE:
        if name != backbone_name and inputs.get(name) is None:
            inputs.pop(name, None)


def _at_head(hidden: Tensor, weight: Tensor) -> Tensor:
    """The hidden states on the head's device, and without autocast in the head's dtype.

    A model that is split over several devices may have its head on another one.
    """
    if weight.is_meta and not hidden.is_meta:
        raise ValueError(
            "the output head's weight is on the meta device (offloaded by accelerate?); expected "
            "it on a device: leave the head out of what is offloaded"
        )
    if torch.is_autocast_enabled(weight.device.type):
        return hidden.to(weight.device)
    return hidden.to(weight.device, weight.dtype)


def _checked_transform(transform: Mapping[str, Any]) -> dict[str, Any]:
    if set(transform) != {"scale", "softcap"}:
        raise ValueError(
            f"transform: got {dict(transform)!r}, expected the keys 'scale' and 'softcap'"
        )
    scale, cap = transform["scale"], transform["softcap"]
    return {"scale": float(scale), "softcap": None if cap is None else float(cap)}


# Tolerance of `check_head`: the difference of two log-probs relative to the largest logit.
_ROUNDING = {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}


@torch.no_grad()
def check_head(model: Any) -> None:
    """Compare the model's log-probs with those computed from its hidden states and `read_head`.

    Costs two forward passes of three tokens. Skipped if a weight is not whole on this process.
    The docstring of `fastpref.heads` compares this check with that of `install_head_forward`.

    Args:
        model: a causal language model, wrapped or not.

    Raises:
        ValueError: the log-probs differ by more than rounding, or the model's are NaN.
    """
    model = unwrap(model)
    if any(p.is_meta or p.numel() == 0 or is_sharded(p) for p in model.parameters()):
        return
    head = read_head(model, adapters=True)
    ids = torch.tensor([[token % head.vocab_size for token in (5, 6, 7)]])
    ids = ids.to(next(model.parameters()).device)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with evaluating(model):
        hidden = hidden_states(model, **inputs)
        expected = model(**inputs, **accepted(type(model).forward, {"use_cache": False})).logits
        logits = read_head(model, adapters=True).logits(hidden.to(head.weight))
    logits, expected = logits.float().cpu(), expected.float().cpu()
    if expected.isnan().any() and not logits.isnan().any():
        raise ValueError(
            f"{type(model).__name__}'s own logits are not numbers, where its weights are; expected "
            "finite ones. DoRA does that to rows of zeros, such as a padding token's: use LoRA on "
            "the output layer, or untie and fill them"
        )
    same_shape = logits.shape == expected.shape
    gap = torch.tensor(0.0)
    if same_shape:
        gap = (logits.log_softmax(-1) - expected.log_softmax(-1)).abs().max()
    limit = 1e-5 + _ROUNDING.get(hidden.dtype, 1e-4) * expected.abs().max()
    if not same_shape or gap > limit:  # False for NaNs on both sides, which training reports
        difference = f"by up to {gap:.2g}" if same_shape else f"in shape, {tuple(expected.shape)}"
        raise ValueError(
            f"the log-probs of {type(model).__name__} differ {difference} from those of a linear "
            f"output head with scale {head.scale:g} and softcap {head.softcap}, which is all that "
            "its config and get_output_embeddings() tell; expected a head without further layers"
        )


def hidden_states(model: Any, **inputs: Any) -> Tensor:
    """Call a causal language model, wrapped or not, and return its final hidden states [B, T, H].

    No logits are computed. T is the length of input_ids or inputs_embeds; the virtual tokens of a
    prompt-learning adapter are dropped.

    Raises:
        ValueError: as `install_head_forward`, and a wrapper that does not pass keywords on.
    """
    install_head_forward(model)
    hidden = model(**inputs, head_fn=_return_hidden)
    if not isinstance(hidden, Tensor):
        raise ValueError(
            f"model: the {type(model).__name__} around the language model keeps head_fn from it; "
            "expected a wrapper that passes keywords on: install_head_forward before wrapping"
        )
    tokens = inputs.get("input_ids")
    tokens = inputs.get("inputs_embeds") if tokens is None else tokens
    return hidden if tokens is None else align_to_tokens(hidden, tokens)


def _return_hidden(hidden: Tensor, head: Head, aux_loss: Tensor | None) -> Tensor:
    return hidden


def disable_dropout(model: nn.Module) -> None:
    """Set every dropout probability of the model to zero."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        # Functional dropout reads its probability from an attribute of the module or, in Falcon
        # and Persimmon, of the config. A config's attribute counts if forward names it.
        code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
        config = getattr(module, "config", None)
        names_in_forward = [] if code is None or config is None else code.co_names
        for owner, names in ((module, list(vars(module))), (config, names_in_forward)):
            for name in names:
                if "drop" in name and isinstance(getattr(owner, name, None), float):
                    setattr(owner, name, 0.0)


def labelled_states(hidden: Tensor, labels: Tensor, hidden_indices: Tensor | None) -> Tensor:
    """The hidden states that labels are aligned with.

    Args:
        hidden: [R, T, H], of a batch's rows.
        labels: [R, T], or [N] with hidden_indices.
        hidden_indices: [N] int64, positions in the flattened rows, for rows of segments.

    Returns:
        `align_to_tokens` without indices; else [N, H]. The gradients of a state that is named
        twice are added. Since there are at most two, their order has no effect.
    """
    if hidden_indices is None:
        return align_to_tokens(hidden, labels)
    return hidden.flatten(0, 1).index_select(0, hidden_indices)


def align_to_tokens(hidden: Tensor, labels: Tensor) -> Tensor:
    """The last T positions of hidden [B, >= T, H], where labels are [B, T].

    Prompt learning puts virtual tokens in front of a sequence; they are dropped.
    """
    return hidden if hidden.shape[1] == labels.shape[1] else hidden[:, -labels.shape[1] :]
