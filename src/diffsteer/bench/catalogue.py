"""``diffsteer bench methods``: what each guidance method does to a small trained model, in one table for each task.

Every trial of :data:`diffsteer.bench.trials.TRIALS` runs at several scales under the same seeds. The question is the
direction that its paper claims; what is found stands beside it, made from the figures.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from rich.console import Console

from diffsteer import zoo
from diffsteer.bench import balance
from diffsteer.bench.findings import Line, finding
from diffsteer.bench.plots import draw_samples
from diffsteer.bench.prompted import Prompted
from diffsteer.bench.removal import Outcome
from diffsteer.bench.report import MethodPanel
from diffsteer.bench.self_consumed import self_consumed
from diffsteer.bench.sweep import bars
from diffsteer.bench.tasks import Bench
from diffsteer.bench.trials import TRIALS, method_of
from diffsteer.errors import ParameterError, UnknownNameError, UnsupportedError
from diffsteer.files import check_writable, write_figure, write_text
from diffsteer.train.loop import accelerator
from diffsteer.zoo import Model


def bench_methods(
    name: str = "digits", *, out: Path, samples: int = 1000, steps: int = 25, only: tuple[str, ...] = ()
) -> list[Line]:
    """Run every trial that is not there yet, and write methods.md, methods.json, a csv and a picture for each task.

    Parameters
    ----------
    name : str
        "digits", or the folder of a model of them: a weak network beside the denoiser is needed.
    samples, steps : int
        Of the classes' task; removal takes half as many samples and twice the steps.
    only : tuple of str
        Names of ``TRIALS``, or of methods; default all.

    Returns
    -------
    list of mapping
        "trial", "task", "scale" and the figures of each.

    Raises
    ------
    UnknownNameError
        There is no such trial.
    UnsupportedError
        The model has no weak network.
    """
    known = {*TRIALS, *map(method_of, TRIALS)}
    for wanted in only:
        if wanted not in known:
            raise UnknownNameError("trial", wanted, sorted(known))
    if samples < 20 or steps < 1:
        raise ParameterError(f"needs at least 20 samples and 1 step, got {samples} and {steps}")
    model = zoo.load_model(name)
    if not model.has("weak"):
        raise UnsupportedError(
            f"{name} has no weak network beside it, as only those of the digits have: take the shipped one, or a "
            "folder that `diffsteer train digits` wrote with all of its parts"
        )
    bench = Bench(model, samples, steps, out / "runs")
    check_writable(out / "methods.json")
    plan = [
        (key, w)
        for key, trial in TRIALS.items()
        if not only or key in only or method_of(key) in only
        for w in trial.scales
    ]
    tasks = [TRIALS[key].task for key, _ in plan]
    if any(isinstance(task, Prompted) for task in tasks):
        zoo.require_transformers()  # now, not in an hour
    if any(getattr(task, "networks", None) is self_consumed for task in tasks):
        accelerator()
    lines: list[Line] = []
    shown: list[Outcome] = []
    console = Console()
    with bars(console) as progress:
        bar = progress.add_task("methods", total=len(plan))
        for key, w in plan:
            progress.update(bar, description=f"{key} {w:g}")
            trial = TRIALS[key]
            outcome = trial.task.outcome(bench, trial.build(bench, w))
            figures = trial.task.values(bench, outcome)
            lines.append({"trial": key, "task": trial.task.name, "scale": w, **figures})
            shown.append(outcome)
            progress.advance(bar)
    _write(out, bench, lines)
    _draw_samples(out, bench.model, lines, shown)
    console.print((out / "methods.md").read_text(encoding="utf-8"), markup=False, highlight=False, soft_wrap=True)
    return lines


def suffix(task: str) -> str:
    """What distinguishes the files of a task's tables and pictures."""
    return "" if task == "classes" else f"-{task}"


def table(lines: Sequence[Line], named: bool = True) -> list[str]:
    """Lines of one task in Markdown, with the trials' names or without."""
    columns = TRIALS[lines[0]["trial"]].task.columns
    heads = [*(["method"] if named else []), "scale", *(column.title for column in columns)]
    rows = [
        [*([line["trial"]] if named else []), f"{line['scale']:g}", *(column.text(line, True) for column in columns)]
        for line in lines
    ]
    return [f"| {' | '.join(row)} |" for row in (heads, ["---"] * len(heads), *rows)]


def _write(out: Path, bench: Bench, lines: Sequence[Line]) -> None:
    of = {key: [line for line in lines if line["trial"] == key] for key in TRIALS}
    findings = {key: finding(TRIALS[key], own, of.get(TRIALS[key].versus, [])) for key, own in of.items() if own}
    tasks = {TRIALS[key].task.name: TRIALS[key].task.about(bench) for key in findings}
    subjects = {TRIALS[key].task.name: TRIALS[key].task.subject(bench) for key in findings}
    record = {
        "model": bench.model.name, "fingerprint": bench.model.fingerprint, "samples": bench.samples,
        "steps": bench.steps, "tasks": tasks, "subjects": subjects, "lines": lines, "findings": findings,
    }  # fmt: skip
    write_text(out / "methods.json", json.dumps(record, indent=1) + "\n")
    text = []
    for name, about in tasks.items():
        mine = [line for line in lines if line["task"] == name]
        text += [f"### {name.capitalize()}: {about}", "", *table(mine), ""]
        text += [f"- `{key}`: {found}" for key, found in findings.items() if TRIALS[key].task.name == name] + [""]
        rows = [",".join(mine[0]), *(",".join(map(str, line.values())) for line in mine)]
        write_text(out / f"methods{suffix(name)}.csv", "\n".join(rows) + "\n")
        _draw(out / f"methods{suffix(name)}.png", mine)
    write_text(out / "methods.md", "\n".join(text))


def _draw_samples(out: Path, model: Model, lines: Sequence[Line], shown: Sequence[Outcome]) -> None:
    """A picture for each method and task: what it is compared with, at the nearest scale, then its own trials."""
    pairs = list(zip(lines, shown, strict=True))
    for method, task in dict.fromkeys((method_of(line["trial"]), line["task"]) for line in lines):
        own = [pair for pair in pairs if (method_of(pair[0]["trial"]), pair[0]["task"]) == (method, task)]
        beside = {TRIALS[line["trial"]].versus for line, _ in own}
        others = [pair for pair in pairs if pair[0]["trial"] in beside and method_of(pair[0]["trial"]) != method]
        scale = own[-1][0]["scale"]
        nearest = sorted(others, key=lambda pair: abs(pair[0]["scale"] - scale))[:1]
        panels = [
            MethodPanel(
                label=f"{line['trial']} {line['scale']:g}",
                images=outcome.pixels,
                forbidden=TRIALS[line["trial"]].task.framed(model, outcome),
                class_shares=balance.class_shares(outcome.labels, int(outcome.labels.max()) + 1),
            )
            for line, outcome in [*nearest, *own]
            if outcome.images is not None
        ]
        framed = TRIALS[own[0][0]["trial"]].task.wrong
        draw_samples(out / f"samples-{method}{suffix(task)}.png", panels, columns=10, framed=framed)


_AXES: Mapping[str, Sequence[tuple[str, str]]] = {
    "classes": (("recall", "distance"), ("saturation", "distance")),
    "removal": (("forbidden_share", "kl_rejection"), ("forbidden_share", "fd_rejection")),
    "prompts": (("faithful", "kl"), ("faithful", "undecided")),
    "negatives": (("forbidden_share", "kl"), ("forbidden_share", "undecided")),
    "few-steps": (("forbidden_share", "kl"), ("forbidden_share", "undecided")),
}  # of each task's picture, across and up
_LINEAR = ("prompts", "negatives", "few-steps")  # shares that are all of one size
_BLACK = ("cfg", "np", "np two", "cfg prompts", "np prompts")  # what the others are compared with


def _draw(path: Path, lines: Sequence[Line]) -> None:
    """One line per trial through its scales, in each of the task's two pictures; dotted where more is left out."""
    task = TRIALS[lines[0]["trial"]].task
    titles = {column.name: column.title for column in task.columns}
    keys = list(dict.fromkeys(line["trial"] for line in lines))
    colors = mpl.colormaps["turbo"](np.linspace(0.05, 0.95, max(2, len(keys))))
    with mpl.rc_context({"font.size": 8, "svg.hashsalt": "diffsteer"}):
        figure = Figure(figsize=(9.5, 5.5), layout="constrained")
        for axis, (across, up) in zip(figure.subplots(1, 2), _AXES[task.name], strict=True):
            for number, (key, color) in enumerate(zip(keys, colors, strict=False)):
                mine = [line for line in lines if line["trial"] == key]
                black, other = key in _BLACK, mine[0].get("without") != lines[0].get("without")
                axis.plot(
                    [_seen(line, across) for line in mine], [_seen(line, up) for line in mine], label=key,
                    color="black" if black else color, lw=2 if black else 1, ls=":" if other else "-",
                    marker="osD^v"[number % 5], ms=3,
                )  # fmt: skip
            axis.set(xlabel=titles[across], ylabel=titles[up], yscale="linear" if task.name in _LINEAR else "log")
            if across == "saturation":
                axis.set_xscale("symlog", linthresh=0.001)
                axis.set_xlim(left=-0.0001)
            if across == "forbidden_share" and task.name not in _LINEAR:
                axis.set_xscale("log")
            axis.grid(alpha=0.25, which="both", lw=0.4)
        handles, labels = figure.axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside right upper", frameon=False, fontsize=6.5)
        write_figure(path, figure, dpi=150)


def _seen(line: Line, name: str) -> float:
    """A figure, as far as so many samples can tell it from nothing."""
    value: float = line[name]
    return max(value, 0.5 / line["n"]) if name in ("forbidden_share", "kl_rejection", "undecided") else value


__all__ = ["bench_methods", "suffix", "table"]
