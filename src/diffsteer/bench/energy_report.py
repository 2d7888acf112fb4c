"""Tables and pictures of ``diffsteer bench energy``."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from torch import Tensor

from diffsteer.bench.intervals import Interval
from diffsteer.bench.report_tables import rows_to_csv
from diffsteer.files import write_figure, write_text
from diffsteer.zoo import Model

COLUMNS = 20  # pictures in a row


@dataclass(frozen=True)
class Line:
    """One method at one scale, as measured. None: does not apply."""

    task: str
    method: str
    scale: float
    reported: bool  # or one of those by which the scale is chosen
    n: int
    accuracy: float  # share in which the judge sees the class that was asked for, or that of the true image
    accuracy_interval: Interval
    nfe: float
    seconds: float
    distance: float | None = None  # energy distance of features to the data's, mean over the classes
    psnr: float | None = None  # dB, mean over the images
    psnr_interval: Interval | None = None
    residual: float | None = None  # root mean square of what the measurement leaves open
    over_unguided: float | None = None  # dB
    over_unguided_interval: Interval | None = None
    over_dps: float | None = None
    over_dps_interval: Interval | None = None

    @property
    def label(self) -> str:
        """The method and, where it has one, its scale."""
        return f"{self.method} {self.scale:g}" if self.scale else self.method


@dataclass(frozen=True)
class Picture:
    """A row of images in [-1, 1], (N, C, H, W), NaN where there is nothing; those that are ``wrong`` are framed."""

    label: str
    images: Tensor
    wrong: Tensor | None = None  # (N,)


def write(
    out: Path, model: Model, lines: Sequence[Line], pictures: Mapping[str, Sequence[Picture]],
    diverged: Sequence[str], **facts: Any,
) -> None:  # fmt: skip
    """energy.json, energy.csv, energy.md and <task>.png; ``diverged`` names the runs that left the numbers behind."""
    record = {
        "model": model.name, "fingerprint": model.fingerprint, **facts, "diverged": diverged,
        "lines": [asdict(line) for line in lines],
    }  # fmt: skip
    write_text(out / "energy.json", json.dumps(record, indent=1) + "\n")
    write_text(out / "energy.csv", rows_to_csv(lines, Line))
    write_text(out / "energy.md", "\n".join([*markdown(lines), *lost(diverged)]))
    for task, rows in pictures.items():
        if rows:
            draw(out / f"{task}.png", rows)


def markdown(lines: Sequence[Line]) -> list[str]:
    """A table of the reported lines for each task."""
    text = []
    for task in dict.fromkeys(line.task for line in lines):
        mine = [line for line in lines if line.task == task and line.reported]
        first = "distance" if task == "labels" else "PSNR, dB | over unguided | over DPS | residual"
        head = f"| method | scale | accuracy | {first} | evaluations | s |"
        text += [f"### {task.capitalize()}", "", head, "|---" * (head.count("|") - 1) + "|"]
        for m in mine:
            cells = [m.method, f"{m.scale:g}" if m.scale else "", _share(m.accuracy, m.accuracy_interval)]
            if task == "labels":
                cells.append(f"{m.distance:.3f}")
            else:
                cells += [
                    _db(m.psnr, m.psnr_interval), _db(m.over_unguided, m.over_unguided_interval, "+"),
                    _db(m.over_dps, m.over_dps_interval, "+"), f"{m.residual:.3f}",
                ]  # fmt: skip
            text.append("| " + " | ".join([*cells, f"{m.nfe:g}", f"{m.seconds:.0f}"]) + " |")
        text.append("")
    return text


def lost(diverged: Sequence[str]) -> list[str]:
    """A line about runs that have no figures."""
    return [f"NaN or infinity, and no figures: {', '.join(diverged)}.", ""] if diverged else []


def _share(value: float, interval: Interval) -> str:
    return f"{value:.1%} ({interval[0]:.1%} to {interval[1]:.1%})"


def _db(value: float | None, interval: Interval | None, sign: str = "") -> str:
    if value is None or interval is None:
        return ""
    return f"{value:{sign}.1f} ({interval[0]:{sign}.1f} to {interval[1]:{sign}.1f})"


def draw(path: Path, rows: Sequence[Picture]) -> None:
    """One row of images per method, its name beside it; the judge's objections framed in red."""
    count, (height, width) = min(COLUMNS, len(rows[0].images)), rows[0].images.shape[2:]
    tall, wide = height + 4, width + 2  # with a frame, and a gap to the next row
    sheet = np.ones((len(rows) * tall, count * wide, 3))
    for i, row in enumerate(rows):
        for j, image in enumerate(row.images[:count].permute(0, 2, 3, 1).clamp(-1, 1).numpy()):
            cell = sheet[i * tall : (i + 1) * tall - 2, j * wide : (j + 1) * wide]
            if row.wrong is not None and row.wrong[j]:
                cell[:] = (0.85, 0.1, 0.1)
            cell[1:-1, 1:-1] = np.where(np.isnan(image), (0.6, 0.7, 0.9), (image + 1) / 2)
    with mpl.rc_context({"font.size": 8}):
        inch = 0.4 / wide
        figure = Figure(figsize=(inch * sheet.shape[1], inch * sheet.shape[0]))
        axis = figure.add_axes((0, 0, 1, 1))
        axis.imshow(sheet, interpolation="nearest")
        axis.set_yticks([i * tall + height / 2 for i in range(len(rows))], [row.label for row in rows])
        axis.set_xticks([])
        axis.tick_params(length=0)
        axis.spines[:].set_visible(False)
        write_figure(path, figure, dpi=200, bbox_inches="tight", pad_inches=0.05)  # with the names
