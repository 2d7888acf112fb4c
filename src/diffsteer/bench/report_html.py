"""A report as one self-contained HTML file."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template

from diffsteer.bench.arrays import to_numpy
from diffsteer.bench.report import MethodPanel, RemovalReport
from diffsteer.bench.report_pictures import LINES, SAMPLES, front_plot, grid, histogram, posterior_plot, scale_plot
from diffsteer.bench.report_tables import floor_text, grouped_cells, headings
from diffsteer.files import check_writable, write_text

__all__ = ["render_report", "template", "write_report"]


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


def render_report(report: RemovalReport) -> str:
    """Return the HTML that `write_report` writes."""
    unguided = report.panels[0]
    traced = [p for p in report.panels if p.posterior is not None or p.scale is not None]
    return template("report.html.j2").render(
        report=report,
        concepts=_listed(report.concepts),
        most=f"{max(row.n for row in report.rows):,}",
        floor=floor_text(report),
        columns=headings(report.rows),
        table=grouped_cells(report.rows),
        front=front_plot(report),
        samples=[(p.label, grid(p, unguided), _tally(p)) for p in report.panels],
        shown=min(SAMPLES, len(to_numpy(unguided.forbidden))),
        traces=[(p.label, posterior_plot(p, report), scale_plot(p, report)) for p in traced],
        lines=min(LINES, len(to_numpy(unguided.forbidden))),
        histograms=[(p.label, histogram(p, report)) for p in report.panels],
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
