"""Output heads whose weight is sharded among processes.

FSDP2 gathers a module's weights before the module's forward. `head_fn` reads the output layer's
weight without calling the layer, so `gather_head` does what the layer's forward would have done.
The data flow of a training step:

    body's forward       each block is gathered, and freed after it
    gather_head          one all-gather of W [V, H], unless it is there already
    head_fn              u, and D where it is stashed: all that the backward pass needs of W
    backward             dW from D; FSDP2 reduce-scatters it, and frees W, at the end

The reference's log-probs of an adapter's base model come from the same gathered W.

DeepSpeed's ZeRO-3 gathers a module's weights in hooks around the module's own forward, and once
more for its backward pass, after which it takes the gradients and divides them. `within_layer`
calls the layer, with head_fn in the place of its forward, so that these hooks run:

    layer's hooks        W is gathered
    head_fn              reads W
    layer's hooks        W is freed; before the backward pass it is gathered again
    backward             dW of W's whole shape, which ZeRO-3 reduces and divides

Tensor parallelism divides W for good: `read_head` then returns it as a VocabParallelWeight.

`vocab_parallel_weight` leaves FSDP2's W where it is instead, and moves tokens, as
fastpref.logps.vocab_parallel has it. This pays where all processes together have fewer labelled
tokens than the vocabulary has entries.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from fastpref.logps.forward import TokenStats
from fastpref.logps.linear import linear_token_logps
from fastpref.logps.vocab_parallel import VocabParallelWeight


def is_sharded(weight: Any) -> bool:
    """Whether a weight is a DTensor."""
    return hasattr(weight, "device_mesh") and hasattr(weight, "placements")


def is_tensor_parallel(weight: Any) -> bool:
    """Whether a weight's rows are divided by tensor parallelism: a DTensor on a mesh "tp"."""
    if not is_sharded(weight) or weight.device_mesh.mesh_dim_names != ("tp",):
        return False
    return weight.dim() == 2 and all(p.is_shard(0) for p in weight.placements)


def local_rows(weight: Any) -> Any:
    """A bias [V] as `linear_*` takes it: this process's rows of a DTensor; else as it is."""
    return weight.to_local() if is_sharded(weight) else weight


def gather_head(layer: nn.Module) -> None:
    """Gather the weights of an output layer that FSDP2 shards by itself; else do nothing.

    They stay until the backward pass frees them. Called within the forward of the model.

    Args:
        layer: what get_output_embeddings() returns.
    """
    for module in layer.modules():
        if hasattr(module, "unshard") and any(map(is_sharded, module.parameters())):
            module.unshard()  # type: ignore[operator]


def is_partitioned(parameter: Any) -> bool:
    """Whether ZeRO-3 divides a parameter among processes, gathered at the moment or not."""
    return hasattr(parameter, "ds_id")


def needs_hooks(layer: nn.Module) -> bool:
    """Whether an output layer has weights that ZeRO-3's hooks gather; then see `within_layer`."""
    return any(is_partitioned(parameter) for parameter in layer.parameters())


def within_layer(layer: nn.Module, function: Callable[[Tensor], Any], hidden: Tensor) -> Any:
    """function(hidden), as the forward of an output layer whose weights ZeRO-3 divides.

    With an adapter on it, the forward of each module that holds weights calls the next one's, so
    that all of them are gathered while the function runs.

    Args:
        layer: what get_output_embeddings() returns.
        function: returns tensors, also in dicts and tuples.
    """
    for module in layer.modules():
        if any(True for _ in module.parameters(recurse=False)):
            function = partial(_within, module, function)
    return function(hidden)


def _within(module: nn.Module, function: Callable[[Tensor], Any], hidden: Tensor) -> Any:
    structure: list[Any] = []

    def forward(x: Tensor) -> tuple[Any, ...]:  # ZeRO-3's hooks know tuples of tensors
        leaves, spec = tree_flatten(function(x))
        structure.append(spec)
        return tuple(leaves)

    replaced = vars(module).get("forward")  # where somebody has replaced the class's
    module.forward = forward  # type: ignore[method-assign]
    try:
        leaves = module(hidden)
    finally:
        del module.forward
        if replaced is not None:
            module.forward = replaced
    return tree_unflatten(leaves, structure[0])


def vocab_parallel_weight(
    weight: Tensor, *, gathers_tokens: bool, mean_gradient: bool | None = None
) -> VocabParallelWeight:
    """A head's DTensor as the argument `weight` of the `linear_*` functions, without gathering it.

    Gradients arrive in the DTensor's grad, as those of any other use of it.

    Args:
        weight: a DTensor [V, H] on a mesh of one dimension with the placement Shard(0), as FSDP2
            and the column-wise style of tensor parallelism have it. Processes may have rows of
            different number, or none.
        gathers_tokens: False if all processes have the same tokens (tensor parallelism), True if
            each has its own (FSDP2).
        mean_gradient: as in `VocabParallelWeight`; by default gathers_tokens, as FSDP2 has it.

    Raises:
        ValueError: no such DTensor.
    """
    shown = f"{type(weight).__name__} of shape {tuple(weight.shape)}"
    if not is_sharded(weight):
        raise ValueError(f"weight: got a {shown}, expected a DTensor with the placement Shard(0)")
    from torch.distributed.tensor import DTensor, Shard
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    assert isinstance(weight, DTensor)
    mesh, placements = weight.device_mesh, weight.placements
    if weight.dim() != 2 or len(placements) != 1 or placements[0] != Shard(0):
        raise ValueError(
            f"weight: got a {shown} with placements {placements}, expected [V, H] with the "
            "placement Shard(0) on a mesh of one dimension"
        )
    _, (start, _) = compute_local_shape_and_global_offset(weight.shape, mesh, placements)
    local, size = weight.to_local(), weight.shape[0]
    return VocabParallelWeight(
        local,
        min(start, size - local.shape[0]),
        size,
        mesh.get_group(),
        gathers_tokens,
        gathers_tokens if mean_gradient is None else mean_gradient,
    )


def vocab_parallel_token_logps(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    *,
    vocab_start: int,
    vocab_size: int,
    group: Any = None,
    **options: Any,
) -> Tensor | TokenStats:
    """`linear_token_logps` by processes that each have some rows of the head.

    All processes of the group call it with the same hidden states and labels, and get the same
    results and gradients of hidden, to the last bit.

    Args:
        hidden: [..., H]. labels: [...] int64 in [0, V).
        weight, bias: [v, H] and [v] or None, the rows [vocab_start, vocab_start + v) of the head;
            v may be 0.
        vocab_start: the first row of this process.
        vocab_size: V.
        group: the process group; None is the default group.
        options: those of `linear_token_logps`; lora_B and dora_scale are rows of this process.

    Returns:
        As `linear_token_logps`.

    Raises:
        ValueError: as `linear_token_logps`; fused=True, precision="fast" or a tolerance of
            gradients; rows of the processes that are not [0, V) together.
    """
    shard = VocabParallelWeight(weight, vocab_start, vocab_size, group)
    return linear_token_logps(hidden, shard, labels, bias, **options)
