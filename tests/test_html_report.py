"""HtmlReport: one whole file that needs no network, and no markup from the data."""

from __future__ import annotations

from html.parser import HTMLParser

import browser
import pytest

from fastpref.html_report import HtmlReport, png_bytes

VOID = {"meta", "img", "link", "br", "hr"}
MARKUP = '<script>document.title = "taken"</script>'


class Page(HTMLParser):
    """The elements of a page; raises AssertionError unless each is closed in its order."""

    def __init__(self, text):
        super().__init__()
        self.open, self.elements, self.words = [], [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)

    def named(self, name):
        return [attributes for tag, attributes in self.elements if tag == name]


def picture():
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4, 2))
    figure.subplots().plot([0, 1], [1, 0])
    return png_bytes(figure)


def report():
    out = HtmlReport("fastpref verify", f"model {MARKUP}")
    out.findings(
        [
            ("error", "identical", f"1 of 3 rows: {MARKUP}", "drop the row"),
            ("warning", "length_bias", "the longer answer wins", ""),
            ("note", "unread_columns", "nothing reads 'source'", "rename it"),
        ]
    )
    out.facts([("rows", 1500), ("beta", 0.1), ("exact", True), ("peak", None)], heading="Facts")
    out.table(["path", "nats"], [["fastpref", 1.5e-7], ["eager", 0.25]], "Errors", "Sums.")
    out.text("A paragraph.", heading="More")
    out.figure(picture(), "Lengths")
    return out


def test_the_page_is_whole_and_asks_for_nothing(tmp_path):
    path = report().write(tmp_path / "new" / "report.html")
    page = Page(path.read_text("utf-8"))
    text = "".join(page.words)
    for part in ("1,500", "0.25", "1.5e-07", "yes", "A paragraph.", "drop the row", MARKUP):
        assert part in text
    assert not page.named("script") and not page.named("link") and not page.named("iframe")
    sources = [a["src"] for a in page.named("img")]
    assert len(sources) == 1 and sources[0].startswith("data:image/png;base64,")
    assert [a.get("class") for a in page.named("td")][-1] == "number"
    assert [p.name for p in path.parent.iterdir()] == ["report.html"]


def test_nothing_found_is_said():
    out = HtmlReport("fastpref check-data")
    out.findings([])
    assert "Nothing found." in out.html()


def test_bad_input_is_refused():
    out = HtmlReport("x")
    with pytest.raises(ValueError, match="rows: got one of 1 values, expected 2"):
        out.table(["a", "b"], [[1]])
    with pytest.raises(ValueError, match="level is 'fatal'"):
        out.findings([("fatal", "a", "b", "c")])
    with pytest.raises(ValueError, match="no PNG file"):
        out.figure(b"GIF89a", "x")


def test_a_browser_shows_the_page(tmp_path):
    program = browser.find()
    if program is None:
        pytest.skip("no Chromium is installed")
    path = report().write(tmp_path / "report.html")
    document, console = browser.rendered(program, path, tmp_path)
    assert not console
    page = Page(document)
    assert "fastpref verify: model" in "".join(page.words) and "taken</title>" not in document
    assert len(page.named("img")) == 1 and len(page.named("h2")) == 4
    assert browser.screenshot(program, path, tmp_path).startswith(b"\x89PNG")
