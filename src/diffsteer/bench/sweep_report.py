"""What ``diffsteer bench removal`` writes: numbers, tables, fronts, grids, and a page that holds them all."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from diffsteer.bench.plots import draw_fronts, draw_samples
from diffsteer.bench.removal import NAMES
from diffsteer.bench.report import MethodPanel, MethodRow
from diffsteer.bench.report_html import template
from diffsteer.bench.report_pictures import SAMPLES, data_address, grid
from diffsteer.bench.report_tables import Titled, markdown, rows_to_csv
from diffsteer.engine import versions
from diffsteer.files import write_text
from diffsteer.zoo import Model


@dataclass(frozen=True)
class Entry:
    """One measured configuration."""

    scheduler: str
    concept: str
    method: str
    scale: float
    reported: bool  # False on the half of the classes on which things were chosen
    row: MethodRow


@dataclass(frozen=True)
class Lead:
    """By how much one method's front is ahead of another's, in decades squared, with its 95% interval.

    Neither is known where no unguided sample shows the concept.
    """

    scheduler: str
    concept: str  # or "mean"
    versus: str
    axis: str  # "KL" or "distance"
    difference: float | None
    interval: tuple[float, float] | None


def write(
    out: Path,
    model: Model,
    entries: Sequence[Entry],
    leads: Sequence[Lead],
    points: Mapping[str, float],
    final: Sequence[Entry],
    panels: Mapping[str, Sequence[MethodPanel]],
    *,
    choosing: Sequence[str],
    **facts: Any,
) -> None:
    """results.json, tables as CSV and Markdown, fronts and grids as pictures, report.html; each whole or not at all.

    Parameters
    ----------
    entries, final : sequence of Entry
        Of the sweeps, and at the operating points.
    points : mapping of str to float
        Per method the scale that was chosen.
    panels : mapping of str to sequence of MethodPanel
        Per sampler the samples of the first reported class, the unguided ones first.
    choosing : sequence of str
        The classes that the scales were chosen on; none: the model's folder recommends them.
    **facts
        Whatever else the record should say.
    """
    out.mkdir(parents=True, exist_ok=True)
    run = {"model": model.name, "fingerprint": model.fingerprint, "versions": versions(), **facts}
    results = {
        "operating_points": dict(points),
        "sweep": [asdict(e) for e in entries],
        "leads": [asdict(lead) for lead in leads],
        "final": [asdict(e) for e in final],
    }
    write_text(out / "results.json", json.dumps({**run, **results}, indent=1))
    for name, rows in (("sweep", entries), ("final", final)):
        table = rows_to_csv([replace(e.row, name=f"{e.scheduler}/{e.concept}/{e.method}") for e in rows])
        write_text(out / f"{name}.csv", table)
    tables = _tables(model, entries, leads, points, final, choosing)
    write_text(out / "summary.md", markdown(tables))
    draw_fronts(out, entries)
    for sampler, shown in panels.items():
        draw_samples(out / f"samples-{sampler}.png", shown)
    reported = [e for e in entries if e.reported]
    page = template("sweep.html.j2").render(
        model=model.name,
        concepts=list(dict.fromkeys(e.concept for e in [*reported, *final])),
        most=max(e.row.n for e in [*reported, *final]),
        tables=tables,
        fronts=[
            (s, data_address((out / f"fronts-{s}.png").read_bytes()))
            for s in dict.fromkeys(e.scheduler for e in reported)
        ],
        samples=[(s, [(p.label, grid(p, shown[0])) for p in shown]) for s, shown in panels.items() if shown],
        shown=min([SAMPLES, *(len(p.images) for shown in panels.values() for p in shown)]),
        record=json.dumps(run, indent=1),
    )
    write_text(out / "report.html", page)


def _tables(
    model: Model,
    entries: Sequence[Entry],
    leads: Sequence[Lead],
    points: Mapping[str, float],
    final: Sequence[Entry],
    choosing: Sequence[str],
) -> list[Titled]:
    """The figures that matter."""
    tables: list[Titled] = []
    if leads:
        header = ["sampler", "concept", "versus", "KL to the rejection shares", "distance to the rejection set"]
        paired = {(le.scheduler, le.concept, le.versus, le.axis): le for le in leads}
        body = [
            [
                sampler,
                concept,
                NAMES[versus],
                *(_signed(paired[sampler, concept, versus, a]) for a in ("KL", "distance")),
            ]
            for sampler, concept, versus, axis in paired
            if axis == "KL"
        ]
        title = "Fronts: DNG's hypervolume minus the baseline's (decades squared, 95% interval)"
        tables.append((title, header, body))
    source = f"chosen on classes {', '.join(choosing)}" if choosing else "as the model recommends them"
    body = [[NAMES[method], f"{scale:g}"] for method, scale in points.items()]
    tables.append((f"Operating points, {source}", ["method", "scale"], body))
    if final:
        tables.append(("At the operating points, mean over the reported classes", _COLUMNS, _means(model, final)))
    reported = [e for e in entries if e.reported]
    for kind in dict.fromkeys(e.scheduler for e in reported):
        title = f"The sweep under {kind}, mean over the reported classes"
        tables.append((title, _COLUMNS, _means(model, [e for e in reported if e.scheduler == kind])))
    return tables


_COLUMNS = [
    "method", "scale", "forbidden share", "above the floor", "KL to rejection", "KL to uniform",
    "distance to rejection", "distance to data", "recall", "untouched", "evaluations",
]  # fmt: skip


def _means(model: Model, entries: Sequence[Entry]) -> list[list[str]]:
    """One line per method and scale, in the columns of ``_COLUMNS``."""
    lines = []
    found = {(e.method, e.scale) for e in entries}
    for method, scale in sorted(found, key=lambda m: (list(NAMES).index(m[0]), m[1])):
        rows = [e for e in entries if (e.method, e.scale) == (method, scale)]
        means = {
            key: float(np.mean([getattr(e.row, key) for e in rows]))
            for key in ("forbidden_share", "kl_rejection", "kl_uniform", "fd_rejection", "fd_data", "nfe")
        }
        known = {
            key: [value for e in rows if (value := getattr(e.row, key)) is not None] for key in ("recall", "untouched")
        }
        excess = means["forbidden_share"] - float(np.mean([model.floor([e.concept]) for e in rows]))
        lines.append([
            NAMES[method], f"{scale:g}" if scale else "", f"{means['forbidden_share']:.2%}", f"{excess:+.2%}",
            f"{means['kl_rejection']:.3f}", f"{means['kl_uniform']:.3f}", f"{means['fd_rejection']:.2f}",
            f"{means['fd_data']:.2f}", f"{np.mean(known['recall']):.2f}" if known["recall"] else "",
            f"{np.mean(known['untouched']):.0%}" if known["untouched"] else "", f"{means['nfe']:.0f}",
        ])  # fmt: skip
    return lines


def _signed(lead: Lead) -> str:
    if lead.difference is None or lead.interval is None:
        return "none: no unguided sample shows it"
    low, high = lead.interval
    verdict = "ahead" if low > 0 else "behind" if high < 0 else "even"
    return f"{lead.difference:+.2f} ({low:+.2f} to {high:+.2f}), {verdict}"
