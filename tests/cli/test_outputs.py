"""Places of reports and plots that are refused before the work, the width of tables, and JSON."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

pytest.importorskip("typer")

from fastpref.cli.outputs import check_plot, check_report, print_json, table_console
from fastpref.storage import StorageError


def test_a_place_that_cannot_be_written_is_refused(tmp_path, monkeypatch):
    data = tmp_path / "pairs.jsonl"
    data.write_text("{}\n")
    for path, message in (
        (tmp_path, "is a directory; expected a file"),
        (data, "is no HTML page, so it stays"),
        (data / "report.html", "pairs.jsonl is not a directory"),
        (Path("/dev/stdout"), "is a device"),
    ):
        with pytest.raises(ValueError, match=message):
            check_report(path)
    with pytest.raises(ValueError, match="expected a name that ends in .png, .svg, .pdf"):
        check_plot(tmp_path / "memory")
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(StorageError, match="permission denied"):
        check_plot(tmp_path / "new" / "memory.png")
    assert data.read_text() == "{}\n"


def test_new_places_and_earlier_pages_are_fine(tmp_path):
    page = tmp_path / "page.html"
    page.write_text("<!DOCTYPE html>\n<html></html>")
    check_report(page)
    check_report(tmp_path / "new" / "folder" / "page.html")
    check_report(None)
    check_plot(None)
    check_plot(tmp_path / "memory.PNG")


def test_tables_are_as_wide_as_columns_says(monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    assert table_console().width == 120
    for columns, width in (("60", 60), ("200", 200), ("0", 120), ("wide", 120)):
        monkeypatch.setenv("COLUMNS", columns)
        assert table_console().width == width


def test_tables_are_as_wide_as_the_terminal(monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setattr(os, "get_terminal_size", lambda *_: os.terminal_size((93, 30)))
    assert table_console().width == 93


def test_figures_that_are_not_finite_are_null(capsys):
    print_json({"nats": float("nan"), "rows": [1, float("inf")], "loss": (0.5,)})
    assert json.loads(capsys.readouterr().out) == {"nats": None, "rows": [1, None], "loss": [0.5]}
