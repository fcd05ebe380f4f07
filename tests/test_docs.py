"""Every code block of README.md and docs/ runs; quoted messages and linked files exist."""

from __future__ import annotations

import ast
import re
import shlex
from importlib.util import find_spec
from pathlib import Path

import doc_blocks
import pytest

for needed in ("transformers", "datasets", "accelerate", "peft", "typer"):
    pytest.importorskip(needed)

import typer  # noqa: E402
from typer.testing import CliRunner  # noqa: E402

import fastpref  # noqa: E402
from fastpref.cli import app  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
# Pages whose blocks measure, plan or train.
COMMANDS = {"docs/bench.md", "docs/plan.md", "docs/quickstart.md"}
MOST_SKIPS = 4  # of all pages together
LANGUAGES = {"python", "diff", "sh", "text"}
SHELL_WORDS = {"git", "cd", "accelerate", "torchrun"}  # commands of others, which are not looked at


@pytest.fixture
def cwd(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    yield tmp_path
    if find_spec("trl"):
        fastpref.unpatch_trl()


def _page(name: str):
    return pytest.param(ROOT / name, marks=[pytest.mark.train] * (name in COMMANDS))


@pytest.mark.parametrize("page", [_page(name) for name in NAMES], ids=NAMES)
def test_blocks(page, cwd):
    scope: dict = {"__name__": "page"}
    for block in doc_blocks.blocks(page):
        assert block.language in LANGUAGES, f"{page.name}:{block.line}: {block.language!r}"
        if "skip" in block.marks or not _installed(block.marks.get("needs")):
            continue
        if block.language in ("python", "diff"):
            # Its place in the page, for tracebacks.
            code = "\n" * (block.line - 1) + block.python
            exec(compile(code, str(page), "exec"), scope)
        elif block.language == "sh":
            for command in block.commands:
                _check(command, run="run" in block.marks)


def _installed(package: str | None) -> bool:
    return package is None or find_spec(package) is not None


def _check(command: str, run: bool) -> None:
    """Parse a shell command against what it calls, and run it if it is ours and marked."""
    words = shlex.split(command)
    while re.match(r"[A-Z_]+=", words[0]):
        words.pop(0)
    program, args = words[0], words[1:]
    if program == "fastpref":
        if run:
            result = CliRunner().invoke(app, args)
            assert result.exit_code == 0, f"{command}: {result.output}"
        else:
            group = typer.main.get_command(app)
            with group.make_context("fastpref", list(args)) as context:
                name, sub, rest = group.resolve_command(context, args)
                sub.make_context(name, rest).close()
    elif program == "make":
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert args[0] in targets, command
    elif program == "pip":
        known = re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
        asked = re.findall(r"\[(.*)\]", command)
        assert args[0] == "install" and all(set(x.split(",")) <= set(known) for x in asked), command
    elif program == "python":
        assert (ROOT / args[0]).is_file(), command
    else:
        assert program in SHELL_WORDS, command


def test_few_blocks_are_skipped_and_each_says_why():
    marks = [(n, b.marks) for n, p in zip(NAMES, PAGES, strict=True) for b in doc_blocks.blocks(p)]
    reasons = [(name, m["skip"]) for name, m in marks if "skip" in m]
    assert len(reasons) <= MOST_SKIPS, reasons
    assert all(len(reason.split()) > 2 for _, reason in reasons), reasons
    assert {m["needs"] for _, m in marks if "needs" in m} <= {"trl"}


def test_marks_are_read(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("<!-- test: skip a GPU is needed -->\n```python\nx\n```\n")
    (block,) = doc_blocks.blocks(page)
    assert block.marks == {"skip": "a GPU is needed"} and block.line == 3
    page.write_text("<!-- test: hidden\nx = 1\n-->\n```diff\n-x\n+x == 1\n```\n")
    assert [b.python for b in doc_blocks.blocks(page)] == ["x = 1\n", "x == 1\n"]
    for text, what in (
        ("<!-- test: ship it -->\n```sh\nls\n```\n", "unknown mark"),
        ("<!-- test: run -->\n", "before no block"),
        ("<!-- test: run -->\nwords\n```sh\nls\n```\n", "not before a block"),
        ("words\n\n    fastpref doctor\n", "fence it"),
    ):
        page.write_text(text)
        with pytest.raises(ValueError, match=what):
            doc_blocks.blocks(page)


def _literals() -> list[str]:
    """Every string of the package and of its build; what an f-string fills in is a NUL."""
    out = []
    for path in (*sorted((ROOT / "fastpref").rglob("*.py")), ROOT / "csrc/cuda/nvcc_build.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = (v.value if isinstance(v, ast.Constant) else "\0" for v in node.values)
                out.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                out.append(node.value)
    return [text for text in out if "\n" not in text]  # the others are docstrings


def _has(literal: str, parts: list[str]) -> bool:
    """Whether the parts stand in the literal, in this order."""
    at = 0
    for part in (part.strip() for part in parts):
        at = literal.find(part, at)
        if at < 0:
            return False
        at += len(part)
    return True


def test_quoted_messages_are_the_packages():
    """In troubleshooting.md a block of text is a message, and "..." what differs each time."""
    page = ROOT / "docs" / "troubleshooting.md"
    literals = _literals()
    messages = [b.text for b in doc_blocks.blocks(page) if b.language == "text"]
    assert len(messages) >= 15
    lost = []
    for message in messages:
        words = " ".join(message.split())
        if not any(_has(literal, words.split("...")) for literal in literals):
            lost.append(words)
    assert not lost, "no string of the package has these messages; quote it anew: " + str(lost)


def test_links_and_files_exist():
    for page in PAGES:
        text = page.read_text("utf-8")
        for target in re.findall(r"\]\((?!https?:|#)([^)#\s]+)", text):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
        for path in re.findall(r"\b(?:docs|tests|benchmarks|examples|fastpref)/[\w./-]+\w", text):
            found = (ROOT / path).exists() or list(ROOT.glob(f"{path}*"))
            assert found, f"{page.name} names {path}"


def test_the_pages_that_messages_name_exist():
    for path in sorted((ROOT / "fastpref").rglob("*.py")):
        for name in re.findall(r"docs/[\w/]+\.md", path.read_text("utf-8")):
            assert (ROOT / name).is_file(), f"{path.name} names {name}"
