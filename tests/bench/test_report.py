"""The report: what it says, that it stands alone, that nothing in it can act, and that no write leaves a ruin."""

from __future__ import annotations

import base64
import csv
import dataclasses
import io
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from diffsteer.bench import report as module
from diffsteer.bench.report import (
    MethodPanel,
    MethodRow,
    RemovalReport,
    check_writable,
    render_report,
    rich_table,
    rows_to_csv,
    rows_to_json,
    write_report,
    write_text,
)
from diffsteer.errors import OutputError, ParameterError

STEPS, N = 12, 20


def row(**changes: object) -> MethodRow:
    values = {
        "name": "np",
        "label": "Negative prompting",
        "scale": "0.3",
        "forbidden": 14,
        "n": 1000,
        "forbidden_share": 0.014,
        "forbidden_interval": (0.0084, 0.0234),
        "kl_rejection": 0.036,
        "kl_rejection_interval": (0.0301, 0.0432),
        "kl_uniform": 0.041,
        "kl_uniform_interval": (0.035, 0.05),
        "fd_rejection": 0.52,
        "fd_rejection_interval": (0.4, 0.63),
        "fd_data": 12.3,
        "fd_data_interval": None,
        "nfe": 100.0,
        "seconds": 8.25,
    }
    return MethodRow(**(values | changes))  # type: ignore[arg-type]


def panel(label: str = "Unguided", seed: int = 0, **changes: object) -> MethodPanel:
    rng = np.random.default_rng(seed)
    values = {
        "images": torch.from_numpy(rng.uniform(-1, 1, (N, 1, 8, 8))).float(),
        "forbidden": torch.arange(N) % 5 == seed,
        "class_shares": np.array([0.5, 0.3, 0.2]),
        "posterior": rng.uniform(0, 1, (STEPS, N)),
        "scale": rng.uniform(0, 3, (STEPS, N)),
    }
    return MethodPanel(label, **(values | changes))  # type: ignore[arg-type]


def report(**changes: object) -> RemovalReport:
    values = {
        "title": "Digits without the 2",
        "subtitle": "8 x 8 digits",
        "model": "digits",
        "concepts": ["two"],
        "classes": ["zero", "one", "two"],
        "floor": 0.004,
        "rows": [
            row(name="unguided", label="Unguided", scale="", forbidden_share=0.2, forbidden=200, kl_rejection=0.22),
            row(name="rejection", label="Rejection", scale="", forbidden=0, forbidden_share=0.0, fd_rejection=None),
            row(),
            row(scale="0.5", forbidden=0, forbidden_share=0.0, forbidden_interval=(0.0, 0.0038)),
        ],
        "panels": [panel("Unguided", 0, posterior=None, scale=None), panel("Negative prompting", 1)],
        "levels": np.linspace(-8, 6, STEPS),
        "record": {"seed": 0, "scheduler": {"name": "DDIM", "eta": 0.0}},
        "notes": ["a remark"],
        "command": "diffsteer remove digits --concept 2",
    }
    return RemovalReport(**(values | changes))  # type: ignore[arg-type]


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


def test_the_table_shows_value_and_interval_of_every_row(html: str):
    text = Page(html).text
    assert "Negative prompting 0.3 1,000 1.4% 0.8–2.3 0.036 0.030–0.043 0.041 0.035–0.050" in text
    assert "0.5 1,000 0.0% 0.0–0.4" in text
    assert "0.041 0.035–0.050 – 12 100 8.2" in text  # no distance of the rejection set to itself
    assert 'rowspan="2">Negative prompting<' in html


def test_scales_are_left_out_where_there_are_none():
    plain = [row(scale="", label=label) for label in ("A", "B")]
    assert "Scale" not in Page(render_report(report(rows=plain))).words
    assert [c.header.plain.split("\n")[0] for c in rich_table(report(rows=plain), 120).columns[1:3]] == [
        "N",
        "Forbidden",
    ]


def test_a_column_has_one_precision_that_shows_its_smallest_value():
    rows = [row(fd_rejection=0.0123, fd_rejection_interval=(-0.01, 0.04)), row(fd_rejection=4.5)]
    cells = [line[5] for _, lines in module._table(rows) for line in lines]
    assert cells == [("0.012", "−0.010 to 0.040"), ("4.500", "0.400–0.630")]
    assert module._column([(12345.6, None), (0.02, None), (None, None)]) == [("12,346", ""), ("0", ""), ("–", "")]


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


# --- pictures -----------------------------------------------------------------------------------------------


def sheet(address: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(address.partition(",")[2]))))


def tile(pixels: np.ndarray, i: int, size: int = 56) -> np.ndarray:
    gap = 5
    top, left = gap + i // 6 * (size + gap), gap + i % 6 * (size + gap)
    return pixels[top : top + size, left : left + size]


def test_images_grow_by_whole_pixels_and_keep_their_values():
    images = torch.full((3, 1, 8, 8), -1.0)
    images[0, 0, 2, 3], images[1], images[2] = 1.0, 0.5, 5.0  # 5 lies outside and is clipped
    quiet = panel(images=images, forbidden=[False] * 3, posterior=None, scale=None)
    pixels = sheet(module._grid(quiet, quiet))
    expected = np.zeros((56, 56), np.uint8)
    expected[14:21, 21:28] = 255
    assert (tile(pixels, 0)[..., :3] == expected[..., None]).all()
    assert (tile(pixels, 1)[..., :3] == 191).all()
    assert (tile(pixels, 2) == 255).all()
    assert pixels[0, 0, 3] == 0  # gaps are transparent, for light and dark pages


def test_forbidden_samples_are_framed_in_red_and_those_that_were_in_blue():
    black = torch.full((3, 3, 8, 8), -1.0)
    before = panel(images=black, forbidden=[True, True, False])
    after = panel(images=black, forbidden=[True, False, False])
    pixels = sheet(module._grid(after, before))

    def frame(i: int) -> list[int]:
        return pixels[3, 5 + 61 * i + 28].tolist()

    assert frame(0)[0] > 200
    assert frame(1)[2] > 200
    assert frame(2)[3] == 0
    assert sheet(module._grid(before, before))[3, 5 + 61 + 28, 0] > 200


def test_large_and_colour_images_shrink():
    images = torch.zeros(2, 3, 300, 150)
    images[:, 0], images[:, 1] = 1.0, -1.0
    large = panel(images=images, forbidden=[False] * 2, posterior=None, scale=None)
    pixels = sheet(module._grid(large, large))
    assert pixels.shape[0] < 160
    assert pixels[60, 40].tolist() == [255, 0, 128, 255]


def test_only_the_first_samples_are_shown():
    many = panel(images=torch.zeros(60, 1, 8, 8), forbidden=torch.arange(60) >= 48, posterior=None, scale=None)
    assert sheet(module._grid(many, many)).shape == (8 * 61 + 5, 6 * 61 + 5, 4)
    assert module._tally(many) == "0 of 48 forbidden"


def lines(svg: str, colour: str) -> list[np.ndarray]:
    """Corner points of every path that is drawn in a colour."""
    paths = re.findall(rf'<path d="([^"]*)"[^>]*stroke: var\(--{colour}\)', svg)
    return [np.array(re.findall(r"[ML] ([-\d.]+) ([-\d.]+)", path), float) for path in paths]


def test_trajectories_are_split_by_what_happens_without_guidance():
    scale = np.zeros((STEPS, N))
    scale[:, ::5] = 2.0  # the seeds that are forbidden without guidance
    svg = str(module._scale_plot(steered := panel(scale=scale), report(panels=[panel(), steered][::-1])))
    height = {colour: {y for path in lines(svg, colour) for y in path[:, 1]} for colour in ("bad", "muted")}
    assert len(height["bad"]) == len(height["muted"]) == 1
    assert height["bad"].pop() < height["muted"].pop()  # SVG counts downwards: red is above


def test_time_runs_to_the_right_for_falling_levels_and_gaps_stay_gaps():
    posterior = np.full((STEPS, N), 0.1)
    posterior[: STEPS // 2] = np.nan
    for levels in (np.arange(STEPS), np.arange(STEPS)[::-1]):
        tracked = report(panels=[panel(posterior=posterior)], levels=levels)
        svg = str(module._posterior_plot(tracked.panels[0], tracked))
        x = np.concatenate(lines(svg, "bad"))[:, 0]
        width = float(re.findall(r'viewBox="0 0 ([\d.]+)', svg)[0])
        assert x.min() > width / 2


def test_the_histogram_compares_with_the_rejection_set():
    svg = str(module._histogram((subject := report()).panels[0], subject))
    strokes = sorted(path[0, 1] for path in lines(svg, "ink"))
    axis = strokes[-1]  # the removed class: nothing should be left
    bars = sorted(
        np.ptp([float(y) for y in re.findall(r"[ML] [\d.]+ ([\d.]+)", path)])
        for path in re.findall(r'<path d="([^"]*)"[^>]*fill: var\(--bar\)', svg)
    )
    assert (axis - strokes[0]) / bars[1] == pytest.approx(0.5 / 0.8 / 0.5, rel=0.01)
    assert (axis - strokes[1]) / bars[0] == pytest.approx(0.3 / 0.8 / 0.3, rel=0.01)
    given = report(target=[0.2, 0.8, 0.0])
    strokes = sorted(path[0, 1] for path in lines(str(module._histogram(given.panels[0], given)), "ink"))
    assert (strokes[-1] - strokes[0]) / (strokes[-1] - strokes[1]) == pytest.approx(4, rel=0.01)


def test_a_front_needs_two_rows():
    assert module._front(report(rows=[row()])) is None
    _, key = module._front(report()) or ("", [])
    assert [label for _, label in key] == ["Unguided", "Rejection", "Negative prompting"]
    assert key[0][0] == "s0"


# --- other outputs ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [80, 119, 120, 160])
def test_the_terminal_table_fits_and_loses_no_digit(width: int):
    rows = [
        row(label="Driven by a classifier that knows noise", n=20_000, forbidden_interval=(0.1012, 0.1234), nfe=1234.5),
        row(label="Safe latent diffusion", fd_data_interval=(11.12, 13.13), kl_rejection_interval=(0.03, 1.2345)),
        row(label="Rejection [bold]", fd_rejection=None, fd_rejection_interval=None, seconds=4321.0),
    ]
    out = io.StringIO()
    Console(file=out, width=width).print(rich_table(report(rows=rows), width))
    text = out.getvalue()
    assert max(map(len, text.splitlines())) <= width
    for part in ("Driven by", "10.12–12.34", "0.0300–1.2345", "1,234.5", "4,321", "[bold]", "floor: 0.4%"):
        assert part in text
    assert "…" not in text
    assert ("11–13" in text and "20,000" in text and "uniform" in text) == (width >= 120)


def test_csv_and_json_hold_every_number():
    rows = [row(), row(fd_rejection=None, fd_rejection_interval=None, label='a "quoted", label')]
    first, second = csv.DictReader(io.StringIO(rows_to_csv(rows)))
    assert float(first["kl_rejection_low"]) == 0.0301
    assert float(first["forbidden_high"]) == 0.0234
    assert (second["fd_rejection"], second["fd_rejection_low"], second["label"]) == ("", "", 'a "quoted", label')
    loaded = json.loads(rows_to_json(rows))
    assert loaded[0] == json.loads(json.dumps(dataclasses.asdict(rows[0])))
    assert loaded[1]["fd_rejection"] is None
    assert json.loads(rows_to_json([row(n=np.int64(7), forbidden=np.int64(2))]))[0]["n"] == 7


# --- writing ------------------------------------------------------------------------------------------------


def test_write_makes_folders_and_leaves_one_file(tmp_path: Path, html: str):
    path = tmp_path / "a" / "b" / "report.html"
    check_writable(path)
    assert list(tmp_path.iterdir()) == []  # asking leaves nothing behind
    assert write_report(path, report()) == path
    assert path.read_text(encoding="utf-8") == html
    assert [p.name for p in path.parent.iterdir()] == ["report.html"]


@pytest.mark.parametrize("broken", ["render", "write", "replace"])
def test_a_failure_leaves_the_old_report_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str):
    path = tmp_path / "report.html"
    path.write_text("old")

    def fail(*_: object) -> None:
        raise (RuntimeError if broken == "render" else OSError)("no luck")

    if broken == "render":
        monkeypatch.setattr(module, "_histogram", fail)
    else:
        monkeypatch.setattr(module.os, {"write": "fsync", "replace": "replace"}[broken], fail)
    with pytest.raises(RuntimeError if broken == "render" else OutputError, match=r"no luck|Cannot write"):
        write_report(path, report())
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]


def test_paths_that_cannot_be_written_are_refused_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "render_report", lambda _: pytest.fail("worked before it checked the path"))
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="Choose a folder"):
        write_report(tmp_path / "file" / "report.html", report())
    with pytest.raises(OutputError, match=r"is a folder; give the path of a file in it, e\.g\."):
        write_report(tmp_path, report())

    def refuse(**_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(module.tempfile, "TemporaryFile", refuse)
    with pytest.raises(OutputError, match=r"Permission denied\. Choose a folder"):
        check_writable(tmp_path / "report.html")


def test_write_text_is_utf8_with_plain_line_ends(tmp_path: Path):
    assert write_text(tmp_path / "x.txt", "é\n").read_bytes() == "é\n".encode()


# --- refusals -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: report(rows=[]), "at least one row"),
        (lambda: report(panels=[]), "the unguided one first"),
        (lambda: report(concepts=["ten"]), "some, not all, of the classes"),
        (lambda: report(concepts=[]), "some, not all, of the classes"),
        (lambda: report(concepts=["zero", "one", "two"]), "some, not all"),
        (lambda: report(floor=1.2), "share in"),
        (lambda: report(target=[0.5, 0.5]), "each of the 3 classes"),
        (lambda: report(levels=[math.inf] * STEPS), "finite"),
        (lambda: report(rows=[row(kl_uniform=math.nan)]), "kl_uniform is nan; pass None"),
        (lambda: report(rows=[row(fd_data_interval=(0.0, math.inf))]), "fd_data_interval"),
        (lambda: report(rows=[row(forbidden=1001)]), "1001 forbidden of 1000"),
        (lambda: report(panels=[panel(images=np.zeros((N, 4, 8, 8)))]), "decode latents"),
        (lambda: report(panels=[panel(forbidden=np.zeros(N))]), "one bool per image"),
        (lambda: report(panels=[panel(class_shares=[0.5, 0.5])]), r"shape \(3,\)"),
        (lambda: report(panels=[panel(posterior=np.zeros((N, STEPS)))]), r"\(12, 20\)"),
        (lambda: report(panels=[panel(posterior=np.full((STEPS, N), 1.1))]), r"in \[0, 1\]"),
        (lambda: report(panels=[panel(scale=np.full((STEPS, N), np.nan))]), "not all NaN"),
    ],
)
def test_parts_that_do_not_fit_are_named(make, message: str):
    with pytest.raises(ParameterError, match=message):
        make()
