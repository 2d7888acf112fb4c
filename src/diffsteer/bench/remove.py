"""``diffsteer remove``: the main job. One concept taken out of one model, every method under the same seeds."""

from __future__ import annotations

import math
import shlex
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from diffsteer import zoo
from diffsteer.bench import balance
from diffsteer.bench.intervals import share_interval
from diffsteer.bench.plots import draw_samples
from diffsteer.bench.removal import NAMES, Outcome, Setting, measure, method_for, refuse_empty, reject, run, unguided
from diffsteer.bench.removal import scheduler as build
from diffsteer.bench.report import MethodPanel, RemovalReport
from diffsteer.bench.report_html import write_report
from diffsteer.bench.report_tables import rich_table, rows_to_csv, rows_to_json
from diffsteer.calibration import calibrate
from diffsteer.errors import ParameterError
from diffsteer.files import check_writable, write_text
from diffsteer.methods import DynamicNegativeGuidance
from diffsteer.schedulers import SchedulerView

_GUIDED = ("np", "sld", "dng")


def remove(
    model: str,
    concepts: Sequence[str],
    *,
    samples: int = 256,
    steps: int = 50,
    scheduler: str = "ddpm",
    seed: int = 0,
    out: Path = Path("."),
    device: str = "cpu",
) -> RemovalReport:
    """Compare the removal methods on one model; report.html, samples.png, results.json and results.csv go to ``out``.

    Parameters
    ----------
    model : str
        A shipped model or a folder.
    concepts : sequence of str
        Classes to remove; not all of them.
    samples, steps, scheduler, seed, device
        As in :func:`diffsteer.sample`; ``scheduler`` is one of ``diffsteer.bench.removal.SCHEDULERS``.

    Raises
    ------
    UnknownNameError, ParameterError, OutputError
        Before any work.
    """
    loaded = zoo.load_model(model, device=device)
    schedule = SchedulerView(build(loaded, scheduler), steps)
    labels = tuple(loaded.label(c) for c in dict.fromkeys(concepts))
    if not 0 < len(labels) < len(loaded.classes):
        raise ParameterError(f"remove at least one of {loaded.classes}, and keep at least one")
    if samples < 16:
        raise ParameterError(f"{samples} samples measure nothing; use at least 16, better 256")
    if seed < 0:
        raise ParameterError(f"seed must be at least 0, got {seed}")
    check_writable(out / "report.html")
    setting = Setting(labels, scheduler, steps, samples, seed)
    aside = replace(setting, seed=seed + 1, samples=3 * samples)

    outcomes: dict[str, Outcome] = {}
    notes: list[str] = []
    with Progress(TextColumn("{task.description:<24}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()) as bars:

        def bar(name: str, size: int) -> Callable[[int], None]:
            task = bars.add_task(name, total=size * len(schedule.timesteps))
            return lambda done: bars.advance(task, done)

        guides = {name: method_for(loaded, name, setting) for name in _GUIDED}
        dng = guides["dng"]
        if isinstance(dng, DynamicNegativeGuidance) and None in dng.calibrations:
            rollouts = math.ceil(max(500, 20 / min(dng.priors)))
            passes = 2 if schedule.stochastic == 0 else 1
            guides["dng"] = calibrate(
                loaded.denoiser(neg=labels), dng, scheduler=build(loaded, scheduler), steps=steps,
                num_rollouts=rollouts, seed=seed + 2, device=device, progress=bar("Calibrating DNG", passes * rollouts),
            )  # fmt: skip
            notes.append(f"DNG was calibrated on {rollouts} rollouts for this run; their cost is not in its row.")
        target = unguided(loaded, aside, progress=bar("Rejection set", aside.samples))
        refuse_empty(loaded, target, labels)
        outcomes["unguided"] = unguided(loaded, setting, progress=bar(NAMES["unguided"], samples))
        refuse_empty(loaded, outcomes["unguided"], labels)
        outcomes["rejection"] = reject(outcomes["unguided"], labels)
        for name, method in guides.items():
            outcomes[name] = run(loaded, setting, method, trace="full", progress=bar(NAMES[name], samples))

    rows = [
        measure(loaded, setting, outcome, target, NAMES[name], "", outcomes["unguided"])
        for name, outcome in outcomes.items()
    ]
    panels = []
    for name, outcome in outcomes.items():
        if outcome.result is None:
            continue
        panels.append(
            MethodPanel(
                label=NAMES[name],
                images=outcome.result.samples,
                forbidden=~outcome.kept(labels),
                class_shares=balance.class_shares(outcome.labels, len(loaded.classes)),
                posterior=outcome.result.trace.get("posterior"),
                scale=outcome.result.trace.get("scale"),
            )
        )
    named = [loaded.classes[i] for i in labels]
    command = ["diffsteer", "remove", model, *(word for c in named for word in ("--concept", c))]
    for name, value in (("samples", samples), ("steps", steps), ("scheduler", scheduler), ("seed", seed)):
        command += [f"--{name}", str(value)]
    command += [] if device == "cpu" else ["--device", device]
    report = RemovalReport(
        title=f"{loaded.name} without {' and '.join(named)}",
        subtitle=f"{samples} samples per method, {steps} {scheduler.upper()} steps, the same seeds for all",
        model=loaded.name,
        concepts=named,
        classes=loaded.classes,
        floor=loaded.floor(labels),
        floor_interval=share_interval(*loaded.floor_counts(labels)),
        rows=rows,
        panels=panels,
        levels=outcomes["dng"].record["log_snr"][:-1],
        target=_shares(loaded, target, labels),
        record={name: outcome.record for name, outcome in outcomes.items() if name != "rejection"},
        notes=[
            *notes,
            f"The rejection set, the target of the comparison, is {int(target.kept(labels).sum())} unguided samples "
            f"under other seeds that the judge does not call forbidden.",
            "The judge, the network behind the feature distance and the guidance never share weights. "
            "Feature distances of few samples are biased upward, alike for all rows but rejection, which has fewer.",
        ],
        command=shlex.join(command),
    )
    write_report(out / "report.html", report)
    write_text(out / "results.json", rows_to_json(rows))
    write_text(out / "results.csv", rows_to_csv(rows))
    draw_samples(out / "samples.png", panels)
    console = Console()
    console.print(rich_table(report))
    console.print(f"Report: [bold]{escape(str(out / 'report.html'))}[/bold]", soft_wrap=True)
    return report


def _shares(model: zoo.Model, target: Outcome, labels: Sequence[int]) -> list[float]:
    """Class shares of the rejection set, 0 for what is removed."""
    return balance.class_shares(target.labels[target.kept(labels)], len(model.classes)).tolist()
