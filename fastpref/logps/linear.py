"""`linear_token_logps`: token log-probabilities from hidden states and the head."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastpref.logps.checks import (
    adapter_tensors,
    check_adapter,
    check_extras,
    check_head,
    check_labels,
)
from fastpref.logps.compile import CompiledLogps
from fastpref.logps.first_order import check_transforms
from fastpref.logps.forward import HeadTensors, TokenStats
from fastpref.logps.options import HeadOptions
from fastpref.logps.prepared import PreparedLogps, adjacent, compact
from fastpref.logps.vocab_parallel import VocabParallelWeight, check_vocab_parallel
from fastpref.validation import autocasts, cached_options, is_traced


def linear_token_logps(
    hidden: Tensor,
    weight: Tensor | VocabParallelWeight,
    labels: Tensor,
    bias: Tensor | None = None,
    *,
    scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    ignore_index: int = -100,
    extras: Sequence[str] = (),
    strategy: str = "auto",
    memory_budget: int | None = None,
    precision: str = "exact",
    fused: bool | None = None,
    backend: str | None = None,
    gradient_tolerance: float | None = None,
    head_gradient_tolerance: float | None = None,
    gradient_seed: int = 0,
    token_indices: Tensor | None = None,
    lora_hidden: Tensor | None = None,
    lora_B: Tensor | None = None,
    dora_scale: Tensor | None = None,
    low_rank: tuple[Tensor, Tensor] | None = None,
    weight_scale: Tensor | None = None,
) -> Tensor | TokenStats:
    """Log-probability of each label under the head, without the logits.

    The logits are z = softcap * tanh(scale * (hidden W^T + bias) / softcap) / temperature and the
    result is z[label] - logsumexp(z). Tokens whose label is ignored are dropped before the first
    product, and the gradients are formed as in docs/algorithm.md: the forward pass computes
    u = d logp / d hidden, so that the backward pass of any loss is a scaling of u and one product.

    Args:
        hidden: [..., H] or [N, H], float64, float32, bfloat16 or float16; any strides. Under
            autocast it is cast to the autocast dtype, as `F.linear` would.
        weight: [V, H], in hidden's dtype (or float32 under autocast); or a `VocabParallelWeight`,
            the rows of this process where several share the vocabulary.
        labels: [...] int64, aligned with hidden: labels[t] is predicted from hidden[t].
        bias: [V] or None.
        scale, softcap, temperature: the logits' transform.
        ignore_index: the label of positions that do not count.
        extras: of "entropy" (nats, differentiable), "mean_logit", "is_top1", "log_sum_sq_probs";
            at no extra product.
        strategy, memory_budget (bytes): see `fastpref.plan_head`, which chooses. A pass without
            gradients takes the kernels of the same call with gradients, so that a policy and its
            reference agree to the last bit; strategy="forward-only" takes the fastest ones.
        precision: "exact" keeps the logits of 16-bit inputs in fp32; "fast" rounds them to the
            inputs' dtype, all but the label's, which is exact there and in the normaliser.
        fused: whether to take the backend's logit-free product, whose memory is that of D with
            gradients and none of size N x V without. None: where it is expected to be faster.
            True: a ValueError says why, where it cannot run. False: tiles of logits.
        backend: "native", "cuda", "triton", "eager" or None for the fastest that works.
        gradient_tolerance: the relative root mean square error that u = d logp / d hidden may have,
            such as 1.5e-3, which rounding D to bf16 costs. u is then computed from the columns
            of D that matter and a few that are drawn at random, so that its mean is exact
            (docs/columns.md). Log-probs are not affected. None: exact.
        head_gradient_tolerance: the same for the gradients of weight, bias and lora_B, which stay
            exact with None, also when gradient_tolerance is given. Adam gives each element a step
            of the same size: with this option rows of rare tokens, whose gradients are
            tiny, move by the draws rather than by their gradients. SGD's steps are
            proportional to the gradients, so it is not affected.
        gradient_seed: another number draws other columns. The draws depend on it, on the labels and
            on the normalisers, so that the same call gives the same bits.
        token_indices: [N] int64 positions of the labelled tokens in the flattened labels, where the
            caller knows them; saves a synchronisation on a GPU.
        lora_hidden, lora_B: [..., r] and [V, r], a LoRA adapter on the head: lora_hidden lora_B^T
            is added to hidden W^T, and never merged with it. lora_hidden is
            scaling * dropout(hidden) A^T.
        dora_scale: [V], DoRA's factors on hidden W^T + lora_hidden lora_B^T, before the bias.
        low_rank, weight_scale: earlier names of (lora_hidden, lora_B) and of dora_scale.

    Returns:
        [...] float32 (float64 for float64 inputs), 0 where ignored and never above 0; with extras
        a `TokenStats` of such tensors.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit together, a label outside [0, V), an
            unknown option. RuntimeError: a forced backend that cannot run here.
        NotImplementedError: a second or a forward-mode derivative, batched gradients, a transform
            of torch.func, torch.jit.trace.
    """
    values = dict(
        scale=scale,
        softcap=softcap,
        temperature=temperature,
        ignore_index=ignore_index,
        strategy=strategy,
        memory_budget=memory_budget,
        precision=precision,
        fused=fused,
        backend=backend,
        gradient_tolerance=gradient_tolerance,
        head_gradient_tolerance=head_gradient_tolerance,
        gradient_seed=gradient_seed,
    )
    options = cached_options(HeadOptions, values)
    lora_hidden, lora_B, dora_scale = adapter_tensors(
        low_rank, weight_scale, lora_hidden, lora_B, dora_scale
    )
    head = HeadTensors(weight, bias, lora_B, dora_scale)  # type: ignore[arg-type]
    call = prepare(hidden, head, labels, options, extras, token_indices, lora_hidden)
    out = call.spread(call.compute())
    return out if extras else out.logps


def prepare(
    hidden: Tensor,  # [..., H]
    head: HeadTensors,
    labels: Tensor,  # [...]
    options: HeadOptions,
    extras: Sequence[str] = (),
    token_indices: Tensor | None = None,  # [N]
    lora_hidden: Tensor | None = None,  # [..., r]
    prefix: str = "",
) -> PreparedLogps | CompiledLogps:
    """The part of `linear_token_logps` that comes before the first product.

    prefix goes before the names hidden, weight and bias in the messages of errors.
    """
    check_transforms()
    extras = check_extras(extras)
    parallel = head.weight if isinstance(head.weight, VocabParallelWeight) else None
    if parallel is not None:
        check_vocab_parallel(options)
        head = head._replace(weight=parallel.local)
    check_head(hidden, head.weight, head.bias, prefix, in_parts=parallel is not None)
    check_adapter(hidden, head, lora_hidden)
    hidden = _autocast(hidden)
    where = f"{prefix}hidden without its last dimension"
    check_labels(labels, hidden.shape[:-1], where, hidden.device)
    enabled = torch.is_grad_enabled()
    inputs_grad = hidden.requires_grad or (lora_hidden is not None and lora_hidden.requires_grad)
    head_grad = any(t is not None and t.requires_grad for t in head)
    grads = enabled and inputs_grad, enabled and head_grad
    rows = adjacent(_matrix(hidden))
    if lora_hidden is not None:
        lora_hidden = adjacent(_matrix(lora_hidden.to(hidden.dtype)))
    arguments = rows, lora_hidden, head, labels, options, extras, token_indices, grads
    if is_traced(hidden, head.weight, labels):
        if parallel is not None:
            raise ValueError(
                "weight: got a VocabParallelWeight under torch.compile, which does not support it; "
                "expected the head outside of what is compiled"
            )
        return CompiledLogps(*arguments)
    return compact(*arguments, parallel)


def _matrix(t: Tensor) -> Tensor:
    """[..., H] as [N, H]."""
    # Without elements, a size of -1 could be any.
    return t.reshape(-1 if t.shape[-1] else t.shape[:-1].numel(), t.shape[-1])


def _autocast(hidden: Tensor) -> Tensor:
    """The hidden states in the dtype in which `F.linear` would multiply them."""
    kind = hidden.device.type
    if autocasts(kind) and hidden.dtype != torch.float64:
        return hidden.to(torch.get_autocast_dtype(kind))
    return hidden
