"""The table of a report: its cells, for the terminal, as CSV and as JSON."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, fields
from itertools import groupby
from operator import itemgetter
from typing import Any

import numpy as np
from rich import get_console
from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from diffsteer.bench.intervals import Interval
from diffsteer.bench.report import MethodRow, RemovalReport

__all__ = ["Titled", "grouped_cells", "headings", "markdown", "percent", "rich_table", "rows_to_csv", "rows_to_json"]

Titled = tuple[str, Sequence[str], Sequence[Sequence[str]]]
"""A table: its title, its header, and its rows of cells."""


def markdown(tables: Iterable[Titled]) -> str:
    """Tables one under the other, each below its title."""
    parts = []
    for title, header, body in tables:
        lines = [f"### {title}", "", f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
        parts.append("\n".join([*lines, *(f"| {' | '.join(cells)} |" for cells in body)]) + "\n")
    return "\n".join(parts)


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
    columns = headings(report.rows)
    shown = [i for i, column in enumerate(columns) if column not in hidden or (width or get_console().width) >= 120]
    table = Table(
        title=Text(report.title),
        caption=Text(f"Small figures: 95% intervals. Judge's floor: {floor_text(report)}."),
        title_justify="left",
        caption_justify="left",
        box=SIMPLE_HEAD,
        collapse_padding=True,
    )
    table.add_column("Method", overflow="fold")
    for heading, below in (columns[i] for i in shown):
        short = below.removeprefix("to ").removeprefix("per ")
        table.add_column(Text.assemble(heading, "\n", (short, "dim")), justify="right", no_wrap=True)
    for label, lines in grouped_cells(report.rows):
        for line, cells in enumerate(lines):
            texts = (Text.assemble(cells[i][0], "\n" * bool(cells[i][1]), (cells[i][1], "dim")) for i in shown)
            table.add_row(Text(label if line == 0 else ""), *texts)
        table.add_section()
    return table


def rows_to_csv(rows: Iterable[Any], kind: type[Any] = MethodRow) -> str:
    """Return rows, dataclasses of one kind, as CSV; an interval is two columns, `_low` and `_high`, None is empty."""
    names = [field.name for field in fields(kind)]
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


def headings(rows: Sequence[MethodRow]) -> Sequence[tuple[str, str]]:
    """Headings of the columns; the scales are left out where there are none."""
    return _HEADINGS if any(row.scale for row in rows) else _HEADINGS[1:]


def grouped_cells(rows: Sequence[MethodRow]) -> list[tuple[str, list[list[tuple[str, str]]]]]:
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
    shown = columns[-len(headings(rows)) :]
    lines = zip((row.label for row in rows), map(list, zip(*shown, strict=True)), strict=True)
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


def floor_text(report: RemovalReport) -> str:
    """The judge's floor, with its interval where that is known."""
    ends = [] if report.floor_interval is None else [percent(end) for end in report.floor_interval]
    return f"{percent(report.floor)}{' (' + ' to '.join(ends) + ')' if ends else ''}"


def percent(share: float) -> str:
    return f"{100 * share:.2f}".rstrip("0").rstrip(".") + "%"


def _range(low: str, high: str) -> str:
    return f"{low} to {high}" if low.startswith("−") else f"{low}–{high}"
