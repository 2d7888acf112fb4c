"""The pictures of a report: plots as SVG in the colours of the page, samples as PNG; both are set into the page."""

from __future__ import annotations

import base64
import io
import math
import re
import warnings
from collections.abc import Callable
from typing import Any

import matplotlib.style
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator
from numpy.typing import NDArray
from PIL import Image

from diffsteer.bench.arrays import to_numpy
from diffsteer.bench.intervals import Interval
from diffsteer.bench.report import MethodPanel, RemovalReport

__all__ = ["LINES", "SAMPLES", "front_plot", "grid", "histogram", "posterior_plot", "scale_plot"]

SAMPLES = 48  # images shown per method
LINES = 128  # trajectories drawn per method
ACROSS = 6  # images in a row of the grid

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


def front_plot(report: RemovalReport) -> tuple[Markup, list[tuple[str, str]]] | None:
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


def grid(panel: MethodPanel, unguided: MethodPanel) -> str:
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
    return png_address(Image.fromarray(sheet, "RGBA"))


def png_address(image: Image.Image) -> str:
    """A picture as a PNG data address, for pages that need no other file."""
    out = io.BytesIO()
    image.save(out, "PNG", optimize=True)
    return data_address(out.getvalue())


def data_address(png: bytes) -> str:
    """The content of a PNG file as a data address."""
    return "data:image/png;base64," + base64.b64encode(png).decode()


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


def posterior_plot(panel: MethodPanel, report: RemovalReport) -> Markup | None:
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


def scale_plot(panel: MethodPanel, report: RemovalReport) -> Markup | None:
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


def histogram(panel: MethodPanel, report: RemovalReport) -> Markup:
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
