"""fastpref's variants of the loss of a head, and the list of all sides that are measured."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastpref.bench import peers
from fastpref.bench.device import Device
from fastpref.bench.peers import Entry, Output, Side
from fastpref.bench.problem import BETA, HeadProblem


def _fastpref(backend: str | None, options: dict[str, Any]) -> Side:
    import fastpref
    from fastpref import backends
    from fastpref.backends.tile import Transform

    module: Any = backend and backends._MODULES[backend]
    indices: dict[int, Tensor] = {}
    checked: set[int] = set()

    def call_options(p: HeadProblem) -> dict[str, Any]:
        if backend is None:
            return dict(softcap=p.softcap, **options)
        n = p.labels.numel()
        if n not in indices:
            indices[n] = torch.arange(n, device=p.labels.device)
        return dict(backend=backend, softcap=p.softcap, token_indices=indices[n], **options)

    def check(p: HeadProblem) -> None:
        """Raise if the kernel cannot run. Each weight is checked once, before it is timed."""
        if p.weight.data_ptr() not in checked:
            reason = module.logit_free_reason(p.weight, Transform(1.0, p.softcap))
            if reason is not None:
                raise RuntimeError(f"the {backend} backend's logit-free product: {reason}")
            checked.add(p.weight.data_ptr())

    def loss(p: HeadProblem) -> Output:
        if options.get("fused"):
            check(p)
        out = fastpref.linear_dpo_loss(
            p.hidden, p.weight, p.labels, p.ref_logps, beta=BETA, **call_options(p)
        )
        return Output(out.loss, (out.chosen_logps, out.rejected_logps))

    def logps(p: HeadProblem) -> Tensor:
        out = fastpref.linear_token_logps(p.hidden, p.weight, p.labels, **call_options(p))
        assert isinstance(out, Tensor)
        return out

    if options.get("fused") and backend == "eager":
        raise RuntimeError(f"the {backend} backend has no pass in one kernel")
    return Side(loss, logps)


STRATEGIES = ("stash", "recompute")  # that are measured with a trainable head


def _variants(
    mode: str, backend: str | None, precision: str, strategies: Sequence[str] = STRATEGIES
) -> list[tuple[str, dict[str, Any]]]:
    """The label and the options of each of fastpref's variants for a mode.

    A backend is measured with tiles of logits, and with its logit-free product, which is always
    exact.
    """
    variants: list[tuple[str, dict[str, Any]]] = [("", {})]
    if mode == "trainable":
        variants = [(strategy, {"strategy": strategy}) for strategy in strategies]
    if backend is None:
        return variants
    if mode == "forward-only":
        variants = [
            ("tiles", {"fused": False}),
            ("one kernel", {"fused": True, "strategy": "forward-only"}),
        ]
    elif backend in ("cuda", "triton"):
        label, options = variants[0]
        tiles = (f"{label}, tiles".removeprefix(", "), {**options, "fused": False})
        variants = [(label, {**options, "fused": True}) for label, options in variants]
        variants = [variants[0], tiles, *variants[1:]] if precision == "exact" else [tiles]
    if precision == "fast":  # "exact" already shows what these two cost
        fewer = [variant for variant in variants if variant[0] not in ("recompute", "one kernel")]
        variants = fewer or variants
    return variants


def _by_columns(variants: list[tuple[str, dict[str, Any]]], tolerance: float) -> Any:
    """The first variant, with approximate gradients of the hidden states."""
    label, options = variants[0]
    name = f"{label}, tolerance {tolerance:g}".removeprefix(", ")
    return name, {**options, "gradient_tolerance": tolerance}


def ours(
    mode: str,
    backends: Sequence[str | None],
    precisions: list[str],
    strategies: Sequence[str] | None = None,
    tolerance: float | None = None,
) -> list[Entry]:
    """fastpref's entries.

    backends: None stands for the backend that fastpref picks. tolerance: a `gradient_tolerance`
    that is measured besides the exact gradients.
    """
    out = []
    for backend in backends:
        for precision in precisions:
            variants = _variants(mode, backend, precision, strategies or STRATEGIES)
            if tolerance is not None and mode != "forward-only":
                variants = [*variants, _by_columns(variants, tolerance)]
            for label, options in variants:
                options = {"precision": precision, **options}
                name = " ".join(word for word in ("fastpref", backend, precision) if word)
                entry = Entry(
                    name + (f", {label}" if label else ""),
                    functools.partial(_fastpref, backend, options),
                    ours=True,
                    backend=backend,
                    options=tuple(options.items()),
                    products=4 if options.get("strategy") == "recompute" else 3,
                )
                out.append(entry)
    return out


def known(device: Device) -> list[str]:
    return [e.name for e in peers.PEERS if e.runs_on(device)]


def entries(
    device: Device,
    mode: str,
    dtype: torch.dtype,
    *,
    backends: Sequence[str | None],
    precisions: list[str],
    names: list[str] | None = None,
    strategies: Sequence[str] | None = None,
    tolerance: float | None = None,
) -> list[Entry]:
    """The sides that are measured in a mode.

    names: the peers besides eager; None: those that are measured by default.
    """
    narrow = dtype in (torch.bfloat16, torch.float16)
    if not narrow:  # both precisions are the same
        precisions = precisions[:1]
    out = ours(mode, backends, precisions, strategies, tolerance)
    for e in peers.PEERS:
        named = e.by_default if names is None else e.name in [peers.EAGER, *names]
        if named and mode in e.modes and e.runs_on(device) and (narrow or e.name != peers.NARROW):
            out.append(e)
    return out
