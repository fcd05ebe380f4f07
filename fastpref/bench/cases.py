"""What is measured, as a list of tasks for the worker.

shapes, or a model's config -> `Case`s -> scaled over tokens, vocabulary or threads -> tasks, of
     which each is a dictionary for worker.py
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from fastpref.backends.processor import bf16_is_fast
from fastpref.bench.device import TIGHT_MALLOC
from fastpref.bench.peers import MODES
from fastpref.bench.problem import DTYPES, check_tokens, parse_shape

PARTS = {
    "head": "the loss of a head",
    "rows": "passes over a tile of logits",
    "logits": "ready logits to log-probs and back",
    "overhead": "what a small call costs the host",
    "roofline": "the rates of a bare product and of a copy",
}
SCALES = ("tokens", "vocab", "threads")
_FACTORS = (0.25, 0.5, 1.0, 2.0)


@dataclass(frozen=True)
class Case:
    """A head that is measured.

    Attributes:
        shape: a text that `parse_shape` reads.
        dtypes: some of `DTYPES`.
        model: the name of the model whose head it is.
        threads: of torch and of fastpref; None: as many as torch has.
    """

    shape: str
    dtypes: tuple[str, ...] = ("bf16",)
    model: str = ""
    threads: int | None = None

    @property
    def name(self) -> str:
        """The case in the name of a task."""
        about = f" with {self.threads} threads" if self.threads else ""
        return f"{self.shape}{about}"


@dataclass
class BenchOptions:
    """The options of a run.

    Attributes:
        cases: what is measured, the most important first.
        device: "cpu", "cuda", or "pretend" for tests.
        modes: some of `MODES`.
        parts: some of `PARTS`.
        small: shapes of the part overhead.
        precision: "exact", "fast", or both.
        backends: fastpref's backends; None: all for a GPU, and on a CPU the one that it picks.
        strategies: of a trainable head, "stash" and "recompute"; None: both.
        gradient_tolerance: an error of approximate gradients, which are measured besides the exact
            ones; None: not measured.
        peers: names of the peers besides eager; None: those that are measured by default.
        only: of the part head only the sides whose name contains one of these texts are measured.
        repeats: calls of each side.
        seconds: seconds that one side may spend on its calls.
        keep_memory: whether freed memory is kept from call to call while times are measured on
            a CPU, as in a trainer's steps; otherwise each call has the page faults of new memory.
        budget: seconds of the whole run; None: no limit.
        patience: seconds after which a silent worker is stopped.
        memory: whether a second process measures the memory on a CPU.
        memory_last: whether memory is measured after the times of all cases, or after each case's.
        missing_peers: why peers that were asked for are not measured, by name.
    """

    cases: list[Case]
    device: str = "cpu"
    modes: list[str] = field(default_factory=lambda: ["trainable", "frozen"])
    parts: list[str] = field(default_factory=lambda: ["head"])
    small: list[str] = field(default_factory=list)
    precision: list[str] = field(default_factory=lambda: ["exact", "fast"])
    backends: list[str] | None = None
    strategies: list[str] | None = None
    gradient_tolerance: float | None = None
    peers: list[str] | None = None
    only: list[str] = field(default_factory=list)
    repeats: int = 7
    seconds: float = 4.0
    keep_memory: bool = False
    budget: float | None = None
    patience: float = 3600.0
    memory: bool = True
    memory_last: bool = False
    missing_peers: dict[str, str] = field(default_factory=dict)

    def request(self) -> dict[str, Any]:
        """The options that the worker gets, besides its tasks."""
        names = ["device", "modes", "precision", "backends", "strategies", "gradient_tolerance"]
        names += ["peers", "only", "repeats", "seconds", "keep_memory"]
        return {name: getattr(self, name) for name in names}


def make_cases(
    shapes: Sequence[str],
    *,
    tokens: int | None = None,
    dtypes: Sequence[str] | None = None,
    device: str = "cpu",
    trust_remote_code: bool = False,
) -> list[Case]:
    """The cases of shapes and of models.

    Args:
        shapes: each "N,H,V", "N,H,V,softcap", a letter of `SHAPES`, or the name or the folder of a
            model, whose config gives H, V, the softcap and the dtype. No weights are read.
        tokens: N of every head; None: 1024 for models, and a shape's own N.
        dtypes: by default a model's own, and for shapes the one that the device is fast at.

    Raises:
        ValueError: tokens that cannot be divided into pairs of sequences, or a config that cannot
            be read.
    """
    fast = "bf16" if device != "cpu" or bf16_is_fast("cpu") else "fp32"
    cases = []
    for text in shapes:
        try:
            shape, model, default_dtype = parse_shape(text), "", fast
        except ValueError:
            if _is_shape(text):
                raise
            shape, model, default_dtype = _shape_of_model(text, tokens, trust_remote_code)
        if tokens is not None:
            shape = replace(shape, n=tokens)
        check_tokens(shape.n)
        chosen = tuple(dtypes or [default_dtype])
        sizes = [f"{shape.n},{shape.h},{shape.v}"]
        sizes += [] if shape.softcap is None else [f"{shape.softcap:g}"]
        cases.append(Case(",".join(sizes), chosen, model or shape.model))
    return _joined(cases)


def _joined(cases: list[Case]) -> list[Case]:
    """Each head once, with the names of all models that have it."""
    names: dict[Case, dict[str, None]] = {}
    for case in cases:
        names.setdefault(replace(case, model=""), {})[case.model] = None
    return [replace(case, model=", ".join(filter(None, models))) for case, models in names.items()]


def _is_shape(text: str) -> bool:
    """Whether a text that is no shape was meant to be one: numbers, or a letter and a number."""
    return "," in text or re.fullmatch(r"[a-z](/.*)?", text) is not None


def _shape_of_model(text: str, tokens: int | None, trust: bool) -> tuple[Any, str, str]:
    """The shape of a model's head, its name, and its dtype."""
    from fastpref.bench.problem import Shape

    try:
        from transformers import AutoConfig
    except ImportError as error:
        raise ImportError(
            f"shape {text}: the config of a model is read by transformers, which is not installed; "
            "expected N,H,V"
        ) from error
    try:
        config: Any = AutoConfig.from_pretrained(text, trust_remote_code=trust)
    except Exception as error:  # a config with a size of the wrong type fails in many ways
        lines = str(error).strip().splitlines() or [type(error).__name__]
        # A strict config's first line names the check alone.
        reason = lines[-1 if lines[0].endswith(":") else 0].strip()[:200]
        raise ValueError(
            f"shape: got {text!r}, expected N,H,V, or the name or folder of a model ({reason})"
        ) from error
    inner = config.get_text_config()
    hidden, vocab = (getattr(inner, name, None) for name in ("hidden_size", "vocab_size"))
    if not (isinstance(hidden, int) and isinstance(vocab, int)):
        raise ValueError(f"shape: the config of {text} has no hidden_size and vocab_size")
    dtype = getattr(config, "dtype", None) or getattr(inner, "dtype", None)
    name = "fp32" if "32" in str(dtype or "float32") else "bf16"
    cap = getattr(inner, "final_logit_softcapping", None)
    return Shape(text, tokens or 1024, hidden, vocab, cap), Path(text).name, name


def scaled(cases: Sequence[Case], scale: str, most_threads: int) -> list[Case]:
    """Each case at a quarter, a half, once and twice of its tokens or its vocabulary, or with 1, 2,
    4, ... threads, up to `most_threads`.

    Raises:
        ValueError: an unknown scale.
    """
    if scale not in SCALES:
        raise ValueError(f"scale: got {scale!r}, expected one of {', '.join(SCALES)}")
    out = []
    for case in cases:
        if scale == "threads":
            powers = [2**i for i in range(most_threads.bit_length())]
            for threads in sorted({*(p for p in powers if p <= most_threads), most_threads}):
                out.append(replace(case, threads=threads))
            continue
        shape = parse_shape(case.shape)
        for factor in _FACTORS:
            n, v = shape.n, shape.v
            if scale == "tokens":
                n = _even_sequences(n * factor)
            else:
                v = max(2, round(v * factor))
            softcap = [] if shape.softcap is None else [f"{shape.softcap:g}"]
            text = ",".join([str(n), str(shape.h), str(v), *softcap])
            out.append(replace(case, shape=text))
    return _joined(out)


def _even_sequences(tokens: float) -> int:
    """The nearest number of tokens that makes an even number of sequences."""
    return max(2, round(tokens / 2) * 2) if tokens < 1024 else round(tokens / 1024) * 1024


def tasks(options: BenchOptions) -> list[dict[str, Any]]:
    """The tasks of a run, the most important first.

    The modes of a case follow each other, so that the worker makes its inputs once.
    """
    out: list[dict[str, Any]] = []
    memory: list[dict[str, Any]] = []
    only_bf16 = {dtype for case in options.cases for dtype in case.dtypes} == {"bf16"}

    def task(
        name: str, kind: str, case: Case, dtype: str = "bf16", **fields: Any
    ) -> dict[str, Any]:
        suffix = "" if only_bf16 or kind not in ("cell", "memory") else f" {dtype}"
        about: dict[str, Any] = {"model": case.model} if case.model else {}
        about |= {"threads": case.threads} if case.threads else {}
        task = {"id": name + suffix, "kind": kind, "shape": case.shape, "dtype": dtype}
        return task | about | fields

    def small() -> None:
        if "overhead" in options.parts and not any(t["kind"] == "overhead" for t in out):
            for shape in options.small:
                out.append(task(f"overhead of {shape}", "overhead", Case(shape)))

    if "roofline" in options.parts:
        dtypes = dict.fromkeys(dtype for case in options.cases for dtype in case.dtypes)
        for dtype in dtypes:
            out.append(task(f"roofline {dtype}", "roofline", options.cases[0], dtype))
    for case in options.cases:
        name = case.name
        if "/" in name:  # heads with fewer tokens come after the overhead
            small()
        for dtype in case.dtypes if "head" in options.parts else ():
            for mode in options.modes:
                out.append(task(f"{name} {mode}", "cell", case, dtype, mode=mode))
            measured = options.memory and options.device == "cpu" and case.threads is None
            for mode in options.modes if measured else []:
                fields = {"mode": mode, "env": TIGHT_MALLOC}
                measures = task(f"memory of {name} {mode}", "memory", case, dtype, **fields)
                (memory if options.memory_last else out).append(measures)
        if "/" not in name or set(options.parts) <= {"rows", "logits"}:
            if "rows" in options.parts:
                out.append(task(f"row kernels of {name}", "rows", case))
            if "logits" in options.parts:
                out.append(task(f"ready logits of {name}", "logits", case))
    small()
    return [*out, *memory]


def split_names(text: str, pair: Sequence[str] = ()) -> list[str]:
    """The names in a text, separated by commas.

    Args:
        pair: the two names that the word "both" stands for.
    """
    names = [name.strip() for name in text.split(",") if name.strip()]
    return list(pair) if pair and names == ["both"] else names


def check_names(option: str, names: Sequence[str], allowed: Sequence[str]) -> list[str]:
    """The given names, in the order of the allowed ones.

    Args:
        option: the option's name, for the error.

    Raises:
        ValueError: a name that is not allowed, or no name.
    """
    unknown = [name for name in names if name not in allowed]
    if unknown or not names:
        got = ",".join(unknown or ["nothing"])
        raise ValueError(f"{option}: got {got}, expected some of {', '.join(allowed)}")
    return [name for name in allowed if name in names]


__all__ = ["DTYPES", "MODES", "PARTS", "BenchOptions", "Case", "make_cases", "scaled", "tasks"]
