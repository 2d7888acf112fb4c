"""``diffsteer bench removal``: fronts of every method over its scale, over all concepts, resumable.

Half of the classes is for choosing (defaults, operating points), the other half is reported. Each run is a file named
by a hash of everything that it depends on, so results of different configurations cannot mix, and an interrupted
benchmark goes on where it stopped.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from diffsteer import zoo
from diffsteer.bench import balance, fronts, intervals, metrics, sweep_report
from diffsteer.bench.removal import (
    NAMES,
    Outcome,
    Setting,
    asked_otherwise,
    calibrated_as,
    conditional,
    kind_of,
    measure,
    method_for,
    refuse_empty,
    reject,
    run,
    unguided,
)
from diffsteer.bench.report import MethodPanel
from diffsteer.bench.sweep_report import Entry, Lead
from diffsteer.errors import ParameterError, UnknownNameError, UnsupportedError
from diffsteer.files import check_writable
from diffsteer.zoo import Model

SCALES: dict[str, tuple[float, ...]] = {
    "np": (0.1, 0.2, 0.3, 0.5),
    "sld": (0.1, 0.2, 0.4, 0.8),
    "sld-medium": (0.1, 0.2, 0.4, 0.8),
    "dng": (1.0, 2.0, 3.0, 5.0),
    "dng-paper": (1.0, 2.0, 5.0, 10.0),
    "ceiling": (1.0, 2.0),
}
ODE_SCALES = {"np": (0.2, 0.3, 0.5, 0.8), "sld": (0.2, 0.4, 0.8, 1.6), "sld-medium": (0.2, 0.4, 0.8, 1.6)}
"""Where they differ on deterministic samplers, on which the baselines remove less at equal scale."""
MODEL_SCALES: dict[str, dict[str, tuple[float, ...]]] = {
    "mnist": {
        **ODE_SCALES, "dng": (10.0, 20.0, 30.0, 60.0),
        "dng-paper": (2.0, 5.0, 10.0, 20.0), "ceiling": (2.0, 5.0),
    }
}  # fmt: skip
"""Where they differ on a model: on MNIST half a point above the judge's floor asks for more of every method."""
BASELINES = ("np", "sld", "sld-medium")
MARGINS = {"mnist": 0.005}  # what counts as safe: above the judge's floor, elsewhere one point
TARGET_FACTOR = 3  # unguided samples behind the rejection set, per sample of a method
RESAMPLES = 100  # of the feature distance, whose bootstrap is the dear part


@dataclass(frozen=True)
class Tier:
    """One size of the benchmark.

    Attributes
    ----------
    samplers : tuple of (str, int)
        Schedulers and steps of the sweeps over the scales.
    samples : int
        Per configuration; the classes for choosing get half as many.
    concepts : int
        How many of the reported classes, the first ones.
    choose : bool
        Sweep the classes for choosing too, under the first sampler, and read operating points off them; without it
        they are the scales that the model's folder recommends.
    final : (str, int, int), optional
        Scheduler, steps and samples of one operating point per method.
    methods : tuple of str
        Of ``SCALES``.
    """

    samplers: tuple[tuple[str, int], ...]
    samples: int
    concepts: int = 5
    choose: bool = False
    final: tuple[str, int, int] | None = None
    methods: tuple[str, ...] = ("np", "sld", "dng", "ceiling")


_FEW = (("ddpm", 250), ("ddim", 25), ("ddim", 50), ("dpm++", 25), ("dpm++", 50))
_ALL = tuple(SCALES)
TIERS: dict[str, dict[int, Tier]] = {
    "digits": {1: Tier((("ddpm", 50), ("ddim", 50)), 1000, choose=True, final=("ddpm", 100, 2000))},
    "mnist": {
        1: Tier((("ddpm", 50),), 512, choose=True, methods=_ALL),
        2: Tier(_FEW, 512, concepts=2),
        3: Tier((), 512, concepts=1, final=("ddpm", 1000, 512)),
        4: Tier((("ddpm", 50), *_FEW), 2048, choose=True, methods=_ALL),
    },
    "cifar10": {
        1: Tier((("ddpm", 50), ("dpm++", 25)), 2048, choose=True, methods=_ALL),
        3: Tier((), 2048, concepts=1, final=("ddpm", 1000, 2048)),
    },
}


def tier_of(model: Model, number: int) -> Tier:
    """A tier of a model's benchmark; a user's own model has those of the digits."""
    tiers = TIERS.get(model.dataset, TIERS["digits"])
    if number not in tiers:
        raise UnknownNameError("tier", number, map(str, tiers))
    return tiers[number]


def among(tier: Tier, samplers: Sequence[str]) -> Tier:
    """The tier with these of its samplers alone, each as "name:steps"; without the first one, no final point either."""
    own = {f"{kind}:{steps}": (kind, steps) for kind, steps in tier.samplers}
    for name in samplers:
        if name not in own:
            raise UnknownNameError("sampler of this tier", name, own)
    kept = tuple(own[name] for name in own if name in samplers)
    # operating points are read off the first sampler, and mean nothing under another one
    return replace(tier, samplers=kept, final=tier.final if kept[:1] == tier.samplers[:1] else None)


def scales_of(model: Model, method: str, scheduler: str) -> tuple[float, ...]:
    """The scales that a method is swept over on a model under a scheduler, as many for every baseline."""
    own = ODE_SCALES if kind_of(scheduler) == "ode" else {}
    return {**SCALES, **own, **MODEL_SCALES.get(model.dataset, {})}[method]


def halves(model: Model) -> tuple[list[int], list[int]]:
    """Labels for choosing and labels for reporting."""
    middle = len(model.classes) // 2
    first, second = list(range(middle)), list(range(middle, len(model.classes)))
    return (second, first) if model.dataset == "cifar10" else (first, second)


def sweep(name: str, tier: Tier, *, out: Path, separate: bool = False, device: str = "cpu") -> None:
    """Run one tier of the benchmark and write runs, tables, fronts, grids and a summary into ``out``.

    Under ``torchrun`` the processes share the runs among them; the first one writes.

    Parameters
    ----------
    name : str
        A shipped model or a folder.
    separate : bool
        An unconditional network and one of each concept alone, where the model has them.

    Raises
    ------
    UnknownNameError, ParameterError, UnsupportedError, OutputError
        Before any work: of what the tier asks for, the model has no network, or for DNG no calibration.
    """
    for method in tier.methods:
        if method not in SCALES:
            raise UnknownNameError("method", method, SCALES)
    if tier.samples < 16 or tier.concepts < 1:
        raise ParameterError(f"needs at least 16 samples and 1 concept, got {tier.samples} and {tier.concepts}")
    model = zoo.load_model(name, device=_own_device(device))
    check_writable(out / "results.json")
    if "ceiling" in tier.methods and not model.has("noisy_classifier"):
        raise UnsupportedError(
            f"{model.name} has no noise-aware classifier to drive 'ceiling': train it (--part noisy_classifier), or "
            "name the other methods alone (--method np --method sld --method dng)"
        )
    choose, report = halves(model)
    report = (list(model.alone) if separate else report)[: tier.concepts]
    choosing = choose if tier.choose and not separate else []
    if "dng" in tier.methods:
        _refuse_uncalibrated(model, name, tier, (*report, *choosing), separate)
    plan = [
        _Job(
            Setting((concept,), kind, steps, tier.samples // (1 + (concept in choosing)), separate=separate), method, w
        )
        for kind, steps in tier.samplers
        for concept in ([*report, *choosing] if (kind, steps) == tier.samplers[0] else report)
        for method in tier.methods
        if method != "ceiling" or concept in report
        for w in scales_of(model, method, kind)
    ]
    entries: list[Entry] = []
    outcomes: dict[tuple[str, int, str], list[Outcome]] = {}
    console = Console()
    bases = _Bases(model, tier.samples, separate, out / "runs")
    _share_out(model, plan, bases, out / "runs", console, "sweep")
    for job in plan:
        (concept,) = job.setting.concepts
        outcome = job.run(model, out / "runs")
        outcomes.setdefault((job.sampler, concept, job.method), []).append(outcome)
        entries.append(_entry(model, job.setting, job.method, job.scale, outcome, bases, concept in report))
    for setting in dict.fromkeys(job.setting for job in plan):
        entries += _references(model, setting, bases, setting.concepts[0] in report)
    points = operating_points(entries, model, choosing, tier.methods)
    if not choosing:
        points = recommended(model, tier.methods, (tier.final or tier.samplers[0])[0])
    final: list[Entry] = []
    if tier.final is not None:
        kind, steps, samples = tier.final
        settings = [Setting((concept,), kind, steps, samples, separate=separate) for concept in report]
        jobs = [_Job(setting, method, w) for setting in settings for method, w in points.items()]
        finals = _Bases(model, samples, separate, out / "runs")
        _share_out(model, jobs, finals, out / "runs", console, "operating points")
        for setting in settings:
            final += _references(model, setting, finals, True)
        for job in jobs:
            outcome = job.run(model, out / "runs")
            final.append(_entry(model, job.setting, job.method, job.scale, outcome, finals, True))
    if _rank()[0] == 0:
        panels = {}
        for kind, steps in tier.samplers:
            shown = points if choosing else recommended(model, tier.methods, kind)
            setting = Setting((report[0],), kind, steps, tier.samples, separate=separate)
            panels[sampler_name(setting)] = _panels(model, setting, shown, bases)
        leads = list(_leads(model, outcomes, bases, report, tier))
        sweep_report.write(
            out, model, entries, leads, points, final, panels, choosing=[model.classes[c] for c in choosing],
            tier=asdict(tier), separate=separate,
        )  # fmt: skip
        console.print((out / "summary.md").read_text(encoding="utf-8"), markup=False, highlight=False)


def _refuse_uncalibrated(model: Model, name: str, tier: Tier, concepts: Sequence[int], separate: bool) -> None:
    """Refuse DNG where it would run as the network leaves it, which nobody means by its name; once per kind."""
    commands: dict[str, str] = {}
    for kind, steps in [*tier.samplers, *([tier.final[:2]] if tier.final else [])]:
        key = calibrated_as(Setting((), kind, steps, separate=separate))
        if any(model.calibration(concept, key) is None for concept in concepts):
            words = ["diffsteer", "calibrate", name, "--scheduler", kind, "--steps", str(steps)]
            commands.setdefault(key, f"`{shlex.join([*words, *(['--separate'] if separate else [])])}`")
    if commands:
        raise UnsupportedError(
            f"{model.name} has no calibration of DNG for these samplers: run {' and '.join(commands.values())}, or "
            "name the other methods (--method np --method sld) or samplers (--sampler) alone"
        )


@dataclass(frozen=True)
class _Job:
    """One run of the plan."""

    setting: Setting
    method: str
    scale: float

    @property
    def sampler(self) -> str:
        return sampler_name(self.setting)

    def run(self, model: Model, store: Path) -> Outcome:
        method = method_for(model, self.method, self.setting, self.scale)
        return run(model, self.setting, method, store=store)


def sampler_name(setting: Setting) -> str:
    """ "ddpm-50"."""
    return f"{setting.scheduler}-{setting.steps}"


@dataclass(frozen=True)
class _Bases:
    """The unguided runs that everything is compared with."""

    model: Model
    samples: int
    separate: bool
    store: Path

    def _unguided(self, setting: Setting, samples: int, seed: int) -> Outcome:
        plain = Setting((), setting.scheduler, setting.steps, samples, seed, self.separate)
        return unguided(self.model, plain, store=self.store)

    def base(self, setting: Setting) -> Outcome:
        """Under the same seeds as the methods; the first samples, where a setting asks for fewer."""
        return _first(self._unguided(setting, self.samples, setting.seed), setting.samples)

    def target(self, setting: Setting) -> Outcome:
        """Under other seeds: its kept samples are the rejection set."""
        outcome = self._unguided(setting, TARGET_FACTOR * self.samples, setting.seed + 1)
        refuse_empty(self.model, outcome, setting.concepts)
        return outcome

    def conditional(self, setting: Setting) -> Outcome:
        """Every class asked for in turn, as many as in the target."""
        plain = Setting((), setting.scheduler, setting.steps, TARGET_FACTOR * self.samples, setting.seed)
        return conditional(self.model, plain, store=self.store)


def _first(outcome: Outcome, samples: int) -> Outcome:
    """The first samples of a run, for as large a share of its time."""
    labels, features = outcome.labels[:samples], outcome.features[:samples]
    images = None if outcome.images is None else outcome.images[:samples]
    seconds = outcome.seconds * len(labels) / len(outcome.labels)
    return replace(outcome, labels=labels, features=features, images=images, seconds=seconds, result=None)


def _rank() -> tuple[int, int]:
    """This process's number and how many there are."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


_WAIT = timedelta(days=7)


def _own_device(device: str) -> str:
    """Under ``torchrun``, another of a machine's GPUs for each process."""
    local = os.environ.get("LOCAL_RANK")
    return f"cuda:{int(local) % torch.cuda.device_count()}" if device == "cuda" and local else device


def _share_out(model: Model, plan: Sequence[_Job], bases: _Bases, store: Path, console: Console, title: str) -> None:
    """Make every run of the plan exist; each process makes its own share and waits for the others."""
    rank, world = _rank()
    settings = list({sampler_name(job.setting): job.setting for job in plan}.values())
    work: list[tuple[str, Callable[[], Any]]] = []
    for setting in settings:
        work += [(f"{sampler_name(setting)} unguided", partial(f, setting)) for f in (bases.base, bases.target)]
        if not setting.separate:
            work.append((f"{sampler_name(setting)} conditional", partial(bases.conditional, setting)))
    for job in plan:
        (concept,) = job.setting.concepts
        label = f"{job.sampler} {model.classes[concept]} {job.method} {job.scale:g}"
        work.append((label, partial(job.run, model, store)))
    with bars(console, disable=rank > 0) as progress:
        task = progress.add_task(title, total=len(work))
        for number, (label, do) in enumerate(work):
            progress.update(task, description=label)
            if number % world == rank:
                do()
            progress.advance(task)
    if world > 1:
        from accelerate import PartialState

        state = PartialState(cpu=True, timeout=_WAIT)  # they only meet; the first to finish may wait for hours
        if state.num_processes != world:
            raise UnsupportedError(f"{world} processes were started, but this one sees {state.num_processes}")
        state.wait_for_everyone()


def _entry(
    model: Model, setting: Setting, method: str, scale: float, outcome: Outcome, bases: _Bases, reported: bool
) -> Entry:
    text = f"{scale:g}" if scale else ""
    row = measure(model, setting, outcome, bases.target(setting), NAMES[method], text, bases.base(setting))
    return Entry(sampler_name(setting), model.classes[setting.concepts[0]], method, scale, reported, row)


def _references(model: Model, setting: Setting, bases: _Bases, reported: bool) -> list[Entry]:
    """The rows that need no method: unguided, the same with the forbidden thrown away, and the other classes alone."""
    base = bases.base(setting)
    named = {"unguided": base, "rejection": reject(base, setting.concepts)}
    if not setting.separate:
        others = asked_otherwise(model, bases.conditional(setting), setting.concepts)
        named["conditional"] = _first(others, setting.samples)
    return [_entry(model, setting, method, 0.0, outcome, bases, reported) for method, outcome in named.items()]


def _panels(model: Model, setting: Setting, points: Mapping[str, float], bases: _Bases) -> list[MethodPanel]:
    """The samples of every method at its operating point, or the swept scale next to it; the unguided ones first."""
    outcomes = {NAMES["unguided"]: bases.base(setting)}
    for method, scale in points.items():
        near = min(scales_of(model, method, setting.scheduler), key=lambda w: abs(w - scale))
        outcomes[f"{NAMES[method]} {near:g}"] = _Job(setting, method, near).run(model, bases.store)
    return [
        MethodPanel(
            label=label,
            images=outcome.pixels,
            forbidden=~outcome.kept(setting.concepts),
            class_shares=balance.class_shares(outcome.labels, len(model.classes)),
        )
        for label, outcome in outcomes.items()
        if outcome.images is not None
    ]


def operating_points(
    entries: Sequence[Entry], model: Model, choose: Sequence[int], methods: Sequence[str]
) -> dict[str, float]:
    """Per method the scale with the lowest mean KL among those close enough to the judge's floor.

    Read off the classes for choosing alone. Where no scale is safe enough, the safest.
    """
    names = [model.classes[c] for c in choose]
    margin = MARGINS.get(model.dataset, 0.01)
    points: dict[str, float] = {}
    for method in methods:
        scored: list[tuple[bool, float, float]] = []
        chosen = [e for e in entries if e.method == method and e.concept in names]
        for scale in sorted({e.scale for e in chosen}):
            rows = [e for e in chosen if e.scale == scale]
            excess = float(np.mean([e.row.forbidden_share - model.floor([e.concept]) for e in rows]))
            kl = float(np.mean([e.row.kl_rejection or 0.0 for e in rows]))
            scored.append((excess > margin, kl if excess <= margin else excess, scale))
        if scored:
            points[method] = min(scored)[2]
    return points


def recommended(model: Model, methods: Sequence[str], scheduler: str) -> dict[str, float]:
    """Per method the scale that the model's folder recommends for a sampler."""
    one = Setting((0,), scheduler)
    return {method: float(getattr(method_for(model, method, one), "scale")) for method in methods}  # noqa: B009


def _leads(
    model: Model,
    outcomes: Mapping[tuple[str, int, str], list[Outcome]],
    bases: _Bases,
    report: Sequence[int],
    tier: Tier,
) -> Iterator[Lead]:
    """DNG's front against each baseline's, per reported concept and on average (resampled jointly).

    A concept that no unguided sample shows has none, and is no part of the average.
    """
    for kind, steps in tier.samplers:
        setting = Setting((), kind, steps, tier.samples, separate=bases.separate)
        sampler, target = sampler_name(setting), bases.target(setting)
        shown = [c for c in report if bool((target.labels == c).any())]
        for versus in (m for m in BASELINES if m in tier.methods and "dng" in tier.methods):
            for axis, compare in (("KL", _kl_lead), ("distance", _distance_lead)):
                each = {
                    c: compare(model, outcomes[sampler, c, "dng"], outcomes[sampler, c, versus], target, c)
                    for c in shown
                }
                for concept in report:
                    found = each.get(concept)
                    lead = (None, None) if found is None else (found[0], intervals.interval_of(*found))
                    yield Lead(sampler, model.classes[concept], versus, axis, *lead)
                if not shown:
                    continue
                mean = float(np.mean([difference for difference, _ in each.values()]))
                interval = intervals.interval_of(mean, np.mean([draws for _, draws in each.values()], axis=0))
                yield Lead(sampler, "mean", versus, axis, mean, interval)


def _kl_lead(
    model: Model, ours: Sequence[Outcome], theirs: Sequence[Outcome], target: Outcome, concept: int
) -> tuple[float, Any]:
    kept = [c for c in range(len(model.classes)) if c != concept]
    return fronts.hypervolume_difference(
        [o.labels for o in ours], [o.labels for o in theirs], target.labels, kept=kept, num_classes=len(model.classes)
    )


def _distance_lead(
    model: Model, ours: Sequence[Outcome], theirs: Sequence[Outcome], target: Outcome, concept: int
) -> tuple[float, Any]:
    """Shares and feature distances of every point, resampled by rows: row i is seed i in all of them."""
    points = [(o.features.double().numpy(), o.labels.numpy()) for o in (*ours, *theirs)]
    aside = (target.features.double().numpy(), target.labels.numpy())

    def difference(rows: Any, target_rows: Any, half_a_sample: Any) -> float:
        features, labels = (x[target_rows] for x in aside)
        rejection = features[labels != concept]
        base = max(float((labels == concept).mean()), 1 / len(labels))
        size = len(points[0][1])
        shares = [
            (float((y[rows] == concept).sum()) + n) / size for (_, y), n in zip(points, half_a_sample, strict=True)
        ]
        distances = [metrics.frechet_distance(x[rows], rejection) for x, _ in points]
        half = len(ours)
        a, b = (
            fronts.distance_hypervolume(shares[part], distances[part], size, base, _WORST)
            for part in (slice(half), slice(half, None))
        )
        return a - b

    rng = np.random.default_rng(0)
    sizes = len(points[0][1]), len(aside[1])
    # a count of 0 is not known to be 0: resampling adds to every count what fronts.hypervolume_difference does
    draws = [
        difference(*(rng.integers(n, size=n) for n in sizes), rng.poisson(0.5, len(points))) for _ in range(RESAMPLES)
    ]
    return difference(slice(None), slice(None), np.zeros(len(points))), np.array(draws)


_WORST = 100.0  # feature distance at which a point no longer counts


def bars(console: Console, disable: bool = False) -> Progress:
    return Progress(
        TextColumn("{task.description:<26}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=disable,
    )
