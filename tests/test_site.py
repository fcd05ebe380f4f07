"""docs/ builds as a site without a warning, and its pages ask no other server for anything."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# What a browser loads by itself; a link in the text is only followed by a reader.
_LOADED = re.compile(
    r"<(?:script|img|iframe|source)\b[^>]*\bsrc=\"?(https?:|//)[^\s>]*"
    r"|<link\b(?![^>]*rel=\"?canonical)[^>]*\bhref=\"?(https?:|//)[^\s>]*"
    r"|@import\s+url\(\"?(https?:|//)[^)]*"
)


@pytest.mark.parametrize("folder", ["docs", "docs/decisions"])
def test_the_list_of_pages_has_every_page(folder):
    pages = {path.name for path in (ROOT / folder).glob("*.md")} - {"README.md"}
    text = (ROOT / folder / "README.md").read_text("utf-8")
    assert pages - set(re.findall(r"\]\((\w[\w-]*\.md)\)", text)) == set()


def test_the_site_builds_and_is_whole(tmp_path):
    pytest.importorskip("material")
    pytest.importorskip("mkdocs")
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict"]
    run = subprocess.run(
        [*command, "--site-dir", str(tmp_path / "site")],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    pages = {path.relative_to(ROOT / "docs") for path in (ROOT / "docs").rglob("*.md")}
    for page in pages:
        name = "index.html" if page.name == "README.md" else f"{page.stem}.html"
        assert (tmp_path / "site" / page.parent / name).is_file(), page
    for path in (tmp_path / "site").rglob("*"):
        if path.suffix in (".html", ".css"):
            found = _LOADED.search(path.read_text("utf-8"))
            assert found is None, f"{path.name} loads {found[0] if found else ''}"
