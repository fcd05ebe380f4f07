"""Which lines of the package no test reached, on every version of Python.

A tracer, which Python before 3.12 needs, looks at every call of every library and doubles the time.
Here each statement of fastpref is compiled behind an assignment that notes its line:

    _reached_17 = 1  # a global of the module, in functions and classes too

A note costs nanoseconds. torch.compile, which would trace each note like any assignment to a global
and take half as long again, notes the line itself. Import this module before fastpref. It does
nothing unless FASTPREF_LINES is 1, as `make test` sets it. Triton compiles kernels from their
source, so their lines are not counted.
"""

from __future__ import annotations

import ast
import dis
import os
import sys
from collections import defaultdict
from collections.abc import Callable
from importlib.abc import MetaPathFinder
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

import pytest

ON = os.environ.get("FASTPREF_LINES") == "1"
ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("fastpref", "kernels")
_PREFIX = "_reached_"
_globals: dict[str, list[dict[str, Any]]] = defaultdict(list)  # of each file's modules
_found: dict[str, set[int]] = defaultdict(set)  # lines of each file, by all processes


def _docstring(body: list[ast.stmt]) -> int:
    """How many statements come before the first one that does something: 0 or 1."""
    first = body[0] if body else None
    return int(isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant))


def _is_left_out(statement: ast.stmt) -> bool:
    """Declarations, and what only stands for a body."""
    if isinstance(statement, ast.ImportFrom):
        return statement.module == "__future__"
    ellipsis = isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
    return ellipsis or isinstance(statement, (ast.Global, ast.Nonlocal))


class _Notes(ast.NodeTransformer):
    """Puts a note before each statement. lines: those that have one."""

    def __init__(self) -> None:
        self.lines: set[int] = set()

    def _noted(self, body: list[ast.stmt]) -> list[ast.stmt]:
        out: list[ast.stmt] = []
        for statement in body:
            if not _is_left_out(statement):
                # A decorated function starts with its first decorator.
                decorators = getattr(statement, "decorator_list", [])
                line = min([statement.lineno, *(d.lineno for d in decorators)])
                self.lines.add(line)
                name = ast.Name(f"{_PREFIX}{line}", ast.Store())
                note = ast.copy_location(ast.Assign([name], ast.Constant(1)), statement)
                out.append(ast.fix_missing_locations(note))
            out.append(self.visit(statement))
        return out

    def generic_visit(self, node: ast.AST) -> ast.AST:
        for field in ("body", "orelse", "finalbody", "handlers", "cases"):
            inner = getattr(node, field, None)
            if not isinstance(inner, list):
                continue
            if inner and not isinstance(inner[0], ast.stmt):  # except: and case:
                setattr(node, field, [self.visit(each) for each in inner])
            else:
                setattr(node, field, self._noted(inner))
        return node

    def visit_If(self, node: ast.If) -> ast.AST:
        if isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            return node
        return self.generic_visit(node)

    def _visit_scope(self, node: Any) -> ast.AST:
        if any("jit" in ast.unparse(decorator) for decorator in node.decorator_list):
            return node
        outside, self.lines = self.lines, set()
        self.generic_visit(node)
        if self.lines:  # the names are the module's
            names = [f"{_PREFIX}{line}" for line in sorted(self.lines)]
            declared = ast.copy_location(ast.Global(names), node.body[0])
            node.body.insert(_docstring(node.body), declared)
        self.lines |= outside
        return node

    visit_FunctionDef = visit_AsyncFunctionDef = visit_ClassDef = _visit_scope


def compiled(source: str, path: str) -> tuple[CodeType, set[int]]:
    """A module with its notes, and the lines that have one."""
    notes = _Notes()
    tree = notes.generic_visit(ast.parse(source, path))
    return compile(tree, path, "exec", dont_inherit=True), notes.lines  # type: ignore[arg-type]


class _Loader(SourceFileLoader):
    def exec_module(self, module: ModuleType) -> None:
        path = self.get_filename()
        code, lines = compiled(self.get_source(self.name) or "", path)
        # All names are there at once: a new one would undo what the interpreter has specialised.
        module.__dict__.update(dict.fromkeys((f"{_PREFIX}{line}" for line in lines), 0))
        _globals[_name(path)].append(module.__dict__)
        exec(code, module.__dict__)


class _CompilerLoader(SourceFileLoader):
    """Of the module of torch.compile that traces bytecode. An assignment that is a note is not
    traced: the line counts as reached when it is compiled."""

    def exec_module(self, module: ModuleType) -> None:
        super().exec_module(module)
        store_global = dis.opmap["STORE_GLOBAL"]
        tracers = [getattr(module, "InstructionTranslatorBase", None)]
        if not hasattr(tracers[0], "dispatch_table"):
            return  # another version of torch, which traces the notes
        for tracer in tracers:  # which grows
            tracers += tracer.__subclasses__()
            tracer.dispatch_table[store_global] = _untraced(tracer.dispatch_table[store_global])


def _untraced(store_global: Callable[[Any, Any], None]) -> Callable[[Any, Any], None]:
    def store(tracer: Any, instruction: Any) -> None:
        if instruction.argval.startswith(_PREFIX):
            tracer.pop()
            tracer.f_globals[instruction.argval] = 1
        else:
            store_global(tracer, instruction)

    return store


class _Finder(MetaPathFinder):
    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        if name.split(".")[0] == "fastpref":
            loader: type[SourceFileLoader] = _Loader
        elif name == "torch._dynamo.symbolic_convert":
            loader = _CompilerLoader
        else:
            return None
        others = (f.find_spec(name, path, target) for f in sys.meta_path if f is not self)
        spec = next((found for found in others if found is not None), None)
        if spec is not None and type(spec.loader) is SourceFileLoader:
            spec.loader = loader(spec.loader.name, spec.loader.path)
        return spec


def _name(path: str) -> str:
    """Of a file, the same in each process."""
    return os.path.relpath(os.path.realpath(path), ROOT)


def reached() -> dict[str, list[int]]:
    """The lines of each file that this process has reached."""
    return {
        name: sorted(
            {
                int(key[len(_PREFIX) :])
                for module in modules
                for key, value in module.items()
                if key.startswith(_PREFIX) and value
            }
        )
        for name, modules in _globals.items()
    }


def _add(lines: dict[str, list[int]]) -> None:
    for name, found in lines.items():
        _found[name] |= set(found)


def ranges(missed: set[int], lines: set[int]) -> str:
    """The missed lines, as "3, 7-9": no line that was reached lies between."""
    runs: list[list[int]] = []
    for line in sorted(lines):
        if line not in missed:
            runs.append([])
        elif runs and runs[-1]:
            runs[-1].append(line)
        else:
            runs.append([line])
    return ", ".join(str(r[0]) if len(r) == 1 else f"{r[0]}-{r[-1]}" for r in runs if r)


def report() -> str:
    """A line for each file with lines that no test reached, and the share that one did."""
    rows, total, all_missed = [], 0, 0
    files = {p.resolve() for folder in FOLDERS for p in (ROOT / folder).rglob("*.py")}
    for path in sorted(files):
        _, lines = compiled(path.read_text("utf-8"), str(path))
        missed = lines - _found[_name(str(path))]
        total, all_missed = total + len(lines), all_missed + len(missed)
        if missed:
            share = f"{len(missed)} of {len(lines)}"
            rows.append(f"{_name(str(path)):40} {share:>12}  {ranges(missed, lines)}")
    return "\n".join([*rows, f"{100 * (1 - all_missed / total):.1f}% of {total} lines reached"])


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workeroutput"):  # of pytest-xdist, to the process that reports
        session.config.workeroutput["lines"] = reached()


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    _add(getattr(node, "workeroutput", {}).get("lines", {}))


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    if not hasattr(config, "workeroutput"):
        _add(reached())
        terminalreporter.section("lines of the package that no test reached")
        terminalreporter.write_line(report())


if ON and not any(isinstance(finder, _Finder) for finder in sys.meta_path):
    assert "fastpref" not in sys.modules, "line_coverage is imported too late"
    sys.meta_path.insert(0, _Finder())
