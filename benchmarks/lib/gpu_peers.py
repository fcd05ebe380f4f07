"""Every way to compute the DPO loss of a head on a GPU: fastpref's and the peers'.

As in peers.py, each gets the same inputs, labels and reference log-probs. fastpref is called as its
trainer calls it, with the indices of the labelled tokens; the peers get their tokens compacted, and
those without a loss of their own an ordinary torch DPO loss.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import peers
from .problem import BETA, HeadProblem, dpo_loss

MODES = ("trainable", "frozen", "forward-only")
# The products with the fewest FLOPs: 6NHV, 4NHV and 2NHV.
PRODUCTS = {"trainable": 3, "frozen": 2, "forward-only": 1}


class Output(NamedTuple):
    """loss []; sums [2P], or [P] of the chosen and [P] of the rejected; token_logps [2P, T]. None
    where a side does not give them."""

    loss: Tensor
    sums: Tensor | tuple[Tensor, Tensor] | None = None
    token_logps: Tensor | None = None


@dataclass(frozen=True)
class Side:
    """What one implementation offers.

    loss: the loss with a graph. logps: the token log-probs [2P, T], with a graph too; None where
    they are not to be had. forward: what a pass without gradients runs; default: logps.
    """

    loss: Callable[[HeadProblem], Output]
    logps: Callable[[HeadProblem], Tensor] | None = None
    forward: Callable[[HeadProblem], object] | None = None


@dataclass(frozen=True)
class Entry:
    """One line of the table. make: imports what it needs; raises where it cannot run.

    products: how many of the head's products it computes to train it, 3 being the fewest. other:
    it computes another function, so it has no errors and no part in any target.
    """

    name: str
    make: Callable[[], Side]
    note: str = ""
    backend: str | None = None
    precision: str | None = None
    options: tuple[tuple[str, Any], ...] = ()
    products: int | None = None
    compiled: bool = False
    softcap: bool = True
    with_reference: bool = True
    other: bool = False
    modes: tuple[str, ...] = MODES

    @property
    def ours(self) -> bool:
        return self.backend is not None


def step(side: Side, mode: str) -> Callable[[HeadProblem], Any]:
    """The call that is timed. It gives its Output, or what `forward` gives."""
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


# ---- fastpref ----------------------------------------------------------------------------------


def _fastpref(backend: str, options: dict[str, Any]) -> Side:
    import fastpref
    from fastpref import backends
    from fastpref.backends.tile import Transform

    module: Any = backends._MODULES[backend]
    indices: dict[int, Tensor] = {}
    kept: set[int] = set()

    def given(p: HeadProblem) -> dict[str, Any]:
        n = p.labels.numel()
        if n not in indices:
            indices[n] = torch.arange(n, device=p.labels.device)
        return dict(backend=backend, softcap=p.softcap, token_indices=indices[n], **options)

    def loss(p: HeadProblem) -> Output:
        if (
            options.get("fused") and p.weight.data_ptr() not in kept
        ):  # asked once, not in the timing
            if not module.keeps_logits(p.weight, Transform(1.0, p.softcap), ()):
                raise RuntimeError(f"the {backend} backend keeps no logits on this GPU")
            kept.add(p.weight.data_ptr())
        out = fastpref.linear_dpo_loss(
            p.hidden, p.weight, p.labels, p.ref_logps, beta=BETA, **given(p)
        )
        return Output(out.loss, (out.chosen_logps, out.rejected_logps))

    def logps(p: HeadProblem) -> Tensor:
        return fastpref.linear_token_logps(p.hidden, p.weight, p.labels, **given(p))

    if options.get("fused") and not hasattr(module, "linear_logps"):
        raise RuntimeError(f"the {backend} backend has no pass in one kernel")
    return Side(loss, logps)


def ours(mode: str, backends: list[str], precisions: list[str]) -> list[Entry]:
    """fastpref's strategies for a mode. Where a backend's product keeps its logits in a pass with
    gradients, too, that is measured beside the tiles; it is always exact."""
    from fastpref import backends as known

    given: dict[str, list[tuple[str, dict[str, Any]]]] = {
        "trainable": [("stash", {"strategy": "stash"}), ("recompute", {"strategy": "recompute"})],
        "frozen": [("", {})],
        "forward-only": [("tiles", {"fused": False}), ("one kernel", {"fused": True})],
    }
    out = []
    for backend in backends:
        for precision in precisions:
            ways = list(given[mode])
            if mode != "forward-only" and hasattr(known._MODULES[backend], "linear_grad"):
                label, options = ways[0]
                tiles = (f"{label}, tiles".removeprefix(", "), {**options, "fused": False})
                ways = [(label, {**options, "fused": True}) for label, options in ways]
                ways = [ways[0], tiles, *ways[1:]] if precision == "exact" else [tiles]
            for label, options in ways:
                if precision == "fast" and label in ("recompute", "one kernel"):
                    continue  # nothing that exact does not show; one kernel is always exact
                options = {"precision": precision, **options}
                name = f"fastpref {backend} {precision}" + (f", {label}" if label else "")
                out.append(
                    Entry(
                        name,
                        lambda b=backend, o=options: _fastpref(b, o),
                        backend=backend,
                        precision=precision,
                        options=tuple(options.items()),
                        products=4 if label == "recompute" else 3,
                    )
                )
    return out


# ---- peers -------------------------------------------------------------------------------------


def capped(logits: Tensor, softcap: float | None) -> Tensor:
    """As transformers does it in Gemma 2: in the logits' own dtype."""
    return logits if softcap is None else torch.tanh(logits / softcap) * softcap


def _full(hidden: Tensor, weight: Tensor, labels: Tensor, softcap: float | None) -> Tensor:
    logits = capped(hidden @ weight.t(), softcap)
    return logits.float().log_softmax(-1).gather(-1, labels[..., None])[..., 0]


def _eager() -> Side:
    return _from_logps(lambda p: _full(p.hidden, p.weight, p.labels, p.softcap))


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
        # It marks the labels it is given as dynamic, for which others would compile again.
        value, (chosen, rejected, *_) = head(p.weight, p.hidden, p.labels.detach())
        return Output(value, (chosen, rejected))

    return Side(loss)


def _liger_scaled() -> Side:
    from liger_kernel.ops import LigerFusedLinearScaledCrossEntropyFunction as scaled

    def logps(p: HeadProblem) -> Tensor:
        rows, labels = _rows(p)
        return -scaled.apply(rows, p.weight, labels).view(p.labels.shape)

    return _from_logps(logps)


def _cce(**options: Any) -> Side:
    from cut_cross_entropy import linear_cross_entropy

    def logps(p: HeadProblem) -> Tensor:
        rows, labels = _rows(p)
        losses = linear_cross_entropy(
            rows, p.weight, labels, softcap=p.softcap, reduction="none", impl="cce", **options
        )
        return -losses.view(p.labels.shape)

    return _from_logps(logps)


def _torch_lce() -> Side:
    from torch.nn.functional import linear_cross_entropy

    def logps(p: HeadProblem) -> Tensor:
        rows, labels = _rows(p)
        losses = linear_cross_entropy(rows, p.weight, labels, reduction="none")
        return -losses.view(p.labels.shape)

    return _from_logps(logps)


def _quack() -> Side:
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    def loss(p: HeadProblem) -> Output:
        rows, labels = _rows(p)
        value = chunked_linear_cross_entropy(rows, p.weight, labels, reduction="sum")
        return Output(value, None)

    return Side(loss, forward=loss)


EAGER, COMPILED, TRL = peers.EAGER, peers.COMPILED, peers.TRL
LIGER_SCALED, CCE = "Liger scaled CE", "CCE"
# The most important first: where time is short, the last ones are left out.
PEERS = (
    Entry(EAGER, _eager, "softmax in float32", products=3),
    Entry(
        TRL,
        _trl,
        "trl.kernels.ChunkedLogProbFunction, log-probs only, TRL's own tile sizes",
        products=4,
    ),
    Entry(
        LIGER_SCALED,
        _liger_scaled,
        "LigerFusedLinearScaledCrossEntropyFunction: log-probs per token, no softcap",
        products=4,
        softcap=False,
    ),
    Entry(
        CCE,
        lambda: _cce(),
        "cut_cross_entropy.linear_cross_entropy, impl='cce', its own filter of small gradients",
        products=4,
    ),
    Entry(
        "QuACK",
        _quack,
        "chunked_linear_cross_entropy, reduction='sum': one coefficient for all tokens, so it "
        "computes no DPO loss; no softcap",
        products=3,
        softcap=False,
        other=True,
    ),
    Entry(
        "torch LCE",
        _torch_lce,
        "torch.nn.functional.linear_cross_entropy, reduction='none', its defaults; no softcap",
        products=4,
        softcap=False,
    ),
    Entry(COMPILED, _compiled, "the eager function, static shapes", products=3, compiled=True),
    Entry(
        peers.LIGER,
        _liger_dpo,
        "LigerFusedLinearDPOLoss(compiled=True); it takes no reference log-probs, so it runs with "
        "use_ref_model=False and is spared the reference's product; no softcap, and its forward "
        "pass computes the gradients",
        products=3,
        compiled=True,
        softcap=False,
        with_reference=False,
        modes=("trainable", "frozen"),
    ),
    Entry(
        "CCE, unfiltered",
        lambda: _cce(filter_eps=None),
        "the same with filter_eps=None: all of the gradient",
        products=4,
        modes=("trainable", "frozen"),
    ),
)


def entries(
    mode: str, backends: list[str], precisions: list[str], names: list[str] | None
) -> list[Entry]:
    """What is measured in a mode. names: of peers, beside eager; None: all of them."""
    wanted = [e.name for e in PEERS] if names is None else [EAGER, *names]
    chosen = [e for e in PEERS if e.name in wanted and mode in e.modes]
    return [*ours(mode, backends, precisions), *chosen]
