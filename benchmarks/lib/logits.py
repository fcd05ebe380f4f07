"""Ready bf16 logits [N, V] to token log-probs and back: fastpref's token_logps and the peers'
cross-entropies, forward and backward together, in bytes per second.

The least that has to move is counted, whatever a side moves: forward reads the logits, backward
reads them and writes their gradient, 6 bytes a logit.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .device import Gpu, PretendGpu, failure
from .parts import COPY, Pass, copy_pass
from .problem import HeadProblem

# logits [N, V] and labels [N] to the negative log-probs [N].
Side = Callable[[Tensor, Tensor], Tensor]
_MOST_BYTES = 2**31  # of the logits: as many rows as fit


def _ours(backend: str) -> Side:
    import fastpref

    return lambda x, y: -fastpref.token_logps(x, y, backend=backend, inplace_backward=True)


def _plain(logits: Tensor, labels: Tensor) -> Tensor:
    return torch.nn.functional.cross_entropy(logits.float(), labels, reduction="none")


def _liger() -> Side:
    from liger_kernel.ops.cross_entropy import LigerCrossEntropyFunction

    return lambda x, y: LigerCrossEntropyFunction.apply(x, y, None, -100, 0.0, 0.0, "none")[0]


def _flash_attention() -> Side:
    from flash_attn.ops.triton.cross_entropy import cross_entropy_loss

    return lambda x, y: cross_entropy_loss(x, y, inplace_backward=True)[0]


PEERS: dict[str, Callable[[], Side]] = {
    "eager": lambda: _plain,
    "torch.compile": lambda: torch.compile(_plain, dynamic=False),
    "Liger cross-entropy": _liger,
    "flash-attention cross-entropy": _flash_attention,
}


def passes(
    gpu: Gpu | PretendGpu, problem: HeadProblem, backends: list[str], excluded: dict[str, str]
) -> tuple[dict[str, Pass], list[dict[str, Any]]]:
    """The sides, and a copy; and those that cannot run, with the reason."""
    vocab, labels = problem.weight.shape[0], problem.labels.flatten()
    n = max(1, min(labels.shape[0], _MOST_BYTES // (2 * vocab)))
    labels = labels[:n].contiguous()
    source = (2 * torch.randn(n, vocab, device=gpu.device)).bfloat16()
    coef = torch.rand(n, device=gpu.device)
    sides = {name: (make, True) for name, make in PEERS.items()}
    ours = {f"fastpref {name}": (lambda name=name: _ours(name), False) for name in backends}
    out: dict[str, Pass] = {}
    missing = []
    for name, (make, peer) in {**ours, **sides}.items():
        about = {"backend": name, "precision": "bf16", "kernel": "token_logps", "peer": peer}
        if name in excluded:
            missing.append({**about, "missing": excluded[name]})
            continue
        try:
            out[name] = Pass(about, 6 * n * vocab, _call(make(), source, labels, coef))
            out[name].call()  # compiles what is compiled
        except Exception as error:
            out.pop(name, None)
            missing.append({**about, "missing": failure(error)})
            gpu.check(failure(error))
    out[COPY] = copy_pass(gpu, source.numel())
    return out, missing


def _call(side: Side, source: Tensor, labels: Tensor, coef: Tensor) -> Callable[[], object]:
    """Several sides write their gradient over the logits, so each has a copy of its own. A call
    goes on from what the one before left, which takes as long."""
    leaf = source.clone().requires_grad_()

    def run() -> None:
        losses = side(leaf, labels)
        torch.autograd.grad(losses, leaf, coef.to(losses.dtype))

    return run
