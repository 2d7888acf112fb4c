"""Pictures of the benchmark."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

from diffsteer.bench.removal import NAMES
from diffsteer.files import write_figure

if TYPE_CHECKING:
    from diffsteer.bench.report import MethodPanel
    from diffsteer.bench.sweep_report import Entry

_DOWN = 4  # samples in a column of a panel
_ACROSS = 5  # panels of samples beside each other: more would be too small to see

STYLES = {
    "unguided": ("0.45", "x"),
    "rejection": ("black", "*"),
    "conditional": ("0.3", "+"),
    "np": ("#c0504d", "o"),
    "sld": ("#d99a2b", "s"),
    "sld-medium": ("#8c6d1f", "v"),
    "dng-paper": ("#7b3294", "P"),
    "dng": ("#2166ac", "D"),
    "ceiling": ("#74add1", "^"),
}


def draw_samples(path: Path, panels: Sequence[MethodPanel], columns: int = 9, framed: str = "left") -> None:
    """The first samples of every method side by side, forbidden ones framed in red, and their share in the titles."""
    across, down = min(len(panels), _ACROSS), math.ceil(len(panels) / _ACROSS)
    with mpl.rc_context({"font.size": 8}):
        figure = Figure(figsize=(2.6 * across, 1.75 * down), layout="constrained")
        axes = figure.subplots(down, across, squeeze=False).ravel()
        for axis in axes[len(panels) :]:
            axis.remove()
        for axis, panel in zip(axes, panels, strict=False):
            images = np.asarray(panel.images)[: _DOWN * columns].transpose(0, 2, 3, 1)
            forbidden = np.asarray(panel.forbidden)
            images = (images.clip(-1, 1) + 1) / 2
            height, width = images.shape[1] + 2, images.shape[2] + 2
            between = 1.0 if images.shape[-1] == 1 else 0.85  # grey where pictures may be white themselves
            sheet = np.full((_DOWN * height, columns * width, 3), between)
            for i, image in enumerate(images):
                top, left = i // columns * height, i % columns * width
                if forbidden[i]:
                    sheet[top : top + height, left : left + width] = (0.85, 0.1, 0.1)
                sheet[top + 1 : top + height - 1, left + 1 : left + width - 1] = image
            axis.imshow(sheet, interpolation="nearest")
            axis.set_title(f"{panel.label}\n{forbidden.mean():.1%} {framed}")
            axis.axis("off")
        write_figure(path, figure, dpi=200)


def draw_fronts(out: Path, entries: Sequence[Entry]) -> None:
    """One picture per scheduler: forbidden share against KL and distance, one column per reported concept."""
    for kind in dict.fromkeys(e.scheduler for e in entries):
        shown = [e for e in entries if e.scheduler == kind and e.reported]
        concepts = list(dict.fromkeys(e.concept for e in shown))
        with mpl.rc_context({"font.size": 8, "svg.hashsalt": "diffsteer"}):
            figure = Figure(figsize=(2.3 * len(concepts) + 0.6, 4.8), layout="constrained")
            axes = figure.subplots(2, len(concepts), squeeze=False, sharex=True, sharey="row")
            for column, concept in enumerate(concepts):
                for method, (color, marker) in STYLES.items():
                    rows = sorted(
                        (e for e in shown if e.concept == concept and e.method == method), key=lambda e: e.scale
                    )
                    if not rows:
                        continue
                    share = [max(e.row.forbidden_share, 0.5 / e.row.n) * 100 for e in rows]
                    kl = [max(e.row.kl_rejection or 0, 0.5 / e.row.n) for e in rows]
                    distance = [e.row.fd_rejection for e in rows]
                    style = {"color": color, "marker": marker, "ms": 4, "lw": 1, "label": NAMES[method]}
                    axes[0, column].plot(share, kl, **style)
                    axes[1, column].plot(share, distance, **style)
                axes[0, column].set_title(f"without {concept}")
                axes[1, column].set_xlabel("forbidden share, %")
            for axis in axes.flat:
                axis.set(xscale="log", yscale="log")
                axis.grid(alpha=0.25, which="both", lw=0.4)
            axes[0, 0].set_ylabel("KL to the rejection shares")
            axes[1, 0].set_ylabel("distance to the rejection set")
            handles, labels = axes[0, 0].get_legend_handles_labels()
            columns = min(len(labels), max(2, 2 * len(concepts) - 3))  # as many labels as the panels are wide
            figure.legend(handles, labels, loc="outside upper center", ncols=columns, frameon=False)
            write_figure(out / f"fronts-{kind}.png", figure, dpi=150)


def draw_rows(path: Path, groups: Sequence[tuple[str, Sequence[tuple[str, Any]]]]) -> None:
    """Sheets of pictures, one under the other with their labels, in groups with a title each."""
    lines = sum(len(rows) for _, rows in groups)
    with mpl.rc_context({"font.size": 8}):
        figure = Figure(figsize=(8.5, 0.62 * lines + 0.4 * len(groups)), layout="constrained")
        parts = figure.subfigures(len(groups), 1, squeeze=False, height_ratios=[len(rows) for _, rows in groups])[:, 0]
        for part, (title, rows) in zip(parts, groups, strict=True):
            part.suptitle(title, fontsize=9)
            for axis, (label, sheet) in zip(part.subplots(len(rows), 1, squeeze=False)[:, 0], rows, strict=True):
                axis.imshow(np.asarray(sheet))
                axis.set_ylabel(textwrap.fill(label, 30), rotation=0, ha="right", va="center")
                axis.set(xticks=[], yticks=[])
                axis.spines[:].set_visible(False)
        write_figure(path, figure, dpi=150, bbox_inches="tight")
