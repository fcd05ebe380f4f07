"""Sequence log-probabilities of the same tokens, computed in several ways.

`fastpref` takes padded batches, as training does. `eager` and `exact` take one sequence at a time
without padding, so that a model whose results depend on padding shows as an error. `TRL` takes
padded pairs through TRL's own output head.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from fastpref.backends.host_memory import free_memory
from fastpref.data.batches import batch_labels
from fastpref.heads.modes import evaluating
from fastpref.heads.reading import unwrap

_ROOM = 1.2  # of the free memory that a widened copy of the weights needs


class Widening(TorchFunctionMode):
    """Makes float64 of each float32 that a model's forward asks for.

    Norms, rotary positions and softmax convert to float32 inside most models, which would leave a
    float64 model no more exact than that.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.float:
            func = Tensor.double
        args = tuple(_wider(a) for a in args)
        return func(*args, **{k: _wider(v) for k, v in (kwargs or {}).items()})


def _wider(value: Any) -> Any:
    return torch.float64 if value is torch.float32 else value


def sequences(batch: dict[str, Any]) -> Iterator[tuple[Tensor, Tensor]]:
    """The token ids [T] and the labels [T - 1] of each sequence of a batch, without padding."""
    labels = batch_labels(batch)
    for ids, mask, targets in zip(batch["input_ids"], batch["attention_mask"], labels, strict=True):
        is_token = mask.bool()
        yield ids[is_token], targets[is_token][:-1]


@torch.no_grad()
def plain_logps(model: Any, batch: dict[str, Any]) -> Tensor:
    """The log-probs of a batch's answers from the model's own logits, [S].

    Softmax and logits are in the model's dtype, sums in float32 or float64.
    """
    out = []
    for ids, labels in sequences(batch):
        positions = (labels != -100).nonzero().flatten()
        logits = model(
            input_ids=ids[None], attention_mask=torch.ones_like(ids)[None], use_cache=False
        ).logits[0]
        logits = logits[-len(ids) :][positions]  # without the virtual tokens of prompt learning
        chosen = logits.log_softmax(-1).gather(1, labels[positions, None]).flatten()
        out.append(chosen.to(torch.promote_types(chosen.dtype, torch.float32)).sum())
    return torch.stack(out)


def widened(model: Any, widest: torch.dtype = torch.float64) -> tuple[Any, str]:
    """A copy of the model whose log-probs count as exact, and its dtype's name.

    The widest dtype that fits into memory: float64, float32, or that of the model itself. Weights
    that are not floating-point numbers, as of a quantised model, cannot be widened.

    widest: the widest dtype to try.

    Returns:
        The copy, or None if there is none; and "float64", "float32" or why there is none.
    """
    weights = [*model.parameters()]
    if not all(p.is_floating_point() for p in weights):
        return None, "the weights are quantised"
    count = sum(p.numel() for p in weights)
    free = _free_memory(weights[0].device)
    present = max((p.dtype.itemsize for p in weights), default=4)
    for dtype, size in ((torch.float64, 8), (torch.float32, 4)):
        if size > widest.itemsize:
            continue
        if size > present and (free is None or _ROOM * size * count < free):
            return copy.deepcopy(model).to(dtype).eval(), str(dtype).removeprefix("torch.")
        if size <= present:
            break
    if present >= 4:
        return model, "float32" if present == 4 else "float64"
    return None, "a copy in float32 does not fit into memory"


def _free_memory(device: torch.device) -> int | None:
    """Free bytes of a device, or None if they are not known."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else free_memory()


@contextlib.contextmanager
def computing_in(dtype: str) -> Iterator[None]:
    """Computes as exactly as the dtype of `widened` allows."""
    with Widening() if dtype == "float64" else contextlib.nullcontext():
        yield


def why_no_trl() -> str | None:
    """Why TRL's log-probs cannot be computed here; None if they can."""
    if find_spec("trl") is None:
        return "TRL is not installed"
    try:
        from trl.trainer import utils
    except Exception as error:  # a TRL that does not go with the other libraries
        return f"TRL cannot be imported ({' '.join(str(error).split())})"
    if not hasattr(utils, "add_fused_lm_head"):
        return "this version of TRL has no output head of its own"
    if type(getattr(utils, "_ChunkedLogProbFunction", None)).__module__.startswith("fastpref."):
        return "fastpref.patch_trl() is active in this process"
    return None


@contextlib.contextmanager
def with_trl_head(model: Any) -> Iterator[None]:
    """Gives the model TRL's output head, and takes it away at the end."""
    from trl.trainer.utils import add_fused_lm_head

    base = unwrap(model)
    before = base.__dict__.get("forward")
    add_fused_lm_head(base)
    try:
        yield
    finally:
        del base.forward
        if before is not None:
            base.forward = before


@torch.no_grad()
def trl_logps(model: Any, batch: dict[str, Any]) -> Tensor:
    """The log-probs of a batch's answers as TRL's DPOTrainer computes them, [S].

    The model is inside `with_trl_head`.
    """
    ids, mask = batch["input_ids"], batch["completion_mask"]
    out = model(
        input_ids=ids,
        attention_mask=batch["attention_mask"],
        use_cache=False,
        labels=ids.masked_fill(mask == 0, -100),
        fused_lm_head=True,
    )
    return out.log_probs[:, 1 - ids.shape[1] :].sum(1)


def each(function: Any, model: Any, batches: Sequence[dict[str, Any]]) -> Iterator[Tensor]:
    """function(model, batch) of each batch, with the model in evaluation mode."""
    with evaluating(model):
        for batch in batches:
            yield function(model, batch)
