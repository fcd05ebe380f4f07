"""`HtmlReport`: what a command found, as one HTML file that needs no network.

    report = HtmlReport("fastpref check-data", "pairs.jsonl")
    report.findings([("error", "identical", "1 of 150 rows ...", "drop the row")])
    report.facts([("rows", "150")], heading="Data")
    report.table(["tokens", "median"], [["prompt", "12"]])
    report.figure(png_bytes(figure), "Lengths of the answers")
    report.write("report.html")

Sections stand in the order of the calls. Texts are escaped, so that a row of the data cannot become
markup or a script. Figures are inside the file as base64 and are at most as wide as the page.
"""

from __future__ import annotations

import base64
import io
import math
import os
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

from fastpref.storage import disk_errors, whole_file

LEVELS = ("error", "warning", "note")
_PNG = b"\x89PNG\r\n\x1a\n"

_STYLE = """
:root { color-scheme: light dark; --ink: #1f2430; --dim: #646b7a; --line: #dfe3ea; --paper: #fff;
  --card: #f6f7f9; --error: #b42318; --warning: #9a6700; --note: #17697a; --ok: #1b7f4b; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e8ee; --dim: #9aa2b1; --line: #343a46;
  --paper: #14171d; --card: #1c2028; --error: #ff8a7d; --warning: #e3b341; --note: #6fc6d6;
  --ok: #5fd394; } }
body { margin: 0 auto; max-width: 62rem; padding: 2rem 1.25rem 4rem; color: var(--ink);
  background: var(--paper); font: 15px/1.5 system-ui, -apple-system, "Segoe UI", sans-serif; }
h1 { font-size: 1.5rem; margin: 0; }
h2 { font-size: 1.1rem; margin: 2rem 0 .6rem; }
p.subtitle, p.about, figcaption { color: var(--dim); margin: .2rem 0 1rem;
  overflow-wrap: anywhere; }
div.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .9rem .3rem 0; border-bottom: 1px solid var(--line); text-align: left;
  vertical-align: top; }
thead th { color: var(--dim); font-weight: 600; }
table.facts th { color: var(--dim); font-weight: 400; white-space: nowrap; }
table.facts td { overflow-wrap: anywhere; }
td.number, th.number { text-align: right; white-space: nowrap; }
div.finding { background: var(--card); border-left: 4px solid var(--line); border-radius: 4px;
  padding: .6rem .9rem; margin: 0 0 .6rem; overflow-wrap: anywhere; }
div.finding p { margin: .15rem 0; }
div.finding p.advice { color: var(--dim); }
div.error { border-color: var(--error); } div.error .level { color: var(--error); }
div.warning { border-color: var(--warning); } div.warning .level { color: var(--warning); }
div.note { border-color: var(--note); } div.note .level { color: var(--note); }
div.clean { border-color: var(--ok); }
.level, .name { font-weight: 600; }
figure { margin: 0 0 1.2rem; }
figure img { max-width: 100%; height: auto; background: #fff; border-radius: 4px; }
footer { color: var(--dim); border-top: 1px solid var(--line); margin-top: 2.5rem;
  padding-top: .6rem; }
"""


class HtmlReport:
    """A page with facts, tables, figures and findings.

    Args:
        title: the heading, such as "fastpref verify".
        subtitle: a line below it, such as the model and the data.
    """

    def __init__(self, title: str, subtitle: str = "") -> None:
        self.title, self.subtitle = title, subtitle
        self._parts: list[str] = []

    def facts(self, facts: Iterable[tuple[str, Any]], heading: str = "") -> None:
        """Add a table of names and values.

        Args:
            heading: of the section; with "" the table belongs to the section before.
        """
        rows = "".join(
            f'<tr><th scope="row">{escape(str(name))}</th><td>{escape(_text(value))}</td></tr>'
            for name, value in facts
        )
        self._add(heading, f'<div class="scroll"><table class="facts">{rows}</table></div>')

    def text(self, text: str, heading: str = "") -> None:
        """Add a paragraph."""
        self._add(heading, f"<p>{escape(text)}</p>")

    def table(
        self,
        columns: Sequence[str],
        rows: Iterable[Sequence[Any]],
        heading: str = "",
        about: str = "",
    ) -> None:
        """Add a table. Columns after the first whose values are all numbers are right-aligned.

        Args:
            columns: the names of the columns.
            rows: their values, as many as there are columns; numbers or finished texts.
            about: a sentence above the table.

        Raises:
            ValueError: a row with more or fewer values than columns.
        """
        cells = [[_text(value) for value in row] for row in rows]
        for row in cells:
            if len(row) != len(columns):
                raise ValueError(
                    f"rows: got one of {len(row)} values, expected {len(columns)}, as columns"
                )
        numeric = [i > 0 and all(_is_number(row[i]) for row in cells) for i in range(len(columns))]

        def line(tag: str, values: Sequence[str], scope: str = "") -> str:
            return "".join(
                f"<{tag}{scope}{' class=number' if right else ''}>{escape(value)}</{tag}>"
                for value, right in zip(values, numeric, strict=True)
            )

        head = f"<thead><tr>{line('th', columns, ' scope=col')}</tr></thead>"
        body = "".join(f"<tr>{line('td', row)}</tr>" for row in cells)
        self._add(
            heading,
            _about(about) + f'<div class="scroll"><table>{head}<tbody>{body}</tbody></table></div>',
        )

    def figure(self, png: bytes, caption: str, heading: str = "") -> None:
        """Add a picture.

        Args:
            png: the contents of a PNG file, as of `png_bytes`.
            caption: what it shows; also the text for readers who do not see it.

        Raises:
            ValueError: bytes that are no PNG file.
        """
        if not png.startswith(_PNG):
            raise ValueError("png: got bytes that are no PNG file; expected png_bytes(figure)")
        source = "data:image/png;base64," + base64.b64encode(png).decode()
        name = escape(caption)
        self._add(
            heading,
            f'<figure><img src="{source}" alt="{name}"><figcaption>{name}</figcaption></figure>',
        )

    def findings(
        self,
        findings: Iterable[tuple[str, str, str, str]],
        heading: str = "Findings",
        nothing: str = "Nothing found.",
    ) -> None:
        """Add what was found, in the given order.

        Args:
            findings: level (one of `LEVELS`), name, what was found, and what to do.
            nothing: the sentence that stands there if nothing was found.

        Raises:
            ValueError: an unknown level.
        """
        blocks = []
        for level, name, message, advice in findings:
            if level not in LEVELS:
                raise ValueError(f"level is {level!r}; expected one of {', '.join(LEVELS)}")
            last = f'<p class="advice">{escape(advice)}</p>' if advice else ""
            blocks.append(
                f'<div class="finding {level}"><p><span class="level">{level}</span> '
                f'<span class="name">{escape(name)}</span></p><p>{escape(message)}</p>{last}</div>'
            )
        if not blocks:
            blocks = [f'<div class="finding clean"><p>{escape(nothing)}</p></div>']
        self._add(heading, "".join(blocks))

    def html(self) -> str:
        """The page."""
        from fastpref import __version__

        subtitle = f'<p class="subtitle">{escape(self.subtitle)}</p>' if self.subtitle else ""
        name = f"{self.title}: {self.subtitle}" if self.subtitle else self.title
        return (
            '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; '
            "img-src data:; style-src 'unsafe-inline'\">\n"
            f"<title>{escape(name)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
            f"<h1>{escape(self.title)}</h1>\n{subtitle}\n"
            + "\n".join(self._parts)
            + f"\n<footer>fastpref {escape(__version__)}</footer>\n</body>\n</html>\n"
        )

    def write(self, path: str | os.PathLike[str]) -> Path:
        """Write the page to a file, over an older one; returns its path.

        Raises:
            StorageError: a full, failing or read-only disk.
        """
        path = Path(path).expanduser()
        with disk_errors(f"the report {path} could not be written"), whole_file(path) as beside:
            beside.write_text(self.html(), "utf-8", errors="replace")
        return path

    def _add(self, heading: str, body: str) -> None:
        title = f"<h2>{escape(heading)}</h2>\n" if heading else ""
        self._parts.append(title + body)


def png_bytes(figure: Any, dpi: int = 120) -> bytes:
    """A matplotlib figure as the contents of a PNG file."""
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=dpi, metadata={"Software": None})
    return out.getvalue()


def _about(text: str) -> str:
    return f'<p class="about">{escape(text)}</p>' if text else ""


def _text(value: Any) -> str:
    """A value of a table as text; numbers get four digits, or commas between thousands."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.4g}" if math.isfinite(value) else str(value)
    return str(value)


def _is_number(text: str) -> bool:
    """Whether a cell is a number, perhaps with a unit, or empty."""
    text = text.strip()
    return text in ("", "–") or (text[0] in "+-−.0123456789" and any(c.isdigit() for c in text))
