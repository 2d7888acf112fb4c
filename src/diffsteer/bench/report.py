"""The report of a removal run: one self-contained HTML file, a table for the terminal, CSV and JSON."""

from __future__ import annotations

import base64
import csv
import io
import json
import math
import os
import re
import secrets
import tempfile
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

import matplotlib.style
import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator
from numpy.typing import ArrayLike, NDArray
from PIL import Image
from rich import get_console
from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from diffsteer.bench.metrics import to_numpy
from diffsteer.errors import OutputError, ParameterError

__all__ = [
    "MethodPanel",
    "MethodRow",
    "RemovalReport",
    "check_writable",
    "render_report",
    "rich_table",
    "rows_to_csv",
    "rows_to_json",
    "write_report",
    "write_text",
]

Interval = tuple[float, float]
SAMPLES = 48  # images shown per method
LINES = 128  # trajectories drawn per method
ACROSS = 6  # images in a row of the grid


@dataclass(frozen=True)
class MethodRow:
    """One setting of one method, as measured. None: does not apply.

    Parameters
    ----------
    name : str
        Identifies the method; rows of one name are one line of the front.
    label : str
        What the reader sees. Neighbouring rows of one label are grouped.
    scale : str
        The setting within the method, empty if there is only one.
    forbidden, n : int
        Samples that the judge counts as forbidden, out of `n`.
    forbidden_share : float
        In [0, 1]; likewise its interval.
    kl_rejection, kl_uniform : float, optional
        KL in nats from the target's class shares to the result's; the target is the rejection set or uniform.
    fd_rejection, fd_data : float, optional
        Feature distance to the rejection set and to the data.
    *_interval : (float, float), optional
        95% intervals.
    nfe : float
        Network evaluations per sample that is kept.
    seconds : float
        Wall-clock seconds for the row's `n` samples.
    untouched : float, optional
        Share of samples whose pixels are those of the unguided sample of the same seed, in [0, 1].
    precision, recall, density, coverage : float, optional
        Of the result's features against the rejection set's.
    """

    name: str
    label: str
    scale: str
    forbidden: int
    n: int
    forbidden_share: float
    forbidden_interval: Interval | None
    kl_rejection: float | None
    kl_rejection_interval: Interval | None
    kl_uniform: float | None
    kl_uniform_interval: Interval | None
    fd_rejection: float | None
    fd_rejection_interval: Interval | None
    fd_data: float | None
    fd_data_interval: Interval | None
    nfe: float
    seconds: float
    untouched: float | None = None
    precision: float | None = None
    recall: float | None = None
    density: float | None = None
    coverage: float | None = None


@dataclass(frozen=True, eq=False)
class MethodPanel:
    """What the pictures of one method need. Sample i comes from seed i in every panel.

    Parameters
    ----------
    label : str
        What the reader sees.
    images : array_like, shape (N, C, H, W)
        In [-1, 1]; C is 1 or 3.
    forbidden : array_like of bool, shape (N,)
        The judge's verdicts.
    class_shares : array_like, shape (K,)
        Shares of all classes, in [0, 1].
    posterior : array_like, shape (steps, N), optional
        Tracked probability of the forbidden concept, in [0, 1]; NaN where it is not tracked.
    scale : array_like, shape (steps, N), optional
        Effective guidance scale; NaN where the method is off.
    """

    label: str
    images: ArrayLike
    forbidden: ArrayLike
    class_shares: ArrayLike
    posterior: ArrayLike | None = None
    scale: ArrayLike | None = None


@dataclass(frozen=True, eq=False)
class RemovalReport:
    """Everything that a report says.

    Parameters
    ----------
    title, subtitle : str
        Heading and one line below it.
    model : str
        Name of the model that was steered.
    concepts : sequence of str
        The removed classes, a proper subset of `classes`.
    classes : sequence of str
        All K classes that the judge tells apart.
    floor : float
        Share of real allowed images that the judge calls forbidden, in [0, 1]: no measured share means less than this.
    rows : sequence of MethodRow
        The table, in reading order.
    panels : sequence of MethodPanel
        The pictures. The first one is unguided: the others are compared with it, seed by seed.
    levels : sequence of float
        Horizontal axis of the traces, in sampling order: log-SNR or step numbers.
    record : mapping
        Versions, seed, configuration: whatever the run must be repeated with.
    notes : sequence of str
        Remarks printed below the table.
    command : str
        The command that makes this report again.
    levels_label : str
        What `levels` are.
    target : array_like, shape (K,), optional
        Class shares of the rejection set. Without it, the kept classes of the unguided panel.

    Raises
    ------
    ParameterError
        Parts that do not fit together; the message names the part and the shape it should have.
    """

    title: str
    subtitle: str
    model: str
    concepts: Sequence[str]
    classes: Sequence[str]
    floor: float
    rows: Sequence[MethodRow]
    panels: Sequence[MethodPanel]
    levels: Sequence[float]
    record: Mapping[str, Any]
    notes: Sequence[str] = ()
    command: str = ""
    levels_label: str = "log-SNR"
    target: ArrayLike | None = None

    def __post_init__(self) -> None:
        _require(len(self.rows) > 0, "A report needs at least one row.")
        _require(len(self.panels) > 0, "A report needs at least one panel, the unguided one first.")
        _require(
            bool(self.concepts) and set(self.concepts) < set(self.classes),
            f"The concepts {list(self.concepts)} need to be some, not all, of the classes {list(self.classes)}.",
        )
        _require(0 <= self.floor <= 1, f"The judge's floor is a share in [0, 1], got {self.floor}.")
        _require(
            self.target is None or to_numpy(self.target).shape == (len(self.classes),),
            f"The target needs one share for each of the {len(self.classes)} classes, removed ones included.",
        )
        _require(
            bool(np.isfinite(np.asarray(self.levels, dtype=np.float64)).all()),
            "The levels of the traces need to be finite; leave out the clean end, or use step numbers.",
        )
        for row in self.rows:
            _check_row(row)
        for panel in self.panels:
            _check_panel(panel, len(self.classes), len(self.levels))


# --- writing ------------------------------------------------------------------------------------------------


def check_writable(path: str | os.PathLike[str]) -> None:
    """Refuse a path that cannot be written, before any work is done. Leaves nothing behind.

    Raises
    ------
    OutputError
        The path is a folder, or the nearest existing folder above it cannot hold a file.
    """
    path = Path(path)
    if path.is_dir():
        raise OutputError(f"{path} is a folder; give the path of a file in it, e.g. {path / 'report.html'}.")
    parent = next(p for p in (path.absolute().parent, *path.absolute().parents) if p.exists())
    try:
        with tempfile.TemporaryFile(dir=parent):
            pass
    except OSError as error:
        raise _unwritable(path, error) from error


def write_report(path: str | os.PathLike[str], report: RemovalReport) -> Path:
    """Write the report as one HTML file that needs no other file and no network.

    The file appears complete or not at all, and equal reports give equal files.

    Parameters
    ----------
    path : path
        Folders that are missing are made.
    report : RemovalReport

    Returns
    -------
    Path
        The file.

    Raises
    ------
    OutputError
        The file cannot be written. An older report at that path is left as it was.
    """
    check_writable(path)
    return write_text(path, render_report(report))


def write_text(path: str | os.PathLike[str], text: str) -> Path:
    """Write a text file completely or not at all, in UTF-8; folders that are missing are made.

    Raises
    ------
    OutputError
        The file cannot be written. An older file at that path is left as it was.
    """
    path = Path(path)
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(part, "x", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        raise _unwritable(path, error) from error
    finally:
        with suppress(OSError):  # the error above says why
            part.unlink()
    return path


def render_report(report: RemovalReport) -> str:
    """Return the HTML that `write_report` writes."""
    unguided = report.panels[0]
    traced = [p for p in report.panels if p.posterior is not None or p.scale is not None]
    return template("report.html.j2").render(
        report=report,
        concepts=_listed(report.concepts),
        most=f"{max(row.n for row in report.rows):,}",
        floor=_percent(report.floor),
        columns=_HEADINGS[_first_column(report.rows) :],
        table=_table(report.rows),
        front=_front(report),
        samples=[(p.label, _grid(p, unguided), _tally(p)) for p in report.panels],
        shown=min(SAMPLES, len(to_numpy(unguided.forbidden))),
        traces=[(p.label, _posterior_plot(p, report), _scale_plot(p, report)) for p in traced],
        lines=min(LINES, len(to_numpy(unguided.forbidden))),
        histograms=[(p.label, _histogram(p, report)) for p in report.panels],
        record=[(key, _plain(value)) for key, value in report.record.items()],
    )


def template(name: str) -> Template:
    """A page of this folder; values are escaped."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(name)


# --- tables -------------------------------------------------------------------------------------------------


def rich_table(report: RemovalReport, width: int | None = None) -> Table:
    """Return the report's table for the terminal.

    Parameters
    ----------
    report : RemovalReport
    width : int, optional
        Columns of the terminal, at least 80; by default those of the current one. Below 120 the counts and the
        secondary measures (KL to uniform, distance to data) are left to the report.
    """
    hidden = {("N", "samples"), ("KL", "to uniform"), ("Distance", "to data")}
    headings = _HEADINGS[_first_column(report.rows) :]
    shown = [i for i, h in enumerate(headings) if h not in hidden or (width or get_console().width) >= 120]
    table = Table(
        title=Text(report.title),
        caption=Text(f"Small figures: 95% intervals. Judge's floor: {_percent(report.floor)}."),
        title_justify="left",
        caption_justify="left",
        box=SIMPLE_HEAD,
        collapse_padding=True,
    )
    table.add_column("Method", overflow="fold")
    for heading, below in (headings[i] for i in shown):
        short = below.removeprefix("to ").removeprefix("per ")
        table.add_column(Text.assemble(heading, "\n", (short, "dim")), justify="right", no_wrap=True)
    for label, lines in _table(report.rows):
        for line, cells in enumerate(lines):
            texts = (Text.assemble(cells[i][0], "\n" * bool(cells[i][1]), (cells[i][1], "dim")) for i in shown)
            table.add_row(Text(label if line == 0 else ""), *texts)
        table.add_section()
    return table


def rows_to_csv(rows: Iterable[MethodRow]) -> str:
    """Return the rows as CSV; an interval takes two columns, `_low` and `_high`, and None is empty."""
    names = [field.name for field in fields(MethodRow)]
    wide = {name: [f"{name[:-9]}_low", f"{name[:-9]}_high"] if name.endswith("_interval") else [name] for name in names}
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([column for columns in wide.values() for column in columns])
    for row in rows:
        line: list[Any] = []
        for name, columns in wide.items():
            value = getattr(row, name)
            line += [value] if len(columns) == 1 else value or (None, None)
        writer.writerow(line)
    return out.getvalue()


def rows_to_json(rows: Iterable[MethodRow]) -> str:
    """Return the rows as a JSON list of objects; None becomes null."""
    return json.dumps([asdict(row) for row in rows], indent=2, allow_nan=False, default=np.generic.item) + "\n"


_HEADINGS = (  # of the table's columns, and what is below them
    ("Scale", ""),
    ("N", "samples"),
    ("Forbidden", "share"),
    ("KL", "to rejection"),
    ("KL", "to uniform"),
    ("Distance", "to rejection"),
    ("Distance", "to data"),
    ("NFE", "per sample"),
    ("Time", "seconds"),
)


def _first_column(rows: Sequence[MethodRow]) -> int:
    """Leave the scales out where there are none."""
    return 0 if any(row.scale for row in rows) else 1


def _table(rows: Sequence[MethodRow]) -> list[tuple[str, list[list[tuple[str, str]]]]]:
    """Neighbouring rows of one label, each with value and interval of every column; one precision per column."""
    fine = max(row.n for row in rows) >= 10_000
    whole = all(row.nfe == round(row.nfe) for row in rows)
    columns = [
        [(row.scale, "") for row in rows],
        [(f"{row.n:,}", "") for row in rows],
        [_cell(100 * row.forbidden_share, _times(100, row.forbidden_interval), 1 + fine, "%") for row in rows],
        [_cell(row.kl_rejection, row.kl_rejection_interval, 3 + fine) for row in rows],
        [_cell(row.kl_uniform, row.kl_uniform_interval, 3 + fine) for row in rows],
        _column([(row.fd_rejection, row.fd_rejection_interval) for row in rows]),
        _column([(row.fd_data, row.fd_data_interval) for row in rows]),
        [_cell(row.nfe, None, 1 - whole) for row in rows],
        _column([(row.seconds, None) for row in rows]),
    ]
    lines = zip((row.label for row in rows), map(list, zip(*columns[_first_column(rows) :], strict=True)), strict=True)
    return [(label, [cells for _, cells in group]) for label, group in groupby(lines, key=itemgetter(0))]


def _times(factor: float, interval: Interval | None) -> Interval | None:
    return None if interval is None else (factor * interval[0], factor * interval[1])


def _column(cells: list[tuple[float | None, Interval | None]]) -> list[tuple[str, str]]:
    """Two significant digits for the smallest value, unless that gives the largest more than five."""
    sizes = [math.floor(math.log10(abs(value))) for value, _ in cells if value]
    places = max(0, min(1 - min(sizes), 4 - max(sizes))) if sizes else 0
    return [_cell(value, interval, places) for value, interval in cells]


def _cell(value: float | None, interval: Interval | None, places: int, unit: str = "") -> tuple[str, str]:
    if value is None:
        return "–", ""
    first, *ends = (f"{number:,.{places}f}".replace("-", "−") for number in (value, *(interval or ())))
    return first + unit, _range(*ends) if ends else ""


def _percent(share: float) -> str:
    return f"{100 * share:.2f}".rstrip("0").rstrip(".") + "%"


def _range(low: str, high: str) -> str:
    return f"{low} to {high}" if low.startswith("−") else f"{low}–{high}"


def _listed(names: Sequence[str]) -> str:
    return " and ".join(filter(None, [", ".join(f"“{n}”" for n in names[:-1]), f"“{names[-1]}”"]))


def _tally(panel: MethodPanel) -> str:
    forbidden = to_numpy(panel.forbidden)[:SAMPLES]
    return f"{int(forbidden.sum())} of {len(forbidden)} forbidden"


def _plain(value: Any, indent: str = "") -> str:
    """Nested settings as indented lines."""
    if isinstance(value, Mapping):
        lines = []
        for key, inner in value.items():
            nested = isinstance(inner, Mapping) and bool(inner)
            text = _plain(inner, indent + "  ")
            lines.append(f"{indent}{key}:\n{text}" if nested else f"{indent}{key}: {text}")
        return "\n".join(lines)
    if isinstance(value, list | tuple):
        return ", ".join(map(_plain, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


# --- pictures -----------------------------------------------------------------------------------------------

# Colours that stand for variables of the page's style sheet, so that the plots follow light and dark mode.
_INK, _MUTED, _RULE, _BAD, _BAR = "#000001", "#000002", "#000003", "#000004", "#000005"
_SERIES = tuple(f"#0001{i:02x}" for i in range(6))
_VARIABLES = {_INK: "ink", _MUTED: "muted", _RULE: "rule", _BAD: "bad", _BAR: "bar"} | {
    colour: f"s{i}" for i, colour in enumerate(_SERIES)
}
_MARKERS = "osD^vP"
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text: it follows the page's font and can be searched
    "svg.hashsalt": "diffsteer",
    "text.parse_math": False,  # a class may be called "$\\frac"
    "text.color": _INK,
    "axes.edgecolor": _RULE,
    "axes.labelcolor": _MUTED,
    "axes.titlecolor": _INK,
    "xtick.color": _RULE,
    "ytick.color": _RULE,
    "xtick.labelcolor": _MUTED,
    "ytick.labelcolor": _MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.unicode_minus": True,
    "font.size": 9,
    "axes.labelsize": 9,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "lines.solid_joinstyle": "round",
}


def _svg(draw: Callable[[Axes], None], key: str, width: float = 5.4, height: float = 2.8) -> Markup:
    """Draw on one pair of axes and return SVG to be set inside the page; `key` keeps its identifiers apart."""
    out = io.StringIO()
    with matplotlib.style.context(["default", _STYLE]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # the reader's browser has the glyph
        figure = Figure(figsize=(width, height), layout="constrained")
        draw(figure.subplots())
        figure.savefig(
            out, format="svg", transparent=True, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type"))
        )
    svg = re.sub(r"<(metadata|style)\b.*?</\1>", "", out.getvalue(), flags=re.DOTALL)
    svg = re.sub(r"<[^>]*>", lambda tag: _inline(tag[0], key), svg[svg.index("<svg") :])  # tags, never text
    return Markup(re.sub(r"\n\s*", "\n", svg))


def _inline(tag: str, key: str) -> str:
    """Make one SVG tag fit for a page: the page's colours and font, unique identifiers, short numbers."""
    if tag.startswith("<svg"):
        return re.sub(r".*?(viewBox=\"[^\"]*\").*", r'<svg \1 aria-hidden="true">', tag, flags=re.DOTALL)
    tag = re.sub(r' id="\w+_\d+"', "", tag)
    tag = re.sub(r'(id="|url\(#|xlink:href="#)(\w)', rf"\g<1>{key}-\2", tag).replace("xlink:href", "href")
    tag = re.sub(r"font-family: [^;\"]*;? ?", "", re.sub(r"font: [^;\"]*?([\d.]+px)[^;\"]*", r"font-size: \1", tag))
    tag = re.sub(r"\d+\.\d{3,}", lambda number: f"{float(number[0]):.2f}".rstrip("0").rstrip("."), tag)
    return re.sub("|".join(_VARIABLES), lambda colour: f"var(--{_VARIABLES[colour[0]]})", tag)


def _front(report: RemovalReport) -> tuple[Markup, list[tuple[str, str]]] | None:
    """Forbidden share against KL to the rejection set, one line per method, and the key: (variable, label)."""
    rows = [row for row in report.rows if row.kl_rejection is not None]
    if len(rows) < 2:
        return None
    methods = {name: [row for row in rows if row.name == name] for name in dict.fromkeys(row.name for row in rows)}
    colours = [_SERIES[0], *(_SERIES[1 + i % (len(_SERIES) - 1)] for i in range(len(methods) - 1))]  # grey is unguided

    def draw(axes: Axes) -> None:
        for i, (mine, colour) in enumerate(zip(methods.values(), colours, strict=True)):
            x, x_error = _log_values([(r.forbidden_share, r.forbidden_interval, 0.5 / r.n) for r in mine], 100)
            y, y_error = _log_values([(r.kl_rejection, r.kl_rejection_interval, 0.5 / r.n) for r in mine])
            axes.errorbar(x, y, xerr=x_error, yerr=y_error, fmt="none", ecolor=colour, elinewidth=0.7, alpha=0.5)
            axes.plot(x, y, color=colour, marker=_MARKERS[i % len(_MARKERS)], ms=4.5, lw=1.2, mew=0)
        if report.floor > 0:
            axes.axvline(100 * report.floor, color=_MUTED, lw=0.8, ls=(0, (3, 3)), zorder=0)
        axes.set(xscale="log", yscale="log", xlabel="forbidden share, %", ylabel="KL to rejection set, nats")
        for axis, limits in ((axes.xaxis, axes.get_xlim()), (axes.yaxis, axes.get_ylim())):
            axis.set_major_locator(FixedLocator(_log_ticks(*limits)))
            axis.set_minor_locator(NullLocator())
            axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.grid(color=_RULE, lw=0.5, alpha=0.6)

    key = [(_VARIABLES[colour], mine[0].label) for mine, colour in zip(methods.values(), colours, strict=True)]
    return _svg(draw, "front", 5.6, 3.6), key


def _grid(panel: MethodPanel, unguided: MethodPanel) -> str:
    """First samples as a PNG data address; forbidden ones framed in red, those that were without guidance in blue."""
    images = _pixels(to_numpy(panel.images)[:SAMPLES])
    n, height, width, _ = images.shape
    gap = max(4, round(0.09 * max(height, width)))
    sheet = np.zeros((-(-n // ACROSS) * (height + gap) + gap, ACROSS * (width + gap) + gap, 4), np.uint8)
    now, before = to_numpy(panel.forbidden), to_numpy(unguided.forbidden)
    for i, image in enumerate(images):
        top, left = gap + i // ACROSS * (height + gap), gap + i % ACROSS * (width + gap)
        frame = (212, 54, 44, 255) if now[i] else (66, 133, 214, 255) if i < len(before) and before[i] else None
        if frame:
            line = gap * 3 // 4
            sheet[top - line : top + height + line, left - line : left + width + line] = frame
        sheet[top : top + height, left : left + width] = image
    out = io.BytesIO()
    Image.fromarray(sheet, "RGBA").save(out, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(out.getvalue()).decode()


def _pixels(images: NDArray) -> NDArray[np.uint8]:
    """(N, C, H, W) in [-1, 1] to (N, H', W', 4); small images grow by whole pixels, large ones shrink to 128."""
    values = np.clip(np.rint((images.astype(np.float64) + 1) * 127.5), 0, 255).astype(np.uint8).transpose(0, 2, 3, 1)
    side = max(values.shape[1:3])
    values = np.concatenate(
        [np.broadcast_to(values, (*values.shape[:3], 3)), np.full_like(values[..., :1], 255)], axis=3
    )
    if side > 128:
        size = (-(-128 * values.shape[2] // side), -(-128 * values.shape[1] // side))
        return np.stack([np.asarray(Image.fromarray(v, "RGBA").resize(size, Image.Resampling.BOX)) for v in values])
    factor = -(-56 // side)
    return values.repeat(factor, axis=1).repeat(factor, axis=2)


def _posterior_plot(panel: MethodPanel, report: RemovalReport) -> Markup | None:
    if panel.posterior is None:
        return None
    seen = [_logit(to_numpy(p.posterior)) for p in report.panels if p.posterior is not None]
    low, high = min(np.nanmin(s) for s in seen), max(np.nanmax(s) for s in seen)
    low, high = min(low, _logit(0.05)) - 0.3, max(high, _logit(0.5)) + 0.3  # one axis for all methods

    def draw(axes: Axes) -> None:
        _trajectories(axes, _logit(to_numpy(panel.posterior)), report)
        ticks = [p for p in _POSTERIOR_TICKS if low <= _logit(p) <= high]
        ticks = ticks[:: -(-len(ticks) // 7)]
        axes.set_yticks([_logit(p) for p in ticks], [f"{100 * p:g}%" for p in ticks])
        axes.set(ylim=(low, high), ylabel="posterior (log-odds axis)")

    return _svg(draw, f"p{report.panels.index(panel)}")


def _scale_plot(panel: MethodPanel, report: RemovalReport) -> Markup | None:
    if panel.scale is None:
        return None

    def draw(axes: Axes) -> None:
        values = to_numpy(panel.scale)
        _trajectories(axes, values, report)
        low, high = min(float(np.nanmin(values)), 0.0), max(float(np.nanmax(values)), 0.0)
        margin = 0.05 * (high - low) or 0.05
        axes.set(ylim=(low - margin, high + margin), ylabel="effective scale")

    return _svg(draw, f"w{report.panels.index(panel)}")


def _trajectories(axes: Axes, values: NDArray, report: RemovalReport) -> None:
    """One thin line per sample and the median of each group; red: forbidden without guidance."""
    steps = np.unique(np.linspace(0, len(values) - 1, min(len(values), 200)).round().astype(int))
    levels = np.asarray(report.levels, dtype=np.float64)[steps]
    bad = np.zeros(values.shape[1], dtype=bool)
    before = to_numpy(report.panels[0].forbidden)[: len(bad)]
    bad[: len(before)] = before
    for group, colour, order in ((~bad, _MUTED, 1), (bad, _BAD, 2)):
        lines = values[steps][:, group]
        if not lines.size:
            continue
        thin = lines[:, : int(group[:LINES].sum())]
        breaks = np.full((1, thin.shape[1]), np.nan)  # one path for all lines keeps the file small
        x = np.broadcast_to(np.append(levels, np.nan)[:, None], (len(levels) + 1, thin.shape[1]))
        axes.plot(x.T.ravel(), np.vstack([thin, breaks]).T.ravel(), color=colour, lw=0.5, alpha=0.4, zorder=order)
        known = ~np.isnan(lines).all(1)
        axes.plot(levels[known], np.nanmedian(lines[known], axis=1), color=colour, lw=2, zorder=order + 2)
    margin = 0.01 * (levels[-1] - levels[0]) or 0.5
    axes.set_xlim(levels[0] - margin, levels[-1] + margin)  # falling levels run to the right, too
    axes.set_xlabel(f"{report.levels_label} (noise to image)")
    axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.grid(axis="y", color=_RULE, lw=0.5, alpha=0.6)


def _histogram(panel: MethodPanel, report: RemovalReport) -> Markup:
    removed = np.isin(list(report.classes), list(report.concepts))
    target = np.where(removed, 0, to_numpy(report.panels[0].class_shares if report.target is None else report.target))
    target = target / (target.sum() or 1)
    top = 108 * max(target.max(), *(float(to_numpy(p.class_shares).max()) for p in report.panels))

    named = np.arange(len(target)) if len(target) <= 24 else np.flatnonzero(removed)  # more would not be readable
    names = [name if len(name) <= 14 else name[:13] + "…" for name in (report.classes[int(i)] for i in named)]
    upright = len(target) * max(map(len, names)) <= 48

    def draw(axes: Axes) -> None:
        x = np.arange(len(target))
        axes.bar(x, 100 * to_numpy(panel.class_shares), 0.7, color=np.where(removed, _BAD, _BAR))
        axes.hlines(100 * target, x - 0.45, x + 0.45, color=_INK, lw=1.3)
        axes.set_xticks(named, names, rotation=0 if upright else 90)
        axes.tick_params(axis="x", length=0)
        axes.set(ylim=(0, top), ylabel="share of samples, %", xlim=(-0.7, len(x) - 0.3))
        for label, bad in zip(axes.get_xticklabels(), removed[named], strict=True):
            label.set_color(_BAD if bad else _MUTED)

    return _svg(draw, f"h{report.panels.index(panel)}", width=4.3, height=2.4 if upright else 3.1)


_POSTERIOR_TICKS = (1e-6, 1e-5, 1e-4, 1e-3, 0.01, 0.1, 0.5, 0.9, 0.99, 0.999, 0.9999)


def _logit(p: Any) -> Any:
    p = np.clip(p, 1e-6, 1 - 1e-6)
    return np.log(p) - np.log1p(-p)


def _log_values(
    points: list[tuple[Any, Interval | None, float]], factor: float = 1
) -> tuple[list[float], NDArray | None]:
    """Values and error bars for a log axis; `floor` stands in for zero."""
    values = [factor * max(value, floor) for value, _, floor in points]
    if any(interval is None for _, interval, _ in points):
        return values, None
    ends = [[factor * max(end, floor) for end in interval or ()] for _, interval, floor in points]
    errors = [[max(v - low, 0), max(high - v, 0)] for v, (low, high) in zip(values, ends, strict=True)]
    return values, np.transpose(errors)


def _log_ticks(low: float, high: float) -> list[float]:
    """1-2-5 ticks over a short span, decades over a long one."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    digits = (1, 2, 5) if high / low < 150 else (1, 3) if high / low < 3000 else (1,)
    ticks = [digit * 10.0**decade for decade in decades for digit in digits]
    return [tick for tick in ticks if low <= tick <= high]


# --- checks -------------------------------------------------------------------------------------------------


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ParameterError(message)


def _check_row(row: MethodRow) -> None:
    for field in fields(row):
        value = getattr(row, field.name)
        numbers = value if isinstance(value, tuple) else () if value is None or isinstance(value, str) else (value,)
        _require(
            all(math.isfinite(v) for v in numbers),
            f"Row {row.label!r}: {field.name} is {value}; pass None where a measure does not apply.",
        )
    _require(0 <= row.forbidden <= row.n, f"Row {row.label!r}: {row.forbidden} forbidden of {row.n} samples.")


def _check_panel(panel: MethodPanel, num_classes: int, steps: int) -> None:
    name = f"Panel {panel.label!r}"
    shape = to_numpy(panel.images).shape
    _require(
        len(shape) == 4 and shape[0] > 0 and shape[1] in (1, 3),
        f"{name}: images need shape (N, 1 or 3, H, W), got {shape}; decode latents first.",
    )
    forbidden = to_numpy(panel.forbidden)
    _require(
        forbidden.shape == shape[:1] and forbidden.dtype == np.bool_,
        f"{name}: forbidden needs one bool per image, {shape[0]}, got {forbidden.dtype} {forbidden.shape}.",
    )
    shares = to_numpy(panel.class_shares)
    _require(shares.shape == (num_classes,), f"{name}: class_shares needs shape ({num_classes},), got {shares.shape}.")
    for part, low, high in (("posterior", 0.0, 1.0), ("scale", -math.inf, math.inf)):
        if getattr(panel, part) is not None:
            values = to_numpy(getattr(panel, part))
            _require(
                values.shape == (steps, shape[0]),
                f"{name}: {part} needs shape (levels, images) = ({steps}, {shape[0]}), got {values.shape}.",
            )
            known = values[~np.isnan(values)]
            _require(
                known.size > 0 and bool(((known >= low) & (known <= high) & np.isfinite(known)).all()),
                f"{name}: {part} needs finite values in [{low:g}, {high:g}] (NaN: not tracked), not all NaN.",
            )


def _unwritable(path: Path, error: OSError) -> OutputError:
    reason = error.strerror or type(error).__name__
    return OutputError(f"Cannot write {path}: {reason}. Choose a folder that you may write to, with space left.")
