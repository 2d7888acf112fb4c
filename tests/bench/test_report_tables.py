"""The table of a report, in the terminal, as CSV and as JSON."""

from __future__ import annotations

import csv
import dataclasses
import io
import json

import numpy as np
import pytest
from reports import report, row
from rich.console import Console

from diffsteer.bench import report_tables as module
from diffsteer.bench.report_tables import rich_table, rows_to_csv, rows_to_json


def test_scales_are_left_out_where_there_are_none():
    plain = report(rows=[row(scale="", label=label) for label in ("A", "B")])
    assert [c.header.plain.split("\n")[0] for c in rich_table(plain, 120).columns[1:3]] == ["N", "Forbidden"]


@pytest.mark.parametrize("scale", ["", "0.3"])
def test_every_number_is_below_its_own_heading(scale: str):
    one = row(scale=scale)
    ((_, (cells,)),) = module.grouped_cells([one])
    found = dict(zip(module.headings([one]), cells, strict=True))
    assert found.pop(("Scale", ""), ("", "")) == (scale, "")
    assert found == {
        ("N", "samples"): ("1,000", ""),
        ("Forbidden", "share"): ("1.4%", "0.8–2.3"),
        ("KL", "to rejection"): ("0.036", "0.030–0.043"),
        ("KL", "to uniform"): ("0.041", "0.035–0.050"),
        ("Distance", "to rejection"): ("0.52", "0.40–0.63"),
        ("Distance", "to data"): ("12", ""),
        ("NFE", "per sample"): ("100", ""),
        ("Time", "seconds"): ("8.2", ""),
    }


def test_a_column_has_one_precision_that_shows_its_smallest_value():
    rows = [row(fd_rejection=0.0123, fd_rejection_interval=(-0.01, 0.04)), row(fd_rejection=4.5)]
    cells = [line[5] for _, lines in module.grouped_cells(rows) for line in lines]
    assert cells == [("0.012", "−0.010 to 0.040"), ("4.500", "0.400–0.630")]
    assert module._column([(12345.6, None), (0.02, None), (None, None)]) == [("12,346", ""), ("0", ""), ("–", "")]


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
