"""Rows of segments in a transformers model, through its registries of attentions and of masks.

A model asks the mask registry for one mask of each kind of layer, and hands it to the layers. Our
entry of that registry returns a `SegmentMask`: the plan, and the layer's sliding window. Our entry
of the attention registry reads it. The plan thus reaches every layer, also those of families that
pass no further keywords on; gradient checkpointing keeps it; and whatever does not know such a mask
fails instead of ignoring it.

The second implementation keeps the model's own attention and gives it a dense mask [T, T].
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from fastpref.attention import gpu
from fastpref.attention.grouped import grouped_attention
from fastpref.data.segments import PLAN, RowPlan
from fastpref.heads.reading import unwrap

NAME = "fastpref_segments"  # in both registries
# The implementations: our attention, or a dense mask for the model's own.
FUNCTION, MASK = "attention function", "dense mask"
_DENSE = ("sdpa", "eager")  # the attentions that a dense mask serves


class UnsupportedAttention(ValueError):
    """The model's attention cannot be computed over rows of segments; the message says why."""


class SegmentMask(NamedTuple):
    """What a layer's attention reads instead of a mask."""

    plan: RowPlan
    window: int | None


class _Active(NamedTuple):
    plan: RowPlan
    checked: bool  # whether the masks of this model are known to be causal
    thread: int  # that the model is called in


# The plans in use, of each config by its id; a mask is asked for with the config. Not a context
# variable: checkpointed layers may ask again in the backward pass, which runs in autograd's threads
# on a GPU. Models that train in several threads at once need configs of their own.
_active: dict[int, list[_Active]] = {}


def _plan_of(arguments: dict[str, Any]) -> _Active | None:
    """The plan in use by the model that asks for a mask."""
    plans = _active.get(id(arguments.get("config")))
    return plans[-1] if plans else None


def _window(active: _Active, arguments: dict[str, Any]) -> int | None:
    """The sliding window of a mask that a model asks for, after checks."""
    plan, size = active.plan, arguments.get("local_size")
    requested = arguments["batch_size"], _query_length(arguments)
    if requested != plan.shape or arguments.get("kv_length", requested[1]) != requested[1]:
        raise UnsupportedAttention(
            f"it asks for a mask of {requested} tokens for rows of {plan.shape}, as with a cache "
            "or virtual tokens"
        )
    if not active.checked:
        _check_causal(arguments.get("mask_function"), size, arguments.get("device", "cpu"), plan)
    return size


def _query_length(arguments: dict[str, Any]) -> int:
    if "q_length" in arguments:
        return arguments["q_length"]
    return arguments["cache_position"].shape[0]  # transformers before 5.3


def _check_causal(function: Any, window: int | None, device: Any, plan: RowPlan) -> None:
    """Raise unless a mask function is causal, with this window or none.

    The function is evaluated beyond the rows' length, so that a short pair shows a wide window.
    """
    if function is None:
        return
    size = 2 * max(plan.shape[1], window or 0) + 2
    q = torch.tensor([0, size // 3, size - 1], device=device)[:, None]
    kv = torch.arange(size, device=device)[None]
    zero = torch.zeros((), dtype=torch.int64, device=device)
    expected = kv <= q
    if window is not None:
        expected &= kv > q - window
    try:
        equal = torch.equal(torch.as_tensor(function(zero, zero, q, kv)).expand(3, size), expected)
    except Exception:  # the function reads more than the indices
        equal = False
    if not equal:
        raise UnsupportedAttention(
            "it has layers whose mask is neither causal nor a sliding window, such as chunks or a "
            "prefix that is seen in both directions"
        )


def _segment_mask(*args: Any, **arguments: Any) -> SegmentMask:
    """Our entry of the mask registry."""
    active = _plan_of(arguments)
    if active is None:
        raise UnsupportedAttention(f"{NAME} is in use without rows of segments")
    return SegmentMask(active.plan, _window(active, arguments))


# Keywords that change what an attention computes, which ours does not know.
_UNKNOWN = (
    "position_bias",
    "head_mask",
    "alibi",
    "key_padding_mask",
    "indexer_mask",
    "topk_indices",
)


def _segment_attention(
    module: Any,
    query: Tensor,  # [R, heads, T, D]
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    dropout: float = 0.0,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Our entry of the attention registry."""
    if not isinstance(attention_mask, SegmentMask):
        raise UnsupportedAttention("its layers do not use the mask of transformers' registry")
    unknown = next((name for name in _UNKNOWN if others.get(name) is not None), None)
    if unknown is not None or others.get("is_causal") is False:
        raise UnsupportedAttention(f"its attention needs {unknown or 'is_causal=False'}")
    if dropout:
        raise UnsupportedAttention(f"its attention has a dropout of {dropout}")
    plan, window = attention_mask
    if others.get("sliding_window") not in (None, window):
        raise UnsupportedAttention(
            f"its layers have a sliding window of {others['sliding_window']} and masks of {window}"
        )
    options: dict[str, Any] = {"window": window, "softcap": softcap}
    options["scale"] = query.shape[-1] ** -0.5 if scaling is None else scaling
    if query.device.type == "cuda" and gpu.flash_reason(query, value, s_aux) is None:
        return gpu.flash_attention(query, key, value, plan, **options), None
    if query.device.type == "cuda" and s_aux is None:
        return gpu.flex_attention(query, key, value, plan, **options), None
    return grouped_attention(query, key, value, plan, sinks=s_aux, **options), None


AttentionInterface.register(NAME, _segment_attention)
AttentionMaskInterface.register(NAME, _segment_mask)


def _dense(original: Callable[..., Any], is_float: bool) -> Callable[..., Any]:
    """An entry of the mask registry that gives the plan in use as a dense mask."""

    def mask(*args: Any, **arguments: Any) -> Any:
        active = _plan_of(arguments)
        if active is None or arguments.get("batch_size") != active.plan.shape[0]:
            return original(*args, **arguments)
        device = arguments.get("device", "cpu")
        visible = active.plan.visible(_window(active, arguments), device)
        if not is_float:
            return visible
        dtype = arguments.get("dtype", torch.float32)
        hidden = torch.full((), torch.finfo(dtype).min, dtype=dtype, device=device)
        return torch.where(visible, torch.zeros_like(hidden), hidden)

    return mask


_dense_lock = threading.Lock()
_dense_uses: list[dict[str, Any]] = []  # for each use, the entries that stood before the first


@contextlib.contextmanager
def _dense_masks() -> Iterator[None]:
    """The registry's entries of `_DENSE` give dense masks of plans until the last use ends."""
    masks: Any = ALL_MASK_ATTENTION_FUNCTIONS
    with _dense_lock:
        originals = {name: masks[name] for name in _DENSE}
        if _dense_uses:
            originals = _dense_uses[0]
        else:
            for name, original in originals.items():
                masks[name] = _dense(original, name == "eager")
        _dense_uses.append(originals)
    try:
        yield
    finally:
        with _dense_lock:
            for name, original in _dense_uses.pop().items():
                if not _dense_uses:
                    masks[name] = original


class SegmentAttention:
    """A model's attention, to be switched to rows of segments for a step.

    Between steps the model has its own attention, so that what is saved or generated knows nothing
    of this.

    Args:
        model: a causal language model of transformers, wrapped or not.
        implementation: FUNCTION or MASK.
        checked: whether `check_attention` has compared it with separate rows.

    Raises:
        UnsupportedAttention: the implementation does not suit the model's own attention.
    """

    def __init__(self, model: Any, implementation: str = FUNCTION, checked: bool = False) -> None:
        self.implementation, self.checked = implementation, checked
        configs: list[Any] = [getattr(m, "config", None) for m in unwrap(model).modules()]
        by_id = {id(c): c for c in configs if hasattr(c, "_attn_implementation_internal")}
        self._configs = list(by_id.values())
        if not self._configs:
            raise UnsupportedAttention("its config names no attention")
        if implementation == MASK:
            self._check_dense()

    def of(self, model: Any) -> SegmentAttention:
        """The same for a copy of the model."""
        return SegmentAttention(model, self.implementation, self.checked)

    def _check_dense(self) -> None:
        """Raise `UnsupportedAttention` if the model's own attention would not get a dense mask."""
        implementations = {config._attn_implementation_internal for config in self._configs}
        if not implementations <= {*_DENSE, None}:
            raise UnsupportedAttention(
                f"a dense mask does not serve {', '.join(map(str, implementations))}"
            )

    def rows_of(self, batch: Mapping[str, Any]) -> contextlib.AbstractContextManager:
        """`on` for a batch of rows of segments; nothing for other batches."""
        return self.on(batch[PLAN]) if PLAN in batch else contextlib.nullcontext()

    @contextlib.contextmanager
    def on(self, plan: RowPlan) -> Iterator[None]:
        """The model computes rows of this plan, forward and backward; calls may be nested."""
        if self.implementation == MASK:
            self._check_dense()  # the user may have changed it since
        thread = threading.get_ident()
        if any(_active[id(c)][-1].thread != thread for c in self._configs if id(c) in _active):
            raise RuntimeError(
                "two models that share one config train at once in two threads, and each would "
                "get the other's rows; make each with a copy of the config"
            )
        previous = [config._attn_implementation_internal for config in self._configs]
        with _dense_masks() if self.implementation == MASK else contextlib.nullcontext():
            for config in self._configs:
                _active.setdefault(id(config), []).append(_Active(plan, self.checked, thread))
                if self.implementation == FUNCTION:
                    config._attn_implementation_internal = NAME
            try:
                yield
            finally:
                for config, name in zip(self._configs, previous, strict=True):
                    config._attn_implementation_internal = name
                    plans = _active[id(config)]
                    plans.pop()
                    if not plans:
                        del _active[id(config)]
