"""One side of a profile, in a process of its own: `python -m fastpref.profiling.worker`.

The first step warms up; then come the timed steps, and at last one of the longest pairs whose
memory is watched: by torch's profiler and, on a CPU, by samples of resident memory.

    resident peak = libraries + blocks of tensors + what malloc has freed and keeps + the rest

"libraries" is what is resident before that step without known blocks and without what malloc keeps.
"""

from __future__ import annotations

import contextlib
import gc
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from transformers import TrainerCallback

from fastpref.heads.reading import unwrap
from fastpref.profiling.account import Account, account_of, known_blocks, read_profiler
from fastpref.profiling.gpu_memory import GpuMemory
from fastpref.profiling.phases import StepClock
from fastpref.profiling.processes import Say, serve
from fastpref.profiling.resident import Resident
from fastpref.profiling.sides import make_trainer


def all_tensors() -> Iterator[torch.Tensor]:
    """Every dense tensor of this process that has memory."""
    for value in gc.get_objects():
        kind = type(value)
        if issubclass(kind, FakeTensor):  # without memory
            continue
        if issubclass(kind, torch.Tensor) and value.layout is torch.strided:
            try:
                value.untyped_storage().data_ptr()
            except (NotImplementedError, RuntimeError):
                continue
            yield value


class MemoryStep(TrainerCallback):
    """Watches the memory of the last step."""

    def __init__(self, clock: StepClock, say: Say, snapshot: str | None = None) -> None:
        self.clock, self.say, self.snapshot = clock, say, snapshot
        self.found: dict[str, Any] = {}
        self.account: Account | None = None
        self.watching = contextlib.ExitStack()
        self._began = time.perf_counter()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._began = time.perf_counter()
        if state.global_step == state.max_steps - 1:
            self._start()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        seconds = time.perf_counter() - self._began
        self.say({"step": state.global_step, "of": state.max_steps, "seconds": seconds})
        if state.global_step == state.max_steps:
            self._finish()

    def _start(self) -> None:
        trainer = self.clock.trainer
        self.device = trainer.args.device
        gc.collect()
        model, ref_model = unwrap(trainer.model), getattr(trainer, "ref_model", None)
        state = [v for s in trainer.optimizer.state.values() for v in s.values()]
        groups = {
            "weights": [*model.parameters(), *model.buffers()],
            "gradients": [p.grad for p in model.parameters() if p.grad is not None],
            "optimiser": [v for v in state if isinstance(v, torch.Tensor)],
            "reference": [] if ref_model is None else [*ref_model.parameters()],
            "other": list(all_tensors()),
        }
        self.known = known_blocks(groups, self.device)
        del groups, state
        self.memory: GpuMemory | Resident
        if self.device.type == "cuda":
            self.memory = GpuMemory(self.snapshot)
        else:
            self.memory = Resident()
            self.before = self.memory.sample()
        self.watching.enter_context(self.memory)
        activity = torch.profiler.ProfilerActivity
        kinds = [activity.CPU] if self.device.type == "cpu" else [activity.CPU, activity.CUDA]
        self.profiler = torch.profiler.profile(activities=kinds, profile_memory=True)
        self.profiler.__enter__()
        self.clock.marking = True

    def _finish(self) -> None:
        self.clock.marking = False
        self.profiler.__exit__(None, None, None)
        self.watching.close()
        memory = self.memory
        peak: int | None = memory.peak
        outside: dict[str, int] = {}
        if isinstance(memory, Resident) and self.before is not None and memory.at_peak is not None:
            known = sum(block.size for block in self.known)
            libraries = self.before.resident - self.before.freed - known
            outside = {"malloc": memory.at_peak.freed, "libraries": max(libraries, 0)}
        events = read_profiler(self.profiler, self.device)
        self.account = account = account_of(self.known, events, self.clock.gradients)
        components = {**account.components, **outside}
        self.found = {
            "peak_bytes": peak,
            "tensor_bytes": account.peak_bytes,
            "peak_phase": account.peak_phase,
            "reserved_bytes": memory.reserved if isinstance(memory, GpuMemory) else None,
            "components": components,
            "unaccounted_bytes": None if peak is None else peak - sum(components.values()),
            "timeline": account.timeline,
        }


def profile_side(request: dict[str, Any], say: Say) -> dict[str, Any]:
    """Train as the request says; returns the memory and the seconds of the phases."""
    with tempfile.TemporaryDirectory(dir=request.get("folder")) as out:
        began = time.perf_counter()
        clock = StepClock()
        trainer = make_trainer(request["side"], request, request["rows"], out)
        setup = time.perf_counter() - began
        say({"stage": "training"})
        memory = MemoryStep(clock, say, request.get("snapshot"))
        clock.attach(trainer)
        trainer.add_callback(memory)
        with memory.watching:  # ends after an error as well, such as too little memory
            trainer.train()
    timed = clock.steps[1:-1] or clock.steps[:1]
    return {
        "setup_seconds": setup,
        "steps": timed,
        "longest_step_seconds": sum(clock.steps[-1].values()),
        **memory.found,
    }


def answer(request: dict[str, Any], say: Say) -> None:
    """What `serve` calls."""
    say({"result": profile_side(request, say)})


if __name__ == "__main__":
    serve(answer)
