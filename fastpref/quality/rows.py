"""Checks of the rows' text: empty, identical, repeated and contradictory pairs, marks of templates.

Texts are compared without regard to case, punctuation and white space. Only hashes of them are
kept, so that a large data set needs little memory.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

from fastpref.quality.findings import Finding, of_rows
from fastpref.quality.near import Sketches

# The start of another speaker's turn in plain text, and marks of chat templates.
_TURN = re.compile(
    r"(?:^|\n)\s*(?:Human|User|Assistant|### ?(?:Instruction|Response|Input|Human|Assistant))\s*:"
    r"|<\|(?:im_start|im_end|start_header_id|eot_id|user|assistant|system|endoftext)\|>"
    r"|\[/?INST\]|<</?SYS>>|<(?:start|end)_of_turn>"
)
_WORDS = re.compile(r"\w+")
# An answer in a language without spaces, or in emojis, has no words.
_SOMETHING = re.compile(r"\S")


def text_of(value: Any) -> str:
    """The text of a prompt or answer: a string, or messages with their roles."""
    if isinstance(value, str):
        return value
    return "\n".join(f"{m.get('role')}: {_content(m)}" for m in value)


def contents_of(value: Any) -> str:
    """The text of a prompt or answer without roles."""
    return value if isinstance(value, str) else "\n".join(_content(m) for m in value)


def _content(message: Mapping[str, Any]) -> str:
    content = message.get("content")
    if isinstance(content, list):
        parts = (part.get("text") for part in content if isinstance(part, Mapping))
        content = "\n".join(part for part in parts if isinstance(part, str))
    calls = message.get("tool_calls")
    return f"{content or ''}{calls if calls else ''}"


def _begins_with_question(answer: Any) -> bool:
    """Whether an answer in messages begins with one that the model does not write."""
    if isinstance(answer, str) or not answer:
        return False
    return answer[0].get("role") in ("user", "system", "human")


def normalised(text: str) -> str:
    """The text in lower case, its words separated by single spaces, without punctuation."""
    return " ".join(_WORDS.findall(text.casefold())) or " ".join(text.split())


class Rows:
    """Collects the text checks over a data set.

    Attributes:
        numbers: the row numbers, in order.
        prompts, pairs: hashes of each row's normalised prompt and of prompt, chosen and rejected.
        lengths: characters of chosen and rejected, by row.
    """

    def __init__(self) -> None:
        self.numbers: list[int] = []
        self.prompts: list[int] = []
        self.pairs: list[int] = []
        self.lengths: list[tuple[int, int]] = []
        self.sketches = Sketches()
        self._ordered: defaultdict[tuple[int, int, int], list[int]] = defaultdict(list)
        self._rows: defaultdict[str, list[int]] = defaultdict(list)

    def add(self, number: int, row: Mapping[str, Any], had_nulls: bool = False) -> None:
        """Look at a row, which has prompt, chosen and rejected.

        had_nulls: whether a dict inside it had keys without a value.
        """
        prompt, chosen, rejected = (contents_of(row[k]) for k in ("prompt", "chosen", "rejected"))
        whole = [normalised(text) for text in (prompt, chosen, rejected)]
        keys = [hash(text) for text in whole]
        self.numbers.append(number)
        self.prompts.append(keys[0])
        self.pairs.append(hash(tuple(keys)))
        self.lengths.append((len(chosen), len(rejected)))
        rows_of = self._rows
        if had_nulls:
            rows_of["merged"].append(number)
        if any(_begins_with_question(row[key]) for key in ("chosen", "rejected")):
            rows_of["other_prompt"].append(number)
        empty = [not _SOMETHING.search(text) for text in (prompt, chosen, rejected)]
        if empty[0]:
            rows_of["no_prompt"].append(number)
        if empty[1] or empty[2]:
            rows_of["empty"].append(number)
        elif text_of(row["chosen"]) == text_of(row["rejected"]):
            rows_of["identical"].append(number)
        elif keys[1] == keys[2]:
            rows_of["alike"].append(number)
        else:
            self._ordered[keys[0], keys[1], keys[2]].append(number)
        for key in ("chosen", "rejected"):
            # Marks in messages are as wrong: the template adds its own.
            if _TURN.search(contents_of(row[key])):
                rows_of[f"turns_{key}"].append(number)
        self.sketches.add(number, " ".join(whole))

    def findings(self) -> list[Finding]:
        """What was found."""
        total, rows = len(self.numbers), self._rows
        out = of_rows(
            "empty_prompt",
            "warning",
            rows["no_prompt"],
            total,
            "have an empty prompt",
            "see that the prompt's column is named 'prompt'",
        )
        out += of_rows(
            "different_prompts",
            "error",
            rows["other_prompt"],
            total,
            "have an answer that begins with a message of the user or the system: the two "
            "conversations part before the answers",
            "pair answers to the same prompt",
            drops=True,
        )
        out += of_rows(
            "merged_keys",
            "note",
            rows["merged"],
            total,
            "have null for keys of dicts inside messages or tools, as Arrow leaves where it merges "
            "the keys of all rows",
            "fastpref leaves those keys out; for other trainers keep tool calls as JSON text",
        )
        out += of_rows(
            "empty_answer",
            "error",
            rows["empty"],
            total,
            "have an empty answer, which teaches to say nothing or never to stop",
            "drop them",
            drops=True,
        )
        out += of_rows(
            "identical",
            "error",
            rows["identical"],
            total,
            "have identical answers",
            "drop them: their gradient is zero",
            drops=True,
        )
        out += of_rows(
            "alike",
            "warning",
            rows["alike"],
            total,
            "have answers that differ in case, punctuation or white space alone",
            "drop them unless that difference is what you want to teach",
        )
        out += self._repeated(total)
        out += self._turns(total)
        return out

    def _turns(self, total: int) -> list[Finding]:
        chosen, rejected = set(self._rows["turns_chosen"]), set(self._rows["turns_rejected"])
        level = "error" if len(chosen) > 0.01 * total else "warning"
        return of_rows(
            "turns_in_answer",
            level if chosen else "note",
            [*chosen | rejected],
            total,
            f"have marks of a chat template or another speaker's turn inside an answer (chosen: "
            f"{len(chosen)}, rejected: {len(rejected)})",
            "cut the answers there, or give the turns as messages",
            values={"chosen": len(chosen), "rejected": len(rejected)},
        )

    def _repeated(self, total: int) -> list[Finding]:
        repeats, opposed = [], set()
        for (prompt, chosen, rejected), numbers in self._ordered.items():
            repeats += numbers[1:]
            if other := self._ordered.get((prompt, rejected, chosen)):
                opposed |= {*numbers, *other}
        out = of_rows(
            "contradictory",
            "error",
            [*opposed],
            total,
            "prefer an answer that another row rejects in favour of the same other one",
            "drop both rows or keep the one that you trust",
            drops=True,
        )
        out += of_rows(
            "duplicate",
            "error",
            repeats,
            total,
            "repeat an earlier row",
            "drop them: they weigh double, and in a held-out set they leak",
            drops=True,
        )
        near = self.sketches.near(excluded=set(repeats))
        out += of_rows(
            "near_duplicate",
            "warning" if len(near) > 0.01 * total else "note",
            near,
            total,
            "are nearly the same as an earlier row (three quarters of their text)",
            "look at some of them; --json lists all",
        )
        return out

    def shared(self, other: Rows) -> tuple[list[int], list[int]]:
        """Of the rows: those whose pair stands in other as well, and those whose prompt does."""
        pairs, prompts = set(other.pairs), set(other.prompts)
        same_pair = [n for n, key in zip(self.numbers, self.pairs, strict=True) if key in pairs]
        same_prompt = [
            n for n, key in zip(self.numbers, self.prompts, strict=True) if key in prompts
        ]
        return same_pair, same_prompt


def leakage(train: Rows, held_out: Rows) -> list[Finding]:
    """Rows of the held-out data that the training data has, too."""
    pairs, prompts = held_out.shared(train)
    total = len(held_out.numbers)
    out = of_rows(
        "leaked_pair",
        "error",
        pairs,
        total,
        "stand in the training data as well",
        "drop them: the held-out accuracy is not one of unseen pairs",
        data="eval",
        drops=True,
    )
    prompt_alone = sorted(set(prompts) - set(pairs))
    out += of_rows(
        "leaked_prompt",
        "warning",
        prompt_alone,
        total,
        "have a prompt of the training data with other answers",
        "split the data by prompts",
        data="eval",
    )
    return out


def near_leakage(train: Rows, held_out: Rows, leaked: Iterable[int]) -> list[Finding]:
    """Rows of the held-out data that are nearly the same as one of the training data."""
    rows = held_out.sketches.near_others(train.sketches, excluded=set(leaked))
    return of_rows(
        "nearly_leaked",
        "warning",
        rows,
        len(held_out.numbers),
        "are nearly the same as a row of the training data",
        "split the data by prompts, and look for edited copies",
        data="eval",
    )
