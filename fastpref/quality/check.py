"""`check_data`: everything that can be said of preference pairs before they are trained on.

rows -> arranged into prompt, chosen, rejected (fastpref.data)
     -> text checks over all rows (rows.py, near.py)
     -> word and token checks over a sample (separable.py, tokens.py)
     -> findings, the worst first
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fastpref.data.columns import IDS, PAIRS, TEXT, UNPAIRED, describe, is_messages
from fastpref.data.files import load_preference_data
from fastpref.data.layouts import Layout, arrange_batch, find_layout, sample
from fastpref.progress import watched
from fastpref.quality.findings import LEVELS, Finding
from fastpref.quality.rows import Rows, leakage, near_leakage
from fastpref.quality.separable import Separability
from fastpref.quality.tokens import Tokens

_BATCH = 1000
SAMPLE = 5_000  # rows that are tokenised, by default


@dataclass
class DataQuality:
    """The result of `check_data`.

    Attributes:
        rows: rows of each data set by name ("train", "eval").
        sampled: rows of the training data that were tokenised.
        findings: what was found, the worst first.
        figures: percentiles of token counts of prompt, chosen, rejected and pair within max_length;
            the share of padding in batches of 8 pairs; the share of a pair's tokens that its
            prompt's second copy takes; bytes of an eager head's fp32 logits for the longest batch;
            the rate at which the longer answer is the chosen one, with its R^2; histograms of the
            token counts and of those bytes by batch; the share of unseen pairs that single words
            tell apart ("separability").
    """

    rows: dict[str, int]
    sampled: int = 0
    findings: list[Finding] = field(default_factory=list)
    figures: dict[str, Any] = field(default_factory=dict)

    def worst(self) -> str | None:
        """The level of the worst finding; None if there is none."""
        return min((f.level for f in self.findings), key=LEVELS.index, default=None)

    def as_dict(self) -> dict[str, Any]:
        """The attributes, as values for JSON."""
        return {
            "rows": self.rows,
            "sampled": self.sampled,
            "findings": [finding.as_dict() for finding in self.findings],
            "figures": self.figures,
        }


def check_data(
    data: Any,
    tokenizer: Any = None,
    *,
    eval_data: Any = None,
    max_length: int | None = 1024,
    sample_rows: int | None = SAMPLE,
    show_progress: bool = False,
) -> DataQuality:
    """Look for what spoils a training in preference pairs.

    Args:
        data: pairs as `load_preference_data` takes them: a path, a hub name, a data set or rows.
        tokenizer: the model's tokenizer; None leaves out the checks of tokens.
        eval_data: held-out pairs, which are looked at for rows of the training data.
        max_length: tokens of prompt and answer at which training cuts them; None: nowhere.
        sample_rows: rows, evenly spread, that are tokenised; None: all.
        show_progress: whether progress is shown.

    Returns:
        A `DataQuality`.

    Raises:
        ValueError: a file that cannot be read, single answers instead of pairs, a malformed row
            (with its number).
    """
    train, dataset, layout, separable, tokens = _look(
        data, "train", tokenizer, max_length, sample_rows, show_progress
    )
    out = DataQuality({"train": len(dataset)}, sampled=len(tokens.lengths) if tokens else 0)
    separability = separable.accuracy()
    findings = _unread(layout) + train.findings() + separable.findings(separability)
    if tokens is not None:
        findings += tokens.findings()
        out.figures = tokens.figures(len(tokenizer))
    if separability is not None:
        out.figures["separability"] = separability
    if eval_data is not None:
        held_out, rows, *_ = _look(eval_data, "eval", None, max_length, 0, show_progress)
        out.rows["eval"] = len(rows)
        leaks = leakage(train, held_out)
        leaked = {row for finding in leaks for row in finding.rows}
        findings += leaks + near_leakage(train, held_out, leaked)
    out.findings = sorted(findings, key=lambda finding: LEVELS.index(finding.level))
    return out


def _look(
    data: Any,
    name: str,
    tokenizer: Any,
    max_length: int | None,
    sample_rows: int | None,
    show_progress: bool,
) -> tuple[Rows, Any, Layout, Separability, Tokens | None]:
    dataset = load_preference_data(data)
    if not hasattr(dataset, "__len__"):
        raise ValueError(f"{name} data is a stream; pass a data set or a file")
    layout = _layout(dataset, name)
    rows, separable = Rows(), Separability()
    tokens = None if tokenizer is None else Tokens(tokenizer, max_length)
    total = len(dataset)
    chosen = total if sample_rows is None else min(sample_rows, total)
    sampled = set(np.linspace(0, total - 1, chosen).astype(int).tolist()) if chosen else set()
    title = f"Checking {name} data"
    arranged = _arranged(dataset, layout, f"{name} data")
    for number, row, had_nulls in watched(arranged, title, "rows", total, 1, not show_progress):
        where = f"{name} data: row {number}"
        _check_text(row, where)
        rows.add(number, row, had_nulls)
        if number in sampled:
            separable.add(row)
            if tokens is not None and row["chosen"] and row["rejected"]:
                tokens.add(number, row, where)
    return rows, dataset, layout, separable, tokens


def _check_text(row: dict, where: str) -> None:
    for key in TEXT:
        if not isinstance(row[key], str) and not is_messages(row[key]):
            raise ValueError(
                f"{where}: {key} is {describe(row[key])}; expected a string or a list of messages "
                "with role and content"
            )


def _layout(dataset: Any, name: str) -> Layout:
    names = list(dataset.column_names)
    if set(IDS) <= set(names):
        raise ValueError(f"{name} data is token ids; the checks read text or messages")
    if set(UNPAIRED.answers) <= set(names) and not set(PAIRS.answers) <= set(names):
        raise ValueError(f"{name} data is single answers; the checks read pairs of answers")
    return find_layout(dataset, sample(dataset), name, PAIRS)


def _arranged(dataset: Any, layout: Layout, data: str) -> Iterator[tuple[int, dict, bool]]:
    for first in range(0, len(dataset), _BATCH):
        batch = dataset[first : first + _BATCH]
        numbers = list(range(first, min(first + _BATCH, len(dataset))))
        arranged = arrange_batch(batch, layout, PAIRS, data, numbers)
        yield from ((i, row, nulls) for i, (row, nulls) in zip(numbers, arranged, strict=True))


def _unread(layout: Layout) -> list[Finding]:
    if not layout.unread:
        return []
    names = ", ".join(map(repr, layout.unread))
    return [
        Finding(
            "unread_columns",
            "note",
            f"nothing reads the columns {names}",
            "rename the one that belongs to the prompt (system, question, instruction)",
            values={"columns": list(layout.unread)},
        )
    ]
