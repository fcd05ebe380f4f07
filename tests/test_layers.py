"""The layers: which package may import which, no circles, and every package is installed."""

from __future__ import annotations

import ast
import importlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import fastpref

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "fastpref"

# Package or module: what of fastpref it may import. Arrows point down, never up.
MAY_IMPORT = {
    "validation": set(),
    "progress": set(),
    "storage": {"progress"},
    "html_report": {"storage"},
    "backends": {"validation", "kernels", "_cpu", "_cuda"},
    "body": {"backends"},
    "logps": {"validation", "backends"},
    "losses": {"validation", "logps.sequences"},
    "fused": {"validation", "backends", "logps", "losses"},
    "heads": {"validation", "logps"},
    "data": {"progress"},
    "attention": {"data", "heads", "logps.linear"},
    "quality": {
        "progress", "storage", "backends.host_memory", "data", "heads", "logps", "losses",
        "reference", "trainer.loading", "trainer.step_zero",
    },
    "reference": {"progress", "storage", "attention", "data", "heads", "logps", "losses.tokens"},
    "trainer": {
        "progress", "storage", "attention", "backends.processor", "body", "data", "fused", "heads",
        "logps", "losses", "reference",
    },
    "profiling": {
        "progress", "storage", "backends.huge_pages", "backends.processor", "data", "fused",
        "heads", "logps", "reference", "trainer",
    },
    "planning": {
        "progress", "attention", "backends", "data", "heads", "logps", "profiling",
    },
    "bench": {"validation", "storage", "backends", "body", "logps", "profiling"},
    "integrations": {"validation", "backends", "fused", "heads", "logps", "losses"},
    "cli": {
        "progress", "storage", "html_report", "backends", "bench", "data", "fused", "heads",
        "logps", "losses", "planning", "profiling", "quality", "trainer",
        "_cpu",
    },
}  # fmt: skip
# Modules that keep earlier names: of the packages below.
EARLIER = {"config", "loss_tokens", "plan", "unpaired", "unpaired_data"}


def modules() -> dict[str, Path]:
    """Every module of the package but the faces, by its dotted name within fastpref."""
    paths = (p for p in PACKAGE.rglob("*.py") if p.name != "__init__.py")
    return {".".join(p.relative_to(PACKAGE).with_suffix("").parts): p for p in paths}


def imports(path: Path) -> Iterator[tuple[str, int]]:
    """What a file imports of fastpref, wherever in it: dotted names within fastpref, and lines."""
    inside = path.relative_to(PACKAGE).parent.parts
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.startswith("fastpref."):
                    yield alias.name.removeprefix("fastpref."), node.lineno
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parent = inside[: len(inside) - node.level + 1]
                base = ".".join(("fastpref", *parent, *([base] if base else [])))
            if base == "fastpref" or base.startswith("fastpref."):
                for alias in node.names:
                    name = f"{base}.{alias.name}".removeprefix("fastpref.")
                    yield name, node.lineno


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_a_package_imports_what_it_may(package):
    allowed = MAY_IMPORT[package] | {package}
    found = []
    for path in PACKAGE.rglob("*.py"):
        own = path.relative_to(PACKAGE).with_suffix("").parts
        if own[0] != package:
            continue
        for name, line in imports(path):
            if name == "__version__" or any(f"{name}.".startswith(f"{a}.") for a in allowed):
                continue
            found.append(f"{path.relative_to(ROOT)}:{line} imports {name}")
    assert not found, "\n".join(found)


def test_every_package_has_a_rule():
    found = {path.relative_to(PACKAGE).with_suffix("").parts[0] for path in modules().values()}
    assert found - EARLIER - {"__main__"} == set(MAY_IMPORT)


def test_no_module_imports_itself_through_others():
    known = modules()
    graph = {}
    for name, path in known.items():
        targets = set()
        for imported, _ in imports(path):
            parts = imported.split(".")
            prefixes = (".".join(parts[:i]) for i in range(len(parts), 0, -1))
            targets |= {next((p for p in prefixes if p in known), name)} - {name}
        graph[name] = targets
    done: set[str] = set()

    def visit(name: str, trail: list[str]) -> None:
        assert name not in trail, " -> ".join([*trail[trail.index(name) :], name])
        if name not in done:
            for target in sorted(graph[name]):
                visit(target, [*trail, name])
            done.add(name)

    for name in graph:
        visit(name, [])


@pytest.mark.parametrize("name", sorted(EARLIER))
def test_earlier_names_lead_to_the_same(name):
    pytest.importorskip("transformers")
    module = importlib.import_module(f"fastpref.{name}")
    assert getattr(fastpref, name) is module
    for public in module.__all__:
        found = getattr(module, public)
        assert getattr(found, "__module__", "fastpref.").startswith("fastpref.")


def test_every_package_is_installed():
    """By its name in pyproject.toml; kernels/ is fastpref.kernels."""
    text = (ROOT / "pyproject.toml").read_text("utf-8")
    listed = re.search(r"^packages = \[(.*?)\]", text, re.DOTALL | re.MULTILINE)
    assert listed
    names = set(re.findall(r'"([\w.]+)"', listed.group(1)))
    found = {".".join(p.parent.relative_to(ROOT).parts) for p in PACKAGE.rglob("__init__.py")}
    assert names == found | {"fastpref.kernels"}
