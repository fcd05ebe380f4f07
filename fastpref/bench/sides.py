"""Which sides a task compares: the package's own calls, other libraries and plain torch.

A side that cannot take part has the reason in its row: a table says why a figure is missing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any

import torch

from fastpref.bench import peers
from fastpref.bench.device import Device
from fastpref.bench.ours import entries
from fastpref.bench.peers import Entry
from fastpref.bench.problem import DTYPES, Shape
from fastpref.bench.runner import failure
from fastpref.logps.forward import HeadTensors
from fastpref.logps.options import HeadOptions
from fastpref.logps.prepared import plan_call

_ALWAYS = (peers.EAGER, peers.TRL)  # the speeds of other sides are relative to these


class Sides:
    """The sides that a request asks for, on one device.

    Args:
        backends: the package's backends to compare; empty for the one that it picks.
    """

    def __init__(self, device: Device, request: dict[str, Any], backends: list[Any]):
        self._device, self._request, self._backends = device, request, backends

    def rows(
        self, shape: Shape, task: dict[str, Any], no_time: Callable[[str], bool]
    ) -> Iterator[tuple[Entry, dict[str, Any]]]:
        """Each side with its row, which has the reason if the side cannot take part.

        no_time: tells, by name, whether no time is left for another library's side.
        """
        mode, excluded = task["mode"], task.get("excluded", {})
        for entry in self._listed(mode, task["dtype"]):
            options = dict(entry.options)
            row: dict[str, Any] = {
                "variant": entry.name,
                "ours": entry.ours,
                "backend": entry.backend,
                "strategy": options.get("strategy", mode) if entry.ours else None,
                "precision": options.get("precision"),
                "products": entry.products,
                "other_function": entry.other,
                "note": entry.note,
            }
            if entry.name in excluded:
                row["missing"] = excluded[entry.name]
            elif shape.softcap is not None and not entry.softcap:
                row["missing"] = "it has no softcap"
            elif entry.name not in _ALWAYS and not entry.ours and no_time(entry.name):
                row["missing"] = "left out: no time left"
                row["dropped"] = True
            elif entry.ours:
                try:
                    plan = self._plan(shape, mode, task["dtype"], options, entry.backend)
                    row["plan"] = plan
                except (ValueError, RuntimeError) as error:  # the call would raise it, too
                    row["missing"] = failure(error)
            yield entry, row

    def fuses(self, shape: Shape, dtype: str) -> bool:
        """Whether the package, by its own choice, computes a forward-only pass without logits."""
        fastest = {"strategy": "forward-only"} if self._device.like_gpu else {}
        return self._plan(shape, "forward-only", dtype, fastest)["logit_free"]

    def _listed(self, mode: str, dtype: str) -> list[Entry]:
        listed = entries(
            self._device,
            mode,
            DTYPES[dtype],
            backends=self._backends or [None],
            precisions=self._request["precision"],
            names=self._request["peers"],
            strategies=self._request.get("strategies"),
            tolerance=self._request.get("gradient_tolerance"),
        )
        only = self._request.get("only")
        return [e for e in listed if not only or any(text in e.name for text in only)]

    def _plan(
        self,
        shape: Shape,
        mode: str,
        dtype: str,
        options: dict[str, Any],
        backend: str | None = None,
    ) -> dict[str, Any]:
        """The plan of a call with these options, including the defaults of its backend."""
        row = torch.empty(1, shape.h, dtype=DTYPES[dtype], device=self._device.device)
        head = HeadTensors(row.expand(shape.v, -1))
        head_options = HeadOptions(softcap=shape.softcap, backend=backend, **options)
        grads = mode != "forward-only", mode == "trainable"
        return asdict(plan_call(row, head, shape.n, head_options, (), grads).plan)
