"""``diffsteer bench removal``: fronts of every method over its scale, over all concepts, resumable.

Half of the classes is for choosing (defaults, operating points), the other half is reported. Each run is a file named
by a hash of everything that it depends on, so results of different configurations cannot mix, and an interrupted
benchmark goes on where it stopped.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from diffsteer import zoo
from diffsteer.bench import metrics
from diffsteer.bench.plots import draw_fronts
from diffsteer.bench.removal import Outcome, Setting, measure, method_for, reject, run, unguided
from diffsteer.bench.remove import NAMES
from diffsteer.bench.report import MethodRow, check_writable, rows_to_csv, write_text
from diffsteer.zoo import Model

SCALES: dict[str, tuple[float, ...]] = {
    "np": (0.1, 0.2, 0.3, 0.5),
    "sld": (0.1, 0.2, 0.4, 0.8),
    "dng": (1.0, 2.0, 3.0, 5.0),
    "ceiling": (1.0, 2.0),
}
BASELINES = ("np", "sld")
TARGET_FACTOR = 3  # unguided samples behind the rejection set, per sample of a method
RESAMPLES = 100  # of the feature distance, whose bootstrap is the dear part


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
    """By how much one method's front is ahead of another's, in decades squared, with its 95% interval."""

    scheduler: str
    concept: str  # or "mean"
    versus: str
    axis: str  # "KL" or "distance"
    difference: float
    interval: tuple[float, float]


def halves(model: Model) -> tuple[list[int], list[int]]:
    """Labels for choosing and labels for reporting."""
    middle = len(model.classes) // 2
    return list(range(middle)), list(range(middle, len(model.classes)))


def sweep(
    name: str,
    *,
    out: Path,
    samples: int = 1000,
    steps: int = 50,
    final_samples: int = 2000,
    final_steps: int = 100,
    schedulers: Sequence[str] = ("ddpm", "ddim"),
) -> None:
    """Run the whole benchmark and write runs, tables, fronts and a summary into ``out``."""
    model = zoo.load(name)
    check_writable(out / "results.json")
    choose, report = halves(model)
    plan = [
        (kind, concept, method, scale)
        for kind in schedulers
        for concept in ([*report, *choose] if kind == "ddpm" else report)
        for method, scales in SCALES.items()
        if method != "ceiling" or (kind == "ddpm" and concept in report)
        for scale in scales
    ]
    entries: list[Entry] = []
    labels: dict[tuple[str, int, str], list[Outcome]] = {}
    bases: dict[str, tuple[Outcome, Outcome]] = {}
    console = Console()
    with _bars(console) as bars:
        task = bars.add_task("sweep", total=len(plan))
        for kind in schedulers:
            setting = Setting((), kind, steps, samples)
            target = replace(setting, seed=1, samples=TARGET_FACTOR * samples)
            bases[kind] = (unguided(model, setting, store=out / "runs"), unguided(model, target, store=out / "runs"))
        for kind, concept, method, scale in plan:
            bars.update(task, description=f"{kind} {model.classes[concept]} {method} {scale:g}")
            setting = Setting((concept,), kind, steps, samples if concept in report else samples // 2)
            outcome = run(model, setting, method_for(model, method, setting, scale), store=out / "runs")
            labels.setdefault((kind, concept, method), []).append(outcome)
            row = measure(model, setting, outcome, bases[kind][1], NAMES[method], f"{scale:g}")
            entries.append(Entry(kind, model.classes[concept], method, scale, concept in report, row))
            bars.advance(task)
        for kind, (base, target) in bases.items():
            for concept in report if kind != "ddpm" else [*choose, *report]:
                setting = Setting((concept,), kind, steps, samples)
                for method, outcome in (("unguided", base), ("rejection", reject(base, (concept,)))):
                    row = measure(model, setting, outcome, target, NAMES[method], "")
                    entries.append(Entry(kind, model.classes[concept], method, 0.0, concept in report, row))
    leads = list(_leads(model, labels, bases, report))
    points = operating_points(entries, model, choose)
    final = list(_final(model, points, report, final_samples, final_steps, schedulers, out, console))
    _write(out, model, entries, leads, points, final, steps=steps, samples=samples)
    console.print(summary(model, entries, leads, points, final), markup=False, highlight=False)


def operating_points(entries: Sequence[Entry], model: Model, choose: Sequence[int]) -> dict[str, float]:
    """Per method the scale with the lowest mean KL among those within a point of the judge's floor.

    Read off the classes for choosing alone. Where no scale is safe enough, the safest.
    """
    names = [model.classes[c] for c in choose]
    points: dict[str, float] = {}
    for method, scales in SCALES.items():
        scored: list[tuple[bool, float, float]] = []
        for scale in scales:
            rows = [e for e in entries if e.method == method and e.scale == scale and e.concept in names]
            if not rows:
                continue
            excess = float(np.mean([e.row.forbidden_share - model.floor([e.concept]) for e in rows]))
            kl = float(np.mean([e.row.kl_rejection or 0.0 for e in rows]))
            scored.append((excess > 0.01, kl if excess <= 0.01 else excess, scale))
        if scored:
            points[method] = min(scored)[2]
    return points


def _final(
    model: Model,
    points: dict[str, float],
    report: Sequence[int],
    samples: int,
    steps: int,
    schedulers: Sequence[str],
    out: Path,
    console: Console,
) -> Iterator[Entry]:
    """One operating point per method on the reported classes, with more samples and steps."""
    with _bars(console) as bars:
        task = bars.add_task("operating points", total=len(points) * len(report))
        kind = schedulers[0]
        base = unguided(model, Setting((), kind, steps, samples), store=out / "runs")
        target = unguided(model, Setting((), kind, steps, TARGET_FACTOR * samples, seed=1), store=out / "runs")
        for concept in report:
            setting = Setting((concept,), kind, steps, samples)
            for method, outcome in (("unguided", base), ("rejection", reject(base, (concept,)))):
                row = measure(model, setting, outcome, target, NAMES[method], "")
                yield Entry(kind, model.classes[concept], method, 0.0, True, row)
            for method, scale in points.items():
                bars.update(task, description=f"final {model.classes[concept]} {method}")
                outcome = run(model, setting, method_for(model, method, setting, scale), store=out / "runs")
                row = measure(model, setting, outcome, target, NAMES[method], f"{scale:g}")
                yield Entry(kind, model.classes[concept], method, scale, True, row)
                bars.advance(task)


def _leads(
    model: Model,
    labels: dict[tuple[str, int, str], list[Outcome]],
    bases: dict[str, tuple[Outcome, Outcome]],
    report: Sequence[int],
) -> Iterator[Lead]:
    """DNG's front against each baseline's, per reported concept and on average (resampled jointly)."""
    for kind, (_, target) in bases.items():
        for versus in BASELINES:
            for axis, compare in (("KL", _kl_lead), ("distance", _distance_lead)):
                each = [compare(model, labels[kind, c, "dng"], labels[kind, c, versus], target, c) for c in report]
                for concept, (difference, draws) in zip(report, each, strict=True):
                    interval = metrics.interval_of(difference, draws)
                    yield Lead(kind, model.classes[concept], versus, axis, difference, interval)
                mean = float(np.mean([difference for difference, _ in each]))
                interval = metrics.interval_of(mean, np.mean([draws for _, draws in each], axis=0))
                yield Lead(kind, "mean", versus, axis, mean, interval)


def _kl_lead(
    model: Model, ours: Sequence[Outcome], theirs: Sequence[Outcome], target: Outcome, concept: int
) -> tuple[float, Any]:
    kept = [c for c in range(len(model.classes)) if c != concept]
    return metrics.hypervolume_difference(
        [o.labels for o in ours], [o.labels for o in theirs], target.labels, kept=kept, num_classes=len(model.classes)
    )


def _distance_lead(
    model: Model, ours: Sequence[Outcome], theirs: Sequence[Outcome], target: Outcome, concept: int
) -> tuple[float, Any]:
    """Shares and feature distances of every point, resampled by rows: row i is seed i in all of them."""
    points = [(o.features.double().numpy(), o.labels.numpy()) for o in (*ours, *theirs)]
    aside = (target.features.double().numpy(), target.labels.numpy())

    def difference(rows: Any, target_rows: Any) -> float:
        features, labels = (x[target_rows] for x in aside)
        rejection = features[labels != concept]
        base = max(float((labels == concept).mean()), 1 / len(labels))
        size = len(points[0][1])
        shares = [max(float((y[rows] == concept).mean()), 0.5 / size) for _, y in points]
        distances = [metrics.frechet_distance(x[rows], rejection) for x, _ in points]
        half = len(ours)
        a, b = (
            metrics.distance_hypervolume(shares[part], distances[part], size, base, _WORST)
            for part in (slice(half), slice(half, None))
        )
        return a - b

    rng = np.random.default_rng(0)
    sizes = len(points[0][1]), len(aside[1])
    draws = [difference(*(rng.integers(n, size=n) for n in sizes)) for _ in range(RESAMPLES)]
    return difference(slice(None), slice(None)), np.array(draws)


_WORST = 100.0  # feature distance at which a point no longer counts


def _write(
    out: Path,
    model: Model,
    entries: Sequence[Entry],
    leads: Sequence[Lead],
    points: dict[str, float],
    final: Sequence[Entry],
    **facts: Any,
) -> None:
    out.mkdir(parents=True, exist_ok=True)
    record = {
        "model": model.name,
        "fingerprint": model.fingerprint,
        **facts,
        "operating_points": points,
        "sweep": [asdict(e) for e in entries],
        "leads": [asdict(lead) for lead in leads],
        "final": [asdict(e) for e in final],
    }
    write_text(out / "results.json", json.dumps(record, indent=1))
    for name, rows in (("sweep", entries), ("final", final)):
        table = rows_to_csv([replace(e.row, name=f"{e.scheduler}/{e.concept}/{e.method}") for e in rows])
        write_text(out / f"{name}.csv", table)
    write_text(out / "summary.md", summary(model, entries, leads, points, final))
    draw_fronts(out, entries)


def summary(
    model: Model,
    entries: Sequence[Entry],
    leads: Sequence[Lead],
    points: dict[str, float],
    final: Sequence[Entry],
) -> str:
    """The figures that matter, as Markdown."""
    lines = ["### Fronts: DNG's hypervolume minus the baseline's (decades squared, 95% interval)", ""]
    lines += ["| sampler | concept | versus | KL to the rejection shares | distance to the rejection set |"]
    lines += ["|---|---|---|---|---|"]
    paired = {(le.scheduler, le.concept, le.versus, le.axis): le for le in leads}
    for kind, concept, versus, axis in paired:
        if axis == "KL":
            cells = [_signed(paired[kind, concept, versus, a]) for a in ("KL", "distance")]
            lines.append(f"| {kind} | {concept} | {NAMES[versus]} | {cells[0]} | {cells[1]} |")
    lines += [
        "",
        f"### Operating points, chosen on classes {', '.join(model.classes[c] for c in halves(model)[0])}",
        "",
    ]
    lines += ["| method | scale |", "|---|---|", *(f"| {NAMES[m]} | {s:g} |" for m, s in points.items())]
    lines += ["", "### At the operating points, mean over the reported classes", "", *_means(model, final)]
    reported = [e for e in entries if e.reported]
    for kind in dict.fromkeys(e.scheduler for e in reported):
        chosen = [e for e in reported if e.scheduler == kind]
        lines += ["", f"### The sweep under {kind}, mean over the reported classes", "", *_means(model, chosen)]
    return "\n".join(lines) + "\n"


def _means(model: Model, entries: Sequence[Entry]) -> list[str]:
    """One line per method and scale."""
    lines = [
        "| method | scale | forbidden share | above the floor | KL to rejection | KL to uniform | "
        "distance to rejection | distance to data | evaluations |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    found = {(e.method, e.scale) for e in entries}
    for method, scale in sorted(found, key=lambda m: (list(NAMES).index(m[0]), m[1])):
        rows = [e for e in entries if (e.method, e.scale) == (method, scale)]
        means = {
            key: float(np.mean([getattr(e.row, key) for e in rows]))
            for key in ("forbidden_share", "kl_rejection", "kl_uniform", "fd_rejection", "fd_data", "nfe")
        }
        excess = means["forbidden_share"] - float(np.mean([model.floor([e.concept]) for e in rows]))
        lines.append(
            f"| {NAMES[method]} | {f'{scale:g}' if scale else ''} | {means['forbidden_share']:.2%} | {excess:+.2%} | "
            f"{means['kl_rejection']:.3f} | {means['kl_uniform']:.3f} | {means['fd_rejection']:.2f} | "
            f"{means['fd_data']:.2f} | {means['nfe']:.0f} |"
        )
    return lines


def _signed(lead: Lead) -> str:
    low, high = lead.interval
    verdict = "ahead" if low > 0 else "behind" if high < 0 else "even"
    return f"{lead.difference:+.2f} ({low:+.2f} to {high:+.2f}), {verdict}"


def _bars(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description:<26}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
    )
