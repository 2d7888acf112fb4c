"""The HTML report: what it says, that it stands alone, that nothing in it can act, and that no write leaves a ruin."""

from __future__ import annotations

import io
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from reports import panel, report, row
from rich.console import Console

from diffsteer.bench import report_html as module
from diffsteer.bench.report_html import render_report, write_report
from diffsteer.bench.report_tables import rich_table
from diffsteer.errors import OutputError


class Page(HTMLParser):
    """Tags, attributes and text of a page; fails on tags that do not close in order."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.words: list[str] = []
        self.open: list[str] = []
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, key, value or "") for key, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.words))

    def values(self, key: str) -> list[str]:
        return [value for _, k, value in self.attributes if k == key]


@pytest.fixture(scope="module")
def html() -> str:
    return render_report(report())


# --- what it says -------------------------------------------------------------------------------------------


def test_the_page_holds_every_part(html: str):
    page = Page(html)
    headings = ["Results", "Samples", "Along the trajectory", "Classes", "How to read it", "Record of the run"]
    assert [w.strip() for w in page.words if w.strip() in headings] == headings
    for part in ("Digits without the 2", "“two” was taken out", "a remark", "diffsteer remove digits --concept 2"):
        assert part in page.text
    assert "floor is 0.4%" in page.text
    assert "name: DDIM eta: 0" in page.text
    assert page.tags.count("svg") == 1 + 2 + 2  # the front, posterior and scale of one method, two histograms
    assert page.tags.count("img") == 2


def test_the_floor_has_its_interval_where_that_is_known():
    page = Page(render_report(report(floor=0.0, floor_interval=(0.0, 0.0117))))
    assert "floor is 0% (0% to 1.17%)" in page.text


def test_the_table_shows_value_and_interval_of_every_row(html: str):
    text = Page(html).text
    assert "Negative prompting 0.3 1,000 1.4% 0.8–2.3 0.036 0.030–0.043 0.041 0.035–0.050" in text
    assert "0.5 1,000 0.0% 0.0–0.4" in text
    assert "0.041 0.035–0.050 – 12 100 8.2" in text  # no distance of the rejection set to itself
    assert 'rowspan="2">Negative prompting<' in html


def test_scales_are_left_out_where_there_are_none():
    plain = [row(scale="", label=label) for label in ("A", "B")]
    assert "Scale" not in Page(render_report(report(rows=plain))).words


def test_the_forbidden_ones_are_counted_among_the_samples_that_are_shown():
    many = panel(images=torch.zeros(60, 1, 8, 8), forbidden=torch.arange(60) >= 48, posterior=None, scale=None)
    assert "0 of 48 forbidden" in render_report(report(panels=[many]))


def test_equal_reports_give_equal_pages(html: str):
    assert render_report(report()) == html


# --- it stands alone and cannot act ---------------------------------------------------------------------------


def test_nothing_is_loaded_from_anywhere(html: str):
    assert not re.search(r"https?:|[\"'(]//|@import", html)
    page = Page(html)
    assert not {"script", "link", "iframe", "object", "embed", "base"} & set(page.tags)
    assert all(value.startswith("data:image/png;base64,") for value in page.values("src"))
    assert all(value.startswith("#") for value in page.values("href"))
    assert "default-src 'none'" in html


def test_names_cannot_become_markup_nor_formulas():
    evil = "--><script>alert(1)</script>$\\frac{$ 1.23456 #000001"
    nasty = report(
        title=evil,
        subtitle=evil,
        model=evil,
        concepts=[evil],
        classes=["zero", evil, "two"],
        rows=[row(label=evil, name=evil, scale=evil), row(label=evil + "2", name="b", scale=evil)],
        panels=[panel(evil)],
        record={evil: {evil: [evil]}},
        notes=[evil],
        command=evil,
        levels_label=evil,
    )
    page = Page(render_report(nasty))
    assert "script" not in page.tags
    assert page.text.count(evil) >= 10
    assert f"{evil} (noise to image)" in page.text  # inside the plots, too, nothing is rewritten
    with Console(file=io.StringIO(), width=120) as console:
        console.print(rich_table(nasty))


def test_identifiers_are_unique_and_references_resolve(html: str):
    page = Page(html)
    names = page.values("id")
    assert len(names) == len(set(names))
    assert {value[1:] for value in page.values("href")} | set(re.findall(r"url\(#([^)]+)\)", html)) <= set(names)
    assert names  # otherwise the two lines above hold of nothing


def test_plots_follow_the_colours_of_the_page(html: str):
    declared = set(re.findall(r"--([a-z0-9]+):", html))
    used = set(re.findall(r"var\(--([a-z0-9]+)\)", html))
    assert used <= declared
    assert "#0000" not in html.split("</style>")[1]
    assert "prefers-color-scheme: dark" in html


# --- writing ------------------------------------------------------------------------------------------------


def test_the_file_is_the_page_and_stands_alone(tmp_path: Path, html: str):
    path = tmp_path / "a" / "b" / "report.html"
    assert write_report(path, report()) == path
    assert path.read_text(encoding="utf-8") == html
    assert [p.name for p in path.parent.iterdir()] == ["report.html"]


def test_a_failure_leaves_the_old_report_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "report.html"
    path.write_text("old")

    def fail(*_: object) -> None:
        raise RuntimeError("no luck")

    monkeypatch.setattr(module, "histogram", fail)
    with pytest.raises(RuntimeError, match="no luck"):
        write_report(path, report())
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]


def test_a_path_that_cannot_be_written_is_refused_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "render_report", lambda _: pytest.fail("worked before it checked the path"))
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="Choose a folder"):
        write_report(tmp_path / "file" / "report.html", report())
