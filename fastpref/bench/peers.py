"""The peers: the DPO loss of a head in plain torch and in other libraries.

fastpref's entries are in ours.py. All sides get the same inputs, labels and reference log-probs. On
a GPU fastpref is called as its trainer calls it, with the indices of the labelled tokens. Peers get
a tensor of labelled tokens only. A peer that has log-probs but no loss gets an ordinary DPO loss in
torch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastpref.bench.device import Device
from fastpref.bench.problem import BETA, HeadProblem, capped, dpo_loss

MODES = ("trainable", "frozen", "forward-only")


class Output(NamedTuple):
    """The results of a side.

    loss: []. sums: [2P], or [P] of the chosen and [P] of the rejected sequences. token_logps:
    [2P, T]. Results that a side does not return are None.
    """

    loss: Tensor
    sums: Tensor | tuple[Tensor, Tensor] | None = None
    token_logps: Tensor | None = None


@dataclass(frozen=True)
class Side:
    """The functions of one implementation.

    loss: the loss with a graph. logps: the token log-probs [2P, T] with a graph; None if the
    implementation does not return them. forward: the pass without gradients; default: logps.
    """

    loss: Callable[[HeadProblem], Output]
    logps: Callable[[HeadProblem], Tensor] | None = None
    forward: Callable[[HeadProblem], object] | None = None


@dataclass(frozen=True)
class Entry:
    """One line of the table: a side that is measured.

    make: imports what the side needs, and raises if it cannot run. options: of fastpref's call.
    products: GEMMs with the head in a step that trains it, at least 3. compiled: whether its second
    call compiles as well. softcap: whether it supports one. with_reference: whether its loss uses
    the reference log-probs. other: whether it computes another function, for which there are no
    errors and no targets. on: the kinds of devices. by_default: whether it is measured unless peers
    are named. package: the module that it imports.
    """

    name: str
    make: Callable[[], Side]
    note: str = ""
    ours: bool = False
    backend: str | None = None
    options: tuple[tuple[str, Any], ...] = ()
    products: int | None = None
    compiled: bool = False
    softcap: bool = True
    with_reference: bool = True
    other: bool = False
    on: tuple[str, ...] = ("cpu", "cuda")
    by_default: bool = True
    modes: tuple[str, ...] = MODES
    package: str = "torch"

    def installed(self) -> bool:
        return find_spec(self.package) is not None

    def runs_on(self, device: Device) -> bool:
        return ("cuda" if device.like_gpu else "cpu") in self.on


def step(side: Side, mode: str) -> Callable[[HeadProblem], Any]:
    """The call that is timed. It returns an `Output`, or in forward-only mode that of `forward`."""
    if mode == "forward-only":
        forward = side.forward or side.logps
        if forward is None:
            raise RuntimeError("it has no pass without gradients")

        def evaluate(p: HeadProblem) -> object:
            with torch.no_grad():
                return forward(p)

        return evaluate

    def train(p: HeadProblem) -> Output:
        out = side.loss(p)
        out.loss.backward()
        return out

    return train


def _from_logps(logps: Callable[[HeadProblem], Tensor]) -> Side:
    def loss(p: HeadProblem) -> Output:
        tokens = logps(p)
        sums = tokens.float().sum(1)
        return Output(dpo_loss(sums, p.ref_logps), sums, tokens)

    return Side(loss, logps)


def _full(hidden: Tensor, weight: Tensor, labels: Tensor, softcap: float | None) -> Tensor:
    logits = capped(hidden @ weight.t(), softcap)
    return logits.float().log_softmax(-1).gather(-1, labels[..., None])[..., 0]


def _eager() -> Side:
    return _from_logps(lambda p: _full(p.hidden, p.weight, p.labels, p.softcap))


def _narrow() -> Side:
    def logps(p: HeadProblem) -> Tensor:
        logits = capped(p.hidden @ p.weight.t(), p.softcap)
        return logits.log_softmax(-1).gather(-1, p.labels[..., None])[..., 0]

    return _from_logps(logps)


def _compiled() -> Side:
    full = torch.compile(_full, dynamic=False)
    return _from_logps(lambda p: full(p.hidden, p.weight, p.labels, p.softcap))


def _rows(p: HeadProblem) -> tuple[Tensor, Tensor]:
    return p.hidden.reshape(-1, p.hidden.shape[-1]), p.labels.reshape(-1)


def _trl() -> Side:
    from trl.kernels import ChunkedLogProbFunction

    try:
        from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE as chunk
    except ImportError:  # the trainers need packages that the kernels do without
        chunk = 32768

    def logps(p: HeadProblem) -> Tensor:
        rows, labels = _rows(p)
        out = ChunkedLogProbFunction.apply(
            rows, p.weight, None, labels, 1.0, chunk, p.softcap, 1.0, ()
        )
        return out[0].view(p.labels.shape)

    return _from_logps(logps)


def _liger_dpo() -> Side:
    from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss

    head = LigerFusedLinearDPOLoss(beta=BETA, compiled=True, use_ref_model=False)

    def loss(p: HeadProblem) -> Output:
        # Liger marks its labels as dynamic. With a tensor of its own, no other peer compiles again.
        value, (chosen, rejected, *_) = head(p.weight, p.hidden, p.labels.detach())
        return Output(value, (chosen, rejected))

    return Side(loss)


def _liger_scaled() -> Side:
    from liger_kernel.ops import LigerFusedLinearScaledCrossEntropyFunction as scaled

    def logps(p: HeadProblem) -> Tensor:
        rows, labels = _rows(p)
        return -scaled.apply(rows, p.weight, labels).view(p.labels.shape)

    return _from_logps(logps)


def _cce(impl: str = "cce", **options: Any) -> Side:
    from cut_cross_entropy import linear_cross_entropy

    def logps(p: HeadProblem) -> Tensor:
        rows, labels = _rows(p)
        losses = linear_cross_entropy(
            rows, p.weight, labels, softcap=p.softcap, reduction="none", impl=impl, **options
        )
        return -losses.view(p.labels.shape)

    return _from_logps(logps)


def _torch_lce(chunks: bool = True) -> Side:
    """torch's linear_cross_entropy.

    chunks: whether a CPU takes chunks of 256 tokens, which are many times as fast there.
    """
    from torch.nn import LinearCrossEntropyOptions
    from torch.nn.functional import linear_cross_entropy

    few = LinearCrossEntropyOptions(
        chunking_method=None, batch_chunk_size=256, acc_policy="accurate"
    )

    def logps(p: HeadProblem) -> Tensor:
        rows, labels = _rows(p)
        options: dict[str, Any] = {"options": few} if chunks and not rows.is_cuda else {}
        losses = linear_cross_entropy(rows, p.weight, labels, reduction="none", **options)
        return -losses.view(p.labels.shape)

    return _from_logps(logps)


def _quack() -> Side:
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    def loss(p: HeadProblem) -> Output:
        rows, labels = _rows(p)
        value = chunked_linear_cross_entropy(rows, p.weight, labels, reduction="sum")
        return Output(value, None)

    return Side(loss, forward=loss)


EAGER, NARROW, TRL, LIGER = "eager", "eager bf16", "TRL chunked", "Liger DPO"
# The most important first: where time is short, the last ones are left out.
PEERS = (
    Entry(EAGER, _eager, "softmax in float32", products=3),
    Entry(NARROW, _narrow, "softmax in bf16, as in older trainers", products=3, on=("cpu",)),
    Entry(
        TRL,
        _trl,
        "trl.kernels.ChunkedLogProbFunction, log-probs only, TRL's own tile sizes",
        products=4,
        package="trl",
    ),
    Entry(
        "Liger scaled CE",
        _liger_scaled,
        "LigerFusedLinearScaledCrossEntropyFunction: log-probs per token, no softcap",
        products=4,
        softcap=False,
        on=("cuda",),
        package="liger_kernel",
    ),
    Entry(
        "CCE",
        lambda: _cce(),
        "cut_cross_entropy.linear_cross_entropy, impl='cce', its own filter of small gradients",
        products=4,
        on=("cuda",),
        package="cut_cross_entropy",
    ),
    Entry(
        "QuACK",
        _quack,
        "chunked_linear_cross_entropy, reduction='sum': one coefficient for all tokens, so it "
        "computes no DPO loss; no softcap",
        products=3,
        softcap=False,
        other=True,
        on=("cuda",),
        package="quack",
    ),
    Entry(
        "torch LCE",
        _torch_lce,
        "torch.nn.functional.linear_cross_entropy, reduction='none'; its defaults on a GPU, chunks "
        "of 256 tokens on a CPU, where that is many times as fast; no softcap",
        products=4,
        softcap=False,
    ),
    Entry(
        "torch LCE default",
        lambda: _torch_lce(chunks=False),
        "the same with LinearCrossEntropyOptions(): chunks of a few tokens; runs only if named",
        products=4,
        softcap=False,
        on=("cpu",),
        by_default=False,
    ),
    Entry(
        "CCE torch_compile",
        lambda: _cce("torch_compile"),
        "cut_cross_entropy.linear_cross_entropy, impl='torch_compile'",
        products=4,
        compiled=True,
        on=("cpu",),
        package="cut_cross_entropy",
    ),
    Entry(
        "torch.compile", _compiled, "the eager function, static shapes", products=3, compiled=True
    ),
    Entry(
        LIGER,
        _liger_dpo,
        "LigerFusedLinearDPOLoss(compiled=True); it takes no reference log-probs, so it runs with "
        "use_ref_model=False and is spared the reference's product; no softcap, and its forward "
        "pass computes the gradients",
        products=3,
        compiled=True,
        softcap=False,
        with_reference=False,
        modes=("trainable", "frozen"),
        package="liger_kernel",
    ),
    Entry(
        "CCE, unfiltered",
        lambda: _cce(filter_eps=None),
        "the same with filter_eps=None: all of the gradient",
        products=4,
        modes=("trainable", "frozen"),
        on=("cuda",),
        package="cut_cross_entropy",
    ),
)
