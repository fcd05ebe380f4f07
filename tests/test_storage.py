"""Files that are whole or absent, also after Ctrl-C and with two writers."""

from __future__ import annotations

import threading

import pytest

from fastpref.html_report import HtmlReport
from fastpref.storage import whole_file


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_an_interrupted_file_leaves_the_old_one_and_nothing_beside_it(tmp_path, error):
    path = tmp_path / "new" / "result.json"
    with whole_file(path) as beside:
        beside.write_text("old")
    with pytest.raises(error), whole_file(path) as beside:
        beside.write_text("ha")
        raise error
    assert [p.name for p in path.parent.iterdir()] == ["result.json"]
    assert path.read_text() == "old"


def test_of_two_writers_of_a_file_the_last_one_wins(tmp_path):
    path = tmp_path / "result.json"
    with whole_file(path) as first:
        with whole_file(path) as second:
            first.write_text("first")
            second.write_text("second")
        assert path.read_text() == "second"
    assert path.read_text() == "first" and list(tmp_path.iterdir()) == [path]


def test_pages_that_are_written_at_the_same_time_are_whole(tmp_path):
    path, errors = tmp_path / "page.html", []

    def write(name):
        page = HtmlReport(name)
        page.text("word " * 20_000)
        try:
            for _ in range(20):
                page.write(path)
        except OSError as error:
            errors.append(error)

    threads = [threading.Thread(target=write, args=(f"page {i}",)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors and list(tmp_path.iterdir()) == [path]
    assert path.read_text().rstrip().endswith("</html>")


def test_a_long_name_has_room_beside_it(tmp_path):
    path = tmp_path / ("é" * 120 + ".html")
    HtmlReport("a page").write(path)
    assert path.is_file()
