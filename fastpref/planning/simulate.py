"""`simulate_step`: the memory of a training step of a model that is never loaded.

config -> the model on fake tensors, which have shapes and no data
     -> body forward (real code of transformers, real attention over the rows of a batch)
     -> head: the buffers of `plan_head`, or the logits
     -> backward pass, optimiser
     -> each storage's birth and death -> `Account`

The account is the one that `fastpref profile` makes of a real step, so the two compare line by
line. What C code allocates past torch's allocator is in neither.
"""

from __future__ import annotations

import contextlib
import itertools
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastpref import backends
from fastpref.attention.switch import SegmentAttention
from fastpref.data.batches import model_inputs
from fastpref.data.collate import PreferenceCollator
from fastpref.data.segments import SegmentCollator
from fastpref.heads.calling import backbone
from fastpref.heads.reading import unwrap
from fastpref.logps.plan import HeadPlan, plan_head, tile_dtype
from fastpref.planning.model import (
    METHODS,
    StepOptions,
    build_model,
    check_config,
    first_line,
    silent,
    with_layers,
)
from fastpref.profiling.account import GRADIENTS, Account, Event, Known, part_peaks

Pair = tuple[int, int, int]  # tokens of prompt, chosen and rejected answer
QUANTISED_BYTES = 4.127 / 8  # of a weight, in NF4 with double quantisation
LAYERS = 4, 8  # of the two simulations of a deeper model


def _adds_gradients(args: Any) -> bool:
    """Whether an addition sums two gradients. Other additions of the backward pass recompute
    activations, and do so with gradients enabled."""
    if torch.is_grad_enabled() or len(args) != 2:
        return False
    a, b = args
    alike = isinstance(a, Tensor) and isinstance(b, Tensor)
    return alike and (a.shape, a.dtype) == (b.shape, b.dtype) and a._base is None


class _Tracker(TorchDispatchMode):
    """Records the birth and the death of every storage of an operation's results."""

    def __init__(self) -> None:
        super().__init__()
        self.events: list[Event] = []
        self._numbers = itertools.count(1)
        self._addresses: dict[int, int] = {}  # of the storages that live, by their C++ object
        self._references: dict[int, Any] = {}

    def address(self, tensor: Tensor, is_new: bool = True) -> int:
        """The storage's number; an event of its birth is recorded if it has none yet."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._addresses:
            return self._addresses[key]
        number, size = next(self._numbers), storage.nbytes()
        self._addresses[key] = number
        if is_new and size:
            self.events.append(Event(len(self.events), number, size))

        def died(_: Any) -> None:
            self._addresses.pop(key, None)
            self._references.pop(number, None)
            if size:
                self.events.append(Event(len(self.events), number, -size))

        self._references[number] = weakref.ref(storage, died)
        return number

    def mark(self, text: str) -> None:
        """Record that a phase begins."""
        self.events.append(Event(len(self.events), 0, 0, text))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.add.Tensor and _adds_gradients(args):
            # Autograd adds two gradients of one tensor in place, but not under such a mode.
            func = torch.ops.aten.add_.Tensor
        out = func(*args, **(kwargs or {}))
        for value in tree_leaves(out):
            if isinstance(value, Tensor):
                self.address(value)
        return out


class _PlannedHead(torch.autograd.Function):
    """The buffers of fastpref's head over N labelled tokens, without its arithmetic."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        hidden: Tensor,  # [N, H], in the compute dtype
        weight: Tensor,  # [V, H], in the compute dtype
        plan: HeadPlan,
        at_once: bool,
    ) -> Tensor:
        n, vocab = hidden.shape[0], weight.shape[0]
        wide = tile_dtype(hidden.dtype, plan.precision)
        u = torch.empty_like(hidden)
        stash = hidden.new_empty((plan.stash_tokens, vocab))
        in_stash = plan.stash_tokens == n and wide == hidden.dtype
        if not in_stash and not (plan.logit_free and at_once):
            hidden.new_empty((min(plan.block_tokens, n), vocab), dtype=wide)
        ctx.plan, ctx.wide = plan, wide
        again = plan.stash_tokens < n and weight.requires_grad
        ctx.save_for_backward(u, stash, hidden, weight if again else None)
        ctx.weight_like = weight.shape, weight.dtype, weight.requires_grad
        return hidden.new_empty((), dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        u, stash, hidden, weight = ctx.saved_tensors
        shape, dtype, trains = ctx.weight_like
        d_hidden = torch.empty_like(u)
        if not trains:
            return d_hidden, None, None, None
        d_weight = hidden.new_empty(shape, dtype=dtype)
        scaled = torch.empty_like(hidden)
        if weight is not None:
            hidden.new_empty((hidden.shape[0], ctx.plan.block_vocab), dtype=ctx.wide)
        del scaled
        return d_hidden, d_weight, None, None


def step_head(
    tokens: int, hidden_size: int, vocab_size: int, trains: bool, options: StepOptions
) -> tuple[HeadPlan, bool]:
    """The plan of a step's head, and whether its product multiplies D while it makes it.

    tokens: labelled. trains: whether the head's weight gets a gradient.
    """
    dtype = torch.bfloat16 if options.bf16 else options.dtype
    fused = False
    at_once = False
    if options.device == "cpu":
        backend = backends.choose(torch.device("cpu"), dtype)
        at_once = bool(backend.PROJECTS_AT_ONCE)
        fused = bool(backend.LOGIT_FREE_BY_DEFAULT)
    plan = plan_head(
        tokens,
        hidden_size,
        vocab_size,
        dtype,
        device=options.device if options.memory_budget is not None else "cpu",
        weight_grad=trains,
        strategy=options.head_strategy,
        memory_budget=options.memory_budget,
        fused=fused,
        at_once=at_once,
    )
    return plan, at_once


def _examples(pairs: Sequence[Pair]) -> list[dict[str, Any]]:
    """Tokenised pairs of these lengths, whose answers differ in their first token."""
    return [
        {
            "prompt_ids": [1] * prompt,
            "chosen_ids": [2] * chosen,
            "rejected_ids": [3] * rejected,
        }
        for prompt, chosen, rejected in pairs
    ]


def _materialise(model: torch.nn.Module) -> None:
    """Replace the model's tensors by those of the active mode, on the CPU; ties stay ties."""
    replaced: dict[int, Any] = {}
    for module in model.modules():
        for group in (module._parameters, module._buffers):
            for name, tensor in group.items():
                if tensor is None:
                    continue
                if id(tensor) not in replaced:
                    new = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
                    if isinstance(tensor, torch.nn.Parameter):
                        new = torch.nn.Parameter(new, requires_grad=tensor.requires_grad)
                    replaced[id(tensor)] = new
                group[name] = replaced[id(tensor)]


def _known(model: Any, options: StepOptions, tracker: _Tracker) -> list[Known]:
    weights: dict[int, Known] = {}
    trained: dict[int, int] = {}
    head = unwrap(model).get_output_embeddings()
    head_ids = {id(p) for p in head.parameters()}
    for name, tensor in itertools.chain(model.named_parameters(), model.named_buffers()):
        address = tracker.address(tensor, is_new=False)
        size = tensor.untyped_storage().nbytes()
        if tensor.requires_grad:
            trained[address] = size
        elif options.method == "qlora" and tensor.dim() == 2 and "embed" not in name:
            if id(tensor) not in head_ids:
                size = int(tensor.numel() * QUANTISED_BYTES)
        weights.setdefault(address, Known(address, size, "weights"))
    known = list(weights.values())
    # AdamW's two states of each trained weight, in its dtype.
    known += [Known(-address, 2 * size, "optimiser") for address, size in trained.items()]
    if options.reference == "model":
        total = sum(block.size for block in weights.values())
        known.append(Known(-(10**12), total, "reference"))
    return known


Parts = dict[tuple[str, int], dict[str, int]]  # as `part_peaks` has them


def extrapolated(few: Parts, more: Parts, factor: float) -> Parts:
    """few + factor (more - few): the parts' bytes are linear in layers and in pairs."""
    zero: dict[str, int] = {}
    return {
        part: {
            name: max(0, round(size + factor * (more.get(part, zero).get(name, size) - size)))
            for name, size in components.items()
        }
        for part, components in few.items()
    }


def highest(parts: Parts) -> Account:
    """The account of the part with the most bytes."""
    part = max(parts, key=lambda part: sum(parts[part].values()))
    return Account(sum(parts[part].values()), part[0], parts[part])


def simulate_parts(config: Any, pairs: Sequence[Pair], options: StepOptions) -> Parts:
    """The components at the peak of each part of a step; arguments as in `simulate_step`.

    Many equal layers cost the same each, so that a deep model is simulated with few.
    """
    layers = config.get_text_config().num_hidden_layers
    few, more = LAYERS
    if layers <= more:
        return part_peaks(*_events(config, pairs, options))
    small, large = (
        part_peaks(*_events(with_layers(config, n), pairs, options)) for n in (few, more)
    )
    return extrapolated(small, large, (layers - few) / (more - few))


def simulate_step(config: Any, pairs: Sequence[Pair], options: StepOptions) -> Account:
    """The memory of a step on these pairs.

    Args:
        config: a transformers config of a causal model.
        pairs: the tokens of prompt, chosen and rejected answer of each pair of the micro-batch.
        options: how it is trained.

    Returns:
        The `Account`, in bytes of tensors, without a timeline.

    Raises:
        ValueError: an unknown method, or a config whose model cannot be simulated.
    """
    if options.method not in METHODS:
        raise ValueError(f"method: got {options.method!r}, expected {', '.join(METHODS)}")
    check_config(config)
    return highest(simulate_parts(config, pairs, options))


@contextlib.contextmanager
def _grouped_products() -> Iterator[None]:
    """Gives experts transformers' own grouped product: torch's has shapes of bf16 alone."""
    from transformers.integrations import moe

    before = getattr(moe, "_can_use_grouped_mm", None)
    if before is not None:
        moe._can_use_grouped_mm = lambda *args: False
    try:
        yield
    finally:
        if before is not None:
            moe._can_use_grouped_mm = before


def _events(
    config: Any, pairs: Sequence[Pair], options: StepOptions
) -> tuple[list[Known], list[Event], list[set[int]]]:
    sharing = options.prefix_sharing and options.head == "fastpref"
    collator: Any = SegmentCollator(0, None) if sharing else PreferenceCollator(0, None)
    batch = collator(_examples(pairs))
    tracker = _Tracker()
    with silent():
        model = build_model(config, options)
    with silent(), _grouped_products(), FakeTensorMode(allow_non_fake_inputs=True) as fake, tracker:
        _materialise(model)
        known = _known(model, options, tracker)
        if options.accumulates:
            known += _gradients(model, tracker)
        tracker.events.clear()
        inputs = {k: fake.from_tensor(v) if isinstance(v, Tensor) else v for k, v in batch.items()}
        try:
            gradients = _run(model, inputs, options, tracker, sharing)
        except Exception as error:  # of the model's own code, on tensors without data
            raise ValueError(
                f"config: a step of the type {config.model_type!r} cannot be simulated "
                f"({type(error).__name__}: {first_line(error)})"
            ) from error
    return known, list(tracker.events), gradients


def _gradients(model: Any, tracker: _Tracker) -> list[Known]:
    """Gives each trained weight the gradient of an earlier micro-batch."""
    known = []
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.empty_like(parameter)
            address = tracker.address(parameter.grad, is_new=False)
            size = parameter.grad.untyped_storage().nbytes()
            known.append(Known(address, size, "gradients"))
    return known


def _run(
    model: Any, batch: dict[str, Any], options: StepOptions, tracker: _Tracker, sharing: bool
) -> list[set[int]]:
    base = backbone(unwrap(model))
    weight = unwrap(model).get_output_embeddings().weight
    rows: Any = contextlib.nullcontext()
    if sharing:
        rows = SegmentAttention(model, checked=True).rows_of(batch)
    autocast: Any = contextlib.nullcontext()
    if options.bf16:
        autocast = torch.autocast(
            "cpu", torch.bfloat16, cache_enabled=not options.gradient_checkpointing
        )
    with rows:
        tracker.mark("body forward")
        inputs = model_inputs(batch)
        inputs.pop("logits_to_keep", None)
        with autocast:
            hidden = base(**inputs, use_cache=False)[0]
            hidden.register_hook(lambda grad: tracker.mark("body backward"))
            tracker.mark("head")
            loss = _loss(hidden, weight, batch, options)
        del hidden, inputs
        loss.backward()
    del loss
    trained = [p for p in model.parameters() if p.grad is not None]
    addresses = {tracker.address(p.grad) for p in trained}
    tracker.mark(GRADIENTS)
    tracker.mark("optimiser")
    return [addresses]


def _loss(hidden: Tensor, weight: Tensor, batch: dict[str, Any], options: StepOptions) -> Tensor:
    if options.head == "eager":
        labels = batch["labels"]
        logits = torch.nn.functional.linear(hidden, weight)
        logps = torch.log_softmax(logits.float(), -1)
        del logits
        counted = labels != -100
        label_logps = logps.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
        return (label_logps * counted).sum()
    index = batch["hidden_indices"] if "hidden_indices" in batch else batch["token_indices"]
    dtype = torch.bfloat16 if options.bf16 else hidden.dtype
    flat = hidden.reshape(-1, hidden.shape[-1]).to(dtype).index_select(0, index)
    vocab_size, hidden_size = weight.shape
    plan, at_once = step_head(
        int(index.shape[0]), hidden_size, vocab_size, weight.requires_grad, options
    )
    return _PlannedHead.apply(flat, weight.to(dtype), plan, at_once)
