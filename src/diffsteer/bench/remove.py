"""``diffsteer remove``: the main job. One concept taken out of one model, every method under the same seeds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from diffsteer import zoo
from diffsteer.bench import metrics
from diffsteer.bench.removal import Outcome, Setting, measure, method_for, reject, run, unguided
from diffsteer.bench.removal import scheduler as run_scheduler
from diffsteer.bench.report import (
    MethodPanel,
    RemovalReport,
    check_writable,
    rich_table,
    rows_to_csv,
    rows_to_json,
    write_report,
)
from diffsteer.errors import ParameterError
from diffsteer.schedulers import SchedulerView

NAMES = {
    "unguided": "Unguided",
    "rejection": "Rejection",
    "np": "Negative prompting",
    "sld": "Safe latent diffusion",
    "dng": "DNG",
    "ceiling": "DNG, classifier-driven",
}
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
    """Compare the removal methods on one model and write report.html, results.json and results.csv into ``out``.

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
    loaded = zoo.load(model, device=device)
    labels = tuple(loaded.label(c) for c in dict.fromkeys(concepts))
    if not 0 < len(labels) < len(loaded.classes):
        raise ParameterError(f"remove at least one of {loaded.classes}, and keep at least one")
    if samples < 16:
        raise ParameterError(f"{samples} samples measure nothing; use at least 16, better 256")
    out.mkdir(parents=True, exist_ok=True) if out.parent.exists() else None
    check_writable(out / "report.html")
    setting = Setting(labels, scheduler, steps, samples, seed)
    aside = replace(setting, seed=seed + 1, samples=3 * samples)

    outcomes: dict[str, Outcome] = {}
    with Progress(TextColumn("{task.description:<24}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()) as bars:
        evaluations = len(SchedulerView(run_scheduler(loaded, scheduler), steps).timesteps)

        def bar(name: str, size: int):  # noqa: ANN202
            task = bars.add_task(name, total=size * evaluations)
            return lambda done: bars.advance(task, done)

        target = unguided(loaded, aside, progress=bar("Rejection set", aside.samples))
        outcomes["unguided"] = unguided(loaded, setting, progress=bar(NAMES["unguided"], samples))
        outcomes["rejection"] = reject(outcomes["unguided"], labels)
        for name in _GUIDED:
            method = method_for(loaded, name, setting)
            outcomes[name] = run(loaded, setting, method, trace="full", progress=bar(NAMES[name], samples))

    rows = [measure(loaded, setting, outcome, target, NAMES[name], "") for name, outcome in outcomes.items()]
    panels = []
    for name, outcome in outcomes.items():
        if outcome.result is None:
            continue
        panels.append(
            MethodPanel(
                label=NAMES[name],
                images=outcome.result.samples,
                forbidden=~outcome.kept(labels),
                class_shares=metrics.class_shares(outcome.labels, len(loaded.classes)),
                posterior=outcome.result.trace.get("posterior"),
                scale=outcome.result.trace.get("scale"),
            )
        )
    named = [loaded.classes[i] for i in labels]
    options = "".join(f" --concept {c}" for c in named)
    report = RemovalReport(
        title=f"{loaded.name} without {' and '.join(named)}",
        subtitle=f"{samples} samples per method, {steps} {scheduler.upper()} steps, the same seeds for all",
        model=loaded.name,
        concepts=named,
        classes=loaded.classes,
        floor=loaded.floor(labels),
        rows=rows,
        panels=panels,
        levels=outcomes["dng"].record["log_snr"][:-1],
        record={name: outcome.record for name, outcome in outcomes.items() if name != "rejection"},
        notes=[
            f"The rejection set, the target of the comparison, is {int(target.kept(labels).sum())} unguided samples "
            f"under other seeds that the judge does not call forbidden.",
            "The judge, the network behind the feature distance and the guidance never share weights. "
            "Feature distances of few samples are biased upward, alike for all rows but rejection, which has fewer.",
        ],
        command=f"diffsteer remove {model}{options} --samples {samples} --steps {steps} "
        f"--scheduler {scheduler} --seed {seed}",
    )
    write_report(out / "report.html", report)
    (out / "results.json").write_text(rows_to_json(rows), encoding="utf-8")
    (out / "results.csv").write_text(rows_to_csv(rows), encoding="utf-8")
    console = Console()
    console.print(rich_table(report))
    console.print(f"Report: [bold]{out / 'report.html'}[/bold]", soft_wrap=True)
    return report
