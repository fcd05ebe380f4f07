"""The code blocks of a Markdown page, in order, and what stands in comments before them.

<!-- test: skip REASON -->      the next block does not run, for this reason
<!-- test: needs PACKAGE -->    the next block runs where the package is installed
<!-- test: run -->              the next shell block runs; otherwise it is only parsed
<!-- test: hidden               Python that runs here and is not shown
...
-->
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

_PIECE = re.compile(
    r"^<!-- test: (?P<verb>\w+) ?(?P<rest>.*?)\s*-->\n"
    r"|^```(?P<language>\w*)\n(?P<body>.*?)^```\n",
    re.DOTALL | re.MULTILINE,
)
_INDENTED_COMMAND = re.compile(r"^ {4}(fastpref|pip|make|python|git|cd|[A-Z_]+=\S+) ", re.MULTILINE)
VERBS = ("skip", "needs", "run", "hidden")


@dataclass(frozen=True)
class Block:
    """A fenced block, or hidden Python.

    Attributes:
        line: its first line in the page, from 1.
        marks: what the comments right before it say: {"skip": reason, ...}.
    """

    language: str
    text: str
    line: int
    marks: dict[str, str]

    @property
    def python(self) -> str:
        """The Python to run: of a diff, what it leads to."""
        if self.language != "diff":
            return self.text
        kept = [line for line in self.text.splitlines() if not line.startswith("-")]
        return "\n".join(line[1:] for line in kept) + "\n"

    @property
    def commands(self) -> list[str]:
        """The commands of a shell block, each on one line, without comments."""
        joined = self.text.replace("\\\n", " ")
        lines = (re.sub(r"(^|\s)#.*", "", line).strip() for line in joined.splitlines())
        return [line for line in lines if line]


def blocks(page: Path) -> list[Block]:
    """The blocks of a page, in order. ValueError for a mark that is unknown or before no block."""
    text = page.read_text("utf-8")
    shown = re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)
    if found := _INDENTED_COMMAND.search(shown):
        raise ValueError(f"{page.name}: {found[0].strip()!r} is in an indented block; fence it")
    out: list[Block] = []
    marks: dict[str, str] = {}
    end = 0
    for piece in _PIECE.finditer(text):
        line = text.count("\n", 0, piece.start()) + 1
        if marks and text[end : piece.start()].strip():
            raise ValueError(f"{page.name}: the mark before line {line} is not before a block")
        verb, end = piece["verb"], piece.end()
        if verb is None:
            out.append(Block(piece["language"], piece["body"], line + 1, marks))
            marks = {}
        elif verb == "hidden":
            out.append(Block("python", piece["rest"].lstrip("\n") + "\n", line + 1, marks))
            marks = {}
        elif verb in VERBS:
            marks = {**marks, verb: piece["rest"]}
        else:
            raise ValueError(f"{page.name}: line {line}: unknown mark {verb!r}")
    if marks:
        raise ValueError(f"{page.name}: the last mark is before no block")
    return out
