"""What ``diffsteer bench prompts`` writes: numbers, a summary, and a page with the pictures of equal seeds."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from diffsteer.bench.intervals import Interval
from diffsteer.bench.plots import draw_rows
from diffsteer.bench.prompt_runs import NAMES, Bench, Line, Pair, sampler_name
from diffsteer.bench.report_html import template
from diffsteer.bench.report_pictures import png_address
from diffsteer.bench.report_tables import Titled, markdown
from diffsteer.engine import plain
from diffsteer.files import write_text

SHOWN = 12  # pictures in a row
_TITLES = {
    "related": "Related: the prompt's pictures may show the negative",
    "unrelated": "Unrelated: a negative prompt has nothing to do",
    "chosen on": "The sweep from which the scales were chosen",
}


def write(out: Path, bench: Bench, lines: Sequence[Line]) -> None:
    """results.json, summary.md, report.html and pictures.png; each complete or not at all."""
    record = {"model": bench.fingerprint, "plan": plain(vars(bench.plan)), "lines": [asdict(x) for x in lines]}
    write_text(out / "results.json", json.dumps(record, indent=1) + "\n")
    write_text(out / "summary.md", summary(lines, bench.judge.decides))
    pairs = [(f"{p.prompt}, without {p.negative}", _rows(bench, p, lines)) for p in bench.plan.grid if p.reported]
    page = template("prompts.html.j2").render(
        tables=_tables(lines, bench.judge.decides),
        rows=[(title, [(label, png_address(sheet)) for label, sheet in rows]) for title, rows in pairs],
        sampler=bench.plan.samplers[0],
        record=json.dumps({k: v for k, v in record.items() if k != "lines"}, indent=1),
        decides=bench.judge.decides,
        chosen=any(line.pairs == "chosen on" for line in lines),
    )
    write_text(out / "report.html", page)
    related = [p.related for p in bench.plan.grid if p.reported]
    first = [pairs[related.index(kind)] for kind in (True, False) if kind in related]  # one of either kind
    if all(rows for _, rows in first):
        draw_rows(out / "pictures.png", first)


def summary(lines: Sequence[Line], decides: bool) -> str:
    """The tables as Markdown."""
    return markdown(_tables(lines, decides))


def _tables(lines: Sequence[Line], decides: bool) -> list[Titled]:
    return [(f"{sampler}: {_TITLES[pairs]}", *table(rows, decides)) for sampler, pairs, rows in _split(lines)]


def _split(lines: Sequence[Line]) -> list[tuple[str, str, list[Line]]]:
    """Lines by sampler and kind of pairs, the reported ones first."""
    found = dict.fromkeys((x.sampler, x.pairs) for x in lines)
    order = list(_TITLES)
    keys = sorted(found, key=lambda key: order.index(key[1]))
    samplers = list(dict.fromkeys(x.sampler for x in lines))
    keys.sort(key=lambda key: samplers.index(key[0]))
    return [(s, p, [x for x in lines if (x.sampler, x.pairs) == (s, p)]) for s, p in keys]


def table(lines: Sequence[Line], decides: bool) -> tuple[list[str], list[list[str]]]:
    """Header and cells."""
    header = ["method", "scale", "pictures", "forbidden", "faithful", "undecided", "KL to rejection"]
    if not decides:
        header = ["method", "scale", "pictures", "CLIP score of the negative", "CLIP score of the prompt"]
    header += ["distance to no negative", "evaluations", "seconds / picture"]
    body = []
    for x in lines:
        cells = [NAMES[x.method], f"{x.scale:g}" if x.scale else "", str(x.n)]
        if decides:
            cells += [_number(100 * x.forbidden, _times(x.forbidden_interval, 100), 1, "%"), f"{x.faithful:.1%}"]
            cells += [f"{x.undecided:.1%}", _number(x.kl, x.kl_interval, 3)]
        else:
            cells += [_number(x.forbidden, x.forbidden_interval, 3), f"{x.faithful:.3f}"]
        body.append([*cells, _number(x.distance, x.distance_interval, 3), f"{x.nfe:.0f}", f"{x.seconds:.2f}"])
    return header, body


def _times(interval: Interval, factor: float) -> Interval:
    return interval[0] * factor, interval[1] * factor


def _number(value: float | None, interval: Interval | None, places: int, unit: str = "") -> str:
    if value is None or interval is None:
        return ""
    low, high = interval
    return f"{value:.{places}f}{unit} ({low:.{places}f} to {high:.{places}f})"


def _rows(bench: Bench, pair: Pair, lines: Sequence[Line]) -> list[tuple[str, Image.Image]]:
    """Pictures of one pair under the first sampler, a row per method."""
    sampler = bench.plan.samplers[0]
    pairs = "related" if pair.related else "unrelated"
    shown = [x for x in lines if (x.sampler, x.pairs) == (sampler_name(sampler), pairs) and x.method != "rejection"]
    rows = []
    for x in shown:
        run, verdict = bench.run(pair, sampler, x.method, x.scale), bench.verdict(pair, sampler, x.method, x.scale)
        bad = verdict.forbidden > 0 if bench.judge.decides else np.zeros(len(run.pictures), dtype=bool)
        label = f"{NAMES[x.method]}, scale {x.scale:g}" if x.scale else NAMES[x.method]
        rows.append((label, _sheet(run.pictures[:SHOWN], bad, verdict.undecided)))
    return rows


def _sheet(pictures: NDArray[np.uint8], forbidden: NDArray[Any], undecided: NDArray[Any]) -> Image.Image:
    """Pictures side by side; forbidden ones framed in red, those that cannot be read in grey."""
    gap = 4
    n, height, width, _ = pictures.shape
    sheet = np.zeros((height + 2 * gap, n * (width + 2 * gap), 4), np.uint8)
    for i, picture in enumerate(pictures):
        left = i * (width + 2 * gap)
        colour = (212, 54, 44, 255) if forbidden[i] else (150, 150, 150, 255) if undecided[i] else (0, 0, 0, 0)
        sheet[1:-1, left + 1 : left + width + 2 * gap - 1] = colour
        sheet[gap:-gap, left + gap : left + gap + width] = np.dstack([picture, np.full((height, width), 255, np.uint8)])
    image = Image.fromarray(sheet, "RGBA")
    if width > 128:
        image = image.resize((image.width * 128 // width, image.height * 128 // width))
    return image
