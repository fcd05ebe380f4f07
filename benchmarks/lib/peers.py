"""Every way to compute the DPO loss of a head that is measured: fastpref's and the peers'.

Each variant is one function from a `HeadProblem` to the loss with its gradients, in the problem's
`grad` fields. All get the same inputs, labels and reference log-probs; each peer gives its token
log-probs and an ordinary torch DPO loss follows, but for Liger, which has a loss of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .problem import BETA, HeadProblem, dpo_loss


class Output(NamedTuple):
    """loss []; sums [2P]; token_logps [2P, T], or None where the variant does not return them."""

    loss: Tensor
    sums: Tensor
    token_logps: Tensor | None = None


@dataclass(frozen=True)
class Variant:
    """make: imports what it needs and returns the step; raises where it cannot run.

    compiled: it takes two calls to warm up, and a time to compile before that. with_reference:
    whether its loss uses the reference log-probs. logps: gives the token log-probs that the step
    does not return. by_default: measured unless peers are named.
    """

    name: str
    make: Callable[[], Callable[[HeadProblem], Output]]
    note: str = ""
    ours: bool = False
    strategy: str | None = None
    precision: str | None = None
    compiled: bool = False
    with_reference: bool = True
    by_default: bool = True
    logps: Callable[[HeadProblem], Tensor] | None = None


def _step(logps: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Callable[[HeadProblem], Output]:
    """A step around a function (hidden, weight, labels) -> token log-probs [2P, T]."""

    def step(p: HeadProblem) -> Output:
        tokens = logps(p.hidden, p.weight, p.labels)
        sums = tokens.float().sum(1)
        loss = dpo_loss(sums, p.ref_logps)
        loss.backward()
        return Output(loss.detach(), sums.detach(), tokens.detach())

    return step


# ---- fastpref ----------------------------------------------------------------------------------


def _fastpref(precision: str, strategy: str | None) -> Variant:
    import fastpref

    options: dict[str, Any] = dict(precision=precision, strategy=strategy or "auto")

    def step(p: HeadProblem) -> Output:
        out = fastpref.linear_dpo_loss(
            p.hidden, p.weight, p.labels, p.ref_logps, beta=BETA, **options
        )
        out.loss.backward()
        return Output(out.loss.detach(), torch.cat([out.chosen_logps, out.rejected_logps]))

    def logps(p: HeadProblem) -> Tensor:
        return fastpref.linear_token_logps(p.hidden, p.weight, p.labels, **options).detach()

    return Variant(
        name=f"fastpref {precision}" + (f", {strategy}" if strategy else ""),
        make=lambda: step,
        ours=True,
        strategy=strategy or "frozen",
        precision=precision,
        logps=logps,
    )


# ---- peers -------------------------------------------------------------------------------------


def _logits_logps(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    logits = hidden @ weight.t()
    return logits.float().log_softmax(-1).gather(-1, labels[..., None])[..., 0]


def _logits_logps_narrow(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    logits = hidden @ weight.t()
    return logits.log_softmax(-1).gather(-1, labels[..., None])[..., 0]


def _compiled_eager() -> Callable[[HeadProblem], Output]:
    return _step(torch.compile(_logits_logps, dynamic=False))


def _trl() -> Callable[[HeadProblem], Output]:
    from trl.kernels import ChunkedLogProbFunction
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE

    def logps(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        rows = hidden.reshape(-1, hidden.shape[-1])
        out = ChunkedLogProbFunction.apply(
            rows, weight, None, labels.reshape(-1), 1.0, _CHUNKED_LOGPROB_CHUNK_SIZE, None, 1.0, ()
        )
        return out[0].view(labels.shape)

    return _step(logps)


def _liger() -> Callable[[HeadProblem], Output]:
    from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss

    head = LigerFusedLinearDPOLoss(beta=BETA, compiled=True, use_ref_model=False)

    def step(p: HeadProblem) -> Output:
        loss, (chosen, rejected, *_) = head(p.weight, p.hidden, p.labels)
        loss.backward()
        return Output(loss.detach(), torch.cat([chosen, rejected]).detach())

    return step


def _torch_lce(**chosen: Any) -> Callable[[HeadProblem], Output]:
    from torch.nn import LinearCrossEntropyOptions
    from torch.nn.functional import linear_cross_entropy

    options = LinearCrossEntropyOptions(**chosen)

    def logps(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        rows = hidden.reshape(-1, hidden.shape[-1])
        losses = linear_cross_entropy(
            rows, weight, labels.reshape(-1), reduction="none", options=options
        )
        return -losses.view(labels.shape)

    return _step(logps)


def _cce() -> Callable[[HeadProblem], Output]:
    from cut_cross_entropy import linear_cross_entropy

    def logps(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        return -linear_cross_entropy(hidden, weight, labels, reduction="none", impl="torch_compile")

    return _step(logps)


EAGER = "eager"
COMPILED = "torch.compile"
TRL = "TRL chunked"
LIGER = "Liger DPO"

PEERS = (
    Variant(EAGER, lambda: _step(_logits_logps), "softmax in float32"),
    Variant(
        "eager bf16", lambda: _step(_logits_logps_narrow), "softmax in bf16, as in older trainers"
    ),
    Variant(COMPILED, _compiled_eager, "the eager function, static shapes", compiled=True),
    Variant(TRL, _trl, "trl.kernels.ChunkedLogProbFunction, log-probs only, its own tile sizes"),
    Variant(
        LIGER,
        _liger,
        "LigerFusedLinearDPOLoss(compiled=True); it takes no reference log-probs, so it runs with "
        "use_ref_model=False and is spared the reference's product",
        compiled=True,
        with_reference=False,
    ),
    Variant(
        "torch LCE",
        lambda: _torch_lce(chunking_method=None, batch_chunk_size=256, acc_policy="accurate"),
        "torch.nn.functional.linear_cross_entropy, reduction='none', chunks of 256 tokens, which "
        "on CPUs is many times as fast as its default",
    ),
    Variant(
        "torch LCE default",
        _torch_lce,
        "the same with LinearCrossEntropyOptions(): chunks of a few tokens; runs only if named",
        by_default=False,
    ),
    Variant(
        "CCE torch_compile",
        _cce,
        "cut_cross_entropy.linear_cross_entropy, impl='torch_compile'",
        compiled=True,
    ),
)


def variants(
    trainable: bool, dtype: torch.dtype, precisions: list[str], peers: list[str] | None = None
) -> list[Variant]:
    """What is measured with a trainable, or a frozen, head. peers: names; None: the usual ones."""
    if dtype not in (torch.bfloat16, torch.float16):
        precisions = precisions[:1]  # the two differ for 16-bit inputs only
    ours = [
        _fastpref(precision, strategy)
        for precision in precisions
        for strategy in (("stash", "recompute") if trainable else (None,))
    ]
    named = [v.name for v in PEERS if v.by_default] if peers is None else [EAGER, *peers]
    chosen = [v for v in PEERS if v.name in named]
    if dtype != torch.bfloat16:
        chosen = [v for v in chosen if v.name != "eager bf16"]
    return [*ours, *chosen]
